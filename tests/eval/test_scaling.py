"""Curves and where they cross: against scipy, known laws, and by simulation."""

import math

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from eval.repeats import losses, spread
from eval.scaling import Curve, crossing, interpolate, overtaking, reaching
from parallel.errors import InputError

TOKENS = np.array([1, 2, 4, 8, 16, 32, 64.0]) * 1e6


def small(tokens):
    return 1.2 + 20 / tokens**0.22


def grown(tokens):
    """Behind until 19.15 million tokens; falls to the small one's last loss at 47.0 million."""
    return 1.0 + 28 / tokens**0.22


def root(gap):
    return brentq(gap, 1e5, 1e12)


def curve(values, at=TOKENS, draws=5):
    return Curve(at=at, losses=np.repeat(np.asarray(values, dtype=float)[None], 1 + draws, axis=0))


@pytest.mark.parametrize("points", [2, 3, 4, 7])
@pytest.mark.parametrize("rises", [True, False])
def test_interpolation_is_scipys(points, rises):
    rng = np.random.default_rng(points)
    x = np.cumsum(rng.uniform(0.1, 2, points))
    y = rng.normal(size=(40, points))
    if rises:
        y = np.sort(y, axis=1)
    places = np.linspace(x[0], x[-1], 101)
    assert np.allclose(interpolate(x, y, places), PchipInterpolator(x, y, axis=1)(places), rtol=0, atol=1e-12)


def test_a_curve_is_near_its_law_between_points_and_silent_beyond_them():
    found = curve(small(TOKENS))
    places = np.geomspace(TOKENS[0], TOKENS[-1], 300)
    assert np.abs(found(places) - small(places)).max() < 1e-3  # straight lines: 0.0026
    assert np.allclose(found(TOKENS), small(TOKENS))
    with pytest.raises(InputError, match=r"^the curve is asked at 1e\+06 to 6\.5e\+07; it was measured from 1e\+06 to"):
        found(np.array([1e6, 6.5e7]))
    assert (curve([2.0], at=TOKENS[:1])(TOKENS[:1]) == 2).all()


@pytest.mark.parametrize("at", [[2.0, 2.0], [2.0, 1.0], [0.0, 1.0], []])
def test_counts_have_to_rise(at):
    with pytest.raises(InputError, match=r"^a curve is at \[.*\]: counts have to be above 0 and rise$"):
        curve([1.0] * len(at), at=np.array(at))


def test_known_crossings():
    """At equal tokens, at equal FLOPs (three times as many a token), and at the other one's last loss."""
    a, b = curve(grown(TOKENS)), curve(small(TOKENS))
    found = overtaking(a, b)
    assert found.outcome == "gets ahead"
    assert (
        found.value == pytest.approx(root(lambda n: grown(n) - small(n)), rel=0.01) == pytest.approx(19.15e6, rel=0.01)
    )
    assert found.low == found.high == pytest.approx(found.value)
    assert (found.start, found.end) == pytest.approx((1e6, 64e6))
    assert found.shares == {"always ahead": 0, "gets ahead": 1, "falls behind": 0, "never ahead": 0}
    assert found.difference.value == pytest.approx(grown(64e6) - small(64e6))

    cheap = curve(small(TOKENS) + 0.12)
    dear = Curve(at=3 * TOKENS, losses=a.losses)
    expected = root(lambda flops: grown(flops / 3) - small(flops) - 0.12)
    found = overtaking(dear, cheap)
    assert (found.start, found.end) == pytest.approx((3e6, 64e6))
    assert found.value == pytest.approx(expected, rel=0.01)

    found = reaching(a, b.losses[:, -1])
    assert found.value == pytest.approx(root(lambda n: grown(n) - small(64e6)), rel=0.01)
    assert found.value < 64e6
    assert reaching(curve(grown(TOKENS) + 1), b.losses[:, -1]).outcome == "never ahead"


def test_outcomes_without_a_crossing():
    base = small(TOKENS)
    assert overtaking(curve(base - 0.1), curve(base)).outcome == "always ahead"
    never = overtaking(curve(base + 0.1), curve(base))
    assert (never.outcome, never.value, never.low, never.high) == ("never ahead", None, None, None)
    behind = overtaking(curve(small(TOKENS)), curve(grown(TOKENS)))
    assert behind.outcome == "falls behind"
    assert behind.value == pytest.approx(19.15e6, rel=0.01)
    assert behind.shares["falls behind"] == 1
    same = overtaking(curve(base), curve(base))
    assert (same.outcome, same.value, same.difference.value) == ("not resolved", None, 0)
    # Only from the last place on counts: it is ahead, behind and ahead again.
    zigzag = base + 0.1 * np.array([-1, -1, 1, 1, -1, -1, -1])
    found = overtaking(curve(zigzag), curve(base))
    assert found.outcome == "gets ahead"
    assert 8e6 < found.value < 16e6


