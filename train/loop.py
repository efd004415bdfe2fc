"""One training run: resume if there is something to resume from, step, log, evaluate, checkpoint."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import read_json, write_json
from checkpoint.open import open_checkpoint
from checkpoint.source import NewRun, Source, WithoutState
from parallel.errors import InputError
from parallel.faults import point
from parallel.memory import available_memory
from parallel.ranks import Ranks
from train import guard
from train.alarms import Alarm
from train.batch import Batch, SampleAt, batch_of
from train.checkpointing import clear_after, newest
from train.engine import Engine, Step
from train.pipeline import PipelineEngine
from train.plan import RunPlan
from train.record import Record, Report
from train.schedule import Schedule
from train.signals import StopRequest, Watchdog, time_left
from train.tracker import METRICS, Tracker

Evaluate = Callable[[Any, Ranks], Mapping[str, Any]]
"""Scores the running model; called by all ranks together, returns the same plain data on each. The second argument
says how the text is shared: ranks of one place in it have to score the same at the same time."""
LEAD, LEAD_S = 3.0, 60.0
"""How long before a job's end a run saves and stops: so many times what a save takes, and at least so many seconds."""
SLOW_DISK = 200e6
"""Bytes a second that a rank is taken to write before a save has shown how many it does."""
BRANCH = "branch.json"
"""Where a run that an alarm turned into a decay branch remembers the step that it branched at, and the length."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a call of `train` ended."""

    checkpoint: Path
    """The newest checkpoint."""
    finished: bool
    """Whether the run has all its steps, or was asked to stop before."""
    stopped: str | None = None
    """The alarm that ended the run early."""


def last_checkpoint(folder: Path, steps: int) -> Path:
    """Return the final checkpoint of a run of so many steps; nothing deletes it."""
    return folder / "checkpoints" / f"step-{steps:08d}"


