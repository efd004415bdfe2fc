"""The guard against bad steps: which to skip, and when to stop, from the losses and gradient norms seen so far.

The decision is taken after the backward pass and before the optimizer's step, on a loss and a gradient norm that were
reduced over all ranks: equal inputs, equal arithmetic, and so no rank steps where another one skips. A skipped step
leaves weights and moments as they are, while step, samples and schedule go on.

The rule is that of OLMo-core's SkipStepOptimizer (window of 128 steps, 6 standard deviations), with three differences.
Only a rise counts. What is skipped does not enter the window: otherwise four bad steps widen it until a loss that stays
high passes, and a run is never seen to have diverged. And where the values hardly vary, their spread is taken as a
thousandth of their mean.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SPREAD = 1e-3
"""Least standard deviation, as a share of the mean: less than what a step more of the same run may change."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is let pass."""

    window: int = 128
    """Steps that a new one is compared with."""
    sigma: float = 6.0
    """Standard deviations above the window's mean from which on a step is skipped; inf skips none that is finite."""
    stop_after: int = 8
    """Skipped steps in a row after which the run stops."""

    @property
    def least(self) -> int:
        """Steps that the window has to hold before anything finite is skipped."""
        return min(self.window, max(20, self.window // 2))


@dataclass(frozen=True, kw_only=True)
class Window:
    """Losses and gradient norms of the last steps that were taken, oldest first."""

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A step that was skipped, and the data it saw."""

    step: int
    """Its number as the log has it, 1 for the first."""
    samples: tuple[int, int]
    """Global numbers of its first and its last sample."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class State:
    """All that the guard remembers."""

    window: Window = field(default_factory=Window)
    skipped: int = 0
    """Steps skipped so far."""
    row: tuple[Skipped, ...] = ()
    """Those skipped since the last one that was taken."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a step is skipped, and why."""

    skip: bool
    reason: str = ""


def judge(window: Window, loss: float, grad_norm: float, limits: Limits) -> Verdict:
    """Decide on a step by its loss and its gradient norm before clipping, both over all ranks."""
    for what, value, values in (("loss", loss, window.losses), ("gradient norm", grad_norm, window.grad_norms)):
        if not math.isfinite(value):
            return Verdict(skip=True, reason=f"its {what} is {value}")
        seen = values[-limits.window :]
        if len(seen) < limits.least:
            continue
        mean, deviation = spread(seen)
        if deviation > 0 and value > mean + limits.sigma * deviation:
            return Verdict(
                skip=True,
                reason=f"its {what} {value:.4g} is {(value - mean) / deviation:.1f} standard deviations above the mean "
                f"{mean:.4g} of {len(seen)} steps",
            )
    return Verdict(skip=False)


def spread(values: tuple[float, ...]) -> tuple[float, float]:
    """Return mean and standard deviation (of a sample: n - 1), the latter at least SPREAD of the mean."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) * (value - mean) for value in values) / max(1, len(values) - 1)
    return mean, max(math.sqrt(variance), SPREAD * abs(mean))


def after(
    state: State,
    verdict: Verdict,
    *,
    loss: float,
    grad_norm: float,
    step: int,
    samples: tuple[int, int],
    limits: Limits,
) -> State:
    """Return the state after a step that was judged.

    Args:
        step: its number as the log has it, 1 for the first.
        samples: global numbers of its first and its last sample.
    """
    if verdict.skip:
        bad = Skipped(step=step, samples=samples, reason=verdict.reason)
        return replace(state, skipped=state.skipped + 1, row=(*state.row, bad))
    window = Window(
        losses=(*state.window.losses, loss)[-limits.window :],
        grad_norms=(*state.window.grad_norms, grad_norm)[-limits.window :],
    )
    return replace(state, window=window, row=())


def reason_to_stop(state: State, limits: Limits) -> str | None:
    """Return the line that names the data, if too many steps in a row were skipped."""
    if len(state.row) < limits.stop_after:
        return None
    first, last = state.row[0], state.row[-1]
    return (
        f"bad steps in a row: {len(state.row)} (steps {first.step} to {last.step}, samples {first.samples[0]} to "
        f"{last.samples[1]}); the last was skipped since {last.reason}: lower the learning rate or look at this text"
    )


def forget(state: State) -> State:
    """Return the state with an empty window, for where the loss is expected to jump: another mixture begins, say."""
    return replace(state, window=Window())


def as_plain(state: State) -> dict[str, Any]:
    """Return plain data for a checkpoint (lists, numbers and strings)."""
    return {
        "losses": list(state.window.losses),
        "grad_norms": list(state.window.grad_norms),
        "skipped": state.skipped,
        "row": [[bad.step, *bad.samples, bad.reason] for bad in state.row],
    }


def from_plain(data: Mapping[str, Any] | None) -> State:
    """Return the state that a checkpoint holds; an empty one where it holds none."""
    if not data:
        return State()
    return State(
        window=Window(losses=tuple(data["losses"]), grad_norms=tuple(data["grad_norms"])),
        skipped=data["skipped"],
        row=tuple(Skipped(step=step, samples=(first, last), reason=why) for step, first, last, why in data["row"]),
    )