def test_curves_that_nothing_was_measured_of_both():
    a, b = curve(small(TOKENS)), curve(small(TOKENS), at=100 * TOKENS)
    assert overtaking(a, b) is None
    assert overtaking(curve([2.0], at=TOKENS[:1]), a) is None
    assert reaching(curve([2.0], at=TOKENS[:1]), np.full(6, 2.5)).outcome == "always ahead"
    assert reaching(curve([2.0], at=TOKENS[:1]), np.full(6, 1.5)).outcome == "never ahead"


@pytest.mark.parametrize(
    ("ahead", "crosses", "outcome"), [(0, 100, "gets ahead"), (3, 97, "not resolved"), (98, 2, "always ahead")]
)
def test_an_interval_counts_rows_that_cross_nowhere(ahead, crosses, outcome):
    """Of 100 resamples, some are ahead throughout, others cross at 2, and the rest never get ahead."""
    grid = np.array([1.0, 4.0])
    rows = [[-1, -1]] * ahead + [[1, -1]] * crosses + [[1, 1]] * (100 - ahead - crosses)
    found = crossing(grid, np.array([[1.0, -1.0], *rows]), np.zeros((101, 2)), 0.95)
    assert found.outcome == outcome
    assert found.shares["always ahead"] == ahead / 100
    assert found.shares["gets ahead"] == crosses / 100
    if outcome == "gets ahead":
        assert found.value == found.low == found.high == pytest.approx(2)
    if outcome == "not resolved":  # below 2 nothing is known, above it all
        assert (found.low, found.high) == (None, pytest.approx(2))


def test_an_interval_is_the_percentiles_of_where_rows_cross():
    places = np.geomspace(2, 8, 199)  # percentiles 5 and 95 lie at 9.9 and 188.1: what is outside of them is taken
    grid = np.geomspace(1, 16, 400)
    gap = np.log(places)[:, None] - np.log(grid)
    found = crossing(grid, np.concatenate([gap[99:100], gap]), np.zeros((200, 400)), 0.9)
    assert (found.value, found.low, found.high) == pytest.approx((4, places[9], places[189]), rel=1e-6)


def simulated(seed, *, repeats, between, documents=80, noise=0.05, resamples=300):
    """Both setups' curves of a study: documents that differ far more than models do, and runs that differ by seed."""
    rng = np.random.default_rng([seed, 7])
    size, hard = rng.integers(50, 400, documents), rng.normal(0, 0.3, documents)

    def setup(law):
        runs = rng.normal(0, between, repeats)
        return [
            np.stack([size * (law(n) * math.exp(run) * (1 + hard) + rng.normal(0, noise, documents)) for run in runs])
            for n in TOKENS
        ]

    both = [setup(grown), setup(small)]
    known = spread((bits, size) for bits in both)
    how = {"between": known, "resamples": resamples, "seed": seed}
    return [Curve(at=TOKENS, losses=losses(bits, size, stream=i, **how)) for i, bits in enumerate(both)]


def share_covered(studies, **how):
    """How often the interval holds the true place, of crossing and of the last loss; ends that are open hold all."""
    true = (root(lambda n: grown(n) - small(n)), root(lambda n: grown(n) - small(TOKENS[-1])))
    held = np.zeros(2)
    resolved = 0
    for seed in range(studies):
        a, b = simulated(seed, **how)
        for i, found in enumerate((overtaking(a, b), reaching(a, b.losses[:, -1]))):
            wrong = found.outcome in ("always ahead", "never ahead", "falls behind")
            held[i] += not wrong and (found.low or 0) <= true[i] <= (found.high or math.inf)
            resolved += found.outcome == "gets ahead"
    return [*held / studies], resolved / studies / 2


def test_intervals_cover_smoke():
    held, resolved = share_covered(40, repeats=1, between=0.0)
    assert min(held) >= 0.85
    assert resolved > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("repeats", "between"), [(1, 0.0), (3, 0.004), (2, 0.002)])
def test_intervals_cover(repeats, between):
    """Of documents alone as often as they say; with few seeds, where Student's t makes them wide, at least so often."""
    held, resolved = share_covered(300, repeats=repeats, between=between)
    assert min(held) >= 0.92
    assert max(held) <= (0.98 if repeats == 1 else 1)
    assert resolved > 0.3


@pytest.mark.slow
def test_intervals_without_the_seeds_do_not_cover():
    """One run a setup, as if documents were all: what the report says of it."""
    held, _ = share_covered(200, repeats=1, between=0.01)
    assert max(held) < 0.8
