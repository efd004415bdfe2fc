"""Schedules against closed forms, torch's schedulers and one another."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import InputError
from train.schedule import SHAPES, Rewarm, Schedule, wsd


def curve(schedule):
    return [schedule.factor(step) for step in range(schedule.steps)]


def torch_curve(steps, *schedulers, milestones=()):
    """Return the rates of torch's own schedulers, one after the other, from a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    chain = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [make(optimizer) for make in schedulers], milestones=list(milestones)
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chain.step()
    return rates


def linear(start, end, steps):
    return lambda optimizer: torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=start, end_factor=end, total_iters=steps
    )


def cosine(steps, floor):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=floor)


@st.composite
def schedules(draw, kinds=("wsd", "cosine", "constant")):
    steps = draw(st.integers(2, 300))
    warmup = draw(st.integers(0, steps))
    rewarm, earliest = [], warmup
    for _ in range(draw(st.integers(0, 2))):
        if earliest + 1 > steps - 1:
            break
        length = draw(st.integers(1, steps - earliest - 1))
        at = draw(st.integers(earliest, steps - length))
        rewarm.append(Rewarm(at=at, steps=length, start=draw(st.floats(0, 1))))
        earliest = at + length
    return Schedule(
        kind=draw(st.sampled_from(kinds)),
        steps=steps,
        warmup=warmup,
        decay=draw(st.one_of(st.floats(0, 1), st.integers(2, steps))),
        shape=draw(st.sampled_from(sorted(SHAPES))),
        floor=draw(st.floats(0, 1)),
        rewarm=tuple(rewarm),
    )


def test_a_cosine_is_torchs():
    ours = curve(Schedule(kind="cosine", steps=100, floor=0.1))
    assert ours == pytest.approx(torch_curve(100, cosine(100, 0.1)))
    ours = curve(Schedule(kind="cosine", steps=100, warmup=20, floor=0.1))
    # torch steps onto the peak and then begins the cosine at it again.
    theirs = torch_curve(100, linear(1 / 20, 1.0, 19), cosine(80, 0.1), milestones=[20])
    assert ours == pytest.approx(theirs)


def test_warm_up_stable_phase_and_linear_decay_are_torchs():
    ours = curve(Schedule(steps=100, warmup=10, decay=0.3, floor=0.25))
    theirs = torch_curve(100, linear(1 / 10, 1.0, 9), linear(1.0, 0.25, 30), milestones=[70])
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("shape", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)], ids=lambda value: str(value)
)
def test_ends_and_middle_of_a_decay(shape, half):
    schedule = Schedule(steps=100, warmup=10, decay=40, shape=shape, floor=0.2)
    assert (schedule.decay_steps, schedule.decay_start) == (40, 60)
    found = [schedule.factor(step) for step in (0, 9, 10, 60)]
    assert found == [0.1, 1.0, 1.0, 1.0]
    assert schedule.factor(61) < 1.0
    assert schedule.factor(80) == pytest.approx(0.2 + 0.8 * half)
    assert schedule.factor(99) > schedule.factor(100) == pytest.approx(0.2)
    assert schedule.factor(10**6) == schedule.factor(100)  # after the end it stays


def test_where_the_decay_starts():
    assert Schedule(steps=50, decay=0.0).decay_start == 50
    assert Schedule(kind="constant", steps=50, warmup=5).decay_start == 50
    assert Schedule(kind="cosine", steps=50, warmup=5).decay_start == 5
    assert Schedule(kind="cosine", steps=50, warmup=5, rewarm=(Rewarm(at=20, steps=4),)).decay_start == 24
    assert curve(Schedule(kind="constant", steps=4, warmup=2)) == [0.5, 1.0, 1.0, 1.0]
    assert curve(Schedule(kind="cosine", steps=4, warmup=4)) == [0.25, 0.5, 0.75, 1.0]


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1), st.sampled_from(sorted(SHAPES)))
def test_a_plain_schedule_is_wsd_to_the_bit(steps, warmup, decay, shape):
    warmup = min(warmup, steps - round(steps * decay))
    schedule = Schedule(steps=steps, warmup=warmup, decay=decay, shape=shape)
    assert curve(schedule) == [wsd(s, steps=steps, warmup=warmup, decay=decay, shape=shape) for s in range(steps)]


@given(schedules())
def test_factors_are_shares_and_never_jump_upwards(schedule):
    rates = curve(schedule)
    assert all(0 <= rate <= 1 for rate in rates)
    starts = {each.at for each in schedule.rewarm}
    climbs = [(schedule.warmup, 0.0), *((each.steps, each.start) for each in schedule.rewarm)]
    steepest = max(((1 - start) / length for length, start in climbs if length), default=0.0)
    for step, (before, now) in enumerate(itertools.pairwise(rates), start=1):
        if step not in starts:  # warming up again may begin anywhere
            assert now - before <= steepest + 1e-12


@given(schedules(), st.data())
def test_warming_up_again_changes_nothing_before_and_a_warm_up_from_1_nothing_at_all(schedule, data):
    without = replace(schedule, rewarm=())
    for number, each in enumerate(schedule.rewarm):
        fewer = replace(schedule, rewarm=schedule.rewarm[:number])
        assert curve(schedule)[: each.at] == curve(fewer)[: each.at]
    if schedule.kind != "cosine":
        flat = tuple(replace(each, start=1.0) for each in schedule.rewarm)
        assert curve(replace(schedule, rewarm=flat)) == pytest.approx(curve(without))


