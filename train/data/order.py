"""The order of samples: which sequence of which corpus sample i is, from (seed, i) alone.

Nothing is shuffled or stored: a keyed Feistel network permutes positions, so any sample is found in constant time and
memory, on any number of ranks, before or after a resume.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from parallel.errors import InputError

PERIOD = 1000
"""Samples in which every corpus gets exactly its share, unless a mixture says otherwise."""
LONGEST = 1_000_000
"""Samples of the longest period that `period_for` chooses: 6 MB and a fifth of a second each."""
ENOUGH = 50
"""Samples that the smallest share should have in a period: rounding them moves no share by more than 1 %."""
MOVED = 256
"""Samples by which one is moved at most in a long period."""
ROUNDS = 6
BLOCK = 256
"""Samples found at once, since single numbers are slow in numpy; the order does not depend on it."""


def mix(values: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser of each value (uint64): a bijection that looks random.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: np.ndarray, size: int, key: str) -> np.ndarray:
    """Return where a keyed permutation of range(size) sends each position (int64, any shape).

    A balanced Feistel network permutes the smallest range of 4**k that holds `size`; what lands outside `size` is
    permuted again until it is inside (cycle walking, Black and Rogaway 2002), which is fewer than 4 times on average.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found = np.asarray(positions).astype(np.uint64)
    assert found.size == 0 or found.max() < size, f"position {found.max()} of {size}"
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        found[outside] = (left << half) | right
        outside = found >= size
    return found.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a corpus gives to a run."""

    samples: int
    tokens: int
    epochs: float
    """How often its sequences are seen, on average."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A fixed random part of a corpus: the first sequences of a keyed permutation of the whole.

    It depends on the seed and the corpus alone, so that smaller parts lie within larger ones.
    """

    corpus: str
    whole: int
    """Sequences that the corpus has."""


class Order(Protocol):
    """What samples can be asked of: a `Mixture`, or mixtures in stages (`train.data.staged`)."""

    def __hash__(self) -> int: ...
    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """An endless stream of samples from several corpora.

    In every period of samples each corpus has exactly its share (largest remainder), at places shuffled anew;
    its sequences come in epochs, each in an order of its own that visits every sequence once.
    """

    names: tuple[str, ...]
    """The corpora; a corpus' order depends on its name and the seed, not on the rest of the mixture."""
    weights: tuple[float, ...]
    """Relative; they need not add up to 1."""
    sizes: tuple[int, ...]
    """Sequences a corpus has; of a part, those that are taken."""
    seed: int
    parts: tuple[Part | None, ...] = ()
    """What is a part of a corpus, and has a name of its own; none is by default."""
    period: int = PERIOD
    """Samples a period; a share of less than one sample in it is refused."""

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.weights) == len(self.sizes) > 0:
            raise InputError(
                f"a mixture needs a weight and a size a corpus: {len(self.names)} names, {len(self.weights)} weights, "
                f"{len(self.sizes)} sizes"
            )
        assert len(self.parts) in (0, len(self.names)), f"{len(self.parts)} parts of {len(self.names)}"
        for name, weight, size, count in zip(self.names, self.weights, self.sizes, self.counts, strict=True):
            if size < 1:
                raise InputError(f"{name} holds no whole sequence: it needs more text, or a shorter sequence_length")
            if count == 0:
                raise InputError(
                    f"weight {weight:g} of {name} is less than one sample in {self.period}: "
                    f"raise it or leave {name} out"
                )
        for name, part, size in zip(self.names, self.parts, self.sizes, strict=False):
            assert part is None or size <= part.whole, f"{name}: {size} sequences of {part.corpus}'s {part.whole}"

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each corpus in a period."""
        return largest_remainder(self.weights, self.period)

    @cached_property
    def corpora(self) -> tuple[str, ...]:
        """Which corpus each is read from: the name, but for parts."""
        parts = self.parts or (None,) * len(self.names)
        return tuple(part.corpus if part else name for name, part in zip(self.names, parts, strict=True))

    def sample(self, number: int) -> tuple[str, int, int]:
        """Return (corpus to read from, sequence, epoch) of a global sample number."""
        corpus, sequence, epoch = sample_at(self, number)
        return self.corpora[corpus], sequence, epoch

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (corpus number, sequence, epoch) of samples [start, stop), int64 each."""
        corpus, running = self.running(start, stop)
        return corpus, *self.draw(corpus, running)

    def draw(self, corpus: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sequence, epoch) of the samples that come after `running` others of their corpus, int64 each."""
        epoch, place = np.divmod(running, np.array(self.sizes)[corpus])
        sequence = np.empty_like(place)
        for which, now in {*zip(corpus.tolist(), epoch.tolist(), strict=True)}:
            here = (corpus == which) & (epoch == now)
            key = f"sequence/{self.seed}/{now}/{self.names[which]}"
            sequence[here] = permute(place[here], self.sizes[which], key)
            if self.parts and (part := self.parts[which]):
                sequence[here] = permute(sequence[here], part.whole, f"part/{self.seed}/{part.corpus}")
        return sequence, epoch

    def usage(self, samples: int, sequence_length: int) -> dict[str, Usage]:
        """Return what each corpus gives to the first `samples` samples; every sample is `sequence_length` tokens."""
        given = self.given(samples).tolist()
        return {
            name: Usage(samples=seen, tokens=seen * sequence_length, epochs=seen / size)
            for name, size, seen in zip(self.names, self.sizes, given, strict=True)
        }

    def given(self, samples: int) -> np.ndarray:
        """Return how many of the first `samples` samples are of each corpus, int64 [corpora], in constant time."""
        whole, rest = divmod(samples, self.period)
        table, _ = _period(self.counts, self.seed, whole)
        return whole * np.array(self.counts) + np.bincount(table[:rest], minlength=len(self.names))

    def running(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the corpus number of samples [start, stop), and how many of that corpus came before, int64 each."""
        corpora, running = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for period in range(start // self.period, -(-stop // self.period)):
            first = period * self.period
            part = slice(max(start - first, 0), stop - first)
            corpus, before = (table[part].astype(np.int64) for table in _period(self.counts, self.seed, period))
            corpora.append(corpus)
            running.append(before + period * np.array(self.counts)[corpus])
        return np.concatenate(corpora), np.concatenate(running)


def sample_at(order: Order, number: int) -> tuple[int, int, int]:
    """Return (corpus number, sequence, epoch) of a global sample number."""
    block, at = divmod(number, BLOCK)
    corpus, sequence, epoch = _block(order, block)
    return int(corpus[at]), int(sequence[at]), int(epoch[at])


@lru_cache(maxsize=8)
def _block(order: Order, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return order.samples(block * BLOCK, (block + 1) * BLOCK)


@lru_cache(maxsize=8)
def _period(counts: tuple[int, ...], seed: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the corpus of each sample of a period, and how many of the same corpus came before it in the period."""
    key = f"period/{seed}/{period}"
    if sum(counts) == PERIOD:
        corpus = np.searchsorted(np.cumsum(counts), permute(np.arange(PERIOD), PERIOD, key), side="right")
    else:
        corpus = _spread(counts, key)
    before = np.empty_like(corpus)
    for which, count in enumerate(counts):
        before[corpus == which] = np.arange(count)
    return corpus.astype(np.int16), before.astype(np.int32)


def _spread(counts: tuple[int, ...], key: str) -> np.ndarray:
    """Return the corpus of each sample of a long period: evenly spread, then shuffled among some hundred neighbours.

    Shuffled over all of it, a run much shorter than the period would have its shares by chance alone.
    """
    size = sum(counts)
    place = np.concatenate([(np.arange(count) + 0.5) * (size / count) for count in counts])
    start = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8).digest(), dtype="<u8").astype(np.uint64)
    moved = mix(np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start) >> np.uint64(11)
    order = np.argsort(place + moved.astype(np.float64) * (MOVED / 2**53), kind="stable")
    return np.repeat(np.arange(len(counts)), counts)[order]


def period_for(weights: Sequence[float]) -> int:
    """Return a period in which each corpus has samples enough: PERIOD, or more by tens where a share is small."""
    period = PERIOD
    while period < LONGEST and min(weights) / sum(weights) * period < ENOUGH:
        period *= 10
    return period


def largest_remainder(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Divide a whole number by weights: the floors, and one more for the largest remainders (the first of equals).

    Raises:
        InputError: a weight is not a positive number.
    """
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise InputError(f"weight {weight:g} of a mixture: it has to be a positive number")
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(share + 1e-9) for share in exact]
    most = sorted(range(len(exact)), key=lambda at: (round(counts[at] - exact[at], 9), at))
    for at in most[: total - sum(counts)]:
        counts[at] += 1
    return tuple(counts)
