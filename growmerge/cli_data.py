"""`growmerge data ...`: verbs about text and token files. They import what they need when they run."""

from pathlib import Path

import click


@click.group()
def data() -> None:
    """Prepare corpora, and say what mixtures of them come to."""


@data.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes; by default what CONFIG says, or the machine's cores."
)
@click.option("--check", is_flag=True, help="Read every byte of what is there and compare checksums.")
def prepare(config: Path, workers: int | None, check: bool) -> None:
    """Make token files of the corpora in CONFIG that are not up to date; go on where a killed run stopped."""
    from growmerge.data import prepare_corpora

    prepare_corpora(config, workers=workers, check=check)


@data.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(config: Path, as_json: bool) -> None:
    """Print the tokens, epochs and steps that the mixtures in CONFIG come to."""
    from growmerge.data_plan import print_data_plan

    print_data_plan(config, as_json=as_json)
