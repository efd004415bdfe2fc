"""Values with intervals: weighted sums of bits per byte over held-out documents, and proportions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from eval.bootstrap import interval

Rows = Sequence[Sequence[Any]]
"""A document a row: id, bits, bytes, and possibly more."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """A factor times the bits per byte of some documents in a language."""

    factor: float
    language: str
    rows: Rows


Side = list[Term]
"""A weighted sum of bits per byte, such as the mean over two languages."""

Estimate = dict[str, Any]
"""`value` with the `low` and `high` end of its interval, None where it has none."""

NO_INTERVAL: Estimate = {"low": None, "high": None}

FEWEST = 10
"""Documents below which a bootstrap's interval is far too narrow: with 5, equal models differ in 20 % of cases."""

Estimator = Callable[[Side], Estimate]


def mean(sides: Iterable[Side | None]) -> Side | None:
    """Return the mean of sides; None if there is none or one is missing."""
    every = list(sides)
    known = [side for side in every if side is not None]
    if not every or len(known) < len(every):
        return None
    return [Term(factor=t.factor / len(known), language=t.language, rows=t.rows) for side in known for t in side]


def minus(a: Side | None, b: Side | None) -> Side | None:
    """Return a - b; None if one is missing."""
    if a is None or b is None:
        return None
    return [*a, *(Term(factor=-t.factor, language=t.language, rows=t.rows) for t in b)]


def estimator(*, resamples: int, confidence: float, seed: int) -> Estimator:
    """Return the function that turns a side into value, low and high by a bootstrap over documents.

    A document is drawn in all languages and for all models at once, so differences are paired. Documents of one id
    in several languages are translations of one another and are drawn together; where ids differ they stand alone.
    Too few documents (below FEWEST, or so few that a resample lacks a language) have none: low and high are None.
    """

    def estimate(side: Side) -> Estimate:
        columns = _columns(side)

        def total(sums: Mapping[str, Any]) -> Any:
            with np.errstate(invalid="ignore"):
                parts = [t.factor * sums[f"bits {i}"] / sums[f"bytes {t.language}"] for i, t in enumerate(side)]
            # What rounding leaves of equal models is no difference between them.
            return np.round(np.sum(parts, axis=0), 12) + 0.0

        value = float(total({name: column.sum() for name, column in columns.items()}))
        if len(columns["bits 0"]) < FEWEST:
            return {"value": value, **NO_INTERVAL}
        found = interval(columns, total, resamples=resamples, confidence=confidence, seed=seed)
        known = isfinite(found.low) and isfinite(found.high)
        return {"value": value, **({"low": found.low, "high": found.high} if known else NO_INTERVAL)}

    return estimate


def _columns(side: Side) -> dict[str, np.ndarray]:
    """Return the bits of each term and the bytes of each language, a number a document; 0 where it has none."""
    places: dict[Any, int] = {}
    for term in side:
        for row in term.rows:
            places.setdefault(row[0], len(places))
    columns: dict[str, np.ndarray] = {}
    for i, term in enumerate(side):
        at = [places[row[0]] for row in term.rows]
        bits, size = np.zeros((2, len(places)))
        bits[at] = [row[1] for row in term.rows]
        size[at] = [row[2] for row in term.rows]
        columns[f"bits {i}"] = bits
        known = columns.setdefault(f"bytes {term.language}", size)
        assert np.array_equal(known, size), f"scores of other documents in {term.language}"
    return columns


def wilson(correct: int, n: int, confidence: float) -> Estimate:
    """Return a proportion with Wilson's score interval (Wilson 1927, JASA 22:209)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"value": share, "low": centre - half, "high": centre + half}
