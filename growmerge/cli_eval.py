"""`growmerge eval` and `growmerge compare`. They import what they need when they run."""

import json
from pathlib import Path
from typing import Any

import click


@click.command("eval")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--model", "only", multiple=True, help="Evaluate this one of the file's models; may be given again.")
@click.option("--device", default="cpu", show_default=True, help="Where models run: cpu, cuda, cuda:1.")
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of a batch at most."
)
@click.option(
    "--export", is_flag=True, help="Only write the tasks as lm-evaluation-harness reads them, to OUT/lm_eval."
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
def evaluate(config: Path, folder: Path, export: bool, as_json: bool, **given: Any) -> None:
    """Score every model of the file CONFIG on every task of it; OUT gets each one's verdict, `<model>.json`.

    What is scored is kept in OUT: a killed run goes on, and nothing is scored twice. Under torchrun or srun the ranks
    share each task.
    """
    from growmerge.evaluating import Options, evaluate_file, export_file
    from growmerge.launched import join, launched
    from growmerge.verdicts import print_table
    from parallel.ranks import ALONE

    if export:
        for path in export_file(config, folder):
            click.echo(path)
        return
    place = launched()
    ranks = join(*place) if place else ALONE
    verdicts = []
    for verdict in evaluate_file(config, Options(folder=folder, **given), ranks):
        if not ranks.first:
            continue
        verdicts.append(verdict)
        for note in verdict["model"]["notes"]:
            click.echo(f"note: {verdict['model']['name']}: {note}", err=True)
    if as_json and ranks.first:
        click.echo(json.dumps(verdicts, ensure_ascii=False))
    elif ranks.first:
        print_table(verdicts)
    ranks.barrier()


@click.command()
@click.argument("places", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True, metavar="VERDICT...")
@click.option("--base", help="The model that the others are compared with; the first by default.")
@click.option("--task", "tasks", multiple=True, help="Compare on this one; may be given again. All by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(places: tuple[Path, ...], base: str | None, tasks: tuple[str, ...], as_json: bool) -> None:
    """Put models side by side, each against the first: VERDICT is a file of `growmerge eval`, or its folder with all.

    Accuracies by McNemar's exact test, bits per byte by a paired bootstrap; p is adjusted for all that is shown (Holm).
    """
    from growmerge.comparing import compare as compare_models
    from growmerge.comparing import print_comparison

    found = compare_models(places, base=base, tasks=tasks)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_comparison(found)
