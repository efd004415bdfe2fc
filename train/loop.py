"""One training run: resume if there is something to resume from, step, log, evaluate, checkpoint."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
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
from train import alarms, guard, measure
from train.batch import Batch, SampleAt, batch_of
from train.checkpointing import clear_after, newest
from train.engine import Engine, Step
from train.pipeline import PipelineEngine
from train.plan import RunPlan
from train.schedule import Schedule
from train.signals import StopRequest, Watchdog
from train.tracker import METRICS, Tracker

Evaluate = Callable[[Any, Ranks], Mapping[str, Any]]
"""Scores the running model; called by all ranks together, returns the same plain data on each. The second argument
says how the text is shared: ranks of one place in it have to score the same at the same time."""
Report = Callable[[Mapping[str, Any]], None]
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
        keep_optimizer: whether Adam's moments and step counts of the source to start from go on; the run's own step,
            tokens and schedule begin at 0 all the same.
        branch_from: a checkpoint of a run's stable phase; this run goes on from its step, decaying over the steps that
            the plan has beyond it.
        about: of the run, for the tracker.

    Raises:
        InputError: bad steps in a row; a last checkpoint that could not be written; a source that does not fit.
    """
    while True:
        run = _Run(start, plan, sample, ranks, folder, seed, files, evaluate, report, corpora, about)
        with StopRequest() as stop:
            result = run.go(stop, keep_optimizer=keep_optimizer, branch_from=branch_from)
        if result is not None:
            return result


