"""The order of samples against counting: every epoch whole, every period exact, any access the same."""

import hashlib
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import InputError
from train.data.order import PERIOD, Mixture, largest_remainder, permute

MIXTURE = Mixture(names=("swe", "eng.first"), weights=(0.9, 0.1), sizes=(700, 41), seed=17)

GOLDEN = [("swe", 662, 0), ("swe", 472, 0), ("swe", 485, 0), ("eng.first", 13, 2), ("swe", 42, 158730)]
GOLDEN_PERMUTATION = [7, 1, 6, 4, 5, 3, 2, 0]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=5))
def test_permute_is_a_permutation(size: int, key: str) -> None:
    found = permute(np.arange(size), size, key)
    assert sorted(found.tolist()) == list(range(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert permute(some, size, key).tolist() == found[some].tolist()


def plain_permute(position: int, size: int, key: str) -> int:
    """The same network in Python's own integers, one position at a time."""

    def mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    digest = hashlib.blake2b(key.encode(), digest_size=48).digest()
    half = next(bits for bits in itertools.count(1) if 4**bits >= size)
    while True:
        left, right = divmod(position, 2**half)
        for at in range(0, 48, 8):
            step = mix((right + int.from_bytes(digest[at : at + 8], "little")) % 2**64) % 2**half
            left, right = right, left ^ step
        position = left * 2**half + right
        if position < size:
            return position


def test_permute_against_plain_integers() -> None:
    for size in (1, 2, 5, 16, 17, 1000, 2**31 - 1, 2**40 + 3, 2**62):
        positions = sorted({0, size // 3, size // 2, size - 1})
        expected = [plain_permute(position, size, "k") for position in positions]
        assert permute(np.array(positions), size, "k").tolist() == expected, size


def test_permute_spreads_evenly() -> None:
    """Each position of 8 goes everywhere about equally often: chi-square of 64 cells over 4,000 keys."""
    counts = Counter(
        (at, to) for key in range(4000) for at, to in enumerate(permute(np.arange(8), 8, str(key)).tolist())
    )
    statistic = sum((counts[at, to] - 500) ** 2 / 500 for at in range(8) for to in range(8))
    assert statistic < 49 + 6 * math.sqrt(2 * 49)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    seed=st.integers(0, 2**40),
)
def test_every_epoch_visits_every_sequence_once_and_in_turn(sizes: list[int], weights: list[float], seed: int) -> None:
    names = tuple("abc"[: len(sizes)])
    mixture = Mixture(names=names, weights=tuple(weights[: len(sizes)]), sizes=tuple(sizes), seed=seed)
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    last = dict.fromkeys(range(len(sizes)), 0)
    for corpus, sequence, epoch in zip(*(part.tolist() for part in mixture.samples(0, 2500)), strict=True):
        assert epoch in (last[corpus], last[corpus] + 1), "an epoch begins when the one before it has ended"
        last[corpus] = epoch
        seen[corpus, epoch].append(sequence)
    for (corpus, epoch), sequences in seen.items():
        assert len(set(sequences)) == len(sequences)
        if epoch < last[corpus]:
            assert sorted(sequences) == list(range(sizes[corpus]))


def test_periods_are_exact_and_shuffled_anew() -> None:
    corpus, _, _ = MIXTURE.samples(0, 3 * PERIOD)
    periods = corpus.reshape(3, PERIOD)
    assert [np.bincount(period).tolist() for period in periods] == [[900, 100]] * 3
    assert len({period.tobytes() for period in periods}) == 3
    assert all(60 < np.flatnonzero(period == 1)[:50].max() < 940 for period in periods), "spread over the period"


def test_epochs_and_corpora_have_orders_of_their_own() -> None:
    corpus, sequence, epoch = MIXTURE.samples(0, 2000)
    orders = [sequence[(corpus == 0) & (epoch == now)].tolist() for now in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    same_sizes = Mixture(names=("a", "b"), weights=(1, 1), sizes=(500, 500), seed=17)
    corpus, sequence, _ = same_sizes.samples(0, 1000)
    assert sequence[corpus == 0].tolist() != sequence[corpus == 1].tolist()
    alone = Mixture(names=("eng.first",), weights=(3,), sizes=(41,), seed=17)
    corpus, sequence, _ = MIXTURE.samples(0, 1000)
    assert alone.samples(0, 41)[1].tolist() == sequence[corpus == 1][:41].tolist(), "the rest of a mixture is no matter"


def test_random_access_equals_sequential() -> None:
    corpus, sequence, epoch = MIXTURE.samples(0, 4000)
    for number in (3999, 0, 255, 256, 999, 1000, 2047, 1):
        expected = (MIXTURE.names[corpus[number]], sequence[number], epoch[number])
        assert MIXTURE.sample(number) == expected
    parts = [MIXTURE.samples(start, start + 10) for start in range(985, 1025, 10)]
    for whole, pieces in zip((corpus, sequence, epoch), zip(*parts, strict=True), strict=True):
        assert np.concatenate(pieces).tolist() == whole[985:1025].tolist()
    assert [len(part) for part in MIXTURE.samples(7, 7)] == [0, 0, 0]


def test_seeds_differ() -> None:
    def order(seed: int) -> list[tuple[str, int, int]]:
        mixture = Mixture(names=("a", "b"), weights=(1, 1), sizes=(100, 100), seed=seed)
        return [mixture.sample(number) for number in range(50)]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert [MIXTURE.sample(number) for number in (0, 1, 2, 1000, 123_456_789)] == GOLDEN
    assert permute(np.arange(8), 8, "key").tolist() == GOLDEN_PERMUTATION


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(0, 4000))
def test_usage_counts_what_samples_gives(samples: int) -> None:
    counts = Counter(MIXTURE.samples(0, samples)[0].tolist())
    for which, (name, usage) in enumerate(MIXTURE.usage(samples, 128).items()):
        assert (name, usage.samples, usage.tokens) == (MIXTURE.names[which], counts[which], counts[which] * 128)
        assert usage.epochs == counts[which] / MIXTURE.sizes[which]


@given(weights=st.lists(st.floats(0.001, 10), min_size=1, max_size=6), total=st.integers(0, 2000))
def test_largest_remainder(weights: list[float], total: int) -> None:
    counts = largest_remainder(weights, total)
    assert sum(counts) == total
    exact = [weight / sum(weights) * total for weight in weights]
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    remainders = [(share - math.floor(share), count > share) for share, count in zip(exact, counts, strict=True)]
    for (low, raised), (high, also) in itertools.permutations(remainders, 2):
        assert not (raised and not also and low < high - 1e-6), "a larger remainder goes first"


def test_ties_go_to_the_first() -> None:
    assert largest_remainder([1, 1, 1], 1000) == (334, 333, 333)
    assert largest_remainder([0.45, 0.45, 0.1], 1000) == (450, 450, 100)


def test_wrong_mixtures() -> None:
    with pytest.raises(InputError, match="b holds no whole sequence: it needs more text, or a shorter sequence_length"):
        Mixture(names=("a", "b"), weights=(1, 1), sizes=(5, 0), seed=0)
    with pytest.raises(InputError, match=r"weight 0\.0001 of b is less than one sample in 1000"):
        Mixture(names=("a", "b"), weights=(1, 0.0001), sizes=(5, 5), seed=0)
    with pytest.raises(InputError, match=r"weight -1 of a mixture: it has to be a positive number"):
        Mixture(names=("a", "b"), weights=(1, -1), sizes=(5, 5), seed=0)
    with pytest.raises(InputError, match="2 names, 1 weights, 2 sizes"):
        Mixture(names=("a", "b"), weights=(1,), sizes=(5, 5), seed=0)
