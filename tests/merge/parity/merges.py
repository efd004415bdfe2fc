"""Runs cases: models and recipes are written, mergekit merges them all in one process, ours merges here."""

import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from growmerge.merging import Models, apply_file
from merge.merge import MergedSource
from parity.cases import Case
from parity.environment import mergekit_python
from parity.folders import make_models

VARIANTS = {
    "float32": (torch.float32, "dtype: float32\n"),
    "bfloat16": (torch.bfloat16, "dtype: bfloat16\n"),
    "float64": (torch.bfloat16, "dtype: float64\n"),
    "float32 as it is": (torch.float32, ""),
    "bfloat16 as it is": (torch.bfloat16, ""),
}
"""A name -> the models' dtype, and what is added to the recipe."""


@dataclass(frozen=True)
class Run:
    """A recipe on models of one dtype."""

    case: Case
    variant: str

    @property
    def name(self) -> str:
        return f"{self.case.name}: {self.variant}"


class Merges:
    """Recipes that mergekit has run; what it made lies in a folder."""

    def __init__(self, folder: Path, runs: Iterable[Run]) -> None:
        """Run them.

        Raises:
            NoMergekit: it cannot be installed.
            RuntimeError: it does not run.
        """
        self._folder = folder
        self._places = {run: number for number, run in enumerate(runs)}
        jobs = [self._job(run) for run in self._places]
        self._done = dict(zip(self._places, run_mergekit(folder, jobs), strict=True))

    def _job(self, run: Run) -> dict[str, object]:
        models, path = self._models(run), self._recipe(run)
        if not models.exists():
            make_models(models, run.case.models, VARIANTS[run.variant][0])
        path.write_text(run.case.recipe + VARIANTS[run.variant][1])
        return {"folder": str(models), "recipe": str(path), "out": str(self.out(run)), "seed": 1}

    def _models(self, run: Run) -> Path:
        return self._folder / f"{run.case.models} {VARIANTS[run.variant][0]}".replace("torch.", "")

    def _recipe(self, run: Run) -> Path:
        return self._models(run) / f"{self._places[run]}.yaml"

    def out(self, run: Run) -> Path:
        """Return where mergekit writes to."""
        return self._folder / f"out-{self._places[run]}"

    def error(self, run: Run) -> str | None:
        """Return how mergekit failed."""
        return self._done[run]

    def theirs(self, run: Run) -> dict[str, torch.Tensor]:
        """Return the tensors that mergekit made."""
        assert self.error(run) is None, f"mergekit fails: {self.error(run)}"
        return load_file(self.out(run) / "model.safetensors")

    def config(self, run: Run) -> dict[str, Any]:
        """Return the config that mergekit wrote."""
        found: dict[str, Any] = json.loads((self.out(run) / "config.json").read_text())
        return found

    def ours(self, run: Run) -> tuple[MergedSource, Models]:
        """Return the same file, merged by this project.

        Raises:
            InputError: it is refused.
        """
        applied, models = apply_file(self._recipe(run))
        return applied.merged, models


def run_mergekit(folder: Path, jobs: list[dict[str, object]]) -> Iterator[str | None]:
    """Merge with mergekit and return what came of each job: its error, or None."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("run_mergekit.py")
    # Models in a set: without a seed, the config of a merge without a base is another one each time.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [mergekit_python(), script, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"mergekit does not run: {done.stderr[-2000:]}")
    return map(json.loads, done.stdout.splitlines())
