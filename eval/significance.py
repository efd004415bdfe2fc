"""Whether two models differ: paired tests on the same items, and their correction for many comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.bootstrap import Column, Interval, interval, percentiles, resampled


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A number of one model minus that of another, on the same items."""

    difference: Interval
    p: float
    """Of a difference at least so large if there were none (two-sided)."""
    items: int


def accuracy_difference(
    right: Sequence[bool], other: Sequence[bool], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Compare accuracies on the same pairs: McNemar's exact test, and a paired bootstrap of the difference.

    Raises:
        InputError: numbers of pairs that differ, or fewer than 2.
    """
    columns = {"a": np.asarray(right, dtype=float), "b": np.asarray(other, dtype=float), "n": np.ones(len(right))}
    found = interval(
        columns, lambda sums: (sums["a"] - sums["b"]) / sums["n"], resamples=resamples, confidence=confidence, seed=seed
    )
    alone = sum(one and not two for one, two in zip(right, other, strict=True))
    against = sum(two and not one for one, two in zip(right, other, strict=True))
    return Difference(difference=found, p=mcnemar(alone, against), items=len(right))


def mcnemar(alone: int, against: int) -> float:
    """Return the exact two-sided p of McNemar's test (McNemar 1947): a fair coin on the items that one alone has right.

    Args:
        alone: items that the first model has right and the second wrong.
        against: items the other way round.
    """
    count, fewer = alone + against, min(alone, against)
    tail = sum(math.comb(count, number) for number in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def bits_difference(
    bits: Column, other: Column, size: Column, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Compare bits per byte on the same documents by a paired bootstrap.

    p is twice the share of resamples on the other side of 0, with one more of them (Davison and Hinkley 1997, 4.2).

    Raises:
        InputError: numbers of documents that differ, or fewer than 2.
    """
    value, values = resampled(
        {"a": bits, "b": other, "bytes": size},
        lambda sums: (sums["a"] - sums["b"]) / sums["bytes"],
        resamples=resamples,
        seed=seed,
    )
    found = percentiles(value, values, confidence)
    beyond = min((values <= 0).sum(), (values >= 0).sum())
    return Difference(difference=found, p=min(1.0, 2 * (float(beyond) + 1) / (resamples + 1)), items=len(bits))


def holm(values: Sequence[float]) -> list[float]:
    """Return the p of each comparison, adjusted for their number: by chance alone, any is below 0.05 in 5 % of studies.

    Holm 1979, Scandinavian Journal of Statistics 6. Valid however the comparisons depend on one another.
    """
    adjusted = [0.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted
