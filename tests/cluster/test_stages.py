"""Pipelines on a real SLURM: a job a stage over two nodes, and what happens when jobs are stopped, killed and fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "growmerge"))

from toy import PIPELINE, command, growmerge, numbers, write_toy

from train.tracker import read_metrics

pytestmark = pytest.mark.slow
SMALL = (
    PIPELINE[: PIPELINE.index("stages:")]
    + """\
stages:
  seed: {train: {from: scratch, data: first, training: {steps: 30}}}
  swe: {train: {from: seed, data: swe, training: {steps: 6}}}
  est: {train: {from: seed, data: est, training: {steps: 6}}}
  both: {merge: {from: [swe, est], method: linear}}
evaluation: {pairs: 10, resamples: 200, sample_tokens: 5}
resources: {ranks: 2, threads: 1}
"""
)
ON_CLUSTER = "resources: {ranks: 2, nodes: 2, threads: 1, minutes: 30, lead_seconds: 5, slurm: {mem-per-cpu: 1000}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def local(folder):
    """The workdir of a run on this machine."""
    path = write_toy(folder, SMALL)
    found = growmerge("run", str(path), "--workdir", str(folder / "local"), "--executor", "local")
    assert found.returncode == 0, found.stderr
    return folder / "local"


@pytest.fixture
def environment(cluster):
    """Of a command that submits: the nodes' names do not resolve, as all of them are this machine."""
    return {**os.environ, **cluster.environment, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def write(folder, text=SMALL):
    path = folder / "cluster.yaml"
    path.write_text(text.replace("resources: {ranks: 2, threads: 1}", ON_CLUSTER))
    return path


def start(path, workdir, environment):
    return subprocess.Popen(
        command("run", str(path), "--workdir", str(workdir), "--executor", "slurm"),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
    )


def losses(workdir, stage):
    (file,) = workdir.glob(f"stages/{stage}/*/metrics.jsonl")
    return [line["loss"] for line in read_metrics(file) if "loss" in line]


def job_of(workdir, stage):
    return json.loads((workdir / "submitted.json").read_text())[stage]["id"]


def until_step(workdir, stage, step, process):
    deadline = time.monotonic() + 200
    while True:
        files = list(workdir.glob(f"stages/{stage}/*/metrics.jsonl"))
        if files and len([line for line in read_metrics(files[0]) if "loss" in line]) >= step:
            return
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


def ranks_of(job):
    """Return the processes of a job's ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "submitit.core._submit" in (process.info["cmdline"] or []):
            values = process.environ()
            if values.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in values:
                found.append(process)
    return found


def test_a_pipeline_over_two_nodes_ends_with_the_numbers_of_one_machine(local, folder, environment, cluster):
    workdir = folder / "whole"
    process = start(write(folder), workdir, environment)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "jobs submitted; they go on without this command" in err
    assert numbers(workdir) == numbers(local)
    shown = growmerge("status", str(workdir), "--json", **cluster.environment)
    assert {row["state"] for row in json.loads(shown.stdout)} == {"done"}


@pytest.mark.parametrize("blow", ["requeue", "kill", "signal"])
def test_a_training_that_is_hit_ends_with_the_same_model(local, folder, environment, cluster, blow):
    workdir = folder / blow
    process = start(write(folder), workdir, environment)
    until_step(workdir, "seed", 12, process)
    job = job_of(workdir, "seed")
    if blow == "requeue":
        cluster.run(["scontrol", "requeue", job])
    elif blow == "kill":
        ranks_of(job)[0].kill()
    else:  # as ahead of a time limit or a preemption
        cluster.run(["scancel", "--signal=USR2", job])
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert losses(workdir, "seed") == losses(local, "seed")
    assert numbers(workdir) == numbers(local)
    if blow == "signal":
        assert "seed: asked to stop; saved" in err


def test_what_needs_a_failed_stage_never_starts_and_the_rest_goes_on(local, folder, environment, cluster):
    workdir, model = folder / "failing", folder / "given"
    shutil.copytree(next(local.glob("stages/seed/*/model")), model)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    broken = SMALL.replace("swe: {train: {from: seed", "swe: {train: {from: ./given")
    process = start(write(folder, broken), workdir, environment)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("swe: ") and "stages that need it did not start" in last, err
    shown = json.loads(growmerge("status", str(workdir), "--json", **cluster.environment).stdout)
    states = {row["stage"]: row["state"] for row in shown}
    assert states["seed"] == states["est"] == states["evaluate/est"] == "done"
    assert states["swe"] == "failed" and states["both"] == states["evaluate/both"] == states["report"] == "not started"
    weights.write_bytes(whole)
    process = start(write(folder, broken), workdir, environment)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert losses(workdir, "swe") == losses(local, "swe")


def test_who_submitted_may_leave_and_watch_again(local, folder, environment, cluster):
    workdir = folder / "left"
    process = start(write(folder), workdir, environment)
    until_step(workdir, "seed", 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "the jobs go on" in err
    again = start(write(folder), workdir, environment)
    _, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    assert "jobs are under way already" in err
    assert "jobs submitted" not in err
    assert numbers(workdir) == numbers(local)


def test_a_job_that_the_scheduler_rejects_is_its_own_words(folder, environment):
    path = write(folder)
    path.write_text(path.read_text().replace("slurm: {mem-per-cpu: 1000}", "slurm: {partition: nowhere}"))
    found = subprocess.run(
        command("run", str(path), "--workdir", str(folder / "rejected"), "--executor", "slurm"),
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert found.returncode == 2
    assert "the scheduler rejects" in found.stderr and "invalid partition specified: nowhere" in found.stderr
    assert "Traceback" not in found.stderr
