"""Alarms on held-out bits per byte: how far a language may rise above where the run started, and what happens then."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from parallel.errors import InputError, one_of

Action = Literal["warn", "stop", "branch"]
ACTIONS: dict[str, Action] = {action: action for action in get_args(Action)}
_RISE = re.compile(r"\+?\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<percent>%?)(?:\s+(?P<action>\w+))?")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How far a language's bits per byte may rise."""

    language: str
    rise: float
    """Bits per byte above the value at the run's start, or a share of it."""
    relative: bool = False
    """Whether `rise` is a share."""
    action: Action = "warn"
    """What is to happen: a line of warning, the run's end, or a decay branch from the last checkpoint below it."""

    def __str__(self) -> str:
        """Return the bound as it may be written: `+0.05` or `+5%`."""
        return f"+{100 * self.rise:g}%" if self.relative else f"+{self.rise:g}"


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A bound that is broken."""

    bound: Bound
    first: float
    """Bits per byte at the run's start."""
    now: float

    @property
    def text(self) -> str:
        """One line for a log."""
        rise = self.now - self.first
        share = f", {rise / self.first:+.1%}" if self.first else ""
        return (
            f"{self.bound.language}: {self.now:.4f} bits per byte held out, {rise:+.4f}{share} from {self.first:.4f} "
            f"at the run's start; the alarm is at {self.bound}"
        )


def parse_alarms(
    given: Mapping[str, object], languages: Iterable[str], *, action: Action = "warn"
) -> tuple[Bound, ...]:
    """Read alarms as a YAML file has them, such as `{eng: +0.05, swe: +5%, fin: +0.1 stop}`.

    Args:
        languages: those with held-out text.
        action: of alarms that name none.

    Raises:
        InputError: a language without held-out text, or something that is no rise.
    """
    known = list(languages)
    return tuple(_parse(language, value, known, action) for language, value in given.items())


def _parse(language: str, value: object, languages: Sequence[str], action: Action) -> Bound:
    if language not in languages:
        raise InputError(f"alarms: {one_of('language with held-out text', language, languages)}")
    # YAML reads +0.05 as a number and +5% as text.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return Bound(language=language, rise=float(value), action=action)
    found = _RISE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise InputError(
            f"alarms.{language}: {value!r} is no rise: write bits per byte (+0.05) or a share (+5%), and after it, if "
            f"you like, one of {', '.join(ACTIONS)}"
        )
    chosen = found["action"] or action
    if chosen not in ACTIONS:
        raise InputError(f"alarms.{language}: {one_of('action', chosen, ACTIONS)}")
    number, relative = float(found["number"]), bool(found["percent"])
    rise = number / 100 if relative else number
    return Bound(language=language, rise=rise, relative=relative, action=ACTIONS[chosen])


def check(alarms: Iterable[Bound], first: Mapping[str, float], now: Mapping[str, float]) -> list[Alarm]:
    """Return the alarms that are broken, in order; what is not a number breaks every bound.

    Args:
        first: bits per byte by language at the run's start (before its first step, wherever it was resumed since).
        now: the same now.
    """
    found = []
    for bound in alarms:
        before, after = first[bound.language], now[bound.language]
        limit = before * (1 + bound.rise) if bound.relative else before + bound.rise
        if not after <= limit:
            found.append(Alarm(bound=bound, first=before, now=after))
    return found


def bits_per_byte(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return held-out bits per byte by language from what `eval.evaluate.evaluate_model` returns.

    Languages without held-out text are left out.
    """
    found = {}
    for language, entry in evaluation.get("languages", {}).items():
        if size := sum(row[2] for row in entry["documents"]):
            found[language] = math.fsum(row[1] for row in entry["documents"]) / size
    return found
