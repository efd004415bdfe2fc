"""Leases: one owner at a time, stale ones taken over, an owner named."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from parallel.errors import InputError
from slurm.executor import choose
from slurm.lease import STALE, Lease, alive, holder, this_process


def record(path, **changes):
    owner = {"host": socket.gethostname(), "user": "ada", "pid": 1, "started": 0, "doing": "growmerge run x.yaml"}
    beat = changes.pop("beat", time.time())
    path.write_text(json.dumps({"owner": {**owner, **changes}, "beat": beat}))


def test_a_held_lease_names_its_owner_and_a_released_one_is_gone(tmp_path):
    path = tmp_path / "lease.json"
    with Lease(path, "growmerge run a.yaml"):
        assert holder(path).pid == os.getpid()
        with pytest.raises(InputError) as caught, Lease(path, "growmerge run b.yaml"):
            pass
        line = f"{tmp_path} is in use: growmerge run a.yaml (pid {os.getpid()} of "
        assert str(caught.value).startswith(line)
    assert not path.exists()


def test_the_lease_of_a_dead_process_is_taken_over(tmp_path):
    path = tmp_path / "lease.json"
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    record(path, pid=child.pid, started=1)
    assert holder(path) is None
    with Lease(path, "me"):
        assert holder(path).pid == os.getpid()


def test_a_pid_that_is_another_process_by_now_holds_nothing(tmp_path):
    path = tmp_path / "lease.json"
    me = this_process("me")
    assert alive(me.pid, me.started)
    assert not alive(me.pid, me.started - 100)
    record(path, pid=me.pid, started=me.started - 100)
    assert holder(path) is None


def test_another_hosts_lease_lives_by_its_heartbeat(tmp_path):
    path = tmp_path / "lease.json"
    record(path, host="elsewhere", beat=time.time() - STALE / 2)
    with pytest.raises(InputError, match="of ada on elsewhere"), Lease(path, "me"):
        pass
    record(path, host="elsewhere", beat=time.time() - STALE - 1)
    with Lease(path, "me"):
        pass


def test_a_lease_cut_short_by_a_kill_counts_as_abandoned(tmp_path):
    path = tmp_path / "lease.json"
    path.write_text('{"owner": {"host"')
    with Lease(path, "me"):
        assert holder(path).pid == os.getpid()


def test_slurm_without_sbatch_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose("auto") == choose("local") == "local"
    with pytest.raises(InputError, match="no sbatch on PATH"):
        choose("slurm")
    answers = {
        "exit 0": ("slurm", "slurm"),
        "echo 'sinfo: fatal: Could not establish a configuration source' >&2; exit 1": (
            "local",  # the commands are installed, and there is no cluster
            "--executor slurm: sinfo: fatal: Could not establish a configuration source; run on a login node",
        ),
        "echo first >&2; echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1": (
            "SLURM does not answer (slurm_load_partitions: Unable to contact slurm controller): try again, or use",
            "SLURM does not answer (slurm_load_partitions: Unable to contact slurm controller)",
        ),
    }
    for answer, expected in answers.items():
        for name, lines in {"sbatch": "", "sinfo": answer}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
            (tmp_path / name).chmod(0o755)
        assert choose("local") == "local"
        for wanted, outcome in zip(("auto", "slurm"), expected, strict=True):
            if outcome in ("slurm", "local"):
                assert choose(wanted) == outcome
            else:
                with pytest.raises(InputError, match=re.escape(outcome)):
                    choose(wanted)
