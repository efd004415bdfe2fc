"""Hundreds of small jobs: few calls of the scheduler, none lost."""

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "growmerge"))

from daemons import until
from small import merge
from toy import PIPELINE, growmerge, write_toy

from slurm.executor import Job
from slurm.graph import Planned, submit_all
from slurm.queue import queued

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "scancel")
GRID = """\
stages:
  swe: {train: {from: scratch, data: swe, training: {steps: 2}}}
  est: {train: {from: scratch, data: est, training: {steps: 2}}}
  "m{w}":
    each: {w: [WEIGHTS]}
    merge: {from: [swe, est], method: linear, weights: [1, "{w}"]}
evaluation: {pairs: 2, resamples: 100, sample_tokens: 2}
resources: {ranks: 1, threads: 1, minutes: 30, per_job: 25, profile: virtual}
"""


@pytest.fixture
def calls(tmp_path, monkeypatch, cluster):
    """Count the calls of SLURM's commands that this process and its children make."""
    place, log = tmp_path / "bin", tmp_path / "calls"
    place.mkdir()
    log.touch()
    for name in COMMANDS:
        script = place / name
        script.write_text(f'#!/bin/sh\necho {name} >> {log}\nexec {shutil.which(name)} "$@"\n')
        script.chmod(0o755)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return lambda: log.read_text().split()


@pytest.mark.parametrize(
    "many", [pytest.param(16, marks=pytest.mark.covered), pytest.param(200, marks=pytest.mark.slow)]
)
def test_jobs_of_a_second_are_one_array_and_none_is_lost(tmp_path, calls, many):
    jobs = {
        f"merge-{number}": Planned(
            job=Job(
                name=f"merge-{number}",
                function=merge,
                arguments=(tmp_path / f"merged-{number}",),
                ranks=1,
                threads=1,
                minutes=5,
                slurm={"mem-per-cpu": 500},
                setup=(f"export PYTHONPATH={shlex.quote(str(Path(__file__).parent))}",),
                failures=tmp_path / "failures",
            )
        )
        for number in range(many)
    }
    after = Planned(job=Job(**{**vars(jobs["merge-0"].job), "arguments": (tmp_path / "report",)}), after=tuple(jobs))
    began = time.monotonic()
    taken = submit_all({**jobs, "report": after}, tmp_path / "logs")
    print(f"submitted in {time.monotonic() - began:.1f} s")
    assert calls().count("sbatch") == 2 and "squeue" not in calls()  # jobs that have begun ask for their nodes' names
    assert len({one.ids for one in taken.values()}) == many + 1
    ids = [one.ids[0] for one in taken.values()]
    assert set(queued(ids)) <= set(ids)
    until("all to end", lambda: not queued(ids), 500)
    assert [name for name in jobs if not (tmp_path / name.replace("merge", "merged")).exists()] == []
    assert (tmp_path / "report").exists()
    assert calls().count("sbatch") == 2 and "sacct" not in calls()


@pytest.mark.slow
def test_200_merges_of_a_pipeline_share_jobs_and_calls(tmp_path, calls, cluster):
    text = PIPELINE[: PIPELINE.index("stages:")] + GRID.replace("WEIGHTS", ", ".join(f"'{1 + n}'" for n in range(200)))
    path = write_toy(tmp_path, text)
    began = time.monotonic()
    found = growmerge("run", str(path), "--executor", "slurm", "--detach", cwd=tmp_path)
    print(f"submitted in {time.monotonic() - began:.1f} s")
    assert found.returncode == 0, found.stderr
    asked = calls()
    assert asked.count("sbatch") <= 14 and len(asked) <= 20
    began = time.monotonic()
    shown = growmerge("status", str(tmp_path / "runs" / "toy"))
    print(f"status of 407 stages in {time.monotonic() - began:.1f} s")
    assert shown.returncode == 0 and "m200" in shown.stdout
    assert calls().count("squeue") - asked.count("squeue") == 1
    done = growmerge("run", str(path), "--executor", "slurm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    models = [model for model in (tmp_path / "runs" / "toy" / "models").iterdir() if model.name.startswith("m")]
    assert len(models) == 200 and all((model / "model.safetensors").is_file() for model in models)
