"""Where one model overtakes another as both see more tokens or spend more FLOPs, from losses at a few counts of them.

A curve runs through its measured points in the log of tokens or FLOPs, falling where they fall: a monotone piecewise
cubic (PCHIP; Fritsch and Butland 1984, SIAM J. Sci. Stat. Comput. 5:300). Straight lines would lie above a convex curve
everywhere but at its points, and two models are rarely measured at the same FLOPs. Nothing is said beyond the points.

C counts of tokens, R resamples, G places of a grid
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.bootstrap import Interval, percentiles
from parallel.errors import InputError

GRID = 128
"""Places between which two curves are taken for straight lines."""

Outcome = Literal["always ahead", "gets ahead", "falls behind", "never ahead", "not resolved"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Losses along tokens or FLOPs."""

    at: np.ndarray
    """Tokens or FLOPs: float64 [C], rising."""
    losses: np.ndarray
    """float64 [1 + R, C]: as measured in the first row, over resamples in the others, of the same resamples as those
    that it is compared with."""

    def __post_init__(self) -> None:
        if not len(self.at) or self.at[0] <= 0 or (np.diff(self.at) <= 0).any():
            raise InputError(f"a curve is at {[*self.at]}: counts have to be above 0 and rise")

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the losses at other places, [1 + R, G].

        Raises:
            InputError: a place outside of what was measured.
        """
        slack = 1e-9
        if places.min() < self.at[0] * (1 - slack) or places.max() > self.at[-1] * (1 + slack):
            raise InputError(
                f"the curve is asked at {places.min():g} to {places.max():g}; "
                f"it was measured from {self.at[0]:g} to {self.at[-1]:g}"
            )
        return interpolate(np.log(self.at), self.losses, np.log(places))


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """From where on one curve is below another. Ends that lie outside of what is known are None."""

    outcome: Outcome
    """Of the interval, not of the value: what at least the share `confidence` of the resamples says. `gets ahead` and
    `falls behind`: from `value` on until the end."""
    value: float | None
    low: float | None
    high: float | None
    start: float
    end: float
    """Between which the two are compared."""
    shares: dict[str, float]
    """Of resamples, by what is true of them: the first four outcomes."""
    difference: Interval
    """The first loss minus the second at `end`."""


def interpolate(x: np.ndarray, y: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the monotone cubic through points at places within them.

    Args:
        x: float64 [C], rising.
        y: float64 [..., C].
        places: float64 [G].
    """
    if len(x) == 1:
        return np.repeat(y, len(places), axis=-1)
    width = np.diff(x)
    slope = np.diff(y) / width
    tangent = _tangents(width, slope)
    at = np.clip(np.searchsorted(x, places, side="right") - 1, 0, len(x) - 2)
    h = width[at]
    t = (places - x[at]) / h
    before, after = y[..., at], y[..., at + 1]
    first, last = h * tangent[..., at], h * tangent[..., at + 1]
    return np.asarray(before + t * t * (3 - 2 * t) * (after - before) + t * (1 - t) * ((1 - t) * first - t * last))


