"""Verdicts of models side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

COMPARISONS = "comparisons.json"
"""Beside verdicts: what models' roles compare (`growmerge.retention`)."""
Z = 1.96
"""Standard errors on either side of a mean for 95 %: lm-eval gives these alone."""
STARS = {0.001: "***", 0.01: "**", 0.05: "*"}
"""How sure a difference is: its p, adjusted, is below the number."""
WIDEST = 10_000
"""Characters of a line."""
COLORS = {"better": "green", "worse": "red"}


def headline(task: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return a task's main number: what it is called, and it with its interval. Samples have none."""
    if "bits_per_byte" in task:
        return "bits per byte", task["bits_per_byte"]
    for name, called in (("sum", "accuracy"), ("per_token", "accuracy a token")):
        if name in task:
            return called, task[name]["macro"]
    if len(results := task.get("results", {})) == 1:
        (found,) = results.values()
        for metric, called in (("acc,none", "accuracy"), ("bits_per_byte,none", "bits per byte")):
            if metric in found:
                value, error = found[metric], found.get(metric.replace(",", "_stderr,"))
                spread = Z * error if isinstance(error, float) else None
                low, high = (None, None) if spread is None else (value - spread, value + spread)
                return called, {"value": value, "low": low, "high": high}
    return None


def print_table(verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Print models by tasks; tasks are the rows where there are more of them."""
    tasks = {name: task for verdict in verdicts for name, task in verdict["tasks"].items() if headline(task)}
    names = [verdict["model"]["name"] for verdict in verdicts]
    units = {name: found[0] for name, task in tasks.items() if (found := headline(task))}
    cells = [
        [written(*found) if (found := headline(verdict["tasks"][name])) else "–" for name in tasks]
        for verdict in verdicts
    ]
    across = len(tasks) > len(names)
    table = Table(box=box.SIMPLE_HEAD)
    heads = ["task", "", *names] if across else ["model", *(f"{name}\n{unit}" for name, unit in units.items())]
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number > across else "left", no_wrap=True)
    if across:
        for (name, unit), *row in zip(units.items(), *cells, strict=True):
            table.add_row(name, unit, *row)
    else:
        for name, row in zip(names, cells, strict=True):
            table.add_row(name, *row)
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table as wide as it is: a number that is cut is none."""
    wide = Console(highlight=False, width=WIDEST)
    Console(highlight=False, width=wide.measure(table).maximum).print(table)


def written(called: str, number: Mapping[str, Any], *, sign: bool = False) -> str:
    """Return a number with its interval, accuracies in percent."""
    plus = "+" if sign else ""
    scale, form = (100, f"{{:{plus}.1f}}") if called.startswith("accuracy") else (1, f"{{:{plus}.3f}}")
    value, low, high = (number[key] for key in ("value", "low", "high"))
    found = form.format(scale * value)
    return found if low is None else f"{found} [{form.format(scale * low)}, {form.format(scale * high)}]"


def outcome(entry: Mapping[str, Any]) -> Text:
    """Return what is said of a difference, with stars for how sure it is, or why there is none."""
    said = entry.get("outcome")
    if said is None:
        return Text(entry.get("why", ""))
    stars = next((stars for level, stars in STARS.items() if entry["adjusted"] < level), "")
    return Text(f"{said} {stars}".strip(), COLORS.get(said, ""))
