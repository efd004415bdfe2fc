"""`growmerge import`: models of others, in forms of their own. It imports what it needs when it runs."""

import sys
from pathlib import Path

import click

from parallel.errors import InputError


@click.group(name="import")
def import_models() -> None:
    """Bring models that others have published in a form of their own: plain Hugging Face folders come out."""


def _list(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from growmerge.published import table

        click.echo(table())
        context.exit()


@import_models.command()
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--all", "everything", is_flag=True, help="All 21 published models of the Hub instead of SOURCEs.")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Name these, and stop.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder whose tokenizer goes with each SOURCE that has none.",
)
@click.option("--dtype", help="float32, bfloat16 or float16; the source's own by default.")
@click.option("--no-verify", is_flag=True, help="Do not compare logits.")
@click.option("--workers", type=int, help="Processes; by default as cores and memory allow.")
def hyperllama(
    sources: tuple[str, ...],
    out: Path,
    everything: bool,
    tokenizer: Path | None,
    dtype: str | None,
    no_verify: bool,
    workers: int | None,
) -> None:
    """Write the models of arXiv 2512.10772 as plain Llamas: each SOURCE to a folder of its name in OUT.

    SOURCE is a HyperLlama's folder, a step of a nanotron run, or ORGANISATION/NAME on the Hub, which is fetched. No
    code of it is run or kept. Exit code 1: a model's logits are not the published one's.
    """
    from growmerge.importing import Import, import_models
    from growmerge.published import ORGANISATION, PUBLISHED

    if bool(sources) == everything:
        raise InputError("import hyperllama: give SOURCEs or --all, not both; --list names what is published")
    names = [f"hub:{ORGANISATION}/{name}" for name in PUBLISHED] if everything else sources
    options = Import(out=out, dtype=dtype, tokenizer=tokenizer, verify=not no_verify, workers=workers)
    well = True
    for line, fine in import_models(names, options):
        click.echo(line, err=line.startswith("note: "))
        well = well and fine
    sys.exit(0 if well else 1)
