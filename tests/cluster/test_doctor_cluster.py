"""`growmerge doctor` on a real SLURM: what it sees on nodes, and what it says where a cluster is not fit."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "growmerge"))

from toy import command, growmerge

PROFILE = """
description: the virtual cluster of the tests
tested: here
slurm: {mem-per-cpu: 1000}
gpus_per_node: 0
cores_per_node: 2
environment: {MASTER_ADDR: 127.0.0.1, GLOO_SOCKET_IFNAME: lo}
"""
"""The nodes' names do not resolve: all of them are this machine."""


@pytest.fixture
def examine(cluster, tmp_path):
    """Return a function that examines the cluster with a profile, and returns (exit code, findings by name)."""
    (tmp_path / "runs").mkdir()

    def run(*options, profile=PROFILE):
        (tmp_path / "profile.yaml").write_text(profile)
        given = ("--profile", str(tmp_path / "profile.yaml"), "--workdir", str(tmp_path / "runs"))
        found = growmerge("doctor", *given, "--json", *options, **cluster.environment)
        assert found.stdout, found.stderr
        assert not list((tmp_path / "runs").iterdir())
        return found.returncode, {check["name"]: check for check in json.loads(found.stdout)["checks"]}

    return run


def states(checks):
    return {name: check["state"] for name, check in checks.items() if check["state"] != "ok"}


def test_a_cluster_that_is_fit(examine):
    code, checks = examine(profile=PROFILE.replace("mem-per-cpu: 1000", "mem-per-cpu: 1000, partition: main"))
    assert code == 0 and not {name: state for name, state in states(checks).items() if not name.endswith("space")}
    assert "(tested here)" in checks["profile"]["seen"]
    assert "main: UP, 4 nodes" in checks["partition"]["seen"]
    speed = checks["bandwidth"]["values"]
    assert speed["ranks"] == 2 and speed["backend"] == "gloo"
    assert speed["bus_gb_per_second"] == speed["algorithm_gb_per_second"] > 0 and speed["latency_s"] > 0
    (nodes,) = {checks[name]["seen"].split(":")[0] for name in ("shared workdir", "node packages", "device", "network")}
    assert len(nodes.split(", ")) == 2
    assert "clock within" in checks["clock"]["seen"]


@pytest.mark.slow
def test_a_partition_that_does_not_exist_is_the_schedulers_words(examine):
    code, checks = examine(profile=PROFILE.replace("mem-per-cpu: 1000", "partition: nowhere"))
    assert code == 1
    assert [name for name, state in states(checks).items() if state == "failed"] == ["partition"]
    assert "Partition nowhere not found" in checks["partition"]["seen"]
    assert "nodes were not looked at" in checks["nodes"]["seen"]


@pytest.mark.slow
def test_a_job_that_the_scheduler_rejects_is_not_submitted(examine):
    code, checks = examine("--nodes", "5")
    assert code == 1 and checks["submission"]["state"] == "failed"
    assert "node configuration is not available" in checks["submission"]["seen"]


@pytest.mark.slow
def test_a_job_that_does_not_start_is_cancelled(examine, cluster):
    profile = PROFILE.replace("mem-per-cpu: 1000", "begin: now+1hour")
    code, checks = examine("--wait", "1", profile=profile)
    assert code == 1 and "has not ended after 1 s" in checks["job"]["seen"]
    assert {job.state for job in cluster.jobs() if job.name == "growmerge/doctor"} <= {"CANCELLED", "COMPLETED"}


@pytest.mark.slow
def test_ranks_that_cannot_reach_one_another(examine):
    code, checks = examine(profile=PROFILE.replace("GLOO_SOCKET_IFNAME: lo", "GLOO_SOCKET_IFNAME: nowhere"))
    assert code == 1 and states(checks).keys() >= {"bandwidth"}
    assert "Unable to find address for: nowhere" in checks["bandwidth"]["seen"]
    assert checks["shared workdir"]["state"] == "ok"


@pytest.mark.slow
def test_a_workdir_that_nodes_do_not_share(cluster, tmp_path):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may have mounts of its own")
    (tmp_path / "profile.yaml").write_text(PROFILE)
    (tmp_path / "runs").mkdir()
    given = ("--profile", str(tmp_path / "profile.yaml"), "--workdir", str(tmp_path / "runs"))
    script = f"mount -t tmpfs none {shlex.quote(str(tmp_path / 'runs'))} && {shlex.join(command('doctor', *given))}"
    found = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1, found.stderr
    assert "left no log: is the workdir on a file system that the nodes share?" in found.stdout
