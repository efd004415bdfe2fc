"""A scaling law of losses: L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv 2203.15556, equation 2).

Fitted as there (approach 3): least Huber loss of the difference of logarithms, from a grid of starts. With too few
sizes for it, L(D) = E + B / D^b of one size. N are parameters, D tokens of the language seen in training. The form does
not know text that is seen again (it is worth less: Muennighoff et al. 2023, arXiv 2305.16264), nor what a model knew
before (it is worth text: Hernandez et al. 2021, arXiv 2102.01293).

n points, V variables (D, or N and D), P = 1 + 2 V numbers of a law, R resamples
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from eval.bootstrap import Interval, percentiles
from eval.repeats import Spread

DELTA = 1e-3
"""Huber's: differences of logarithms beyond it count by their size, not its square (Hoffmann et al. 2022)."""
SIZES, COUNTS, POINTS = 3, 3, 6
"""Sizes, token counts and points that the whole law needs: with two sizes, E and A / N^a cannot be told apart, and as
many points as the law has numbers would fit anything."""
COUNTS_ALONE = 4
"""Token counts that the law of one size needs."""
EXPONENTS, LEVELS = (0.01, 3.0), (-12.0, 12.0)
"""Bounds of exponents, and of the logarithms of E and of A / N^a and B / D^b at the middle of the points."""
LEAST = 1e-4
"""Share of the loss that a term has to have for its exponent to mean anything."""
SHARES, POWERS = (0.1, 0.5, 0.8, 0.95), (0.05, 0.1, 0.2, 0.4, 0.8, 1.5)
"""Starts: E as a share of the least loss, and exponents."""
STEPS = 150
"""Of each of two descents at most, the first with a wide Huber loss, which is smooth."""
DONE, STUCK = 1e-9, 1e8
"""Share of its loss by which a step has to better a fit for another one, and damping at which no step will."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Law:
    """A fitted law."""

    names: tuple[str, ...]
    """Of its numbers: E, A, a, B, b or E, B, b."""
    numbers: np.ndarray
    """float64 [1 + R, P]: logarithms of the levels at `middle`, and exponents; that of all points in the first row."""
    middle: np.ndarray
    """Mean logarithm of each variable [V], which levels are at."""
    residuals: np.ndarray
    """Logarithm of each measured loss minus that of the law [n]."""
    freedom: int
    """Points beyond the law's numbers."""

    @property
    def determined(self) -> bool:
        """Whether the points say what the exponents are: they are within their bounds, and their terms are not 0."""
        level, powers, exponents = self.numbers[0, 0], self.numbers[0, 1::2], self.numbers[0, 2::2]
        known = (exponents > EXPONENTS[0]) & (exponents < EXPONENTS[1])
        return bool((known & (np.exp(powers) > LEAST * np.exp(np.logaddexp(level, powers.max())))).all())

    def losses(self, parameters: float, tokens: np.ndarray) -> np.ndarray:
        """Return the losses of a size at token counts [G], [1 + R, G]."""
        sizes = np.full(len(tokens), float(parameters))
        return np.exp(_predicted(self.numbers, _logs(self.names, sizes, tokens) - self.middle)[0])

    def estimates(self, confidence: float = 0.95) -> dict[str, Interval]:
        """Return each number of the law as it is written, with its interval."""
        found = {}
        for i, name in enumerate(self.names):
            values = self.numbers[:, i]
            if i % 2:  # A or B: what stands above N^a or D^b
                values = np.exp(values + self.numbers[:, i + 1] * self.middle[i // 2])
            elif not i:
                values = np.exp(values)
            found[name] = percentiles(float(values[0]), values[1:] if len(values) > 1 else values, confidence)
        return found


def obstacle(parameters: Sequence[float], tokens: Sequence[float]) -> str | None:
    """Return why no law can be fitted to points, in words; None if one can."""
    sizes, counts = len({*parameters}), len({*tokens})
    if sizes == 1:
        few = counts < COUNTS_ALONE
        return f"{COUNTS_ALONE} token counts are needed, {counts} measured" if few else None
    if sizes < SIZES or counts < COUNTS or len(tokens) < POINTS:
        asked = f"{SIZES} sizes, {COUNTS} token counts and {POINTS} points are needed"
        return f"{asked}, {sizes}, {counts} and {len(tokens)} measured"
    return None


def fit(parameters: Sequence[float], tokens: Sequence[float], losses: np.ndarray) -> Law:
    """Return the law of points: the whole one if they differ in size, else that of one size.

    Args:
        losses: float64 [n].
    """
    assert not (reason := obstacle(parameters, tokens)), reason
    names = ("E", "A", "a", "B", "b") if len({*parameters}) > 1 else ("E", "B", "b")
    logs = _logs(names, np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float))
    middle = logs.mean(axis=0)
    variables, wanted = logs - middle, np.log(losses)
    starts = _starts(losses, variables.shape[1])
    found = _descend(starts, variables, np.broadcast_to(wanted, (len(starts), len(wanted))))
    best = found[[np.argmin(_cost(found, variables, wanted, DELTA))]]
    residuals = wanted - _predicted(best, variables)[0][0]
    return Law(names=names, numbers=best, middle=middle, residuals=residuals, freedom=len(wanted) - len(names))


def scatter(laws: Iterable[Law]) -> Spread | None:
    """Return how far points lie from their laws, pooled over laws; None if there is none."""
    every = [*laws]
    freedom = sum(law.freedom for law in every)
    squares = sum(float((law.residuals**2).sum()) for law in every)
    return Spread(value=float(np.sqrt(squares / freedom)), freedom=freedom) if every else None


def refit(
    law: Law, parameters: Sequence[float], tokens: Sequence[float], losses: np.ndarray, errors: np.ndarray
) -> Law:
    """Return a law with its resamples: of the losses, each point moved by what points differ from their laws.

    Args:
        losses: float64 [R, n], over resamples.
        errors: float64 [R, n], added to their logarithms.
    """
    logs = _logs(law.names, np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float))
    starts = np.repeat(law.numbers[:1], len(losses), axis=0)
    found = _descend(starts, logs - law.middle, np.log(losses) + errors)
    return replace(law, numbers=np.concatenate([law.numbers[:1], found]))


