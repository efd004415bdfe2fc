"""Learning-rate schedules as functions of the step alone, so that a resumed run needs no state of them."""

import math
from collections.abc import Callable

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "sqrt": lambda done: 1.0 - math.sqrt(done),
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Factor of the peak rate by the share of the decay phase that is done (sqrt: 1-sqrt, arXiv 2405.18392)."""


def wsd(step: int, *, steps: int, warmup: int, decay: float, shape: str = "linear") -> float:
    """Return the factor of the peak learning rate for an optimizer step (warmup, stable, decay; arXiv 2404.06395).

    Args:
        step: steps taken before this one, 0 for the first.
        steps: length of the run (steps).
        warmup: steps of linear warm-up; the first step already has 1/warmup.
        decay: share of the steps, at the end, in which the factor falls towards 0.
        shape: a key of SHAPES.
    """
    if step < warmup:
        return (step + 1) / warmup
    length = round(steps * decay)
    since = step - (steps - length)
    return SHAPES[shape](since / length) if length and since > 0 else 1.0
