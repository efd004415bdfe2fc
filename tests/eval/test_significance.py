"""Paired tests against scipy and by simulation; intervals cover what they say."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.pairs import Accuracy, macro, wilson
from eval.significance import accuracy_difference, bits_difference, holm, mcnemar


@pytest.mark.parametrize(("alone", "against"), [(1, 7), (7, 1), (0, 0), (5, 5), (40, 60), (0, 12), (500, 590)])
def test_mcnemar_is_a_fair_coin_on_what_differs(alone, against):
    expected = binomtest(alone, alone + against, 0.5).pvalue if alone + against else 1.0
    assert mcnemar(alone, against) == pytest.approx(expected, rel=1e-9)


def test_accuracies_of_the_same_pairs():
    right = [True] * 60 + [False] * 40
    other = [True] * 42 + [False] * 18 + [True] * 3 + [False] * 37
    found = accuracy_difference(right, other)
    assert found.difference.value == pytest.approx(0.15)
    assert found.difference.low > 0 and found.items == 100
    assert found.p == mcnemar(18, 3) == pytest.approx(binomtest(3, 21, 0.5).pvalue)
    turned = accuracy_difference(other, right)
    assert (turned.difference.value, turned.p) == (pytest.approx(-0.15), found.p)


def test_bits_of_the_same_documents():
    rng = np.random.Generator(np.random.Philox(1))
    size = rng.integers(200, 2000, size=80)
    base = size * rng.normal(1.5, 0.4, size=80)  # documents differ far more than models do
    better = base - size * rng.normal(0.02, 0.02, size=80)
    found = bits_difference(better, base, size)
    assert found.difference.value == pytest.approx(-(base - better).sum() / size.sum())
    assert found.difference.high < 0 and found.p == pytest.approx(2 / 2001)
    same = bits_difference(base, base, size)
    assert (same.difference.low, same.difference.high, same.p) == (0, 0, 1)


def test_what_is_said_to_differ_by_chance():
    """Of models that do not differ, 5 % come out as if they did, and no more."""
    rng = np.random.Generator(np.random.Philox(2))
    few, beyond, runs = 0, 0, 1000
    for run in range(runs):
        size = rng.integers(500, 1500, size=60)
        shared = rng.normal(1, 0.2, size=60)
        one, two = (size * (shared + rng.normal(0, 0.05, size=60)) for _ in range(2))
        beyond += bits_difference(one, two, size, resamples=500, seed=run).p < 0.05
        pairs = rng.random((2, 200)) < rng.beta(4, 2, size=200)
        few += mcnemar(int((pairs[0] & ~pairs[1]).sum()), int((pairs[1] & ~pairs[0]).sum())) < 0.05
    assert 0.02 < few / runs <= 0.065  # exact tests are careful
    assert 0.035 < beyond / runs < 0.075  # those of the bootstrap a little less so


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def part(correct, count):
    low, high = wilson(correct, count)
    return Accuracy(value=correct / count, low=low, high=high, correct=correct, ties=0, count=count)


def test_intervals_of_accuracies_cover_what_they_say():
    """95 % within 1.5: of one phenomenon, and of the mean of many, of unlike sizes."""
    rng = np.random.Generator(np.random.Philox(3))
    one = mean = 0
    runs = 4000
    for _ in range(runs):
        shares = rng.uniform(0.3, 0.97, size=12)
        counts = rng.integers(20, 400, size=12)
        parts = [part(int(rng.binomial(count, share)), int(count)) for share, count in zip(shares, counts, strict=True)]
        one += parts[0].low <= shares[0] <= parts[0].high
        value, low, high = macro(parts)
        assert value == pytest.approx(math.fsum(each.value for each in parts) / 12)
        mean += low <= shares.mean() <= high
    assert one / runs == pytest.approx(0.95, abs=0.015)
    assert mean / runs == pytest.approx(0.95, abs=0.015)


def test_a_macro_average_of_one_phenomenon_is_its_own():
    assert macro([part(30, 40)]) == pytest.approx((0.75, *wilson(30, 40)))
