"""Runs that were repeated with other seeds: their spread, and what it does to intervals."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from eval.bootstrap import ratio_interval
from eval.repeats import Spread, losses, spread
from parallel.errors import InputError

SIZE = np.array([100.0, 200, 300, 400])


def repeats(*levels):
    """Bits of runs whose losses differ by these shares, at one token count."""
    return np.stack([SIZE * 2 * math.exp(level) for level in levels])


def test_spread_is_pooled_by_hand():
    setups = [
        ([repeats(-0.01, 0.01), repeats(0.0, 0.0)], SIZE),  # squares 0.0002 and 0
        ([repeats(-0.02, 0.0, 0.02)], SIZE),  # squares 0.0008
        ([repeats(0.5)], SIZE),
    ]
    found = spread(setups)
    assert found is not None
    assert found.value == pytest.approx(math.sqrt(0.001 / (1 + 1 + 2)))
    assert found.freedom == 1 + 2, "token counts of a run are one difference"
    assert spread(setups[2:]) is None


def test_alone_it_is_the_bootstrap_over_documents():
    rng = np.random.default_rng(1)
    size = rng.integers(50, 400, 60).astype(float)
    bits = size * rng.normal(2, 0.3, 60)
    found = losses([bits[None], 2 * bits[None]], size, between=None, resamples=500, seed=3, stream=7)
    assert found.shape == (501, 2)
    assert found[0] == pytest.approx([bits.sum() / size.sum(), 2 * bits.sum() / size.sum()])
    assert np.allclose(found[:, 1], 2 * found[:, 0], rtol=1e-12), "the same documents at every count"
    interval = ratio_interval(bits, size, resamples=500, seed=3)
    assert np.quantile(found[1:, 0], [0.025, 0.975]) == pytest.approx([interval.low, interval.high])


@pytest.mark.parametrize("runs", [2, 4])
def test_runs_alone_give_students_interval(runs):
    """Documents that are all alike: what is left is the textbook's interval of a mean of few."""
    levels = np.random.default_rng(runs).normal(0, 0.004, runs)
    bits = repeats(*levels)
    known = spread([([bits], SIZE)])
    found = np.log(losses([bits], SIZE, between=known, resamples=40_000, seed=1, stream=0)[:, 0])
    half = student.ppf(0.975, runs - 1) * levels.std(ddof=1) / math.sqrt(runs)
    low, high = np.quantile(found[1:], [0.025, 0.975])
    assert found[0] == pytest.approx(math.log(2) + levels.mean(), abs=1e-4)
    assert (found[0] - low, high - found[0]) == pytest.approx((half, half), rel=0.06)


def test_setups_move_apart_and_their_counts_together():
    known = Spread(value=0.01, freedom=8)
    line = [repeats(0.0, 0.0), repeats(0.3)]

    def moved(stream):
        found = np.log(losses(line, SIZE, between=known, resamples=4000, seed=1, stream=stream))
        return found[1:] - found[0]

    one, other = moved(0), moved(1)
    assert np.allclose(one[:, 1], one[:, 0] * math.sqrt(2)), "a mean of two moves less"
    assert abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 0.06
    # They share how large the standard deviation is: squares are alike.
    assert np.corrcoef(one[:, 0] ** 2, other[:, 0] ** 2)[0, 1] > 0.1
    assert np.array_equal(one, moved(0))


def test_one_difference_has_no_end_but_numbers_have():
    found = losses([repeats(0.0)], SIZE, between=Spread(value=5.0, freedom=1), resamples=2000, seed=1, stream=0)
    assert np.isfinite(found).all()
    assert (found > 0).all()


def test_too_few_documents():
    with pytest.raises(InputError, match=r"^a bootstrap over 1 document\(s\) is not possible: at least 2 are needed$"):
        losses([np.ones((1, 1))], [2.0], between=None, resamples=10, seed=1, stream=0)
