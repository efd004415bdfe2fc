"""Mixtures one after the other: still any sample from its number alone, in constant time and memory."""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from train.data.order import Mixture, Part, Usage, sample_at


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A stream of samples whose mixture changes at given sample numbers.

    What a stage is mixed of follows from its own count of samples, which begins at its start. A corpus that a later
    stage names again goes on where it stood, in the middle of an epoch too and after stages without it: what it gave
    before is known in closed form (`Mixture.given`). It begins anew if its sequences or its part are others.
    """

    starts: tuple[int, ...]
    """Global sample number at which each stage begins: 0, then rising."""
    mixtures: tuple[Mixture, ...]
    """One a stage, all of one seed."""

    def __post_init__(self) -> None:
        rising = all(before < start for before, start in pairwise(self.starts))
        assert self.starts[:1] == (0,) and rising, f"stages start at {self.starts}"
        assert len(self.starts) == len(self.mixtures), f"{len(self.starts)} starts, {len(self.mixtures)} mixtures"
        assert len({mixture.seed for mixture in self.mixtures}) == 1, "stages of one run share a seed"

    @cached_property
    def streams(self) -> tuple[tuple[str, int, Part | None], ...]:
        """All that the stages draw from (name, sequences, part), in order of first use."""
        return tuple(dict.fromkeys(stream for mixture in self.mixtures for stream in _streams(mixture)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.streams)

    @cached_property
    def corpora(self) -> tuple[str, ...]:
        """Which corpus each stream is read from."""
        return tuple(part.corpus if part else name for name, _, part in self.streams)

    @cached_property
    def _numbers(self) -> tuple[np.ndarray, ...]:
        """By stage: the stream of each of its mixture's corpora."""
        number = {stream: at for at, stream in enumerate(self.streams)}
        return tuple(np.array([number[stream] for stream in _streams(mixture)]) for mixture in self.mixtures)

    @cached_property
    def _before(self) -> tuple[np.ndarray, ...]:
        """By stage: samples that each stream gave before it."""
        before = [np.zeros(len(self.streams), np.int64)]
        for stage in range(len(self.starts) - 1):
            given = self.mixtures[stage].given(self.starts[stage + 1] - self.starts[stage])
            before.append(before[-1].copy())
            before[-1][self._numbers[stage]] += given
        return tuple(before)

    def sample(self, number: int) -> tuple[str, int, int]:
        """Return (corpus to read from, sequence, epoch) of a global sample number."""
        stream, sequence, epoch = sample_at(self, number)
        return self.corpora[stream], sequence, epoch

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (stream number, sequence, epoch) of samples [start, stop), int64 each."""
        found = [(np.empty(0, np.int64),) * 3]
        for stage, first, last in self._pieces(start, stop):
            mixture, numbers = self.mixtures[stage], self._numbers[stage]
            corpus, running = mixture.running(first, last)
            sequence, epoch = mixture.draw(corpus, running + self._before[stage][numbers[corpus]])
            found.append((numbers[corpus], sequence, epoch))
        streams, sequences, epochs = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return streams, sequences, epochs

    def usage(self, samples: int, sequence_length: int) -> dict[str, Usage]:
        """Return what each name gives to the first `samples` samples; every sample is `sequence_length` tokens."""
        given: Counter[str] = Counter(dict.fromkeys(self.names, 0))
        epochs = dict.fromkeys(self.names, 0.0)
        if samples > 0:
            stage = bisect_right(self.starts, samples - 1) - 1
            counts = self._before[stage].copy()
            counts[self._numbers[stage]] += self.mixtures[stage].given(samples - self.starts[stage])
            for (name, size, _), count in zip(self.streams, counts.tolist(), strict=True):
                given[name] += count
                epochs[name] += count / size
        return {
            name: Usage(samples=given[name], tokens=given[name] * sequence_length, epochs=epochs[name])
            for name in given
        }

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Cut [start, stop) where stages begin: (stage, first and last of the stage's own numbers)."""
        pieces = []
        while start < stop:
            stage = bisect_right(self.starts, start) - 1
            end = min(stop, self.starts[stage + 1]) if stage + 1 < len(self.starts) else stop
            pieces.append((stage, start - self.starts[stage], end - self.starts[stage]))
            start = end
        return pieces


def _streams(mixture: Mixture) -> list[tuple[str, int, Part | None]]:
    parts = mixture.parts or (None,) * len(mixture.names)
    return list(zip(mixture.names, mixture.sizes, parts, strict=True))
