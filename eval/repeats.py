"""Losses of several training runs on the same documents, over resamples of documents and of runs.

Every run scores the same documents: the two are crossed, not nested. So both are drawn, each by itself (Owen 2007, The
pigeonhole bootstrap, Annals of Applied Statistics 1:386): documents by multinomial counts, the same for all models, on
the mean over a model's repeats; and runs by their spread. Few runs are no sample to draw from: a bootstrap of two has
half the variance that it should have. So how much runs differ is taken from all repeats together, relative to the loss,
and the mean of a setup's runs is moved by Student's t with that many degrees of freedom.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.bootstrap import Column, resampled

Repeats = Sequence[np.ndarray]
"""A setup's bits by token count: float64 [repeats, documents] each."""
LARGEST = 3.0
"""Of the log of a factor: with one degree of freedom, t has no end."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A standard deviation of the log of losses, and from how many differences it is known."""

    value: float
    freedom: int

    def errors(self, shape: tuple[int, ...], *, resamples: int, key: Sequence[int]) -> np.ndarray:
        """Return normal errors [R, *shape] of a standard deviation that is itself uncertain: Student's t.

        In a resample the standard deviation is the same for all keys that differ in their last number alone.
        """
        common = _rng(*key[:-1]).chisquare(self.freedom, size=resamples)
        size = self.value * np.sqrt(self.freedom / common)
        return size.reshape(resamples, *(1 for _ in shape)) * _rng(*key).standard_normal((resamples, *shape))


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def spread(setups: Iterable[tuple[Repeats, Column]]) -> Spread | None:
    """Return how much runs differ that have the same setup, pooled over setups; None if none was repeated.

    Token counts of a run share its stable phase: they count as one difference, which is the careful choice.

    Args:
        setups: each one's bits, and the bytes of its documents.
    """
    squares, differences, freedom = 0.0, 0, 0
    for repeats, size in setups:
        for bits in repeats:
            logs = np.log(bits.sum(axis=1) / np.sum(size))
            squares += float(((logs - logs.mean()) ** 2).sum())
            differences += len(bits) - 1
        freedom += max(len(bits) for bits in repeats) - 1
    return Spread(value=float(np.sqrt(squares / differences)), freedom=freedom) if differences else None


def losses(
    repeats: Repeats, size: Column, *, between: Spread | None, resamples: int, seed: int, stream: int
) -> np.ndarray:
    """Return bits per byte by token count, [1 + R, C]: as measured in the first row, over resamples in the others.

    Args:
        repeats: bits by token count.
        size: bytes of each document.
        between: of runs; None where nothing was repeated: then resamples are of documents alone.
        stream: a number of the setup. Runs of different setups are drawn apart, though seeds may be the same: if that
            makes them alike, intervals of their differences are too wide and not too narrow. All token counts of a
            setup are moved together, as a run's branches share its stable phase; of all that branches can have in
            common, this moves a crossing of two curves most.

    Raises:
        InputError: fewer than 2 documents, or numbers of documents that differ.
    """
    columns = []
    for bits in repeats:
        value, values = resampled(
            {"bits": bits.mean(axis=0), "bytes": size},
            lambda sums: sums["bits"] / sums["bytes"],
            resamples=resamples,
            seed=seed,
        )
        columns.append(np.concatenate([[value], values]))
    found = np.stack(columns, axis=1)
    if between is not None:
        moved = between.errors((), resamples=resamples, key=(seed, 1, stream))
        counts = np.array([len(bits) for bits in repeats])
        found[1:] *= np.exp(np.clip(moved[:, None] / np.sqrt(counts), -LARGEST, LARGEST))
    return found
