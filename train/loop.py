"""One training run: resume if there is something to resume from, step, log, evaluate, checkpoint."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.files import disk_errors, write_bytes
from checkpoint.source import NewRun, Source, WithoutState
from checkpoint.zero3 import open_zero3
from parallel.errors import InputError
from parallel.faults import point
from parallel.ranks import Ranks
from train.checkpointing import clear_after, newest, prune
from train.engine import Engine, EngineConfig
from train.schedule import wsd

Evaluate = Callable[[torch.nn.Module], Mapping[str, Any]]
"""Scores the running model; called by all ranks together, returns the same plain data on each."""
METRICS = "metrics.jsonl"
Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How a run trains; what each field means and its unit: growmerge.schema.Training."""

    steps: int
    sequence_length: int
    global_batch: int
    micro_batch: int | None
    lr: float
    warmup: int
    decay: float
    decay_shape: str
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    precision: str
    checkpoint_every: int
    evaluate_every: int
    dynamics: str = "free"

    def batching(self, world_size: int) -> tuple[int, int]:
        """Return (samples a rank and a pass, passes a step) so that all ranks together cover the global batch."""
        share = -(-self.global_batch // world_size)
        micro = min(self.micro_batch or share, share)
        return micro, -(-share // micro)

    def evaluates_at(self, step: int) -> bool:
        inside = self.evaluate_every > 0 and step % self.evaluate_every == 0
        return step in (0, self.steps) or inside

    def saves_at(self, step: int) -> bool:
        return step == self.steps or step % self.checkpoint_every == 0


def last_checkpoint(folder: Path, steps: int) -> Path:
    """Return the final checkpoint of a run of so many steps; nothing deletes it."""
    return folder / "checkpoints" / f"step-{steps:08d}"


def train(
    start: Callable[[], Source],
    plan: RunPlan,
    sample: Callable[[int], np.ndarray],
    ranks: Ranks,
    folder: Path,
    *,
    seed: int,
    files: Mapping[str, bytes],
    evaluate: Evaluate,
    report: Report,
    keep: int = 2,
    keep_optimizer: bool = False,
) -> Path:
    """Train until the plan's last step and return the final checkpoint's folder; all ranks call this together.

    The run is exactly resumable: after a kill at any moment the same call goes on from the newest sound checkpoint and
    ends with the very numbers of an undisturbed run (at the same number of ranks, on the same machine).

    Args:
        start: opens the source to start from, if there is nothing to resume.
        sample: global sample number -> tokens [sequence_length + 1]; a pure function.
        folder: holds `checkpoints/` and `metrics.jsonl` (a line a step and a line an evaluation).
        files: small files stored in every checkpoint (config.json).
        evaluate: called before the first step, after the last, and every `evaluate_every` steps.
        report: told of progress, on rank 0.
        keep: checkpoints kept; with two, a damaged newest one costs the steps since the one before it.
        keep_optimizer: whether Adam's moments and step counts of the source to start from go on; the run's own step,
            tokens and schedule begin at 0 all the same.

    Raises:
        InputError: a non-finite loss; a full disk; a source that does not fit the model.
    """
    checkpoints = folder / "checkpoints"
    found, damaged = ranks.broadcast(newest(checkpoints) if ranks.first else None)
    for line in damaged if ranks.first else []:
        report({"event": "warning", "text": f"passed over a damaged checkpoint: {line}"})
    if ranks.first:
        clear_after(checkpoints, found)
    begin = NewRun if keep_optimizer else WithoutState
    source: Source = begin(start()) if found is None else open_zero3(found)
    first, known = 0, b""
    if found is not None:
        assert source.run.seed == seed, f"checkpoint of seed {source.run.seed}, run of seed {seed}"
        first, known = source.run.step, (found / METRICS).read_bytes()
    log = Metrics(folder / METRICS, known=known, ranks=ranks)
    if found is not None and first == plan.steps:
        log.close()
        return found
    micro, passes = plan.batching(ranks.world_size)
    engine = Engine(source, _engine_config(plan, micro, passes), ranks)
    del source  # and with it the mapping of files that are pruned later
    scored = plan.global_batch * plan.sequence_length

    def evaluate_now(step: int) -> None:
        engine.model.eval()
        log.write({"step": step, "tokens": step * scored, "evaluation": evaluate(engine.model)})

    if found is None:
        evaluate_now(0)
    began, behind = time.monotonic(), first
    for step in range(first, plan.steps):
        rate = plan.lr * wsd(step, steps=plan.steps, warmup=plan.warmup, decay=plan.decay, shape=plan.decay_shape)
        batches = [
            load_batch(sample, step, number, micro=micro, passes=passes, plan=plan, ranks=ranks)
            for number in range(passes)
        ]
        total = torch.tensor([engine.step(batches, rate, scored)], dtype=torch.float64)
        loss = float(ranks.sum(total)) / scored
        if not math.isfinite(loss):
            first_sample = step * plan.global_batch
            raise InputError(
                f"the loss is not finite at step {step + 1} (samples {first_sample} to "
                f"{first_sample + plan.global_batch - 1}); lower the learning rate ({rate:g}) or look at this text"
            )
        done = step + 1
        point(f"step/{done}")
        log.write({"step": done, "tokens": done * scored, "loss": loss, "lr": rate, "grad_norm": engine.grad_norm})
        if ranks.first:
            speed = (done - behind) * scored / (time.monotonic() - began)
            report({"event": "step", "step": done, "steps": plan.steps, "loss": loss, "tokens_per_second": speed})
        if plan.evaluates_at(done):
            evaluate_now(done)
        if plan.saves_at(done):
            state = {"tokens": done * scored, "samples": done * plan.global_batch, "seed": seed}
            engine.save(checkpoints, f"step-{done:08d}", state, {**files, METRICS: log.content()})
            if ranks.first:
                prune(checkpoints, keep)
    engine.close()
    log.close()
    ranks.barrier()
    return last_checkpoint(folder, plan.steps)


def load_batch(
    sample: Callable[[int], np.ndarray],
    step: int,
    number: int,
    *,
    micro: int,
    passes: int,
    plan: RunPlan,
    ranks: Ranks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's samples of one pass (ids [B, T + 1], weights [B]).

    The samples of step s are [s * global_batch, (s + 1) * global_batch), whatever the topology; where the ranks'
    places outnumber them, the rest is filled with samples of weight 0.
    """
    places = range(ranks.rank * micro * passes + number * micro, ranks.rank * micro * passes + (number + 1) * micro)
    ids, weights = [], []
    for place in places:
        real = place < plan.global_batch
        ids.append(sample(step * plan.global_batch + (place if real else 0)))
        weights.append(1.0 if real else 0.0)
    return torch.from_numpy(np.stack(ids).astype(np.int64)), torch.tensor(weights)


def _engine_config(plan: RunPlan, micro: int, passes: int) -> EngineConfig:
    return EngineConfig(
        micro_batch=micro,
        accumulation=passes,
        lr=plan.lr,
        betas=plan.betas,
        eps=plan.eps,
        weight_decay=plan.weight_decay,
        clip=plan.clip,
        precision=plan.precision,
        dynamics=plan.dynamics,
    )


class Metrics:
    """The run's JSONL log, on rank 0. Every checkpoint holds a copy, with which a resumed run goes on."""

    def __init__(self, path: Path, *, known: bytes, ranks: Ranks) -> None:
        self._path = path
        self._file = None
        if ranks.first:
            write_bytes(path, known)
            self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            with disk_errors(self._path):
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()

    def content(self) -> bytes:
        return b"" if self._file is None else self._path.read_bytes()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines
