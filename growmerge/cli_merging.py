"""`growmerge merge` and `growmerge sweep`. They import what they need when they run."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from growmerge.cli_targets import target_of, targets

MANY = 50_000
"""Objects between two looks for garbage: what is imported are hundreds of thousands, and none is."""


def _merging(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of commands that merge."""
    options = [
        click.option("--seed", type=int, help="Of methods that draw random numbers; the file's, or else 0."),
        click.option("--allow-unrelated", is_flag=True, help="Merge models known not to stem from the base, too."),
        click.option("--device", default="cpu", show_default=True, help="Where values are merged: cpu, cuda, cuda:1."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@targets
@_merging
@click.option(
    "--models",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder where the recipe's models are looked for first: org/name there as org/name, or as name.",
)
@click.option("--lenient", is_flag=True, help="Pass over keys that no recipe has.")
@click.option("--dry-run", is_flag=True, help="Check the recipe and its models, and stop.")
def merge(
    source: Path,
    seed: int | None,
    allow_unrelated: bool,
    device: str,
    models: Path | None,
    lenient: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Merge the models of the recipe SOURCE, mergekit's YAML unchanged, into the folder TARGET."""
    gc.set_threshold(MANY)
    from growmerge.merging import apply_file, merge_file

    target = target_of(given)
    applied, opened = apply_file(
        source, seed=seed, lenient=lenient, allow_unrelated=allow_unrelated, device=device, folder=models
    )
    for note in applied.merged.notes:
        click.echo(f"note: {note}", err=True)
    if dry_run:
        click.echo(f"{source}: nothing is wrong with it")
        return
    if applied.recipe.search is None:
        click.echo(merge_file(target, applied, opened))
        return
    from growmerge.searching import find_and_merge

    click.echo(find_and_merge(target, applied, opened))


@click.command()
@targets
@_merging
@click.option("--recipes", is_flag=True, help="Write each merge's recipe instead of the model.")
@click.option("--dry-run", is_flag=True, help="Check the spec and its models, list the merges, and stop.")
def sweep(
    source: Path, seed: int | None, allow_unrelated: bool, device: str, recipes: bool, dry_run: bool, **given: Any
) -> None:
    """Merge what the spec SOURCE asks for, subsets x methods x parameters, into TARGET; models are read once."""
    gc.set_threshold(MANY)
    from growmerge.sweeping import sweep_file

    target = target_of(given)
    lines = sweep_file(
        source,
        target,
        seed=seed,
        allow_unrelated=allow_unrelated,
        device=device,
        recipes_only=recipes,
        dry_run=dry_run,
    )
    for line in lines:
        click.echo(line, err=line.startswith("note: "))
