"""`growmerge compare`: models side by side, each against the first, with what differences are more than chance."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from checkpoint.files import inside, read_json
from eval.significance import Difference, accuracy_difference, bits_difference, holm
from growmerge.eval_rows import Kept
from growmerge.verdicts import headline, written
from parallel.errors import InputError, one_of

LEVEL = 0.05
"""A difference counts where its p, adjusted for all that are shown, is below this."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `growmerge eval` says of a model."""

    name: str
    folder: Path
    """What paths in it start from."""
    about: Mapping[str, Any]

    @property
    def tasks(self) -> Mapping[str, Any]:
        return dict(self.about["tasks"])

    def rows(self, task: str) -> list[list[Any]]:
        """Return the rows of a task, in the order of its items.

        Raises:
            InputError: they are not there any more, or not all.
        """
        found = Kept(inside(self.folder, self.tasks[task]["scores"])).rows
        count = self.tasks[task].get("documents", self.tasks[task].get("pairs"))
        if len(found) != count:
            raise InputError(f"{self.folder}: {task}: {len(found)} of {count} scores are there; evaluate it again")
        return found


def read_verdicts(places: Sequence[Path]) -> list[Verdict]:
    """Read verdicts: files, or folders of `growmerge eval` with all of theirs.

    Raises:
        InputError: a place that holds none, or fewer than two in all.
    """
    files: list[Path] = []
    for place in places:
        found = sorted(place.glob("*.json")) if place.is_dir() else [place]
        found = [path for path in found if "tasks" in read_json(path)]
        if not found:
            raise InputError(f"{place}: no verdict of growmerge eval is there")
        files += found
    stems = [path.stem for path in files]
    if len(files) < 2:
        raise InputError(f"{', '.join(map(str, places))}: one model alone; a comparison is of two or more")
    return [
        Verdict(
            name=path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}",
            folder=path.parent,
            about=read_json(path),
        )
        for path in files
    ]


def compare(places: Sequence[Path], *, base: str | None, tasks: Sequence[str]) -> dict[str, Any]:
    """Return every model's numbers and differences to the first one, or the one named, as plain JSON.

    {"base": name, "tasks": {task: {"unit", "models": {name: {"value", "low", "high", "difference": {value, low, high},
    "p", "adjusted", "outcome"}}}}}: outcome is better, worse or not resolved, by p adjusted for all of them (Holm). The
    value of an accuracy is the mean of its phenomena, its difference that over all pairs. A model that was not asked a
    task, or over other data, has no difference there and "why".

    Raises:
        InputError: as `read_verdicts`; a name that none of them has.
    """
    verdicts = read_verdicts(places)
    names = [verdict.name for verdict in verdicts]
    if base is not None and base not in names:
        raise InputError(one_of("model", base, names))
    first = verdicts[0] if base is None else verdicts[names.index(base)]
    known = [name for name, task in first.tasks.items() if headline(task)]
    for task in tasks:
        if task not in known:
            raise InputError(f"{first.name}: {one_of('task', task, known)}")
    found: dict[str, Any] = {}
    tested: list[dict[str, Any]] = []
    for task in tasks or known:
        called, number = headline(first.tasks[task]) or ("", {})
        models: dict[str, Any] = {first.name: dict(number)}
        for verdict in verdicts:
            if verdict is not first:
                entry = _against(first, verdict, task)
                models[verdict.name] = entry
                tested += [entry] if "p" in entry else []
        found[task] = {"unit": called, "models": models}
    for entry, p in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
        entry["adjusted"] = p
        good = entry.pop("good")
        entry["outcome"] = "not resolved" if p >= LEVEL else "better" if good else "worse"
    return {"base": first.name, "tasks": found}


def _against(first: Verdict, other: Verdict, task: str) -> dict[str, Any]:
    """Return a model's number, and its difference to that of the first with what it takes to judge it."""
    mine, theirs = other.tasks.get(task), first.tasks[task]
    if mine is None or (shown := headline(mine)) is None:
        return {"why": "not asked"}
    called, number = shown
    if mine["data"] != theirs["data"]:
        return {**number, "why": "other data or another window"}
    if "results" in mine:
        return {**number, "why": "lm-eval keeps no items"}
    if called == "bits per byte" and mine["documents"] < 2:
        return {**number, "why": "a single document"}
    kinds = mine.get("sum" if called == "accuracy" else "per_token", {}).get("phenomena", ())
    result = _difference(first.rows(task), other.rows(task), called, kinds, other.about)
    good = (result.difference.value < 0) == (called == "bits per byte")
    return {**number, "difference": asdict(result.difference), "p": result.p, "items": result.items, "good": good}


def _difference(
    first: Sequence[Sequence[Any]],
    other: Sequence[Sequence[Any]],
    called: str,
    kinds: Collection[str],
    about: Mapping[str, Any],
) -> Difference:
    how = {"resamples": about["resamples"], "confidence": about["confidence"], "seed": about["seed"]}
    if called == "bits per byte":
        size = [row[2] for row in first]
        return bits_difference([row[1] for row in other], [row[1] for row in first], size, **how)
    per_token = called == "accuracy a token"
    return accuracy_difference(_right(other, per_token, kinds), _right(first, per_token, kinds), **how)


def _right(rows: Sequence[Sequence[Any]], per_token: bool, kinds: Collection[str]) -> list[bool]:
    """Return whether each pair of some kinds is right: a sum is not fair to all."""
    return [
        good / good_tokens > bad / bad_tokens if per_token else good > bad
        for good, bad, good_tokens, bad_tokens, kind in rows
        if kind in kinds
    ]


def print_comparison(found: Mapping[str, Any]) -> None:
    """Print a row for each task and model."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("task", "model", "value", f"against {found['base']}", "p, adjusted", ""):
        table.add_column(column, no_wrap=True, justify="left" if column in ("task", "model", "") else "right")
    for task, about in found["tasks"].items():
        for name, entry in about["models"].items():
            value = written(about["unit"], entry) if "value" in entry else "–"
            change = written(about["unit"], entry["difference"], sign=True) if "difference" in entry else ""
            p = f"{entry['adjusted']:.2g}" if "adjusted" in entry else ""
            table.add_row(
                f"{task} ({about['unit']})", name, value, change, p, entry.get("outcome", entry.get("why", ""))
            )
        table.add_section()
    Console(highlight=False, width=max(140, Console().width)).print(table)
