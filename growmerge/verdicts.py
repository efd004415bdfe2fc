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
    """Print a row a model and a column a task."""
    tasks = {name: task for verdict in verdicts for name, task in verdict["tasks"].items() if headline(task)}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for name, task in tasks.items():
        found = headline(task)
        assert found is not None, name
        table.add_column(f"{name}\n{found[0]}", justify="right", no_wrap=True)
    for verdict in verdicts:
        row = [headline(verdict["tasks"][name]) for name in tasks]
        table.add_row(verdict["model"]["name"], *(written(*one) if one else "–" for one in row))
    Console(highlight=False, width=max(120, Console().width)).print(table)


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
