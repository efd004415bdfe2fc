"""Graphs of jobs: what is submitted together, and what a job's script says."""

import subprocess

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from parallel.errors import InputError
from slurm.executor import Job
from slurm.graph import Planned, groups, parameters

HOW = {"function": print, "arguments": (), "ranks": 4, "threads": 2, "minutes": 30}


def planned(*after, **changes):
    return Planned(job=Job(**{"name": "j", **HOW, **changes}), after=after)


def test_jobs_that_wait_for_the_same_and_ask_for_the_same_are_one_array():
    merges = {f"merge-{number}": planned("a", "b", ranks=1) for number in range(200)}
    graph = {"a": planned(), "b": planned(), "large": planned(ranks=8), **merges, "report": planned(*merges, ranks=1)}
    assert groups(graph) == [("a", "b"), ("large",), tuple(merges), ("report",)]


def test_what_is_under_way_is_waited_for_and_not_submitted():
    assert groups({"b": planned("a"), "c": planned("b")}, ["a"]) == [("b",), ("c",)]
    with pytest.raises(AssertionError, match="wait for one another"):
        groups({"b": planned("a")})


def test_a_script_has_what_the_file_asks_for(tmp_path):
    job = planned(
        name="toy/seed",
        nodes=2,
        gpus=2,
        memory_gb=100,
        lead_s=300,
        restarts=2,
        slurm={"partition": "gpu", "account": "p123"},
        setup=("module load cuda",),
        failures=tmp_path / "failed tries",
    ).job
    script = _make_sbatch_string(command="python -m work", folder=tmp_path, **parameters(job, ["12", "13_4"]))
    lines = script.splitlines()
    for option in (
        "job-name=toy/seed",
        "nodes=2",
        "ntasks-per-node=2",
        "cpus-per-task=2",
        "gpus-per-node=2",
        "mem=100GB",
        "time=30",
        "partition=gpu",
        "account=p123",
        "requeue",
        "kill-on-invalid-dep=yes",
        "dependency=afterok:12:13_4",
    ):
        assert f"#SBATCH --{option}" in lines, option
    assert any(line.startswith("#SBATCH --signal=USR2@300") for line in lines)
    assert lines.index("module load cuda") < next(at for at, line in enumerate(lines) if line.startswith("srun "))
    assert "--kill-on-bad-exit=1" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("code", "tries", "state", "requeued"),
    [
        (1, 2, "RUNNING", True),
        (137, 3, "RUNNING", True),
        (1, 4, "RUNNING", False),  # once too often
        (3, 1, "RUNNING", False),  # bad input
        (75, 9, "RUNNING", True),  # asked to stop: as often as that happens
        (75, 1, "COMPLETING", False),  # cancelled
        (0, 1, "RUNNING", False),
    ],
)
@pytest.mark.parametrize("job", ["7", "5_2"])
def test_what_failed_is_tried_again_where_that_may_help(tmp_path, code, tries, state, requeued, job):
    """The end of a script, run by bash after that many tries, with commands that only note what they are asked."""
    commands = {"scontrol": 'echo "$@" >> "$0.asked"', "squeue": f"echo {state}", "sleep": "exit 0"}
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    script = f"(exit {code})\n" + "\n".join(parameters(planned(failures=tmp_path / "failed tries").job)["teardown"])
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    if "_" in job:
        environment |= dict(zip(("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"), job.split("_"), strict=True))
    for _ in range(tries):
        (tmp_path / "scontrol.asked").unlink(missing_ok=True)
        ended = subprocess.run(["bash", "-c", script], env=environment, check=False)
    assert ended.returncode == (75 if requeued else code)
    assert (tmp_path / "scontrol.asked").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.asked").read_text() == f"requeue {job}\n"
    if code in (1, 137):
        assert (tmp_path / "failed tries" / job).read_text() == f"{code} n[1-2]\n" * tries


def test_ranks_that_nodes_cannot_share_are_one_line():
    with pytest.raises(InputError, match=r"^resources: 4 ranks do not divide by 3 nodes$"):
        parameters(planned(nodes=3).job)
