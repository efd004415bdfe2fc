"""`growmerge stats ...`: statistics of a model on text, for merging. Its verbs import what they need when they run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_FOLDER = click.Path(path_type=Path)


@click.group()
def stats() -> None:
    """Count on text what Fisher-weighted averaging and RegMean need of a model; a killed pass goes on."""


def _pass(command: Callable[..., None]) -> Callable[..., None]:
    """Add what all passes know, named as in `growmerge.statistics.Pass`."""
    options = [
        click.argument("model", type=_FOLDER),
        click.argument("texts", type=_FOLDER, metavar="TEXT...", nargs=-1, required=True),
        click.argument("folder", type=_FOLDER, metavar="OUT"),
        click.option("--tokens", type=int, help="Tokens that are scored at most; all of the text by default."),
        click.option(
            "--sequence-length", type=int, help="Tokens of a window; 1024 or the model's positions by default."
        ),
        click.option("--every", type=int, default=20, show_default=True, help="Batches between saves."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@stats.command()
@_pass
@click.option(
    "--labels",
    type=click.Choice(["text", "sampled"]),
    default="text",
    show_default=True,
    help="Of the text itself (empirical Fisher), or drawn from the model (true Fisher).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides what is drawn.")
def fisher(**given: Any) -> None:
    """Write the diagonal Fisher of MODEL, of any format, on TEXT files (.txt, .jsonl) to OUT, a folder like a model's.

    It takes twice the memory of the model in float32.
    """
    from growmerge.statistics import Pass, make_statistics

    click.echo(make_statistics(Pass(statistic="fisher", **given)))


@stats.command()
@_pass
def gram(**given: Any) -> None:
    """Write the Gram matrices of the inputs of MODEL's linear layers on TEXT files (.txt, .jsonl) to OUT.

    For hidden size D, feed-forward size F and L layers OUT has about 4 L (3 D^2 + F^2) bytes, and the pass takes twice
    that in memory beside the model in float32.
    """
    from growmerge.statistics import Pass, make_statistics

    click.echo(make_statistics(Pass(statistic="gram", **given)))
