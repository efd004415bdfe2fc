"""Training over two nodes of a real SLURM: whatever hits it, it ends with the model of an undisturbed run."""

import sys
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "growmerge"))

import forked
from daemons import until
from runs import EVERY, PROFILE, STEPS, Run, losses, prepare, weights, write


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    prepare(home)
    return home


@pytest.fixture(scope="module")
def whole(home):
    """The folder of a run that nothing hit, on this machine."""
    path = write(home, "whole", nodes=1)
    found = forked.growmerge("train", path.name, "--executor", "local", cwd=home)
    assert found.returncode == 0, found.stderr
    return home / "runs" / "whole"


@pytest.fixture
def tidy(cluster):
    """Leave four idle nodes behind."""
    yield
    cluster.run(["scancel", "--me"])
    for node in cluster.nodes:
        if not cluster.daemons.processes(node):
            cluster.start_node(node)
    until("idle nodes", lambda: set(cluster.node_states().values()) == {"idle"}, 60)


def is_the_same(run, whole):
    assert losses(run.folder) == losses(whole)
    assert weights(run.folder) == weights(whole)


def ranks_of(job):
    """Return the processes of a job's ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "submitit.core._submit" in (process.info["cmdline"] or []):
            values = process.environ()
            if values.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in values:
                found.append(process)
    return found


def preempt(cluster):
    options = ["--output=/dev/null", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap", "true"]
    return cluster.run(["sbatch", "--parsable", *options]).stdout.strip()


@pytest.mark.parametrize("partition", [pytest.param("main", marks=pytest.mark.slow), "grace"])
def test_preempted_it_saves_and_goes_on(home, whole, cluster, tidy, partition):
    # `main` sends its signals together and kills after KillWait; `grace` gives a while.
    profile = PROFILE.replace("slurm: {", f"slurm: {{partition: {partition}, ")
    run = Run(write(home, f"preempted-{partition}", profile=profile), cluster.environment)
    run.until_step(3)
    job = run.job
    urgent = preempt(cluster)
    err = run.end()
    assert "asked to stop; saved" in err
    assert run.steps() == [*range(1, STEPS + 1)]  # none was done twice
    assert cluster.wait(urgent, "COMPLETED")
    assert cluster.wait(job, "COMPLETED").restarts == 1
    is_the_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("blow", ["requeued", "killed"])
def test_without_a_word_beforehand_it_goes_on_from_the_last_checkpoint(home, whole, cluster, tidy, blow):
    run = Run(write(home, blow), cluster.environment)
    run.until_step(EVERY + 3)
    if blow == "requeued":
        cluster.run(["scontrol", "requeue", run.job])
    else:
        ranks_of(run.job)[0].kill()
    run.end()
    assert cluster.wait(run.job, "COMPLETED").restarts == 1
    assert run.steps()[-1] == STEPS and len(run.steps()) <= STEPS + EVERY
    is_the_same(run, whole)


@pytest.mark.slow
def test_out_of_time_it_saves_and_goes_on(home, whole, cluster, tidy):
    slow = PROFILE.replace("step/:0.4", "step/:1.5")
    run = Run(write(home, "timed", profile=slow, minutes=1, lead_seconds=20), cluster.environment)
    err = run.end()
    assert "asked to stop; saved" in err
    assert run.steps() == [*range(1, STEPS + 1)]
    assert cluster.wait(run.job, "COMPLETED").restarts >= 1
    is_the_same(run, whole)


@pytest.mark.slow
def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(home, whole, cluster, tidy):
    run = Run(write(home, "dead-node"), cluster.environment)
    run.until_step(EVERY + 3)
    nodes = cluster.wait(run.job, "RUNNING").nodes
    assert run.status()["state"] == "running"
    cluster.kill_node(nodes[1])
    run.end()
    assert not {nodes[1]} & set(cluster.wait(run.job, "COMPLETED").nodes)
    assert run.steps()[-1] == STEPS and len(run.steps()) <= STEPS + EVERY
    is_the_same(run, whole)


@pytest.mark.slow
def test_a_controller_that_starts_again_costs_nothing(home, whole, cluster, tidy):
    run = Run(write(home, "controller"), cluster.environment)
    run.until_step(3)
    cluster.restart_controller()
    run.end()
    assert run.steps() == [*range(1, STEPS + 1)]
    is_the_same(run, whole)


@pytest.mark.slow
def test_a_node_on_which_ranks_die_is_left_out(home, whole, cluster, tidy):
    # On n1 no Python starts.
    python = home / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" != n1 ] || exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run = Run(write(home, "bad-node", profile=f"{PROFILE}python: {python}\n"), cluster.environment)
    run.end()
    done = cluster.wait(run.job, "COMPLETED")
    assert done.restarts >= 2 and "n1" not in done.nodes
    is_the_same(run, whole)


@pytest.mark.slow
def test_where_requeuing_is_not_allowed_successors_go_on(home, whole, cluster, tidy):
    run = Run(write(home, "chain", profile=PROFILE + "requeue: false\nsuccessors: 2\n"), cluster.environment)
    run.until_step(3)
    assert len(cluster.jobs()) >= 3
    cluster.run(["scancel", "--signal=USR2", run.job])
    run.end()
    assert cluster.wait(run.job, "FAILED").restarts == 0
    assert run.steps() == [*range(1, STEPS + 1)]
    assert run.status()["state"] == "done"
    is_the_same(run, whole)
    until("no job left", lambda: not [job for job in cluster.jobs() if job.state in ("PENDING", "RUNNING")], 30)


@pytest.mark.slow
def test_it_goes_on_over_other_nodes_and_another_mesh(home, whole, cluster, tidy):
    path = write(home, "meshes", training="  tp: 2\n", ranks=4, nodes=2)
    run = Run(path, cluster.environment)
    run.until_step(EVERY + 1)
    row = run.status()
    assert (row["state"], row["restarts"]) == ("running", 0)
    here = run.start("train", path.name, "--executor", "local")
    assert "the job of meshes is under way on a cluster" in here.communicate(timeout=60)[1]
    assert "1 jobs cancelled" in run.say("cancel", str(run.folder))
    assert "its job" in run.end(1)
    assert run.status()["state"] == "failed"
    assert min(run.steps()) == 1
    again = Run(write(home, "meshes", ranks=4, nodes=4), cluster.environment)
    again.end()
    assert EVERY < min(again.steps()) <= max(run.steps()) + 1
    assert len(losses(again.folder)) == STEPS
    assert losses(again.folder) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
def test_a_pipeline_of_layers_over_two_nodes(home, whole, cluster, tidy):
    run = Run(write(home, "layers", training="  zero: 1\n  pp: 2\n", ranks=4, nodes=2), cluster.environment)
    run.end()
    assert losses(run.folder) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow  # without a cluster: tests/growmerge/test_status.py
def test_cancelled_resubmitted_watched_by_two(home, whole, cluster, tidy):
    run = Run(write(home, "again"), cluster.environment)
    run.until_step(EVERY + 1)
    second = Run(run.path, cluster.environment)
    assert any("1 jobs are under way already" in line for line in second.process.stderr)
    run.say("cancel", str(run.folder), "again")
    assert "its job" in run.end(1)
    second.end(1)
    assert "failed" in run.say("status", str(run.folder))
    assert "1 jobs submitted" in str(run.start("resubmit", str(run.folder)).communicate(timeout=60))
    third = Run(run.path, cluster.environment)
    assert "1 jobs are under way already" in third.end()
    assert "growmerge" not in third.say("logs", str(run.folder), "again", "--rank", "1")
    is_the_same(third, whole)
