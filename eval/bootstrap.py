"""Confidence intervals by resampling documents (percentile bootstrap; Efron 1979, Koehn 2004 for paired tests).

Every statistic here is a function of sums over documents, so a resample is a vector of multinomial counts and a
statistic of all resamples is one matrix product. The same seed and number of documents give the same resamples:
intervals of different models on the same documents are paired without further care.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from parallel.errors import InputError

Column = Sequence[float] | np.ndarray
Sums = Mapping[str, np.ndarray]
BLOCK = 1 << 24
"""Counts drawn at once (elements)."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


def interval(
    columns: Mapping[str, Column],
    statistic: Callable[[Sums], np.ndarray],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return a statistic of documents with its percentile interval; as `resampled`.

    Raises:
        InputError: the columns differ in length, or hold fewer than 2 documents.
    """
    return percentiles(*resampled(columns, statistic, resamples=resamples, seed=seed), confidence)


def percentiles(value: float, values: np.ndarray, confidence: float) -> Interval:
    """Return an estimate with the interval that its values over resamples give."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def resampled(
    columns: Mapping[str, Column], statistic: Callable[[Sums], np.ndarray], *, resamples: int, seed: int
) -> tuple[float, np.ndarray]:
    """Return a statistic of documents, and its values over resamples (float64 [R]).

    `columns` gives one number a document each, all in the same order; `statistic` maps their sums over documents
    (float64 [R], one a resample) to values [R]. Documents are resampled as a whole: a row of all columns at once.

    Raises:
        InputError: the columns differ in length, or hold fewer than 2 documents.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"columns of different numbers of documents: {lengths}")
    documents = next(iter(lengths.values()))
    if documents < 2:
        raise InputError(f"a bootstrap over {documents} document(s) is not possible: at least 2 are needed")
    table = np.stack([np.asarray(column, dtype=np.float64) for column in columns.values()], axis=1)  # [documents, k]
    drawn = _kept if resamples * documents <= BLOCK else _drawn
    sums = np.concatenate([counts @ table for counts in drawn(documents, resamples, seed)])  # [R, k]

    def evaluate(rows: np.ndarray) -> np.ndarray:
        return np.asarray(statistic({name: rows[:, at] for at, name in enumerate(columns)}))

    return float(evaluate(table.sum(axis=0)[None])[0]), evaluate(sums)


def _drawn(documents: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each document is in each resample [R, documents], a block of resamples at a time."""
    rng = np.random.Generator(np.random.Philox(seed))
    share = np.full(documents, 1 / documents)
    step = max(1, BLOCK // documents)
    for start in range(0, resamples, step):
        yield rng.multinomial(documents, share, size=min(step, resamples - start))


@lru_cache(maxsize=2)
def _kept(documents: int, resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    """Return what `_drawn` yields: to draw takes fifteen times as long as to use, and reports draw the same again."""
    return tuple(counts.astype(np.uint32) for counts in _drawn(documents, resamples, seed))


def ratio_interval(
    bits: Column, size: Column, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return bits per byte, sum(bits) / sum(bytes), of one model; `size` is each document's bytes."""
    return interval(
        {"bits": bits, "bytes": size},
        lambda sums: sums["bits"] / sums["bytes"],
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def difference_interval(
    bits_a: Column, bits_b: Column, size: Column, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return bits per byte of a minus those of b, on the same documents (paired): below 0 where a is better."""
    return interval(
        {"a": bits_a, "b": bits_b, "bytes": size},
        lambda sums: (sums["a"] - sums["b"]) / sums["bytes"],
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
