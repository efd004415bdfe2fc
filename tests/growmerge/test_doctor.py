"""`growmerge doctor` without SLURM: this machine, folders, quotas, and what is said of nodes."""

import json
import os
import time

import pytest
from toy import growmerge

from growmerge.doctor_job import OPTIONAL, PACKAGES, REPORTS, versions
from growmerge.doctor_login import group, quotas, writable
from growmerge.doctor_report import Seen, told
from slurm.profile import OFFLINE, Profile

HEADER = """Disk quotas for user someone (uid 1000): {none}
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Make the only folder on PATH; returns a function that puts a program there, which prints a text."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name, text, code=0):
        (folder / name).write_text(f"#!/bin/sh\n/bin/cat << 'END'\n{text}\nEND\nexit {code}\n")
        (folder / name).chmod(0o755)

    return add


def test_this_machine_is_looked_at_and_nothing_is_left(tmp_path, programs):
    programs("quota", HEADER.format(none="") + "/dev/sda1 1000 0 2000000 0 20 0 0 0")
    found = growmerge("doctor", "--workdir", str(tmp_path / "new" / "place"))
    lines = {line.split()[1]: line for line in found.stdout.splitlines() if not line.startswith("fit")}
    assert found.returncode == 0, found.stdout + found.stderr
    assert all(line.startswith("ok ") for name, line in lines.items() if name not in ("workdir", "home"))
    assert "no SLURM here: nodes were not looked at" in lines["nodes"]
    assert "/dev/sda1: 0.0 GB of 2.0 GB" in lines["quota"]
    assert "torch " in lines["packages"] and "files are created, synced, renamed, linked, deleted" in found.stdout
    assert not (tmp_path / "new").exists()


def test_what_fails_is_a_line_and_exit_code_1(tmp_path, programs):
    (tmp_path / "file").touch()
    found = growmerge("doctor", "--workdir", str(tmp_path / "file" / "runs"), "--json")
    assert found.returncode == 1
    told = json.loads(found.stdout)
    assert not told["fit"]
    (failed,) = (check for check in told["checks"] if check["state"] == "failed")
    assert failed["name"] == "workdir" and "cannot be written" in failed["seen"] and "--workdir" in failed["do"]
    assert [check["name"] for check in told["checks"] if check["name"].endswith("space")]


def test_a_profile_without_a_cluster(tmp_path, programs):
    (tmp_path / "p.yaml").write_text("description: none\nworkdirs: $NOWHERE/runs\n")
    found = growmerge("doctor", "--profile", str(tmp_path / "p.yaml"), cwd=tmp_path)
    assert found.returncode == 1
    assert "untested template" in found.stdout
    assert "$NOWHERE/runs: not all of its variables are set here" in found.stdout
    found = growmerge("doctor", "--profile", str(tmp_path / "p.yaml"), cwd=tmp_path, NOWHERE=str(tmp_path))
    assert found.returncode == 1
    assert "no SLURM here: nodes were not looked at  -> give this command on a login node" in found.stdout


def test_an_unknown_profile_is_one_line_with_the_nearest(programs):
    found = growmerge("doctor", "--profile", "nvidai")
    assert found.returncode == 2 and found.stdout == ""
    assert len(found.stderr.splitlines()) == 1 and "did you mean 'nvidia'?" in found.stderr


@pytest.mark.parametrize(
    ("text", "code", "state", "seen"),
    [
        (HEADER.format(none="") + "/dev/sda1 1000 0 0 0 20 0 0 0", 0, "ok", "/dev/sda1: no limit"),
        (HEADER.format(none="") + "nas:/home 950* 900 1000 1769000000 20 0 0 0", 1, "warning", "0.0 GB of 0.0 GB"),
        (HEADER.format(none="") + "nas:/home 1 0 1000 0 1000 0 1000 0", 1, "failed", "1000 of 1000 files"),
        (HEADER.format(none="none").splitlines()[0], 0, "ok", "none"),
        ("Ihre Dateien: viele", 0, "warning", "cannot be read: Ihre Dateien: viele"),
        ("", 1, "warning", "cannot be read: quota: exit code 1"),
    ],
)
def test_quotas_are_read_or_said_not_to_be_readable(tmp_path, programs, text, code, state, seen):
    programs("quota", text, code)
    (found,) = quotas(tmp_path)
    assert found.state == state and seen in found.seen


def test_the_quota_of_lustre(tmp_path, programs):
    programs("lfs", "     /a/long/name/of/a/file/system\n            95*  90  100  6d23h  5  0  0  -")
    found = list(quotas(tmp_path / "not" / "there"))
    assert [(each.state, each.values["share"]) for each in found] == [("warning", round(95 / 90, 4))] * 2


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    found = writable(tmp_path)
    assert found.state == "failed" and "no hard links (Operation not permitted)" in found.seen
    assert not list(tmp_path.iterdir())


def test_the_group_of_new_files(tmp_path):
    tmp_path.chmod(0o770)
    assert group(tmp_path).state == "warning"
    tmp_path.chmod(0o2770)
    assert group(tmp_path).state == "ok"


def report(**changes):
    import platform

    return {
        "node": "n1",
        "token": "right",
        "python": platform.python_version(),
        "packages": versions(),
        "temporary": {"folder": "/tmp", "free_bytes": 10**12, "problem": None},
        "network": {"hub": "the hub", "problem": None, "offline": list(OFFLINE)},
        "devices": [],
        "speed": {"ranks": 1, "backend": "gloo", "bytes": 4, "seconds": 1.0, "latency_s": 1.0},
        "time": time.time(),
        "login_time": time.time(),
    } | changes


def look_at(folder, reports, ranks=1, gpus=0, profile=None):
    """Return what is said of reports of ranks, by the name of the check."""
    seen = Seen(ranks=ranks, ended=True)
    (folder / REPORTS).mkdir()
    for rank, each in enumerate(reports):
        (folder / REPORTS / f"{rank}.json").write_text(json.dumps(each))
    seen.update(folder)
    return {finding.name: finding for finding in told(seen, "right", folder, gpus, profile or Profile())}


@pytest.mark.parametrize(
    ("changes", "name", "state", "seen"),
    [
        ({}, "clock", "ok", "n1: clock within "),
        ({"time": 4e9}, "clock", "warning", " s ahead of here"),
        ({"login_time": 4e9}, "clock", "warning", " s behind"),
        ({"token": "wrong"}, "shared workdir", "failed", "n1: not what was written here"),
        ({"packages": {**versions(), "torch": "1.0"}}, "node packages", "warning", "torch 1.0 (here "),
        ({"packages": dict.fromkeys((*PACKAGES, *OPTIONAL))}, "node packages", "failed", "no torch, deepspeed"),
        ({"temporary": {"folder": "/t", "free_bytes": None, "problem": "no"}}, "node temporary", "failed", "/t: "),
        ({"temporary": {"folder": "/t", "free_bytes": 5, "problem": None}}, "node temporary", "warning", "0.0 GB"),
        ({"network": {"hub": "", "problem": None, "offline": []}}, "network", "warning", "but for HF_DATASETS_OFFLINE"),
    ],
)
def test_what_is_said_of_a_node(tmp_path, changes, name, state, seen):
    finding = look_at(tmp_path, [report(**changes)])[name]
    assert finding.state == state and seen in finding.seen
    assert bool(finding.do) == (state != "ok")


def test_missing_gpus_and_a_hub_out_of_reach(tmp_path):
    network = {"hub": "the hub", "problem": "timed out", "offline": []}
    reports = [report(devices=["A", "A", "B"], network=network)]
    found = look_at(tmp_path, reports, gpus=4, profile=Profile(network=True))
    assert found["device"].state == "failed" and "2 x A, 1 x B; 4 GPUs were asked for" in found["device"].seen
    assert found["network"].state == "warning" and "the hub is not reached: timed out" in found["network"].seen


def test_ranks_that_do_not_meet_and_ranks_that_say_nothing(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "1_0_log.err").write_text("Traceback\n  File\nRuntimeError: no route\nsrun: error: n1\n")
    alone = report()
    del alone["speed"]
    found = look_at(tmp_path, [alone], ranks=2)
    assert found["shared workdir"].state == "failed" and "1 of 2 ranks" in found["shared workdir"].seen
    assert found["bandwidth"].state == "failed" and "RuntimeError: no route" in found["bandwidth"].seen


def test_bandwidth_is_what_nccl_tests_define(tmp_path):
    speed = {"ranks": 4, "backend": "nccl", "bytes": 2**26, "seconds": 2**26 / 1e9, "latency_s": 1e-5}
    found = look_at(tmp_path, [report(node=f"n{rank}", speed=speed) for rank in range(4)], ranks=4)
    values = found["bandwidth"].values
    assert values["algorithm_gb_per_second"] == pytest.approx(1) and values["bus_gb_per_second"] == pytest.approx(1.5)
    assert "n0, n1, n2, n3: CPU" in found["device"].seen


def test_no_word_at_all(tmp_path):
    (finding,) = look_at(tmp_path, []).values()
    assert finding.name == "job" and "is the workdir on a file system that the nodes share?" in finding.seen
