"""Being stopped, and standing still: what the process says of it."""

import math
import subprocess
import sys
import time
from types import SimpleNamespace

from growmerge.jobs import _failure
from slurm.local import Running
from train.signals import time_left


def test_a_process_that_stands_still_leaves_its_stacks_and_the_job_names_the_rank(tmp_path):
    program = "import time; from train.signals import Watchdog; Watchdog(0.005).progress(); time.sleep(60)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert found.returncode != 0
    assert "most recent call first" in found.stderr
    log = tmp_path / "log.err"
    log.write_text(found.stderr)
    task = SimpleNamespace(
        exception=lambda: RuntimeError(), paths=SimpleNamespace(stderr=log, result_pickle=log), result=lambda: None
    )
    job = SimpleNamespace(num_tasks=2, task=lambda rank: task)
    line = _failure(Running(job))
    assert line.startswith("rank 0 failed: no progress for 0:00:00.300000 (stall_minutes); the stacks")
    assert line.endswith(str(log))


def test_slurm_says_when_a_job_ends(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert time_left() == math.inf
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert 90 < time_left() <= 100