def train(
    start: Callable[[], Source],
    plan: RunPlan,
    sample: SampleAt,
    ranks: Ranks,
    folder: Path,
    *,
    seed: int,
    files: Mapping[str, bytes],
    evaluate: Evaluate,
    report: Report,
    corpora: tuple[str, ...] = ("",),
    bytes_seen: Callable[[int], int] | None = None,
    keep_optimizer: bool = False,
    branch_from: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> Result:
    """Train until the plan's last step; all ranks call this together.

    The run is exactly resumable: after a kill at any moment the same call goes on from the newest sound checkpoint and
    ends with the very numbers of an undisturbed run (at the same number of ranks, on the same machine).

    Args:
        start: opens the source to start from, if there is nothing to resume.
        sample: from a global sample number to the sample; a pure function.
        folder: holds `checkpoints/`, `metrics.jsonl` (a line a step and a line an evaluation) and `timings.jsonl`.
        files: small files stored in every checkpoint (config.json).
        evaluate: called before the first step, after the last, and every `evaluate_every` steps.
        report: told of progress, on rank 0.
        corpora: names of the samples' corpora, whose losses are logged apart.
        bytes_seen: from a number of samples to the bytes of text that the first so many hold.
        keep_optimizer: whether Adam's moments and step counts of the source to start from go on; the run's own step,
            tokens and schedule begin at 0 all the same.
        branch_from: a checkpoint of a run's stable phase; this run goes on from its step, decaying over the steps that
            the plan has beyond it.
        about: of the run, for the tracker.

    Raises:
        InputError: bad steps in a row; a last checkpoint that could not be written; a source that does not fit.
    """
    with StopRequest() as stop:
        while True:
            run = _Run(
                start=start,
                plan=plan,
                sample=sample,
                ranks=ranks,
                folder=folder,
                seed=seed,
                files=files,
                evaluate=evaluate,
                report=report,
                corpora=corpora,
                bytes_seen=bytes_seen,
                about=about,
            )
            result = run.go(stop, keep_optimizer=keep_optimizer, branch_from=branch_from)
            if result is not None:
                return result


@dataclass(kw_only=True)
class _Run:
    """A run between two starts; the fields are those of `train`."""

    start: Callable[[], Source]
    plan: RunPlan
    sample: SampleAt
    ranks: Ranks
    folder: Path
    seed: int
    files: Mapping[str, bytes]
    evaluate: Evaluate
    report: Report
    corpora: tuple[str, ...]
    bytes_seen: Callable[[int], int] | None
    about: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        self.checkpoints = self.folder / "checkpoints"
        self.mesh = self.plan.mesh(self.ranks.world_size)
        self.passes = self.plan.batching(self.mesh.dp)[1]
        self.turned: Mapping[str, int] | None = None
        """Where an alarm turned the run into a branch, and how long that is."""
        self.sound = 0
        """The last step that was saved while no alarm asked for a branch."""
        self.save_s = 0.0
        """Seconds from the begin of a save to its end, the longest so far; before the first one a guess."""
        self.longest_s = 0.0
        """Seconds of a step and what comes with it, such as an evaluation, the longest so far."""

    def go(self, stop: StopRequest, *, keep_optimizer: bool, branch_from: Path | None) -> Result | None:
        """Train; None when an alarm has turned the run into a branch, which starts anew."""
        found, damaged = self.ranks.broadcast(newest(self.checkpoints) if self.ranks.first else None)
        if self.ranks.first:
            for line in damaged:
                self.report({"event": "warning", "text": f"passed over a damaged checkpoint: {line}"})
            clear_after(self.checkpoints, found)
        begin = found or branch_from
        fresh = NewRun if keep_optimizer else WithoutState
        source: Source = fresh(self.start()) if begin is None else open_checkpoint(begin)
        assert found is None or source.run.seed == self.seed, f"seed {source.run.seed}, run of seed {self.seed}"
        rates = self._rates(branch_from)
        self.record = self._open_record(begin, source, resumes=found is not None)
        if found is not None and source.run.step == rates.steps:
            self.record.close()
            return Result(checkpoint=found, finished=True)
        first = 0 if begin is None else source.run.step
        guarded = guard.from_plain(source.run.extra.get("guard") if begin is not None else None)
        self.sound = 0 if found is None else source.run.extra.get("sound", first)
        kind = PipelineEngine if self.mesh.pp > 1 else Engine
        self.engine = kind(
            source,
            self.plan.engine(self.mesh),
            self.ranks,
            background=self._in_background(source),
            keep=self.plan.keep,
            every=self.plan.keep_every,
            patience_s=self.plan.patience_s,
        )
        del source  # and with it the mapping of files that are pruned later
        self.save_s = self.save_s or self.engine.expected_bytes / SLOW_DISK
        self.watchdog = Watchdog(self.plan.stall_minutes)
        try:
            if begin is None:
                began = time.perf_counter()
                self._evaluate(0)
                self.longest_s = time.perf_counter() - began
            result = self._steps(first, rates, guarded, stop)
        finally:
            self.watchdog.close()
            self.record.close()
        self.engine.close()
        self.ranks.barrier()
        return result

    def _in_background(self, source: Source) -> bool:
        """Return whether saves are copied first: where that is left open, if all nodes have the memory for it."""
        if self.plan.saves != "auto":
            return self.plan.saves == "background"
        elements = sum(math.prod(info.shape) for info in source.infos.values() if info.tied_to is None)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.world_size))
        mine = local / self.ranks.world_size * elements * 4 * 3  # master and two moments, in float32
        # What the run itself will take in this memory, without GPUs, is weights, gradients and the same once more.
        taken = 0.0 if torch.cuda.is_available() else mine * 5 / 3
        return all(self.ranks.gather(mine < 0.5 * (available_memory() - taken)))

    def _rates(self, branch_from: Path | None) -> Schedule:
        plan, rates = self.plan, self.plan.rates
        if branch_from is not None:
            at = open_checkpoint(branch_from).run.step
            rates = replace(rates, steps=max(rates.steps, at + 1), decay=0.0)
            rates = rates.branch(at, plan.steps - at, shape=plan.decay_shape, floor=plan.floor)
        path = self.folder / BRANCH
        self.turned = self.ranks.broadcast(read_json(path) if self.ranks.first and path.is_file() else None)
        if self.turned is not None:
            rates = rates.branch(self.turned["at"], self.turned["steps"], shape=plan.decay_shape, floor=plan.floor)
        return rates

    def _open_record(self, begin: Path | None, source: Source, *, resumes: bool) -> Record:
        known = (begin / METRICS).read_bytes() if begin is not None and (begin / METRICS).is_file() else b""
        tracker = Tracker(
            self.plan.tracker,
            self.folder,
            first=self.ranks.first,
            warn=lambda text: self.report({"event": "warning", "text": text}),
            known=known,
            state=source.run.extra.get("tracker") if resumes else None,
            config=self.about,
        )
        return Record(
            tracker,
            self.plan,
            source,
            self.ranks,
            begun=begin is not None,
            corpora=self.corpora,
            bytes_seen=self.bytes_seen,
            report=self.report,
            known=known,
        )

    def _steps(self, first: int, rates: Schedule, guarded: guard.State, stop: StopRequest) -> Result | None:
        plan, limits = self.plan, self.plan.limits
        for step in range(first, rates.steps):
            self.watchdog.progress()
            began = time.perf_counter()
            taken, verdict = self._step(step, plan.lr * rates.factor(step), guarded.window)
            done = step + 1
            guarded = guard.after(
                guarded,
                verdict,
                loss=taken.loss,
                grad_norm=taken.grad_norm,
                step=done,
                samples=(step * plan.global_batch, done * plan.global_batch - 1),
                limits=limits,
            )
            point(f"step/{done}")
            took = time.perf_counter() - began
            self.record.step(
                taken, done, rates.steps, rates.factor(step), verdict, guarded.skipped, took, self._saved()
            )
            if (why := guard.reason_to_stop(guarded, limits)) is not None:
                raise InputError(why)
            if done == rates.steps and not math.isfinite(taken.loss):
                raise InputError(f"the loss is not finite at the last step ({done}): lower the learning rate")
            rung = self._evaluate(done) if plan.evaluates_at(done, rates.steps) else []
            branch = any(alarm.bound.action == "branch" for alarm in rung) and self.turned is None
            if branch and self._may_branch(rates):
                self._settle(final=False)
                self._turn(max(1, rates.decay_steps))
                return None
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            if (ended := self.engine.finished()) is not None:
                self.save_s = max(self.save_s, ended.blocked_s + ended.written_s)
            late = time_left() < max(LEAD_S, LEAD * self.save_s) + self.longest_s
            asked = bool(self.ranks.sum(torch.tensor([float(stop.asked or late)])))
            halt = asked or any(alarm.bound.action == "stop" for alarm in rung)
            if plan.saves_at(done, rates.steps) or halt:
                self.sound = self.sound if branch else done
                self._save(done, guarded)
            if halt and done < rates.steps:
                self._settle(final=True)
                texts = [alarm.text for alarm in rung if alarm.bound.action == "stop"]
                stopped = texts[0] if texts else None
                return Result(checkpoint=last_checkpoint(self.folder, done), finished=False, stopped=stopped)
        self._settle(final=True)
        return Result(checkpoint=last_checkpoint(self.folder, rates.steps), finished=True)

    def _step(self, step: int, rate: float, window: guard.Window) -> tuple[Step, guard.Verdict]:
        """Take one optimizer step, unless the guard vetoes it; all ranks decide alike."""
        batches = [self._batch(step, number) for number in range(self.passes)]
        # Dropout, too, is a function of seed and step: a resume needs no generator's state.
        torch.manual_seed(self.seed * 1_000_003 + step * 4099 + self.mesh.data_rank(self.ranks.rank))

        def keep(loss: float, norm: float) -> bool:
            return not guard.judge(window, loss, norm, self.plan.limits).skip

        taken = self.engine.step(batches, rate, corpora=len(self.corpora), keep=keep)
        return taken, guard.judge(window, taken.loss, taken.grad_norm, self.plan.limits)

    def _batch(self, step: int, number: int) -> Batch:
        """Return this rank's samples of one pass.

        The samples of step s are [s * global_batch, (s + 1) * global_batch), whatever the topology; where the ranks'
        places outnumber them, the rest is filled with samples of weight 0.
        """
        micro, passes = self.plan.batching(self.mesh.dp)
        begin = (self.mesh.data_rank(self.ranks.rank) * passes + number) * micro
        places = range(begin, begin + micro)
        real = [place < self.plan.global_batch for place in places]
        first = step * self.plan.global_batch
        return batch_of(
            [self.sample(first + (place if counts else 0)) for place, counts in zip(places, real, strict=True)], real
        )

    def _evaluate(self, step: int) -> list[Alarm]:
        """Score held-out text, log it, and return the alarms that ring."""
        self.watchdog.progress()
        self.engine.model.eval()
        found = dict(self.evaluate(self.engine.model, self.engine.readers))
        weights = self.engine.weights() if self.record.grown else None
        return self.record.evaluation(step, found, None if weights is None else self._watched(weights))

    def _watched(self, weights: Iterable[Any]) -> Iterator[Any]:
        """Let the watchdog know of each tensor that is looked at."""
        for each in weights:
            self.watchdog.progress()
            yield each

    def _save(self, done: int, guarded: guard.State) -> None:
        self._settle(final=False)
        state = {
            "tokens": done * self.plan.global_batch * self.plan.sequence_length,
            "samples": done * self.plan.global_batch,
            "seed": self.seed,
            "extra": {"guard": guard.as_plain(guarded), "sound": self.sound, **self.record.state()},
        }
        self.engine.save(self.checkpoints, f"step-{done:08d}", state, {**self.files, **self.record.files()})

    def _settle(self, *, final: bool) -> None:
        """Learn how the last save ended; a run goes on without it, unless it was the last."""
        self.watchdog.progress()
        outcomes = self.engine.settle()
        for outcome in outcomes:
            if outcome.complete:
                self._last_save = outcome.record
                self.save_s = max(self.save_s, outcome.blocked_s + outcome.written_s)
            if outcome.error is not None and self.ranks.first:
                what = "saved, but" if outcome.complete else "not saved:"
                self.report({"event": "warning", "text": f"{what} {outcome.error}"})
        if final and outcomes and not outcomes[-1].complete:
            raise InputError(str(outcomes[-1].error))

    _last_save: Mapping[str, float] | None = None

    def _saved(self) -> Mapping[str, float] | None:
        """Return the times of a save that ended since the last step, for the log."""
        found, self._last_save = self._last_save, None
        return found

    def _may_branch(self, rates: Schedule) -> bool:
        """Return whether the run can decay from its last sound checkpoint; if not, that is said."""
        why = "no checkpoint yet"
        if self.sound:
            try:
                rates.branch(self.sound, max(1, rates.decay_steps), shape=self.plan.decay_shape, floor=self.plan.floor)
                return True
            except InputError as error:
                why = str(error)
        if self.ranks.first:
            self.report({"event": "warning", "text": f"the alarm cannot turn the run into a branch: {why}"})
        return False

    def _turn(self, steps: int) -> None:
        """Go back to the last sound checkpoint, to decay from there."""
        if self.ranks.first:
            write_json(self.folder / BRANCH, {"at": self.sound, "steps": steps})
            clear_after(self.checkpoints, last_checkpoint(self.folder, self.sound))
            self.report({"event": "warning", "text": f"decaying from step {self.sound} over {steps} steps"})
        self.ranks.barrier()
