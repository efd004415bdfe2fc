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
    "--batch-tokens", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens of a batch at most."
)
@click.option(
    "--export", is_flag=True, help="Only write the tasks as lm-evaluation-harness reads them, to OUT/lm_eval."
)
@click.option("--json", "as_json", is_flag=True, help="Print verdicts and comparisons as JSON.")
def evaluate(config: Path, folder: Path, export: bool, as_json: bool, **given: Any) -> None:
    """Score every model of the file CONFIG on every task of it; OUT gets each one's verdict, `<model>.json`.

    What is scored is kept in OUT: a killed run goes on, and nothing is scored twice. Under torchrun or srun the ranks
    share each task. With `roles` in the file, OUT/comparisons.json is written when all models have verdicts.
    """
    from growmerge.evaluating import Options, evaluate_file, export_file
    from growmerge.launched import join, launched
    from growmerge.retention import compare_roles, print_roles
    from growmerge.roles import read_roles
    from growmerge.verdicts import print_table
    from parallel.ranks import ALONE

    if export:
        for path in export_file(config, folder):
            click.echo(path)
        return
    roles = read_roles(config)
    place = launched()
    ranks = join(*place) if place else ALONE
    verdicts = []
    for verdict in evaluate_file(config, Options(folder=folder, **given), ranks):
        if not ranks.first:
            continue
        verdicts.append(verdict)
        for note in verdict["model"]["notes"]:
            click.echo(f"note: {verdict['model']['name']}: {note}", err=True)
    if ranks.first:
        comparisons = compare_roles(folder, *roles) if roles else None
        if as_json:
            click.echo(json.dumps({"verdicts": verdicts, "comparisons": comparisons}, ensure_ascii=False))
        else:
            print_table(verdicts)
            if comparisons:
                print_roles(comparisons)
        if roles and comparisons is None:
            click.echo("note: comparisons follow when all models of the file have verdicts in OUT", err=True)
    ranks.barrier()


@click.command()
@click.argument("places", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True, metavar="PLACE...")
@click.option("--base", help="The model that all others are compared with; by default the first, or namesakes.")
@click.option("--task", "tasks", multiple=True, help="Compare on tasks of this name (a glob); may be given again.")
@click.option("--model", "models", multiple=True, help="Compare models of this name (a glob); may be given again.")
@click.option("--language", help="Compare on tasks of this language alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(places: tuple[Path, ...], as_json: bool, **given: Any) -> None:
    """Put models side by side: PLACE is a verdict of `growmerge eval`, its folder, or a workdir of `growmerge run`.

    Each model is compared with the first one, or, where places have models of the same names, with its namesake in the
    first place. Accuracies by McNemar's exact test, bits per byte by a paired bootstrap; p is adjusted for all that is
    shown (Holm).
    """
    from growmerge.comparing import Asked, print_comparison
    from growmerge.comparing import compare as compare_models

    found = compare_models(places, Asked(**given))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_comparison(found)
