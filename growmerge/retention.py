"""Forgetting of the source language against a base, and retention of the others after merging, by models' roles."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from checkpoint.files import read_json, write_json
from growmerge.paired import Comparison, Verdict, caption, judged, unit
from growmerge.roles import Roles
from growmerge.verdicts import COMPARISONS, outcome, print_whole, written

NUMBERS = ("value", "low", "high", "p", "adjusted", "outcome", "why")
Key = tuple[str, str, str, str]
"""Kind, task, model, and what it is compared with."""


def role_comparisons(verdicts: Mapping[str, Mapping[str, Any]], roles: Roles, folder: Path) -> list[dict[str, Any]]:
    """Return forgetting and retention: what each model has more than its base, and its specialised and joint models.

    Of every task of the source language each model against its setup's base; of every task of a language adapted to
    each further model against the setup's model specialised in it and against its joint one. Models without a verdict
    are left out.

    Args:
        verdicts: of `growmerge eval` or of a pipeline, by model.
        folder: from where the paths of their scores start.

    Returns:
        [{"kind": forgetting or retention, "task", "language", "unit", "model", "against", "value", "low", "high", "p",
        "adjusted", "outcome", "why"}], as `judged`: all from "value" to "outcome" are None where "why" is not.

    Raises:
        InputError: scores that are not there any more.
    """
    read = {name: Verdict(name=name, folder=folder, about=about) for name, about in verdicts.items()}
    tasks = {name: task["language"] for about in verdicts.values() for name, task in about["tasks"].items()}
    keys = [key for key in dict.fromkeys(_asked(tasks, roles)) if {key[2], key[3]} <= read.keys()]
    asked = [Comparison(task=task, model=read[model], against=read[other]) for _, task, model, other in keys]
    found = []
    for (kind, task, model, other), one, result in zip(keys, asked, judged(asked), strict=True):
        about = {
            "kind": kind,
            "task": task,
            "language": tasks[task],
            "unit": unit(one),
            "model": model,
            "against": other,
        }
        numbers = {**result, **result.get("difference", {})}
        found.append(about | {name: numbers.get(name) for name in NUMBERS})
    return found


def _asked(tasks: Mapping[str, str], roles: Roles) -> Iterator[Key]:
    """Yield what is compared, forgetting first; some of it twice."""
    for task, language in tasks.items():
        for setup in roles["setups"] if language == roles["source_language"] else ():
            for model in (*setup["specialised"].values(), setup["joint"], *setup["models"]):
                if model and setup["base"] not in (None, model):
                    yield "forgetting", task, model, setup["base"]
    for task, language in tasks.items():
        for setup in roles["setups"]:
            if language in setup["specialised"]:
                trained = (setup["base"], *setup["specialised"].values(), setup["joint"])
                for model in setup["models"]:
                    for other in (setup["specialised"][language], setup["joint"]):
                        if other and model not in trained:
                            yield "retention", task, model, other


def compare_roles(folder: Path, names: Sequence[str], roles: Roles) -> list[dict[str, Any]] | None:
    """Write `comparisons.json` beside the verdicts and return what it says; None while a model has no verdict.

    Of several that evaluate models side by side into one folder, the last one finds all verdicts there.

    Raises:
        InputError: as `role_comparisons`.
    """
    files = {name: folder / f"{name}.json" for name in names}
    if not all(path.is_file() for path in files.values()):
        return None
    found = role_comparisons({name: read_json(path) for name, path in files.items()}, roles, folder)
    write_json(folder / COMPARISONS, {"format": 1, "roles": roles, "comparisons": found})
    return found


def print_roles(found: Sequence[Mapping[str, Any]]) -> None:
    """Print a row a comparison."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "task", "model", "against", "difference", "p, adjusted", ""):
        table.add_column(column, no_wrap=True, justify="right" if column in ("difference", "p, adjusted") else "left")
    for one in found:
        task = f"{one['task']} ({one['unit']})" if one["unit"] else one["task"]
        change = written(one["unit"], one, sign=True) if one["value"] is not None else ""
        p = f"{one['adjusted']:.2g}" if one["adjusted"] is not None else ""
        table.add_row(one["kind"], task, one["model"], one["against"], change, p, outcome(one))
    print_whole(table)
    print(caption(found))
