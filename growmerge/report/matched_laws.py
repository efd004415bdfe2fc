"""The scaling laws of a language's setups, and what they say beyond the token counts that were measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from eval.repeats import Spread
from eval.scaling import GRID, Crossing, crossing
from eval.scaling_law import Law, fit, obstacle, refit
from growmerge.report.study import Study

REACH = 4.0
"""A law is believed up to this many times beyond what was measured of both models, either way."""
REFITS = 400
"""Resamples that laws are fitted to, at most."""
DRAWN = 40
"""Points of a law's line."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """What was measured of a setup on a language, by token count (C)."""

    name: str
    parameters: int
    tokens: np.ndarray
    flops: np.ndarray
    """Of the adaptation alone [C]."""
    stages: Sequence[Sequence[str]]
    bits: Sequence[np.ndarray]
    """float64 [repeats, documents] each."""
    size: np.ndarray
    """Bytes of each document."""
    stream: int = 0
    """A number of its own."""
    losses: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """As `eval.repeats.losses` has them [1 + R, C]."""

    @property
    def rate(self) -> float:
        """FLOPs a token."""
        return float(self.flops[-1] / self.tokens[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """The law of some setups, or why there is none."""

    setups: tuple[str, ...]
    law: Law | None = None
    why: str | None = None

    def result(self, setups: Mapping[str, Setup], confidence: float) -> dict[str, Any]:
        """Return the law as plain JSON, with its line for each setup as far as it is believed."""
        about: dict[str, Any] = {"setups": [*self.setups], "why": self.why}
        if self.law is None:
            return about
        curves = {}
        for name in self.setups:
            tokens = setups[name].tokens
            grid = np.geomspace(tokens[0] / REACH, tokens[-1] * REACH, DRAWN)
            curves[name] = np.stack([grid, self.law.losses(setups[name].parameters, grid)[0]], axis=1).tolist()
        numbers = {name: asdict(found) for name, found in self.law.estimates(confidence).items()}
        return about | {"numbers": numbers, "curves": curves, "residuals": self.law.residuals.tolist()}


def fitted(study: Study, setups: Mapping[str, Setup]) -> list[Fitted]:
    """Return one law of all setups that differ in size alone, where those are enough; else one of each setup."""
    found = [family for family in _families(study, setups) if _fits(family)]
    together = {one.name for family in found for one in family}
    return [*map(_fitted, [*found, *([one] for name, one in setups.items() if name not in together)])]


def _families(study: Study, setups: Mapping[str, Setup]) -> Iterator[list[Setup]]:
    """Yield the setups grown before the last training in the source language, and those after it, with the small."""
    after = study.grown.index(study.late) if study.late in study.grown else len(study.grown)
    for grown in (study.grown[:after], study.grown[after:]):
        yield [setups[name] for name in (study.small, *grown) if name in setups]


def _fits(family: Sequence[Setup]) -> bool:
    sizes = [one.parameters for one in family]
    return len(family) > 1 and len({*sizes}) == len(sizes) and obstacle(*_places(family)) is None


def _places(setups: Sequence[Setup]) -> tuple[list[float], list[float]]:
    """Return parameters and tokens of the points of setups."""
    return [float(one.parameters) for one in setups for _ in one.tokens], [n for one in setups for n in one.tokens]


def _fitted(setups: Sequence[Setup]) -> Fitted:
    names, places = tuple(one.name for one in setups), _places(setups)
    if why := obstacle(*places):
        return Fitted(setups=names, why=f"not enough points: {why}")
    law = fit(*places, np.concatenate([one.losses[0] for one in setups]))
    if not law.determined:
        return Fitted(setups=names, why="the points do not say what the exponents are")
    return Fitted(setups=names, law=law)


def refitted(one: Fitted, setups: Mapping[str, Setup], points: Spread, seed: int) -> Fitted:
    """Return a law with its resamples: each point is moved as far as points lie from their laws, too."""
    if one.law is None:
        return one
    members = [setups[name] for name in one.setups]
    drawn = np.concatenate([setup.losses[1 : 1 + REFITS] for setup in members], axis=1)
    errors = points.errors((drawn.shape[1],), resamples=len(drawn), key=(seed, 2, members[-1].stream))
    return replace(one, law=refit(one.law, *_places(members), drawn, errors))


def by_law(first: Setup, second: Setup, laws: Sequence[Fitted], confidence: float) -> dict[str, Any]:
    """Return from where on a setup is ahead of another one by their laws, within REACH of what was measured of both.

    `tokens` and `flops` as measured curves have them, and `text`: the tokens of the small model's training at those
    FLOPs; `why` there is none of it.
    """
    pair = [[law for law in laws if one.name in law.setups] for one in (first, second)]
    both = [law for law in pair[0] if law in pair[1]]
    chosen = [both or of for of in pair]
    found: dict[str, Any] = {"why": next((of[0].why for of in chosen if of[0].why), None)}
    one, two = (of[0].law for of in chosen)
    if one is None or two is None:
        return found
    for axis, rates in (("tokens", (1.0, 1.0)), ("flops", (first.rate, second.rate))):
        start = max(getattr(setup, axis)[0] for setup in (first, second)) / REACH
        end = min(getattr(setup, axis)[-1] for setup in (first, second)) * REACH
        grid = np.geomspace(start, end, GRID)
        a, b = (
            law.losses(setup.parameters, grid / rate)
            for law, setup, rate in zip((one, two), (first, second), rates, strict=True)
        )
        found[axis] = plain(crossing(grid, a, b, confidence)) if start < end else None
    if found["flops"]:
        ends = ("value", "low", "high", "start", "end")
        found["text"] = {key: None if (at := found["flops"][key]) is None else at / second.rate for key in ends}
    return found


def plain(found: Crossing | None) -> dict[str, Any] | None:
    """Return a crossing as plain JSON."""
    return None if found is None else asdict(found)
