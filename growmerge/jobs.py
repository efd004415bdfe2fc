"""A job of several ranks: submitted, followed to its end, and why it failed if it did."""

import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growmerge.events import Follower
from slurm.executor import Job, Kind, dead_ranks, stop, submit, tell
from train.signals import SIGNALS

ALMOST_FULL = 2**18
"""Free bytes below which a death without a message is put down to the disk: a rank could not even say why."""
STALLED = re.compile(r"^Timeout \((\S+)\)!$", re.MULTILINE)
"""How faulthandler begins when `train.signals.Watchdog` ends a rank."""
AGAIN = 2.0
"""Seconds after which ranks are told once more that they are asked to stop."""
PATIENCE = 5.0
"""Seconds between two looks for dead ranks; one that is dead at both ends the job."""


def run_job(
    job: Job, kind: Kind, folder: Path, events: Path, show: Any, workdir: Path, *, stops: bool = False
) -> str | None:
    """Run a job, showing its events, and return the line to end with if it failed.

    Args:
        folder: of the job's scripts and logs.
        events: file that the job's first rank appends its events to.
        show: takes events (`event`), keeps time (`tick`), and holds the first bad input (`error`).
        workdir: whose disk may have been full.
        stops: whether the ranks save and end when they are asked to stop. Then a first SIGTERM or SIGUSR2 is passed on
            to them, again and again, as one that is still starting has no ear for it; a second one ends the job.
    """
    handle = submit(job, kind, folder)
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in SIGNALS if stops}
    try:
        return _follow(handle, kind, events, show, workdir, asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(handle: Any, kind: Kind, events: Path, show: Any, workdir: Path, asked: Sequence[int]) -> str | None:
    follower = Follower(events)
    dead: list[int] = []
    dead_since = told = 0.0
    try:
        while not handle.done():
            for event in follower.new():
                show.event(event)
            show.tick()
            now = time.monotonic()
            if asked and kind == "local" and now - told > AGAIN:
                told = now
                tell(handle, signal.Signals(asked[0]))
            if len(asked) > 1:
                raise KeyboardInterrupt
            if kind == "local" and now - dead_since > PATIENCE:
                before, dead, dead_since = dead, dead_ranks(handle), now
                if dead and dead == before:
                    stop(handle, kind)
            time.sleep(0.2)
    except BaseException:
        stop(handle, kind)
        raise
    for event in follower.new():
        show.event(event)
    if show.error is not None:
        return str(show.error)
    line = _failure(handle, dead)
    if line is not None and shutil.disk_usage(workdir).free < ALMOST_FULL:
        return f"{show.stage}: {workdir}: no space left; nothing that was complete is lost"
    return f"{show.stage}: {line}" if line else None


def _failure(handle: Any, dead: Sequence[int]) -> str | None:
    """Return the line of a rank that failed or died, if one did."""
    failed = [rank for rank in range(handle.num_tasks) if handle.task(rank).exception() is not None]
    for rank in sorted({*range(handle.num_tasks)} - {*failed}):
        if (line := handle.task(rank).result()) is not None:
            return str(line)  # a bad input that this rank alone met
    if not failed:
        return None
    # A rank that was killed leaves no traceback; the others then fail in a collective. Name the first cause.
    tasks = {rank: handle.task(rank) for rank in failed}
    logs = {rank: _text(task.paths.stderr) for rank, task in tasks.items()}
    stalled = {rank: found[1] for rank in failed if (found := STALLED.search(logs[rank]))}
    if stalled:
        rank, time_out = next(iter(stalled.items()))
        stacks = f"the stacks of its threads are in its log: {tasks[rank].paths.stderr}"
        return f"rank {rank} failed: no progress for {time_out} (stall_minutes); {stacks}"
    silent = [rank for rank in [*dead, *failed] if rank in failed and "Traceback" not in logs[rank]]
    if silent:
        last = "it died without a message (killed, or out of memory)"
        return f"rank {silent[0]} failed: {last}; log: {tasks[silent[0]].paths.stderr}"
    rank = min(failed, key=lambda rank: tasks[rank].paths.result_pickle.stat().st_mtime_ns)
    return f"rank {rank} failed: {logs[rank].strip().splitlines()[-1][:300]}; log: {tasks[rank].paths.stderr}"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