class _Run:
    """A run between two starts: what does not change from step to step."""

    def __init__(
        self,
        start: Callable[[], Source],
        plan: RunPlan,
        sample: SampleAt,
        ranks: Ranks,
        folder: Path,
        seed: int,
        files: Mapping[str, bytes],
        evaluate: Evaluate,
        report: Report,
        corpora: tuple[str, ...],
        about: Mapping[str, Any] | None,
    ) -> None:
        self.start, self.plan, self.sample, self.ranks, self.folder = start, plan, sample, ranks, folder
        self.seed, self.files, self.evaluate, self.report = seed, files, evaluate, report
        self.corpora, self.about = corpora, about
        self.checkpoints = folder / "checkpoints"
        self.mesh = plan.mesh(ranks.world_size)
        self.passes = plan.batching(self.mesh.dp)[1]
        self.bounds = tuple(plan.bounds())
        self.turned: Mapping[str, int] | None = None
        """Where an alarm turned the run into a branch, and how long that is."""
        self.sound = 0
        """The last step that was saved while no alarm rang."""

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
        self.log = self._open_log(begin, source)
        if found is not None and source.run.step == rates.steps:
            self.log.close()
            return Result(checkpoint=found, finished=True)
        self.flops = measure.flops_per_token(source.config, self.plan.sequence_length)
        first = 0 if begin is None else source.run.step
        guarded = guard.from_plain(source.run.extra.get("guard") if begin is not None else None)
        kind = PipelineEngine if self.mesh.pp > 1 else Engine
        self.engine = kind(
            source,
            self.plan.engine(self.mesh),
            self.ranks,
            background=self._in_background(source),
            keep=self.plan.keep,
            every=self.plan.keep_every,
        )
        del source  # and with it the mapping of files that are pruned later
        self.watchdog = Watchdog(self.plan.stall_minutes)
        try:
            if begin is None:
                self._evaluate(0)
            result = self._steps(first, rates, guarded, stop)
        finally:
            self.watchdog.close()
            self.log.close()
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

    def _open_log(self, begin: Path | None, source: Source) -> Tracker:
        known = (begin / METRICS).read_bytes() if begin is not None and (begin / METRICS).is_file() else b""
        scores = [line["evaluation"] for line in read_lines(known) if "evaluation" in line]
        self.first_scores = alarms.bits_per_byte(scores[0]) if scores and self.bounds else {}
        return Tracker(
            self.plan.tracker,
            self.folder,
            first=self.ranks.first,
            warn=lambda text: self.report({"event": "warning", "text": text}),
            known=known,
            state=source.run.extra.get("tracker") if begin is not None else None,
            config=self.about,
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
            self._log(taken, done, rates, verdict, guarded.skipped, time.perf_counter() - began)
            if (why := guard.reason_to_stop(guarded, limits)) is not None:
                raise InputError(why)
            if done == rates.steps and not math.isfinite(taken.loss):
                raise InputError(f"the loss is not finite at the last step ({done}): lower the learning rate")
            rung = self._evaluate(done) if plan.evaluates_at(done, rates.steps) else []
            asked = bool(self.ranks.sum(torch.tensor([float(stop.asked)])))
            halt = asked or any(alarm.bound.action == "stop" for alarm in rung)
            if plan.saves_at(done, rates.steps) or halt:
                self._save(done, guarded)
                self.sound = self.sound if rung else done
            if halt and done < rates.steps:
                self._settle(final=True)
                texts = [alarm.text for alarm in rung if alarm.bound.action == "stop"]
                stopped = texts[0] if texts else None
                return Result(checkpoint=last_checkpoint(self.folder, done), finished=False, stopped=stopped)
            if any(alarm.bound.action == "branch" for alarm in rung) and self.turned is None and self.sound:
                self._settle(final=False)
                self._turn(max(1, rates.decay_steps))
                return None
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

    def _log(
        self, taken: Step, done: int, rates: Schedule, verdict: guard.Verdict, skipped: int, seconds: float
    ) -> None:
        plan = self.plan
        tokens = plan.global_batch * plan.sequence_length
        line: dict[str, Any] = {
            "step": done,
            "tokens": done * tokens,
            "loss": taken.loss,
            "lr": plan.lr * rates.factor(done - 1),
            "grad_norm": taken.grad_norm,
        }
        if len(self.corpora) > 1:
            counts = taken.counts.tolist()
            means = zip(self.corpora, taken.losses.tolist(), counts, strict=True)
            line["losses"] = {name: total / count for name, total, count in means if count}
        if skipped:
            line["skipped"] = skipped
        if verdict.skip:
            line["skip"] = verdict.reason
            self.report({"event": "warning", "text": f"step {done} skipped: {verdict.reason}"})
        peak = measure.peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        timing = measure.speed(tokens, seconds, flops_a_token=self.flops, devices=self.ranks.world_size, peak=peak)
        self.log.write(line, {**timing, **measure.peak_memory(), **self._saved()})
        if self.ranks.first:
            speed = {"tokens_per_second": tokens / seconds}
            self.report({"event": "step", "step": done, "steps": rates.steps, "loss": taken.loss, **speed})

    def _evaluate(self, step: int) -> list[alarms.Alarm]:
        """Score held-out text, log it, and return the alarms that ring."""
        self.watchdog.progress()
        self.engine.model.eval()
        found = dict(self.evaluate(self.engine.model, self.engine.readers))
        self.log.write({"step": step, "tokens": step * self._tokens(), "evaluation": found})
        if not self.bounds:
            return []
        now = alarms.bits_per_byte(found)
        if not self.first_scores:
            self.first_scores = now
        rung = alarms.check(self.bounds, self.first_scores, now)
        for alarm in rung if self.ranks.first else []:
            self.report({"event": "warning", "text": f"step {step}: {alarm.text}"})
        return rung

    def _tokens(self) -> int:
        """Tokens of a step."""
        return self.plan.global_batch * self.plan.sequence_length

    def _save(self, done: int, guarded: guard.State) -> None:
        self._settle(final=False)
        state = {
            "tokens": done * self._tokens(),
            "samples": done * self.plan.global_batch,
            "seed": self.seed,
            "extra": {"guard": guard.as_plain(guarded), "tracker": self.log.state()},
        }
        files = {**self.files, METRICS: self.log.content()}
        self.engine.save(self.checkpoints, f"step-{done:08d}", state, files)

    def _settle(self, *, final: bool) -> None:
        """Learn how the last save ended; a run goes on without it, unless it was the last."""
        self.watchdog.progress()
        outcomes = self.engine.settle()
        for outcome in outcomes:
            if outcome.complete:
                self._last_save = outcome.record
            if outcome.error is not None and self.ranks.first:
                what = "saved, but" if outcome.complete else "not saved:"
                self.report({"event": "warning", "text": f"{what} {outcome.error}"})
        if final and outcomes and not outcomes[-1].complete:
            raise InputError(str(outcomes[-1].error))

    _last_save: Mapping[str, float] | None = None

    def _saved(self) -> dict[str, Any]:
        """Return the times of a save that ended since the last step, for the log."""
        found, self._last_save = self._last_save, None
        return {} if found is None else {"save": dict(found)}

    def _turn(self, steps: int) -> None:
        """Go back to the last sound checkpoint, to decay from there."""
        self.engine.close()
        if self.ranks.first:
            write_json(self.folder / BRANCH, {"at": self.sound, "steps": steps})
            clear_after(self.checkpoints, last_checkpoint(self.folder, self.sound))
            self.report({"event": "warning", "text": f"decaying from step {self.sound} over {steps} steps"})
        self.ranks.barrier()


def read_lines(data: bytes) -> list[dict[str, Any]]:
    """Return JSON lines; a last one that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    for text in data.decode("utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file."""
    return read_lines(path.read_bytes()) if path.is_file() else []
