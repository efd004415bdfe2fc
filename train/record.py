"""What a run logs: a line a step and a line an evaluation, for rank 0 and the tracker."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from checkpoint.source import Source
from parallel.ranks import Ranks
from train import alarms, guard, measure
from train.engine import Step
from train.plan import RunPlan
from train.tracker import METRICS, Tracker, read_lines

Report = Callable[[Mapping[str, Any]], None]
GROWN = "grown"
"""In a checkpoint's state: the factors by which the run's model was grown before its first step."""


class Record:
    """The log of a run between two starts."""

    def __init__(
        self,
        tracker: Tracker,
        plan: RunPlan,
        source: Source,
        ranks: Ranks,
        *,
        begun: bool,
        corpora: tuple[str, ...],
        bytes_seen: Callable[[int], int] | None,
        report: Report,
        known: bytes,
    ) -> None:
        """Begin.

        Args:
            source: what the engine is filled from.
            begun: whether that is a checkpoint of this run.
            known: metrics.jsonl of that checkpoint.
        """
        self._tracker, self._plan, self._ranks, self._corpora = tracker, plan, ranks, corpora
        self._bytes_seen, self._report = bytes_seen, report
        self._flops = measure.flops_per_token(source.config, plan.sequence_length)
        self._peak = measure.peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self._blocks = measure.blocks(source.config)
        run = source.run
        self.grown = run.extra.get(GROWN) if begun else measure.factors_of(run.provenance)
        self._growths = measure.growths_of(self.grown, source.config) if self.grown else {}
        self._first: dict[str, float] = {}
        for line in read_lines(known):
            if "evaluation" in line:
                self._first = {**alarms.bits_per_byte(line["evaluation"]), **self._first}
        self.bounds = plan.bounds()

    def step(
        self,
        taken: Step,
        done: int,
        steps: int,
        factor: float,
        verdict: guard.Verdict,
        skipped: int,
        seconds: float,
        saved: Mapping[str, float] | None,
    ) -> None:
        """Log a step.

        Args:
            done: steps taken, this one included.
            steps: of the whole run.
            factor: of the peak learning rate.
            skipped: steps skipped so far.
            saved: times of a save that ended since the last step.
        """
        if not self._ranks.first:
            return
        plan = self._plan
        tokens = plan.global_batch * plan.sequence_length
        line: dict[str, Any] = {"step": done, "tokens": done * tokens}
        if self._bytes_seen is not None:
            line["bytes"] = self._bytes_seen(done * plan.global_batch)
        line |= {"loss": taken.loss, "lr": plan.lr * factor, "grad_norm": taken.grad_norm}
        if len(self._corpora) > 1:
            means = zip(self._corpora, taken.losses.tolist(), taken.counts.tolist(), strict=True)
            line["losses"] = {name: total / count for name, total, count in means if count}
        if skipped:
            line["skipped"] = skipped
        if verdict.skip:
            line["skip"] = verdict.reason
            self._report({"event": "warning", "text": f"step {done} skipped: {verdict.reason}"})
        timing = {
            **measure.speed(
                tokens, seconds, flops_a_token=self._flops, devices=self._ranks.world_size, peak=self._peak
            ),
            **measure.peak_memory(),
            **({} if saved is None else {"save": dict(saved)}),
            # By the run alone, but too long for what every checkpoint has a copy of.
            "grad_norms": {
                block: float(f"{norm:.4g}") for block, norm in measure.block_norms(taken.squares, self._blocks).items()
            },
        }
        self._tracker.write(line, timing)
        speed = {"tokens_per_second": tokens / seconds}
        self._report({"event": "step", "step": done, "steps": steps, "loss": taken.loss, **speed})

    def evaluation(
        self, step: int, found: Mapping[str, Any], weights: Iterator[tuple[str, torch.Tensor]] | None
    ) -> list[alarms.Alarm]:
        """Log held-out scores, and return the alarms that ring; all ranks together.

        Args:
            found: what evaluation returned.
            weights: of a grown model, one whole tensor after the other, for how far its copies are apart.
        """
        line: dict[str, Any] = {"step": step, "tokens": step * self._plan.global_batch * self._plan.sequence_length}
        scores = alarms.bits_per_byte(found)
        if self._growths and weights is not None:
            if self._ranks.first:
                apart = measure.clone_asymmetries(weights, self._growths, self._blocks)
                line["clone_asymmetry"] = {block: float(f"{value:.4g}") for block, value in apart.items()}
            else:
                deque(weights, maxlen=0)  # all ranks gather them
        self._tracker.write({**line, "bits_per_byte": scores, "evaluation": found})
        if not self.bounds:
            return []
        self._first = {**scores, **self._first}
        rung = alarms.check(self.bounds, self._first, scores)
        for alarm in rung if self._ranks.first else []:
            self._report({"event": "warning", "text": f"step {step}: {alarm.text}"})
        return rung

    def state(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's state."""
        return {"tracker": self._tracker.state(), **({GROWN: dict(self.grown)} if self.grown else {})}

    def files(self) -> dict[str, bytes]:
        """Return the files that a checkpoint has of the log."""
        return {METRICS: self._tracker.content()}

    def close(self) -> None:
        self._tracker.close()
