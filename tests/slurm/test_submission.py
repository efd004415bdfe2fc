"""Graphs of jobs: what is submitted together, and what a job's script says."""

import re
import subprocess
from pathlib import Path

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from parallel.errors import InputError
from slurm.executor import Job
from slurm.graph import Planned, groups, scripts
from slurm.script import parameters

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
    needed = {"afterok": ["12", "13_4"], "afterany": ["9"]}
    script = _make_sbatch_string(command="python -m work", folder=tmp_path, **parameters(job, tmp_path, needed))
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
        "dependency=afterok:12:13_4,afterany:9",
    ):
        assert f"#SBATCH --{option}" in lines, option
    assert any(line.startswith("#SBATCH --signal=USR2@300") for line in lines)
    assert lines.index("module load cuda") < next(at for at, line in enumerate(lines) if line.startswith("srun "))
    assert "--kill-on-bad-exit=1" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.fixture
def script(tmp_path):
    """Run what is around a job's command, with commands of SLURM that only note what they are asked."""
    logs, bin_ = tmp_path / "logs of jobs", tmp_path / "bin"
    logs.mkdir()
    bin_.mkdir()
    commands = {
        "scontrol": '[ "$1" = --oneliner ] && echo " Features=$FEATURE ExcNodeList=$LEFT_OUT " || echo $@ >> $0.asked',
        "squeue": "echo $STATE",
        "sinfo": "printf 'n1 ,a,big,\\nn2 ,a,\\nn3 ,a,\\n'",
        "sleep": "exit 0",
    }
    for name, line in commands.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_ / name).chmod(0o755)

    def run(code, job="7", state="RUNNING", nodes="n[1-2]", said="", feature="(null)", left_out="(null)", **changes):
        (bin_ / "scontrol.asked").unlink(missing_ok=True)
        what = parameters(planned(failures=tmp_path / "failed tries", **changes).job, logs)
        lines = [*what["setup"], f'printf %s "{said}" >> "$gm_log"', f"(exit {code})", *what["teardown"]]
        count = "2" if "[" in nodes else "1"
        environment = {
            "PATH": f"{bin_}:/usr/bin:/bin",
            "STATE": state,
            "FEATURE": feature,
            "LEFT_OUT": left_out,
            "SLURM_JOB_ID": "7" if "_" in job else job,
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_JOB_NUM_NODES": count,
            "SLURM_JOB_PARTITION": "main",
        }
        if "_" in job:
            environment |= dict(zip(("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"), job.split("_"), strict=True))
        with (logs / f"{job}_0_log.err").open("a"):
            pass
        ended = subprocess.run(
            ["bash", "-c", "\n".join(lines)], env=environment, text=True, capture_output=True, check=False
        )
        assert ended.stderr == ""
        asked = bin_ / "scontrol.asked"
        return ended.returncode, asked.read_text().splitlines() if asked.is_file() else []

    return run


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
def test_what_failed_is_tried_again_where_that_may_help(script, tmp_path, code, tries, state, requeued, job):
    for _ in range(tries):
        ended, asked = script(code, job, state)
    assert ended == (75 if requeued or code == 75 else code)
    assert asked == ([f"requeue {job}"] if requeued else [])
    if code in (1, 137):
        assert (tmp_path / "failed tries" / job).read_text() == f"{code} n[1-2]\n" * tries


def test_a_node_that_jobs_fail_on_is_left_out(script):
    said = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Terminated\n"
    assert script(137, "7", said=said) == (75, ["requeue 7"])
    # What stood in the log before does not count; of a job of one node that node does.
    assert script(1, "7", said="Traceback\n") == (75, ["requeue 7"])
    assert script(1, "8", nodes="n2") == (75, ["requeue 8", "update JobId=8 ExcNodeList=n2"])
    # With what it leaves out anyway; among nodes of the kind that it asks for, if that can be told.
    assert script(1, "18", nodes="n2", left_out="n7")[1] == ["requeue 18", "update JobId=18 ExcNodeList=n7,n2"]
    assert script(1, "19", nodes="n2", feature="big")[1] == ["requeue 19", "update JobId=19 ExcNodeList=n2"]
    assert script(1, "20", nodes="n2", feature="huge")[1] == ["requeue 20"]
    assert script(1, "21", nodes="n2", feature="a&big")[1] == ["requeue 21"]
    # While enough others are up.
    script(1, "8", nodes="n3")
    assert script(1, "8", nodes="n3") == (75, ["requeue 8", "update JobId=8 ExcNodeList=n2,n3"])
    script(1, "9", nodes="n1")
    assert script(1, "10", nodes="n1") == (75, ["requeue 10"])


def test_where_jobs_may_not_be_requeued_successors_go_on_unless_that_cannot_help(script, tmp_path):
    how = {"requeue": False, "successors": 2, "name": "toy/seed", "restarts": 1}
    assert script(75, "7", **how) == (75, [])
    assert script(1, "8", **how) == (75, [])
    assert script(1, "9", **how) == (1, [])  # once too often
    assert script(0, "10", **how) == (3, [])  # nor does another begin
    assert (tmp_path / "failed tries" / "toy_seed").read_text() == "1 n[1-2]\n" * 2


def test_successors_wait_for_a_failure_and_what_needs_them_for_any_end(tmp_path):
    graph = {
        "seed": planned(requeue=False, successors=2),
        "swe": planned("seed", requeue=False, successors=2),
        "merge": planned("seed", "swe"),
        "report": planned("merge"),
    }
    found = dict(scripts(graph, tmp_path))
    waits = {names[0]: re.findall("#SBATCH --dependency=(.*)", script) for names, script in found.items()}
    chain = "@seed:@seed+1:@seed+2"
    assert waits == {
        "seed": [],
        "swe": [f"afterany:{chain}"],
        "merge": [f"afterany:{chain}:@swe:@swe+1:@swe+2"],
        "report": ["afterok:@merge"],
    }
    assert "#SBATCH --no-requeue" in found["seed",]


def test_being_out_of_time_counts_but_is_not_the_nodes_fault(script, tmp_path):
    for _ in range(4):
        ended, asked = script(74, nodes="n2")
    assert (ended, asked) == (74, [])
    assert not (tmp_path / "failed tries" / "nodes").exists()


def test_a_sites_own_set_e_does_not_skip_the_end(script):
    assert script(75, setup=("set -eu",)) == (75, ["requeue 7"])


@pytest.mark.parametrize("options", [{"comment": "a\ntouch /tmp/x #"}, {"comment=x\n": "y"}, {"a b": 1}])
def test_an_option_cannot_begin_a_command(options):
    with pytest.raises(InputError, match="is no option of sbatch"):
        parameters(planned(slurm=options).job, Path())


def test_ranks_that_nodes_cannot_share_are_one_line():
    with pytest.raises(InputError, match=r"^resources: 4 ranks do not divide by 3 nodes$"):
        parameters(planned(nodes=3).job, Path())
