"""Which steps are skipped, when a run stops, and that a resumed run decides as an undisturbed one."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.guard import (
    SPREAD,
    Limits,
    Skipped,
    State,
    Verdict,
    Window,
    after,
    as_plain,
    forget,
    from_plain,
    judge,
    reason_to_stop,
    spread,
)

BATCH = 5
LIMITS = Limits()
NOISE = random.Random(3)
WINDOW = Window(
    losses=tuple(NOISE.gauss(2.5, 0.05) for _ in range(128)),
    grad_norms=tuple(NOISE.gauss(0.8, 0.1) for _ in range(128)),
)


def follow(values, limits=LIMITS, state=None, first=0):
    """Run the guard over (loss, norm) pairs; return the state after them and which steps were skipped."""
    state, skipped = state or State(), []
    for step, (loss, norm) in enumerate(values, start=first):
        verdict = judge(state.window, loss, norm, limits)
        samples = (step * BATCH, (step + 1) * BATCH - 1)
        state = after(state, verdict, loss=loss, grad_norm=norm, step=step + 1, samples=samples, limits=limits)
        if verdict.skip:
            skipped.append(step + 1)
    return state, skipped


def test_six_standard_deviations_are_the_border_for_loss_and_norm():
    for which, values in (("losses", WINDOW.losses), ("grad_norms", WINDOW.grad_norms)):
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        for sigmas, skip in ((5.999, False), (6.001, True), (-50, False)):
            given = {"losses": 2.5, "grad_norms": 0.8} | {which: mean + sigmas * deviation}
            verdict = judge(WINDOW, given["losses"], given["grad_norms"], LIMITS)
            assert verdict.skip is skip, (which, sigmas)
    text = judge(WINDOW, 4.0, 0.8, LIMITS).reason
    mean, deviation = np.mean(WINDOW.losses), np.std(WINDOW.losses, ddof=1)
    assert text == (
        f"its loss 4 is {(4 - mean) / deviation:.1f} standard deviations above the mean {mean:.4g} of 128 steps"
    )
    assert judge(WINDOW, 2.5, 9.0, LIMITS).reason.startswith("its gradient norm 9 is ")
    assert not judge(WINDOW, 1e9, 1e9, replace(LIMITS, sigma=math.inf)).skip


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "its loss is nan"),
        (math.inf, 1.0, "its loss is inf"),
        (2.0, math.inf, "its gradient norm is inf"),
        (2.0, math.nan, "its gradient norm is nan"),
    ],
)
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss, norm, reason):
    for window in (Window(), WINDOW):
        assert judge(window, loss, norm, replace(LIMITS, sigma=math.inf)) == Verdict(skip=True, reason=reason)


def test_nothing_finite_is_skipped_before_the_window_is_half_full():
    short = Window(losses=WINDOW.losses[:63], grad_norms=WINDOW.grad_norms[:63])
    assert not judge(short, 100.0, 1.0, LIMITS).skip
    full = Window(losses=WINDOW.losses[:64], grad_norms=WINDOW.grad_norms[:64])
    assert judge(full, 100.0, 1.0, LIMITS).skip
    assert [Limits(window=window).least for window in (4, 20, 30, 128, 1000)] == [4, 20, 20, 64, 500]


def test_values_that_hardly_vary_do_not_make_the_next_one_a_spike():
    same = Window(losses=(2.0,) * 128, grad_norms=(1.0,) * 128)
    assert spread(same.losses) == (2.0, 2.0 * SPREAD)
    assert not judge(same, 2.0 + 5.9 * 2.0 * SPREAD, 1.0, LIMITS).skip
    assert judge(same, 2.0 + 6.1 * 2.0 * SPREAD, 1.0, LIMITS).skip
    still = Window(losses=(2.0,) * 128, grad_norms=(0.0,) * 128)  # nothing to compare with
    assert not judge(still, 2.0, 3.0, LIMITS).skip


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=200))
def test_mean_and_standard_deviation_are_numpys(values):
    mean, deviation = spread(tuple(values))
    assert mean == pytest.approx(np.mean(values))
    assert deviation == pytest.approx(max(np.std(values, ddof=1), SPREAD * mean), abs=1e-9)


def test_the_window_holds_the_last_steps_that_were_taken():
    values = [(float(n % 7), float(n % 5)) for n in range(300)]
    state, skipped = follow(values)
    assert not skipped
    assert state.window.losses == tuple(loss for loss, _ in values[-128:])
    assert state.window.grad_norms == tuple(norm for _, norm in values[-128:])
    state, skipped = follow([(50.0, 1.0), (math.nan, 1.0)], state=state, first=300)
    assert (skipped, state.skipped) == ([301, 302], 2)
    assert state.window.losses == tuple(loss for loss, _ in values[-128:])
    assert [bad.samples for bad in state.row] == [(1500, 1504), (1505, 1509)]
    state, _ = follow([(3.0, 1.0)], state=state, first=302)
    assert (state.skipped, state.row, state.window.losses[-1]) == (2, (), 3.0)
    # A window made shorter by a changed config is compared by its newest part.
    narrow = replace(LIMITS, window=40)
    assert judge(Window(losses=(9.0,) * 88 + (1.0,) * 40, grad_norms=(1.0,) * 128), 5.0, 1.0, narrow).skip


def test_a_loss_that_stays_high_stops_the_run_with_its_data_named():
    widened = replace(WINDOW, losses=(*WINDOW.losses[4:], *[6.0] * 4))
    assert not judge(widened, 6.0, 0.8, LIMITS).skip  # were they let into the window, the fifth would pass
    good = list(zip(WINDOW.losses, WINDOW.grad_norms, strict=True))
    state, skipped = follow([*good, *[(6.0, 0.8)] * 7])
    assert skipped == list(range(129, 136))
    assert reason_to_stop(state, LIMITS) is None
    state, _ = follow([(math.nan, 0.8)], state=state, first=135)
    assert reason_to_stop(state, LIMITS) == (
        "bad steps in a row: 8 (steps 129 to 136, samples 640 to 679); the last was skipped since its loss is nan: "
        "lower the learning rate or look at this text"
    )
    once = replace(LIMITS, stop_after=1)
    state, _ = follow([(math.inf, 1.0)], limits=once)
    assert reason_to_stop(state, once) == (
        "bad steps in a row: 1 (steps 1 to 1, samples 0 to 4); the last was skipped since its loss is inf: "
        "lower the learning rate or look at this text"
    )
    # Where a jump is expected, the window begins anew.
    begun = forget(replace(state, window=WINDOW))
    assert (begun.window, begun.skipped, begun.row) == (Window(), 1, state.row)


SOME = st.one_of(st.floats(0.5, 5), st.sampled_from([math.nan, math.inf, 100.0, 1e30]))


@given(st.lists(st.tuples(SOME, SOME), max_size=60), st.integers(0, 60))
def test_a_resumed_run_decides_as_an_undisturbed_one(values, cut):
    limits = Limits(window=24, stop_after=3)
    whole, skipped = follow(values, limits)
    before, early = follow(values[:cut], limits)
    kept = from_plain(json.loads(json.dumps(as_plain(before), allow_nan=False)))
    assert kept == before
    resumed, late = follow(values[cut:], limits, state=kept, first=len(values[:cut]))
    assert (resumed, early + late) == (whole, skipped)
    assert reason_to_stop(resumed, limits) == reason_to_stop(whole, limits)


def test_the_state_goes_through_a_checkpoint(tmp_path):
    bad = Skipped(step=7, samples=(30, 34), reason="its loss is nan")
    state = State(window=WINDOW, skipped=3, row=(bad,))
    torch.save({"guard": as_plain(state)}, tmp_path / "state.pt")
    assert from_plain(torch.load(tmp_path / "state.pt", weights_only=True)["guard"]) == state
    assert from_plain(None) == from_plain({}) == State()
