"""The virtual cluster itself: jobs run, move, and outlive what is done to the nodes and the controller."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import cluster as module
import daemons
import pytest
import submitit
from cluster import Cluster, node_names
from daemons import Unavailable, install, until

from slurm.executor import task_environment


@pytest.fixture
def submit(cluster, tmp_path):
    """Submit a shell command; return its job's id. What it prints is in `<id>.out`. At the end all nodes are idle."""

    def sbatch(command, *options):
        output = [f"--output={tmp_path}/%j.out", "--open-mode=append"]
        return cluster.run(["sbatch", "--parsable", *output, *options, "--wrap", command]).stdout.strip()

    yield sbatch
    cluster.run(["scancel", "--me"])
    for node in cluster.nodes:
        if not cluster.daemons.processes(node):
            cluster.start_node(node)
    until("idle nodes", lambda: set(cluster.node_states().values()) == {"idle"}, 60)


@pytest.fixture
def output(tmp_path):
    """Read what a submitted job has printed so far."""

    def read(job):
        path = tmp_path / f"{job}.out"
        return path.read_text() if path.exists() else ""

    return read


@pytest.mark.slow
def test_tasks_know_their_rank_and_node(cluster, submit, output):
    job = submit("srun sh -c 'echo $SLURM_PROCID $SLURMD_NODENAME'", "--nodes=2", "--ntasks=2", "--job-name=two nodes")
    done = cluster.wait(job, "COMPLETED")
    assert (done.name, done.restarts) == ("two nodes", 0)
    lines = sorted(output(job).splitlines())
    assert lines == [f"{rank} {node}" for rank, node in enumerate(done.nodes)]
    assert len(done.nodes) == 2


@pytest.mark.slow
def test_the_tasks_of_an_array_are_jobs(cluster, submit):
    job = submit("exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    assert cluster.wait(f"{job}_0", {"COMPLETED", "FAILED"}).state == "COMPLETED"
    assert cluster.wait(f"{job}_1", {"COMPLETED", "FAILED"}).state == "FAILED"


@pytest.mark.slow
def test_an_urgent_job_sends_another_back_to_the_queue(cluster, submit, output):
    job = submit("echo run ${SLURM_RESTART_COUNT:-0}; sleep 100")
    until("its first line", lambda: output(job) == "run 0\n", 20)
    urgent = submit("sleep 1", "--partition=urgent", "--nodes=4", "--exclusive")
    cluster.wait(urgent, "COMPLETED")
    cluster.wait(job, "RUNNING", restarts=1)
    until("its second line", lambda: "run 1" in output(job), 10)


@pytest.mark.slow
def test_a_job_that_ends_in_its_grace_time_is_not_requeued(cluster, submit, output):
    command = "trap 'echo saved; exit 0' USR2; echo ready; sleep 100 & wait"
    job = submit(command, "--partition=grace", "--signal=B:USR2@30")
    until("its first line", lambda: output(job) == "ready\n", 20)
    submit("sleep 1", "--partition=urgent", "--nodes=4", "--exclusive")
    assert cluster.wait(job, {"COMPLETED", "PREEMPTED", "PENDING"}).state == "COMPLETED"
    assert "saved\n" in output(job)


@pytest.mark.slow
def test_a_job_outlives_its_controller(cluster, submit):
    done = submit("true")
    cluster.wait(done, "COMPLETED")
    running = submit("sleep 6", "--nodes=4", "--exclusive")
    waiting = submit("true")
    cluster.wait(running, "RUNNING")
    cluster.restart_controller()
    states = {job.id: job.state for job in cluster.jobs()}
    assert [states[job] for job in (done, running, waiting)] == ["COMPLETED", "RUNNING", "PENDING"]
    cluster.wait(running, "COMPLETED")
    assert cluster.wait(waiting, "COMPLETED").restarts == 0


@pytest.mark.slow
def test_the_job_of_a_killed_node_starts_again_elsewhere(cluster, submit, output):
    job = submit("srun sh -c 'echo $SLURMD_NODENAME; sleep 100'")
    (node,) = cluster.wait(job, "RUNNING").nodes
    until("its first line", lambda: output(job) == f"{node}\n", 10)
    cluster.kill_node(node)
    again = cluster.wait(job, "RUNNING", restarts=1, timeout=90)
    assert again.nodes != (node,)
    assert cluster.node_states()[node].startswith("down")
    cluster.start_node(node)
    assert cluster.node_states()[node] == "idle"


@pytest.mark.slow
def test_submitit_runs_a_function_on_two_nodes(cluster, submit, tmp_path, monkeypatch):
    for name, value in (cluster.environment | {"PYTHONSAFEPATH": "1"}).items():
        monkeypatch.setenv(name, value)
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="slurm")
    executor.update_parameters(nodes=2, tasks_per_node=1, cpus_per_task=1, timeout_min=5, gpus_per_node=0)
    assert executor.submit(task_environment).results() == [(0, 2), (1, 2)]


@pytest.mark.slow
def test_accounting_remembers_jobs(accounting_cluster):
    job = accounting_cluster.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap", "true"]).stdout.strip()
    accounting_cluster.wait(job, "COMPLETED")
    sacct = ["sacct", "--noheader", "--allocations", "--format=JobID,State", f"--jobs={job}"]
    until("accounting", lambda: accounting_cluster.run(sacct).stdout.split() == [job, "COMPLETED"], 20)


@pytest.mark.slow
def test_a_cluster_whose_process_was_killed_is_stopped_by_the_next_one(cluster):
    code = f"import sys; sys.path.insert(0, {str(Path(module.__file__).parent)!r}); from cluster import Cluster\n"
    code += "with Cluster(nodes=1) as cluster: print(cluster.folder, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        abandoned = Cluster(Path(process.stdout.readline().strip()))
        assert abandoned.owner() == "running"
        process.kill()
    assert abandoned.owner() == "gone"
    assert abandoned.daemons.processes()
    with Cluster(nodes=1) as other:
        assert other.node_states() == {"n1": "idle"}
        assert not abandoned.daemons.processes()
        assert not abandoned.folder.exists()
    assert not other.daemons.processes()
    assert len(cluster.node_states()) == 4


@pytest.mark.slow
def test_the_command_stops_its_cluster_at_ctrl_c():
    command = [sys.executable, module.__file__, "run", "--nodes=1"]
    # What a shell starts in the background ignores SIGINT, and so does all that it starts.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        line = process.stdout.readline()
        conf = Path(line.removeprefix("export SLURM_CONF=").strip())
        mine = Cluster(conf.parent)
        mine.run(["sbatch", "--output=/dev/null", "--wrap", "sleep 100"])
        mine.wait(1, "RUNNING")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert not mine.daemons.processes()
    assert not conf.parent.exists()


def test_without_packages_and_root_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(daemons, "which", lambda program: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match=r"apt-get install slurm-wlm munge$"):
        install()


def test_short_lists_of_nodes_are_written_out():
    assert node_names("n[1-3,5]") == ("n1", "n2", "n3", "n5")
    assert node_names("n2") == ("n2",)
    assert node_names("") == ()
