"""Intervals: coverage in simulation, agreement with the delta method, pairing."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from eval.bootstrap import difference_interval, interval, ratio_interval
from parallel.errors import InputError


def documents(rng, count):
    """Documents of unequal length, cost about 2 bits a byte, two models that share most of their noise."""
    size = rng.integers(50, 400, size=count)
    shared = rng.normal(2.0, 0.3, size=count)
    a = size * (shared + rng.normal(0.00, 0.05, size=count))
    b = size * (shared + rng.normal(0.03, 0.05, size=count))
    return a, b, size


def test_coverage_of_ratio_and_difference():
    rng = np.random.Generator(np.random.Philox(11))
    ratio_hits = difference_hits = 0
    for seed in range(300):
        a, b, size = documents(rng, 80)
        ratio = ratio_interval(a, size, resamples=500, seed=seed)
        difference = difference_interval(a, b, size, resamples=500, seed=seed)
        ratio_hits += ratio.low <= 2.0 <= ratio.high
        difference_hits += difference.low <= -0.03 <= difference.high
    assert 0.90 <= ratio_hits / 300 <= 0.98
    assert 0.90 <= difference_hits / 300 <= 0.98


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_agrees_with_the_delta_method(confidence):
    a, _, size = documents(np.random.Generator(np.random.Philox(2)), 2000)
    found = ratio_interval(a, size, resamples=4000, confidence=confidence)
    ratio = a.sum() / size.sum()
    spread = math.sqrt(((a - ratio * size) ** 2).sum()) / size.sum()
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * spread
    assert found.value == pytest.approx(ratio, rel=1e-12)
    assert found.low == pytest.approx(ratio - half, abs=0.1 * half)
    assert found.high == pytest.approx(ratio + half, abs=0.1 * half)


def test_differences_are_paired():
    a, b, size = documents(np.random.Generator(np.random.Philox(3)), 200)
    paired = difference_interval(a, b, size)
    alone = ratio_interval(a, size)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    assert paired.value == pytest.approx((a.sum() - b.sum()) / size.sum())
    shifted = difference_interval(a + 0.1 * size, a, size)
    assert (shifted.low, shifted.high) == pytest.approx((0.1, 0.1)), "a constant difference has no width"


def test_a_difference_of_differences():
    a, b, size = documents(np.random.Generator(np.random.Philox(4)), 100)
    found = interval(
        {"a": a, "b": b, "c": a + 0.2 * size, "d": b, "bytes": size},
        lambda sums: ((sums["c"] - sums["d"]) - (sums["a"] - sums["b"])) / sums["bytes"],
    )
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))


def test_seeded_and_independent_of_the_blocks(monkeypatch):
    a, _, size = documents(np.random.Generator(np.random.Philox(5)), 50)
    first = ratio_interval(a, size, seed=1)
    assert ratio_interval(a, size, seed=1) == first
    assert ratio_interval(a, size, seed=2) != first
    monkeypatch.setattr("eval.bootstrap.BLOCK", 50 * 7)
    again = ratio_interval(a, size, seed=1)
    assert (again.value, again.low, again.high) == pytest.approx((first.value, first.low, first.high), rel=1e-12)


def test_too_few_documents_and_unequal_columns():
    with pytest.raises(InputError, match=r"^a bootstrap over 1 document\(s\) is not possible: at least 2 are needed$"):
        ratio_interval([1.0], [2])
    with pytest.raises(InputError, match=r"^columns of different numbers of documents: {'bits': 2, 'bytes': 3}$"):
        ratio_interval([1.0, 2.0], [2, 3, 4])
