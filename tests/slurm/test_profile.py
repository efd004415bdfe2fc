"""A cluster's profile: what it makes of a new workdir, and of a job's script, which bash runs here."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from parallel.errors import InputError
from slurm.profile import NodeLocal, Profile


def run(profile, place, **variables):
    """Run the lines of a profile with bash, srun being a command that starts one task; return what is set then."""
    (place / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    (place / "srun").chmod(0o755)
    lines = ["finish() { echo finished $1; exit $1; }", *profile.lines(place / "the code"), "umask", "env"]
    environment = {"PATH": f"{place}:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "1", **variables}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, text=True, capture_output=True, check=False
    )
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return done.returncode, done.stdout, values


def test_variables_are_filled_in_and_nothing_else(tmp_path):
    profile = Profile(
        setup=("export LOADED=yes",),
        environment={"A": '$WHO\'s "own" `false` $(false) \\', "NCCL_SOCKET_IFNAME": "ib0,ib1"},
        cache="$PLACE/cache",
        temporary="$PLACE/tmp of $WHO",
        group_writable=True,
    )
    code, out, values = run(profile, tmp_path, WHO="me", PLACE=str(tmp_path), PYTHONPATH="/mine")
    assert code == 0, out
    assert values["LOADED"] == "yes"
    assert values["A"] == 'me\'s "own" `false` $(false) \\'
    assert values["HF_HOME"] == f"{tmp_path}/cache/huggingface"
    assert values["TMPDIR"] == f"{tmp_path}/tmp of me" and Path(values["TMPDIR"]).is_dir()
    assert values["PYTHONPATH"] == f"{tmp_path}/the code:/mine"
    assert values["HF_HUB_OFFLINE"] == values["TRANSFORMERS_OFFLINE"] == "1" and values["WANDB_MODE"] == "offline"
    assert "\n0002\n" in "\n" + out
    code, out, values = run(Profile(network=True), tmp_path)
    assert (code, values["PYTHONPATH"]) == (0, f"{tmp_path}/the code") and "HF_HUB_OFFLINE" not in values


def test_an_environment_is_unpacked_on_the_nodes_disk(tmp_path):
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").write_text("#!/bin/sh\necho $0 $1\n")
    (tmp_path / "env" / "bin" / "python").chmod(0o755)
    subprocess.run(["tar", "-cf", tmp_path / "env.tar", "-C", tmp_path / "env", "."], check=True)
    profile = Profile(node_local=NodeLocal(archive=f"{tmp_path}/env.tar", folder="$DISK/env"))
    code, out, _ = run(profile, tmp_path, DISK=f"{tmp_path}/the disk")
    assert code == 0, out
    command = f"{profile.command(tmp_path)} -u"
    said = subprocess.run(
        ["bash", "-c", command], env={"DISK": f"{tmp_path}/the disk"}, text=True, capture_output=True, check=True
    )
    assert said.stdout == f"{tmp_path}/the disk/env/bin/python -u\n"
    # A node whose disk is full, or that does not see the archive, counts as a failure of that node.
    (tmp_path / "env.tar").unlink()
    code, out, _ = run(profile, tmp_path, DISK=f"{tmp_path}/disk")
    assert (code, out) == (1, "finished 1\n")


def test_a_container_is_given_the_workdir(tmp_path):
    profile = Profile(python="apptainer exec --nv --bind {workdir} image.sif python")
    assert profile.command(Path("/a b/run")) == "apptainer exec --nv --bind '/a b/run' image.sif python"
    assert Profile().command(tmp_path) is None


def test_a_new_workdir_is_striped_once_and_is_the_groups(tmp_path):
    command = tmp_path / "stripe"
    command.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/striped\n[ "$2" != 9 ] || {{ echo no such pool >&2; exit 3; }}\n'
    )
    command.chmod(0o755)
    before = os.umask(0o022)
    try:
        profile = Profile(striping=f"{command} -c 8", group_writable=True)
        for _ in range(2):
            profile.prepare(tmp_path / "runs" / "a b")
        assert (tmp_path / "striped").read_text() == f"-c 8 {tmp_path}/runs/a b\n"
        (tmp_path / "runs" / "a b" / "file").touch()
        assert (tmp_path / "runs" / "a b" / "file").stat().st_mode & stat.S_IWGRP
    finally:
        os.umask(before)
    with pytest.raises(InputError, match=r"^striping: .*stripe -c 9 .*: no such pool$"):
        Profile(striping=f"{command} -c 9").prepare(tmp_path / "other")
    with pytest.raises(InputError, match=r"^striping: .*No such file or directory"):
        Profile(striping="lfs-that-is-not-here setstripe").prepare(tmp_path / "third")
