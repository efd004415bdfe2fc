"""Tables of what models were asked: tasks, their phenomena, differences, tokenizers, samples."""

from collections.abc import Iterable, Mapping
from typing import Any

from growmerge.report.tables import NONE, Cell, Table, estimate, number, percent, rows


def shown(unit: str, found: Mapping[str, Any] | None, **also: Any) -> Cell:
    """Return a cell with a number in its unit: accuracies in percent."""
    return percent(found, **also) if unit.startswith("accuracy") else estimate(found, **also)


def unit_name(unit: str, of: str = "%") -> str:
    return f"{unit}, {of}" if unit.startswith("accuracy") else unit


def best_of(values: Iterable[float | None], less_is_better: bool) -> float | None:
    known = [value for value in values if value is not None]
    return None if not known else min(known) if less_is_better else max(known)


def tasks(results: Mapping[str, Any]) -> Table | None:
    """Every model by every task with intervals, tasks of a unit side by side; the best model of a task in bold."""
    asked = results.get("tasks") or []
    kinds = dict.fromkeys((task["unit"], task["less_is_better"]) for task in asked)
    # sorted() is stable: a unit's tasks keep their order.
    asked = sorted(asked, key=lambda task: [*kinds].index((task["unit"], task["less_is_better"])))
    names = dict.fromkeys(model for task in asked for model in task["values"])
    if not names:
        return None
    best = [best_of((found["value"] for found in task["values"].values()), task["less_is_better"]) for task in asked]
    columns = [
        [
            shown(task["unit"], found, best=found is not None and found["value"] == top)
            for found in map(task["values"].get, names)
        ]
        for task, top in zip(asked, best, strict=True)
    ]
    widths = {kind: sum((task["unit"], task["less_is_better"]) == kind for task in asked) for kind in kinds}
    groups = [
        (f"{unit_name(unit)}; {'less' if less else 'more'} is better", width) for (unit, less), width in widths.items()
    ]
    return Table(
        name="tasks",
        caption="Tasks: every model's numbers with their intervals; the best model of a task in bold",
        groups=[("", 1), *groups],
        columns=["model", *(task["name"] for task in asked)],
        rows=rows([name, *cells] for name, *cells in zip(names, *columns, strict=True)),
    )


def phenomena(results: Mapping[str, Any]) -> Table | None:
    """The parts of tasks by models, a row a part; the best model of each in bold."""
    asked = [task for task in results.get("tasks") or [] if task.get("parts")]
    names = dict.fromkeys(model for task in asked for model in task["parts"])
    found: list[list[str | Cell]] = []
    breaks = []
    for task in asked:
        breaks.append(len(found))
        for part in dict.fromkeys(part for parts in task["parts"].values() for part in parts):
            values = [task["parts"].get(name, {}).get(part) for name in names]
            top = best_of((one and one["value"] for one in values), task["less_is_better"])
            cells = [shown(task["unit"], one, best=one is not None and one["value"] == top) for one in values]
            found.append([part, task["name"], unit_name(task["unit"]), *cells])
    if not found:
        return None
    return Table(
        name="phenomena",
        caption="Phenomena: the parts of tasks, with their intervals; the best model of each in bold",
        columns=["phenomenon", "task", "unit", *names],
        rows=rows(found),
        breaks=frozenset(breaks),
        words=frozenset({0, 1, 2}),
    )


def comparisons(results: Mapping[str, Any]) -> Table | None:
    """Models against others on the same items, with what is more than chance."""
    asked = results.get("comparisons") or []
    found: list[list[str | Cell]] = [
        [
            one["model"], one["against"], one["task"], one["kind"], unit_name(one["unit"], "% points"),
            shown(one["unit"], one, sign=True), number(one["p"], ".2g"), number(one["adjusted"], ".2g"),
            one["outcome"] or one.get("why") or NONE,
        ]
        for one in asked
    ]  # fmt: skip
    if not found:
        return None
    columns = ["model", "against", "task", "kind", "unit", "difference", "p", "p, adjusted", "outcome"]
    return Table(
        name="comparisons",
        caption="Differences on the same items, model minus the one that it stands against; better and worse are "
        "differences whose adjusted p is small enough",
        columns=columns,
        rows=rows(found),
        breaks=frozenset(i for i in range(1, len(asked)) if asked[i]["kind"] != asked[i - 1]["kind"]),
        words=frozenset({0, 1, 2, 3, 4, 8}),
    )


def fertility(results: Mapping[str, Any]) -> list[Table]:
    """What the run's tokenizer, and those of evaluated models, make of text; models that are alike share a row."""
    own = results.get("tokenizer") or {}
    words, sizes = own.get("tokens_per_word") or {}, own.get("bytes_per_token") or {}
    found = [
        Table(
            name="tokenizer",
            caption="The run's tokenizer on held-out text",
            columns=["language", "tokens a word", "bytes a token"],
            rows=rows(
                [results["languages"].get(c, c), number(words.get(c), ".2f"), number(sizes.get(c), ".2f")]
                for c in dict.fromkeys([*words, *sizes])
            ),
        )
    ]
    asked = results.get("fertility") or []
    tasks = [*dict.fromkeys(one["task"] for one in asked)]
    by_model: dict[str, dict[tuple[str, str], Any]] = {}
    for one in asked:
        for key in ("tokens_per_word", "bytes_per_token"):
            by_model.setdefault(one["model"], {})[key, one["task"]] = one.get(key)
    alike: dict[tuple[Any, ...], list[str]] = {}
    places = [(key, task) for key in ("tokens_per_word", "bytes_per_token") for task in tasks]
    for model, values in by_model.items():
        alike.setdefault(tuple(map(values.get, places)), []).append(model)
    table = Table(
        name="fertility",
        caption="Tokenizers on the tasks' text; models with the same numbers share a row",
        groups=[("", 1), ("tokens a word", len(tasks)), ("bytes a token", len(tasks))],
        columns=["model", *tasks, *tasks],
        rows=rows([", ".join(names), *(number(value, ".2f") for value in key)] for key, names in alike.items()),
    )
    return [one for one in (*found, table) if one.rows]


def samples(results: Mapping[str, Any]) -> Table | None:
    """What models write after a prompt."""
    names = results["languages"]
    found = [
        [s["stage"], names.get(s["language"], s["language"]) or NONE, s["prompt"], s["text"]]
        for s in results.get("samples", [])
    ]
    columns = ["model", "language", "prompt", "text"]
    caption = "Text written by the models"
    table = Table(name="samples", caption=caption, columns=columns, rows=rows(found), words=frozenset(range(4)))
    return table if found else None