def _tangents(width: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the slope at each point, [..., C]: a weighted harmonic mean of its neighbours', 0 at a turn."""
    if len(width) == 1:
        return np.concatenate([slope, slope], axis=-1)
    before, after = slope[..., :-1], slope[..., 1:]
    a, b = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    turn = before * after <= 0
    safe = [np.where(turn, 1.0, one) for one in (before, after)]
    inner = np.where(turn, 0.0, (a + b) / (a / safe[0] + b / safe[1]))
    ends = [_end(width[i], width[j], slope[..., i], slope[..., j])[..., None] for i, j in ((0, 1), (-1, -2))]
    return np.concatenate([ends[0], inner, ends[1]], axis=-1)


def _end(width: float, next_width: float, slope: np.ndarray, next_slope: np.ndarray) -> np.ndarray:
    """Return the slope at an end: of the parabola through three points, as far as the curve stays monotone."""
    found = ((2 * width + next_width) * slope - width * next_slope) / (width + next_width)
    found = np.where(found * slope <= 0, 0.0, found)
    steep = (slope * next_slope <= 0) & (np.abs(found) > 3 * np.abs(slope))
    return np.where(steep, 3 * slope, found)


def common(first: Curve, second: Curve) -> np.ndarray | None:
    """Return a grid over what was measured of both curves, their points among it; None if that is no range."""
    start, end = max(first.at[0], second.at[0]), min(first.at[-1], second.at[-1])
    if start >= end:
        return None
    points = np.concatenate([first.at, second.at])
    return np.unique(np.concatenate([np.geomspace(start, end, GRID), points[(points >= start) & (points <= end)]]))


def overtaking(first: Curve, second: Curve, confidence: float = 0.95) -> Crossing | None:
    """Return from where on the first curve is below the second, within what was measured of both; None if nothing was.

    Args:
        confidence: of the interval (percentile bootstrap, paired: row by row).
    """
    grid = common(first, second)
    return None if grid is None else crossing(grid, first(grid), second(grid), confidence)


def reaching(curve: Curve, target: np.ndarray, confidence: float = 0.95) -> Crossing:
    """Return from where on a curve is below a loss, such as another model's last one.

    Args:
        target: float64 [1 + R], of the same resamples.
    """
    grid = np.geomspace(curve.at[0], curve.at[-1], GRID)
    found = curve(grid)
    return crossing(grid, found, np.broadcast_to(target[:, None], found.shape), confidence)


def crossing(grid: np.ndarray, first: np.ndarray, second: np.ndarray, confidence: float) -> Crossing:
    """Return from where on `first` is below `second`, both [1 + R, G] on a grid.

    A row whose first curve is below at the end has a place from where on it is; a row of which it is below from the
    start has it before everything, one where it is not below at the end, after everything. So places have an order and
    their percentiles a meaning, though some lie nowhere.
    """
    # What rounding leaves of equal models is no difference between them.
    gap = np.round(first - second, 12)
    ahead, behind = _settles(np.log(grid), gap), _settles(np.log(grid), -gap)
    drawn = ahead[1:]
    shares = {
        "always ahead": np.isneginf(drawn),
        "gets ahead": np.isfinite(drawn),
        "falls behind": np.isposinf(drawn) & (gap[1:] < 0).any(axis=1),
        "never ahead": np.isposinf(drawn) & ~(gap[1:] < 0).any(axis=1),
    }
    low, high = _ends(drawn, confidence)
    outcome: Outcome = "not resolved"
    place = ahead
    if high == -np.inf:
        outcome = "always ahead"
    elif np.isfinite([low, high, ahead[0]]).all():
        outcome = "gets ahead"
    elif low == np.inf:
        other = _ends(behind[1:], confidence)
        if other[1] == -np.inf:
            outcome = "never ahead"
        elif np.isfinite([*other, behind[0]]).all():
            outcome, place, (low, high) = "falls behind", behind, other
    ends = {
        name: float(np.exp(at)) if np.isfinite(at) else None
        for name, at in (("value", place[0]), ("low", low), ("high", high))
    }
    return Crossing(
        outcome=outcome,
        **ends,
        start=float(grid[0]),
        end=float(grid[-1]),
        shares={name: float(true.mean()) for name, true in shares.items()},
        difference=percentiles(float(gap[0, -1]), gap[1:, -1], confidence),
    )


def _settles(x: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Return from where on each row of a gap [N, G] is below 0: -inf from the start, inf if not at the end."""
    below = gap < 0
    last = gap.shape[1] - 1 - np.argmax(~below[:, ::-1], axis=1)  # the last place where it is not
    after = np.minimum(last + 1, gap.shape[1] - 1)
    rows = np.arange(len(gap))
    high, low = gap[rows, last], gap[rows, after]
    share = high / np.where(high > low, high - low, 1)
    found = x[last] + share * (x[after] - x[last])
    return np.where(below.all(axis=1), -np.inf, np.where(below[:, -1], found, np.inf))


def _ends(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the percentiles of places, each one of them: between infinite ones there is nothing."""
    tail = (1 - confidence) / 2
    return float(np.quantile(drawn, tail, method="lower")), float(np.quantile(drawn, 1 - tail, method="higher"))
