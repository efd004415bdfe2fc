"""What a cluster's job says by its exit code: SLURM's script (slurm/job.sh) tries again or not by it."""

import os
import subprocess
import sys
import time

import pytest
from toy import write_toy

from growmerge.events import read_events
from slurm.script import OUT_OF_TIME, STOPPED

LEAVES = """
import os, signal, time
from growmerge.worker import leave
signal.signal(signal.SIGUSR2, leave)
os.kill(os.getpid(), signal.SIGUSR2)
time.sleep(30)
"""
PACK = """
import sys, time
from pathlib import Path
from growmerge import run, verbs
from growmerge.worker import work

folder = Path(sys.argv[1])
plan = run.load(folder / "toy.yaml", folder / "run")
real = verbs.do

def do(context, task):
    if task.name == "tokens":
        raise ZeroDivisionError("of this test")
    real(context, task)

verbs.do = do
work(run.submission(plan, folder / "toy.yaml", time.time()).order(("text", "tokens", "pairs"), folder))
"""
"""A job of three stages, in the second of which something is raised that is no bad input."""
ALONE = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "1",
    "SUBMITIT_LOCAL_NTASKS": "1",
    "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
    "SUBMITIT_LOCAL_NODEID": "0",
    "SUBMITIT_LOCAL_GLOBALID": "0",
    "SUBMITIT_LOCAL_LOCALID": "0",
    "MASTER_ADDR": "127.0.0.1",
}


@pytest.mark.parametrize(("left", "code"), [(60, OUT_OF_TIME), (3600, STOPPED)])
def test_told_to_stop_with_nothing_to_save_it_says_whether_its_time_is_up(monkeypatch, left, code):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left))
    assert subprocess.run([sys.executable, "-c", LEAVES], check=False, timeout=60).returncode == code


@pytest.mark.parametrize(
    ("modules", "later"),
    [
        ("growmerge.run, growmerge.on_machine, growmerge.worker, growmerge.texts", "torch"),
        ("growmerge.scores, growmerge.verify, merge.search", "transformers"),
    ],
)
def test_what_takes_seconds_to_import_is_imported_where_it_is_used(modules, later):
    imported = f"import sys, {modules}; print({later!r} in sys.modules)"
    found = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_what_was_imported_is_not_searched_for_garbage():
    code = (
        "import gc; from growmerge.worker import import_all; import_all(['growmerge.tasks', 'growmerge.texts']);"
        "print(gc.isenabled(), gc.get_freeze_count() > 10_000, 'growmerge.texts' in __import__('sys').modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "True True True\n"


def test_a_stage_that_crashes_leaves_the_others_of_its_job_alone_and_is_tried_again(tmp_path):
    write_toy(tmp_path)
    (tmp_path / "run" / "leases").mkdir(parents=True)
    found = subprocess.run(
        [sys.executable, "-c", PACK, str(tmp_path)],
        env={**os.environ, **ALONE},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    # Neither 0 nor the code of a bad input: the job is tried again, and then does what is left.
    assert found.returncode == 1, found.stderr
    said = {event["stage"]: event for event in read_events(tmp_path / "events.jsonl") if "stage" in event}
    assert said["pairs"]["event"] == "done"
    assert (said["tokens"]["event"], said["tokens"]["text"]) == ("error", "ZeroDivisionError: of this test")
    assert "Traceback" in found.stderr
