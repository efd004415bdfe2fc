"""Two models on the same items: their difference, and whether it is more than chance among all that are asked.

Accuracies by McNemar's exact test over all pairs, bits per byte by a paired bootstrap over documents, p adjusted for
the number of comparisons (Holm).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from checkpoint.files import inside
from eval.significance import Difference, accuracy_difference, bits_difference, holm
from growmerge.eval_rows import Kept
from growmerge.verdicts import headline
from parallel.errors import InputError

LEVEL = 0.05
"""A difference counts where its p, adjusted for all that are asked, is below this."""
FINE = 80
"""Resamples a comparison at least: p is never below 2 / resamples, and many times that would always be above LEVEL."""
MOST = 20_000
"""Resamples that FINE may come to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """What `growmerge eval`, or a pipeline, says of a model."""

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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against another one on a task."""

    task: str
    model: Verdict
    against: Verdict


Read = Callable[[Verdict, str], list[list[Any]]]


def judged(asked: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return for each comparison, as plain JSON, what the model has more than the other one.

    {"difference": {value, low, high}, "p", "items", "adjusted", "outcome"}: outcome is better, worse or not resolved,
    by p adjusted for all of them (Holm). The difference of an accuracy is that over all pairs. {"why"} where two
    verdicts cannot be compared.

    Raises:
        InputError: scores that are not there any more.
    """
    reasons = [_obstacle(one) for one in asked]
    resamples = min(FINE * reasons.count(None), MOST)
    read = lru_cache(maxsize=8)(Verdict.rows)  # the same few models are compared with, one task after the other
    found: list[dict[str, Any]] = [
        {"why": reason} if reason else _difference(one, read, resamples)
        for one, reason in zip(asked, reasons, strict=True)
    ]
    tested = [entry for entry in found if "p" in entry]
    for entry, p in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
        entry["adjusted"] = p
        good = entry.pop("good")
        entry["outcome"] = "not resolved" if p >= LEVEL else "better" if good else "worse"
    return found


def caption(entries: Iterable[Mapping[str, Any]]) -> str:
    """Return the line under a table of differences: what the stars mean."""
    count = sum(entry.get("adjusted") is not None for entry in entries)
    line = f"* p < 0.05, ** p < 0.01, *** p < 0.001; p is adjusted for all {count} differences (Holm)"
    lost = 2 * count / (MOST + 1) >= LEVEL
    return line + (": too many for any in bits per byte to be resolved, ask for fewer" if lost else "")


def unit(one: Comparison) -> str:
    """Return what a comparison's numbers are; empty where neither verdict has one."""
    shown = (headline(verdict.tasks[one.task]) for verdict in (one.model, one.against) if one.task in verdict.tasks)
    return next((found[0] for found in shown if found), "")


def _obstacle(one: Comparison) -> str | None:
    """Return why two verdicts cannot be compared on a task, if so."""
    for verdict in (one.model, one.against):
        if one.task not in verdict.tasks:
            return f"{verdict.name} was not asked"
    mine, theirs = one.model.tasks[one.task], one.against.tasks[one.task]
    if mine["data"] != theirs["data"]:
        return "other data or another window"
    if "results" in mine:
        return "lm-eval keeps no items"
    shown = headline(mine)
    if shown is None:
        return "no number"
    if shown[0] == "bits per byte":
        return "a single document" if mine["documents"] < 2 else None
    return "a single pair" if sum(kind["count"] for kind in _kinds(mine, shown[0]).values()) < 2 else None


def _kinds(task: Mapping[str, Any], called: str) -> Mapping[str, Any]:
    """Return the kinds of pairs that count: a sum is not fair to all."""
    return dict(task["sum" if called == "accuracy" else "per_token"]["phenomena"])


def _difference(one: Comparison, read: Read, resamples: int) -> dict[str, Any]:
    about, called = one.model.about, unit(one)
    mine, theirs = (read(verdict, one.task) for verdict in (one.model, one.against))
    how = {name: about[name] for name in ("resamples", "confidence", "seed")}
    result: Difference
    if called == "bits per byte":
        how["resamples"] = max(how["resamples"], resamples)
        size = [row[2] for row in theirs]
        result = bits_difference([row[1] for row in mine], [row[1] for row in theirs], size, **how)
    else:
        kinds, per_token = _kinds(one.model.tasks[one.task], called), called == "accuracy a token"
        right = (
            [
                good / good_tokens > bad / bad_tokens if per_token else good > bad
                for good, bad, good_tokens, bad_tokens, kind in rows
                if kind in kinds
            ]
            for rows in (mine, theirs)
        )
        result = accuracy_difference(*right, **how)
    good = (result.difference.value < 0) == (called == "bits per byte")
    return {"difference": asdict(result.difference), "p": result.p, "items": result.items, "good": good}