def test_warming_up_again_after_growth():
    schedule = Schedule(steps=100, warmup=10, decay=0.2, rewarm=(Rewarm(at=40, steps=4, start=0.2),))
    assert [schedule.factor(step) for step in (39, 40, 41, 42, 43, 44)] == pytest.approx([1, 0.4, 0.6, 0.8, 1, 1])
    assert curve(schedule)[44:] == curve(replace(schedule, rewarm=()))[44:]
    again = Schedule(kind="cosine", steps=60, floor=0.1, rewarm=(Rewarm(at=20, steps=10),))
    assert again.factor(29) == again.factor(30) == 1.0
    whole = Schedule(kind="cosine", steps=30, floor=0.1)
    assert curve(again)[30:] == pytest.approx(curve(whole))  # falls anew over what is left


@given(schedules(kinds=("wsd", "constant")), st.integers(1, 50), st.sampled_from(sorted(SHAPES)), st.data())
def test_a_branch_is_the_run_that_was_planned_to_end_there(parent, length, shape, data):
    stable = [step for step in range(1, parent.decay_start + 1) if in_stable_phase(parent, step)]
    if not stable:
        return
    at = data.draw(st.sampled_from(stable))
    branch = parent.branch(at, length, shape=shape)
    assert branch.steps == at + length
    assert (branch.decay_start, branch.decay_steps) == (at, length)
    assert curve(branch)[:at] == curve(parent)[:at]
    expected = [SHAPES[shape](done / length) for done in range(length)]
    assert curve(branch)[at:] == pytest.approx(expected)
    assert branch.factor(branch.steps) == pytest.approx(0.0)


def in_stable_phase(schedule, at):
    """Say by the closed form whether the steps up to `at` had come to the peak and not left it."""
    begin, length = max([(0, schedule.warmup)] + [(each.at, each.steps) for each in schedule.rewarm if each.at < at])
    return begin + length <= at <= schedule.decay_start


def test_two_branches_of_one_stable_phase_are_two_whole_runs():
    stable = Schedule(kind="constant", steps=1000, warmup=100)
    for at in (300, 800):
        branch = stable.branch(at, 100, shape="sqrt")
        assert branch == Schedule(steps=at + 100, warmup=100, decay=100, shape="sqrt")
        whole = [wsd(s, steps=at + 100, warmup=100, decay=100 / (at + 100), shape="sqrt") for s in range(at + 100)]
        assert curve(branch) == whole
    assert curve(stable.branch(300, 1)) == [*curve(stable)[:300], 1.0]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda s: s.branch(99, 5), "no branch at step 99: the stable phase goes from step 100 to 800"),
        (lambda s: s.branch(801, 5), "no branch at step 801: the stable phase goes from step 100 to 800"),
        (lambda s: s.branch(800, 0), "a branch of 0 steps: allowed are whole numbers from 1 on"),
        (
            lambda s: replace(s, rewarm=(Rewarm(at=300, steps=50),)).branch(301, 5),
            "no branch at step 301: the stable phase goes from step 350 to 800",
        ),
        (
            lambda s: replace(s, kind="cosine").branch(500, 5),
            "a cosine has no stable phase to branch off from: allowed are wsd and constant",
        ),
        (
            lambda s: replace(s, kind="cosin"),
            "kind: unknown schedule 'cosin': allowed are wsd, cosine, constant; did you mean 'cosine'?",
        ),
        (
            lambda s: replace(s, shape="root"),
            "shape: unknown decay shape 'root': allowed are linear, sqrt, cosine",
        ),
        (lambda s: replace(s, steps=0, warmup=0), "steps: 0 steps are no run: allowed are whole numbers from 1 on"),
        (lambda s: replace(s, warmup=1001), "warmup: 1001 steps of warm-up do not fit into the run's 1000 steps"),
        (
            lambda s: replace(s, decay=1.5),
            "decay: 1.5 is no length: allowed are shares from 0 to 1, or whole steps up to 1000",
        ),
        (
            lambda s: replace(s, decay=math.nan),
            "decay: nan is no length: allowed are shares from 0 to 1, or whole steps up to 1000",
        ),
        (lambda s: replace(s, floor=-0.1), "floor: -0.1 is not a factor of the peak: allowed is 0 to 1"),
        (
            lambda s: replace(s, rewarm=(Rewarm(at=50, steps=10),)),
            "rewarm.0: 10 steps from step 50 on do not fit: one step or more, between step 100 (the end of the warm-up "
            "before) and the run's 1000 steps",
        ),
        (
            lambda s: replace(s, rewarm=(Rewarm(at=200, steps=10), Rewarm(at=995, steps=10))),
            "rewarm.1: 10 steps from step 995 on do not fit: one step or more, between step 210 (the end of the "
            "warm-up before) and the run's 1000 steps",
        ),
        (
            lambda s: replace(s, rewarm=(Rewarm(at=200, steps=10, start=2.0),)),
            "rewarm.0: start 2 is not a factor of the peak: allowed is 0 to 1",
        ),
    ],
)
def test_what_makes_no_schedule_is_one_line(make, line):
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        make(Schedule(steps=1000, warmup=100, decay=0.2))
