"""The scaling law: known numbers come back, scipy finds nothing better, intervals cover."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber

from eval.repeats import Spread
from eval.scaling_law import DELTA, EXPONENTS, LEVELS, fit, obstacle, refit, scatter

COUNTS = np.array([1, 2, 4, 8, 16]) * 1e7
NUMBERS = {"E": 0.8, "A": 30.0, "a": 0.3, "B": 300.0, "b": 0.35}


def true(sizes, tokens):
    return NUMBERS["E"] + NUMBERS["A"] / sizes ** NUMBERS["a"] + NUMBERS["B"] / tokens ** NUMBERS["b"]


def points(sizes=(1e6, 4e6, 16e6), counts=COUNTS):
    return tuple(map(np.ravel, np.meshgrid(np.array(sizes), counts)))


def values(law):
    return {name: found.value for name, found in law.estimates().items()}


def test_known_numbers_of_the_whole_law_come_back():
    sizes, tokens = points()
    law = fit(sizes, tokens, true(sizes, tokens))
    assert values(law) == pytest.approx(NUMBERS, rel=1e-4)
    assert law.determined
    assert law.freedom == 10
    assert np.abs(law.residuals).max() < 1e-8
    assert law.losses(8e6, np.array([3e8])) == pytest.approx(true(8e6, 3e8), rel=1e-5)  # a size that is no point


def test_known_numbers_of_one_size_come_back():
    tokens = COUNTS[:4]
    law = fit([5e5] * 4, tokens, 1.3 + 90 / tokens**0.28)
    assert values(law) == pytest.approx({"E": 1.3, "B": 90, "b": 0.28}, rel=1e-4)
    assert (law.names, law.freedom) == (("E", "B", "b"), 1)


def test_one_wild_point_does_not_move_the_law():
    sizes, tokens = points()
    wild = true(sizes, tokens) * np.exp(np.random.default_rng(1).normal(0, 1e-4, len(sizes)))
    wild[3] *= 1.2
    law = fit(sizes, tokens, wild)
    assert values(law)["b"] == pytest.approx(0.35, abs=0.01)
    assert law.residuals[3] == pytest.approx(np.log(1.2), abs=0.01)


@pytest.mark.parametrize(("noise", "sizes"), [(0.002, (1e6,)), (0.02, (1e6,)), (0.002, (1e6, 4e6, 16e6))])
def test_scipy_finds_nothing_better(noise, sizes):
    """Hoffmann et al.'s objective, written anew, by L-BFGS from many places."""
    n, d = points(sizes)
    noisy = true(n, d) * np.exp(np.random.default_rng(2).normal(0, noise, len(n)))
    law = fit(n, d, noisy)
    x, y = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()

    def objective(numbers):
        e, *terms = numbers
        said = np.exp(e)
        for (level, power), of in zip(
            zip(terms[::2], terms[1::2], strict=True), [x, y][2 - len(terms) // 2 :], strict=True
        ):
            said = said + np.exp(level - power * of)
        return huber(DELTA, np.log(said) - np.log(noisy)).sum() / DELTA

    rng = np.random.default_rng(3)
    bounds = [LEVELS, *[LEVELS, EXPONENTS] * len(law.names[1::2])]
    starts = [[-0.3, *rng.uniform([-2, 0.1] * (len(bounds) // 2), [0, 1] * (len(bounds) // 2))] for _ in range(4)]
    best = min(minimize(objective, start, bounds=bounds, method="L-BFGS-B").fun for start in starts)
    assert objective(law.numbers[0]) <= best * (1 + 1e-6)
    assert objective(law.numbers[0]) > 0


@pytest.mark.parametrize(
    ("sizes", "counts", "why"),
    [
        ((1e6,), COUNTS[:3], "4 token counts are needed, 3 measured"),
        ((1e6,), COUNTS[:4], None),
        ((1e6, 4e6), COUNTS, "3 sizes, 3 token counts and 6 points are needed, 2, 5 and 10 measured"),
        ((1e6, 4e6, 16e6), COUNTS[:2], "3 sizes, 3 token counts and 6 points are needed, 3, 2 and 6 measured"),
        ((1e6, 4e6, 16e6), COUNTS[:3], None),
    ],
)
def test_what_a_law_needs(sizes, counts, why):
    n, d = points(sizes, counts)
    assert obstacle([*n], [*d]) == why
    if why:
        with pytest.raises(AssertionError, match=why):
            fit(n, d, np.ones(len(n)))


@pytest.mark.parametrize(
    "losses",
    [
        1 + 8 / (COUNTS / 1e7) ** 5,  # all is learnt at once
        np.full(5, 2.0),
        2 + 0.1 * np.log(COUNTS / 1e7),  # it gets worse
    ],
)
def test_points_that_say_nothing_of_exponents(losses):
    assert not fit([1e6] * 5, COUNTS, losses).determined


def test_scatter_is_pooled():
    laws = [fit([1e6] * 5, COUNTS, true(1e6, COUNTS) * np.exp(by * np.array([0, 1, -2, 1, 0]))) for by in (0.0, 0.01)]
    found = scatter(laws)
    assert found is not None
    assert found.freedom == 4
    assert found.value == pytest.approx(np.sqrt((laws[1].residuals ** 2).sum() / 4), rel=1e-3)
    assert scatter([]) is None


def covered(studies, *, noise):
    """How often the intervals of an exponent and of a loss beyond the points hold the true ones."""
    held = np.zeros(2)
    sizes = [1e6] * 5
    level = true(1e6, COUNTS)
    for seed in range(studies):
        rng = np.random.default_rng([seed, 5])
        noisy = level * np.exp(rng.normal(0, noise, len(level)))
        law = fit(sizes, COUNTS, noisy)
        known = scatter([law])
        errors = known.errors((5,), resamples=300, key=(seed, 2, 0))
        law = refit(law, sizes, COUNTS, np.repeat(noisy[None], 300, axis=0), errors)
        low, high = np.quantile(law.losses(1e6, np.array([5e8]))[1:, 0], [0.025, 0.975])
        exponent = law.estimates()["b"]
        held += (exponent.low <= 0.35 <= exponent.high, low <= true(1e6, 5e8) <= high)
    return held / studies


def test_intervals_cover_smoke():
    assert min(covered(12, noise=0.002)) >= 0.75


@pytest.mark.slow
def test_intervals_cover():
    assert min(covered(100, noise=0.002)) >= 0.9


def test_resamples_follow_the_losses_and_the_errors():
    sizes, tokens = points()
    level = true(sizes, tokens)
    law = fit(sizes, tokens, level)
    assert law.estimates()["b"].low == law.estimates()["b"].high, "no resamples, no width"
    twice = refit(law, sizes, tokens, np.stack([level, 2 * level]), np.zeros((2, len(level))))
    assert np.exp(twice.numbers[:, 0]) == pytest.approx([0.8, 0.8, 1.6], rel=1e-3)
    assert twice.losses(4e6, COUNTS)[2] == pytest.approx(2 * true(4e6, COUNTS), rel=1e-5)
    errors = Spread(value=0.005, freedom=10).errors((len(level),), resamples=200, key=(1, 2, 3))
    wide = refit(law, sizes, tokens, np.repeat(level[None], 200, axis=0), errors).estimates()["b"]
    assert wide.low < 0.34 < 0.36 < wide.high
