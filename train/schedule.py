"""Learning-rate schedules as functions of the step alone, so that a resumed run needs no state of them.

A step's number is how many were taken before it: 0 for the first. What a schedule says of a step never depends on what
comes later: warming up again at step s, or branching off there, changes nothing before s.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from parallel.errors import InputError, one_of

Kind = Literal["wsd", "cosine", "constant"]
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


@dataclass(frozen=True, kw_only=True)
class Rewarm:
    """Warming up again within a run, after it grew, say (arXiv 2403.08763 on why)."""

    at: int
    """The first step of it."""
    steps: int
    """Steps until the peak is reached again."""
    start: float = 0.0
    """Factor of the peak that it rises from: its first step has start + (1 - start) / steps."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of a run, as factors of its peak.

    Raises:
        InputError: values that make no schedule (see `problems`).
    """

    kind: Kind = "wsd"
    """wsd: stable at the peak, then decay; cosine: half a cosine from the last warm-up on; constant: no decay."""
    steps: int
    """Length of the run (steps)."""
    warmup: int = 0
    """Steps of linear warm-up; the first step already has 1/warmup."""
    decay: float = 0.2
    """wsd: length of the decay at the end; up to 1 a share of the steps, above 1 whole steps."""
    shape: str = "linear"
    """wsd: how it falls, a key of SHAPES."""
    floor: float = 0.0
    """Factor that wsd and cosine fall towards; the step after the last one would have it."""
    rewarm: tuple[Rewarm, ...] = ()
    """Where it warms up again, in order; a cosine then falls anew over the steps that are left."""

    def __post_init__(self) -> None:
        for key, text in problems(self):
            raise InputError(f"{key}: {text}")

    @property
    def decay_steps(self) -> int:
        """Length of wsd's decay (steps)."""
        return round(self.steps * self.decay) if self.decay <= 1 else int(self.decay)

    @property
    def decay_start(self) -> int:
        """Steps taken when the decay begins: the step of this number is the last one at the peak."""
        starts = {"wsd": self.steps - self.decay_steps, "cosine": self._warmed(self.steps), "constant": self.steps}
        return starts[self.kind]

    def factor(self, step: int) -> float:
        """Return the factor of the peak rate; after the run's end it stays at the floor."""
        begin, length, start = self._warmup(step)
        since = step - begin
        rise = start + (1.0 - start) * (since + 1) / length if since < length else 1.0
        # Where a warm-up reaches into the decay, the smaller one holds: no jump at its end.
        return min(rise, FALLS[self.kind](self, step))

    def branch(self, at: int, length: int, *, shape: str = "linear", floor: float = 0.0) -> "Schedule":
        """Return the schedule of a decay branch: as this one up to step `at`, then a decay over `length` more steps.

        It is a whole schedule of `at + length` steps, which an undisturbed run of this length would have had: a run
        that goes on from this one's checkpoint of step `at` is what that run would be (FLOP-matched comparisons from
        one stable phase, arXiv 2405.18392).

        Raises:
            InputError: `at` is not in a stable phase, or there is no step to decay in.
        """
        begin, warmup, _ = self._warmup(at - 1)
        if self.kind == "cosine":
            raise InputError("a cosine has no stable phase to branch off from: allowed are wsd and constant")
        if not begin + warmup <= at <= self.decay_start:
            raise InputError(
                f"no branch at step {at}: the stable phase goes from step {begin + warmup} to {self.decay_start}"
            )
        if length < 1:
            raise InputError(f"a branch of {length} steps: allowed are whole numbers from 1 on")
        steps = at + length
        return replace(
            self,
            kind="wsd",
            steps=steps,
            decay=length if length > 1 else 1 / steps,
            shape=shape,
            floor=floor,
            rewarm=tuple(each for each in self.rewarm if each.at < at),
        )

    def _warmup(self, step: int) -> tuple[int, int, float]:
        """Return (first step, length, factor it rises from) of the last warm-up that has begun by a step."""
        begun = [each for each in self.rewarm if each.at <= step]
        return (begun[-1].at, begun[-1].steps, begun[-1].start) if begun else (0, self.warmup, 0.0)

    def _warmed(self, step: int) -> int:
        begin, length, _ = self._warmup(step)
        return begin + length


def _fall(schedule: Schedule, done: float, shape: str) -> float:
    return schedule.floor + (1.0 - schedule.floor) * SHAPES[shape](min(done, 1.0))


def _wsd(schedule: Schedule, step: int) -> float:
    since, length = step - schedule.decay_start, schedule.decay_steps
    return _fall(schedule, since / length, schedule.shape) if length and since > 0 else 1.0


def _cosine(schedule: Schedule, step: int) -> float:
    peak = schedule._warmed(step)
    return (
        _fall(schedule, (step - peak) / (schedule.steps - peak), "cosine") if peak < min(step, schedule.steps) else 1.0
    )


FALLS: dict[str, Callable[[Schedule, int], float]] = {
    "wsd": _wsd,
    "cosine": _cosine,
    "constant": lambda schedule, step: 1.0,
}
"""By kind: the factor without warm-up."""


def problems(schedule: Schedule) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong there) of a schedule's values."""
    steps = schedule.steps
    if schedule.kind not in FALLS:
        yield "kind", one_of("schedule", schedule.kind, FALLS)
    if schedule.shape not in SHAPES:
        yield "shape", one_of("decay shape", schedule.shape, SHAPES)
    if steps < 1:
        yield "steps", f"{steps} steps are no run: allowed are whole numbers from 1 on"
    if not 0 <= schedule.warmup <= steps:
        yield "warmup", f"{schedule.warmup} steps of warm-up do not fit into the run's {steps} steps"
    if not 0 <= schedule.decay <= max(1, steps) or (schedule.decay > 1 and schedule.decay != int(schedule.decay)):
        yield "decay", f"{schedule.decay:g} is no length: allowed are shares from 0 to 1, or whole steps up to {steps}"
    if not 0 <= schedule.floor <= 1:
        yield "floor", f"{schedule.floor:g} is not a factor of the peak: allowed is 0 to 1"
    earliest = schedule.warmup
    for number, each in enumerate(schedule.rewarm):
        where = f"rewarm.{number}"
        if each.steps < 1 or not earliest <= each.at <= steps - each.steps:
            yield (
                where,
                (
                    f"{each.steps} steps from step {each.at} on do not fit: one step or more, between step {earliest} "
                    f"(the end of the warm-up before) and the run's {steps} steps"
                ),
            )
        if not 0 <= each.start <= 1:
            yield where, f"start {each.start:g} is not a factor of the peak: allowed is 0 to 1"
        earliest = each.at + each.steps