def _logs(names: Sequence[str], parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.log(np.stack([parameters, tokens] if "A" in names else [tokens], axis=1))


def _starts(losses: np.ndarray, variables: int) -> np.ndarray:
    found = []
    for share, *powers in product(SHARES, *[POWERS] * variables):
        rest = np.log((losses.mean() - share * losses.min()) / variables)
        found.append([np.log(share * losses.min()), *(one for power in powers for one in (rest, power))])
    return np.array(found)


def _predicted(numbers: np.ndarray, variables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithm of a law's losses [R, n], and its terms' shares of them [R, n, 1 + V]."""
    powers = numbers[:, None, 1::2] - numbers[:, None, 2::2] * variables  # [R, n, V]
    terms = np.concatenate([np.broadcast_to(numbers[:, None, :1], (*powers.shape[:2], 1)), powers], axis=2)
    top = terms.max(axis=2, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(axis=2, keepdims=True)
    return (top + np.log(total))[..., 0], parts / total


def _cost(numbers: np.ndarray, variables: np.ndarray, wanted: np.ndarray, delta: float) -> np.ndarray:
    """Return the Huber loss of each row [R]."""
    far = np.abs(_predicted(numbers, variables)[0] - wanted)
    return np.where(far <= delta, far**2 / 2, delta * (far - delta / 2)).sum(axis=1)


def _descend(numbers: np.ndarray, variables: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the numbers [R, P] of least Huber loss that Levenberg-Marquardt steps lead to, all rows at once."""
    for delta in (100 * DELTA, DELTA):
        numbers = _steps(numbers, variables, wanted, delta)
    return numbers


def _steps(numbers: np.ndarray, variables: np.ndarray, wanted: np.ndarray, delta: float) -> np.ndarray:
    low, high = (np.array([LEVELS[i], *[LEVELS[i], EXPONENTS[i]] * variables.shape[1]]) for i in (0, 1))
    numbers = numbers.copy()
    damping = np.full(len(numbers), 1e-3)
    cost = _cost(numbers, variables, wanted, delta)
    rows = np.arange(len(numbers))  # those that still get better
    for _ in range(STEPS):
        now, aim = numbers[rows], wanted[rows]
        gradient, curvature = _slopes(now, variables, aim, delta)
        diagonal = np.arange(now.shape[1])
        curvature[:, diagonal, diagonal] *= 1 + damping[rows, None]
        curvature[:, diagonal, diagonal] += 1e-12
        tried = np.clip(now - np.linalg.solve(curvature, gradient[..., None])[..., 0], low, high)
        found, before = _cost(tried, variables, aim, delta), cost[rows]
        better = found < before
        numbers[rows] = np.where(better[:, None], tried, now)
        cost[rows] = np.where(better, found, before)
        damping[rows] = np.where(better, damping[rows] / 3, damping[rows] * 4)
        rows = rows[np.where(better, before - found > DONE * before, damping[rows] < STUCK)]
        if not len(rows):
            break
    return numbers


def _slopes(
    numbers: np.ndarray, variables: np.ndarray, wanted: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient of the Huber loss [R, P], and of its curvature what keeps it positive [R, P, P]."""
    predicted, shares = _predicted(numbers, variables)
    slopes = np.empty((*predicted.shape, numbers.shape[1]))  # of the prediction by each number
    slopes[..., 0], slopes[..., 1::2] = shares[..., 0], shares[..., 1:]
    slopes[..., 2::2] = -shares[..., 1:] * variables
    far = predicted - wanted
    weighted = slopes * np.minimum(1, delta / np.maximum(np.abs(far), 1e-300))[..., None]
    return (weighted * far[..., None]).sum(axis=1), np.matmul(weighted.swapaxes(1, 2), slopes)
