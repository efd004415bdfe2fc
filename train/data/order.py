"""The order of samples: which sequence of which corpus sample i is, from (seed, i) alone.

Nothing is shuffled or stored: a keyed Feistel network permutes positions, so any sample is found in constant time and
memory, on any number of ranks, before or after a resume.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from parallel.errors import InputError

PERIOD = 1000
"""Samples in which every corpus gets exactly its share."""
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
class Mixture:
    """An endless stream of samples from several corpora.

    In every period of `PERIOD` samples each corpus has exactly its share (largest remainder), at places shuffled anew;
    its sequences come in epochs, each in an order of its own that visits every sequence once.
    """

    names: tuple[str, ...]
    """The corpora; a corpus' order depends on its name and the seed, not on the rest of the mixture."""
    weights: tuple[float, ...]
    """Relative; they need not add up to 1."""
    sizes: tuple[int, ...]
    """Sequences a corpus has."""
    seed: int

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.weights) == len(self.sizes) > 0:
            raise InputError(
                f"a mixture needs a weight and a size a corpus: {len(self.names)} names, {len(self.weights)} weights, "
                f"{len(self.sizes)} sizes"
            )
        for name, weight, size, count in zip(self.names, self.weights, self.sizes, self.counts, strict=True):
            if size < 1:
                raise InputError(f"{name} holds no whole sequence: it needs more text, or a shorter sequence_length")
            if count == 0:
                raise InputError(
                    f"weight {weight:g} of {name} is less than one sample in {PERIOD}: raise it or leave {name} out"
                )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each corpus in a period."""
        return largest_remainder(self.weights, PERIOD)

    def sample(self, number: int) -> tuple[str, int, int]:
        """Return (corpus, sequence, epoch) of a global sample number."""
        block, at = divmod(number, BLOCK)
        corpus, sequence, epoch = _block(self, block)
        return self.names[corpus[at]], int(sequence[at]), int(epoch[at])

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (corpus number, sequence, epoch) of samples [start, stop), int64 each."""
        corpus, running = self._running(start, stop)
        epoch, place = np.divmod(running, np.array(self.sizes)[corpus])
        sequence = np.empty_like(place)
        for which, now in {*zip(corpus.tolist(), epoch.tolist(), strict=True)}:
            here = (corpus == which) & (epoch == now)
            key = f"sequence/{self.seed}/{now}/{self.names[which]}"
            sequence[here] = permute(place[here], self.sizes[which], key)
        return corpus, sequence, epoch

    def usage(self, samples: int, sequence_length: int) -> dict[str, Usage]:
        """Return what each corpus gives to the first `samples` samples; every sample is `sequence_length` tokens."""
        whole, rest = divmod(samples, PERIOD)
        table, _ = _period(self.counts, self.seed, whole)
        last = np.bincount(table[:rest], minlength=len(self.names)).tolist()
        found = {}
        for name, size, count, more in zip(self.names, self.sizes, self.counts, last, strict=True):
            seen = whole * count + more
            found[name] = Usage(samples=seen, tokens=seen * sequence_length, epochs=seen / size)
        return found

    def _running(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each sample's corpus, and how many samples of that corpus came before it."""
        corpora, running = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for period in range(start // PERIOD, -(-stop // PERIOD)):
            part = slice(max(start - period * PERIOD, 0), stop - period * PERIOD)
            corpus, before = _period(self.counts, self.seed, period)
            corpora.append(corpus[part])
            running.append(before[part] + period * np.array(self.counts)[corpus[part]])
        return np.concatenate(corpora), np.concatenate(running)


@lru_cache(maxsize=8)
def _block(mixture: Mixture, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return mixture.samples(block * BLOCK, (block + 1) * BLOCK)


@lru_cache(maxsize=8)
def _period(counts: tuple[int, ...], seed: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the corpus of each sample of a period, and how many of the same corpus came before it in the period."""
    shuffled = permute(np.arange(PERIOD), PERIOD, f"period/{seed}/{period}")
    corpus = np.searchsorted(np.cumsum(counts), shuffled, side="right")
    before = np.empty_like(corpus)
    for which, count in enumerate(counts):
        before[corpus == which] = np.arange(count)
    return corpus, before


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
