"""Pipelines on a real SLURM: a job a stage over two nodes, and what happens when jobs are stopped, killed and fail."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "growmerge"))

import forked
from toy import PIPELINE, command, growmerge, numbers, write_toy

from train.tracker import read_metrics

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
SHORT = SMALL.replace("  est: {train: {from: seed, data: est, training: {steps: 6}}}\n", "").replace(
    "[swe, est]", "[seed, swe]"
)
"""With a job of two nodes less."""
ON_CLUSTER = "resources: {ranks: 2, nodes: 2, threads: 1, minutes: 30, profile: profile.yaml, per_job: 4}"
PROFILE = """
slurm: {mem-per-cpu: 1000}
environment: {MASTER_ADDR: 127.0.0.1, GLOO_SOCKET_IFNAME: lo, PYTHONPATH: PLACE}
group_writable: true
"""
NO_NETWORK = """
import socket
def checked(connect):
    def call(self, address, *more):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
            raise OSError(f"this node has no network: {address}")
        return connect(self, address, *more)
    return call
socket.socket.connect, socket.socket.connect_ex = checked(socket.socket.connect), checked(socket.socket.connect_ex)
"""
"""What Python runs first on the nodes of this profile: they reach nothing but themselves."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def local(folder):
    """The workdir of a run on this machine."""
    return run_here(folder, SMALL, "local")


def run_here(folder, text, name):
    path = write_toy(folder, text)
    found = forked.growmerge("run", str(path), "--workdir", str(folder / name), "--executor", "local")
    assert found.returncode == 0, found.stderr
    return folder / name


@pytest.fixture
def environment(cluster):
    return {**os.environ, **cluster.environment}


def write(folder, text=SMALL):
    if not (folder / "eng").is_dir():
        write_toy(folder)
    path = folder / "cluster.yaml"
    path.write_text(text.replace("resources: {ranks: 2, threads: 1}", ON_CLUSTER))
    place = folder / "first"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(NO_NETWORK)
    (folder / "profile.yaml").write_text(PROFILE.replace("PLACE", str(place)))
    return path


def start(path, workdir, environment):
    return subprocess.Popen(
        command("run", str(path), "--workdir", str(workdir), "--executor", "slurm"),
        env=environment,
        cwd=path.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
    )


def losses(workdir, stage):
    (file,) = workdir.glob(f"stages/{stage}/*/metrics.jsonl")
    return [line["loss"] for line in read_metrics(file) if "loss" in line]


def until_step(workdir, stage, step, process):
    deadline = time.monotonic() + 200
    while True:
        files = list(workdir.glob(f"stages/{stage}/*/metrics.jsonl"))
        if files and len([line for line in read_metrics(files[0]) if "loss" in line]) >= step:
            return
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_pipeline_over_two_nodes_ends_with_the_numbers_of_one_machine(folder, environment, cluster):
    local, workdir = run_here(folder, SHORT, "short"), folder / "whole"
    process = start(write(folder, SHORT), workdir, environment)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "jobs submitted; they go on without this command" in err
    assert numbers(workdir) == numbers(local)
    shown = growmerge("status", str(workdir), "--json", **cluster.environment)
    assert {row["state"] for row in json.loads(shown.stdout)} == {"done"}
    # What was written may be changed by the group.
    modes = {path: path.lstat().st_mode for path in workdir.rglob("*") if not path.is_symlink()}
    assert [path for path, mode in modes.items() if not mode & 0o020] == []


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        pytest.param(
            "slurm: {partition: nowhere}",
            "the scheduler rejects tokens: sbatch: error: Batch job submission failed: Invalid partition name",
            marks=pytest.mark.slow,
        ),
        ("gpus: 4", "2 nodes of 1 cores and 4 GPUs are asked for; the partition has 4 nodes of 2 cores and 0 GPUs"),
        pytest.param(
            "threads: 9",
            "1 nodes of 9 cores are asked for; the partition has 4 nodes of 2 cores and 0 GPUs",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_run_is_one_line(folder, environment, asked, line):
    path = write(folder)
    key = asked.partition(":")[0]
    text = path.read_text().replace("threads: 1, minutes", "minutes") if key == "threads" else path.read_text()
    path.write_text(text.replace("minutes: 30", f"minutes: 30, {asked}"))
    process = start(path, folder / f"rejected-{asked}", environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert line in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a mount of its own takes root")
def test_a_workdir_that_the_nodes_do_not_share_is_one_line(folder, environment, cluster):
    path, place = write(folder), folder / "mine"
    place.mkdir()
    run = shlex.join(command("run", str(path), "--workdir", str(place / "run"), "--executor", "slurm"))
    script = f"mount -t tmpfs none {shlex.quote(str(place))} && {run}"
    found = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env=environment,
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
        timeout=200,
    )
    assert found.returncode == 1
    assert "is the workdir on a file system that the nodes share?" in found.stderr.splitlines()[-1]
