"""`growmerge tokenizer`: its verbs on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parallel.errors import InputError

if TYPE_CHECKING:
    from growmerge.vocabularies import Remodel

_FOLDER = click.Path(path_type=Path)


@click.group()
def tokenizer() -> None:
    """Measure tokenizers, give them tokens for new languages, and give models rows for new tokens."""


@tokenizer.command()
@click.argument("folder", metavar="TOKENIZER", type=_FOLDER)
@click.argument("texts", metavar="[NAME=]TEXT...", nargs=-1, required=True)
@click.option("--tokenizer", "others", type=_FOLDER, multiple=True, help="Another one, side by side; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(folder: Path, texts: tuple[str, ...], others: tuple[Path, ...], as_json: bool) -> None:
    """Say what TOKENIZER, a folder with a tokenizer.json, makes of TEXT files, one a language."""
    from growmerge.tokenizer_report import print_report

    print_report([folder, *others], texts, as_json=as_json)


def _remodelled(command: Callable[..., None]) -> Callable[..., None]:
    """Add what `extend` and `replace` know of a model's new rows, named as in `growmerge.vocabularies.Remodel`."""
    options = [
        click.option("--pad-to", "multiple", type=int, default=1, help="Pad the rows to a multiple, such as 64."),
        click.option("--heldout", type=_FOLDER, help="Text that the model is scored on, before and after."),
        click.option("--workers", type=int, help="Processes; by default as cores and memory allow."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@tokenizer.command()
@click.argument("folder", metavar="TOKENIZER", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.option("--text", "texts", type=_FOLDER, multiple=True, required=True, help="Text to learn from; repeatable.")
@click.option("--add", type=int, required=True, help="Number of new tokens.")
@click.option("--model", type=_FOLDER, help="A model with this tokenizer, of any format, that gets rows for them.")
@click.option("--out", "target", type=_FOLDER, help="Where that model goes.")
@_remodelled
def extend(
    folder: Path, out: Path, texts: tuple[Path, ...], add: int, model: Path | None, target: Path | None, **given: Any
) -> None:
    """Add new tokens, learned from text, to TOKENIZER and write it to OUT; old tokens keep their ids."""
    from growmerge.vocabularies import extend_tokenizer

    click.echo(extend_tokenizer(folder, out, texts, add, _remodel(model, target, given)))


def _remodel(model: Path | None, target: Path | None, given: dict[str, Any]) -> "Remodel | None":
    from growmerge.vocabularies import Remodel

    if model is None and target is None and given["heldout"] is None and given["multiple"] == 1:
        return None
    if model is None or target is None:
        raise InputError("--model, --out, --pad-to and --heldout are of a model: give both --model and --out, or none")
    return Remodel(model=model, folder=target, **given)


@tokenizer.command()
@click.argument("model", type=_FOLDER)
@click.argument("new_tokenizer", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.option("--old-tokenizer", type=_FOLDER, help="The model's tokenizer, if it is not in its folder.")
@_remodelled
def replace(model: Path, new_tokenizer: Path, out: Path, old_tokenizer: Path | None, **given: Any) -> None:
    """Write MODEL, of any format, to OUT with NEW_TOKENIZER: shared tokens keep their rows, new ones get means."""
    from growmerge.vocabularies import Remodel, replace_tokenizer

    click.echo(replace_tokenizer(Remodel(model=model, folder=out, **given), new_tokenizer, old_tokenizer))
