"""Jobs of this machine: run, followed to their end, and why they failed if they did."""

import re
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growmerge.events import Follower
from slurm.executor import Job, tell
from slurm.graph import Planned
from slurm.local import Queue, Running, run_all
from train.signals import SIGNALS

ALMOST_FULL = 2**18
"""Free bytes below which a death without a message is put down to the disk: a rank could not even say why."""
STALLED = re.compile(r"^Timeout \((\S+)\)!$", re.MULTILINE)
"""How faulthandler begins when `train.signals.Watchdog` ends a rank."""
AGAIN = 2.0
"""Seconds after which ranks are told once more that they are asked to stop."""


def run_job(job: Job, events: Path, show: Any, workdir: Path, *, stops: bool = False) -> str | None:
    """Run one job, whatever it takes of this machine; otherwise as `run_jobs`."""
    return run_jobs(Queue({job.name: Planned(job=job)}), {job.name: events}, show, workdir, stops=stops)


def run_jobs(queue: Queue, events: Mapping[str, Path], show: Any, workdir: Path, *, stops: bool = False) -> str | None:
    """Run jobs, showing their events, and return the line to end with if one failed.

    Args:
        events: file of each job that its first rank appends its events to; the job's scripts and logs lie beside it.
        show: takes events (`event`) and lines (`say`), and keeps time (`tick`).
        workdir: whose disk may have been full.
        stops: whether the ranks save and end when they are asked to stop. Then a first SIGTERM or SIGUSR2 is passed on
            to them, again and again, as one that is still starting has no ear for it; a second one ends the jobs.
            Otherwise a first SIGTERM does, as ctrl-C does anyway.
    """
    followed = {name: _Followed(name, path) for name, path in events.items()}
    asked: list[int] = []
    failed: list[str] = []
    told = 0.0

    def look(running: Mapping[str, Running]) -> None:
        nonlocal told
        for name in running:
            followed[name].pass_on(show)
        show.tick()
        if len(asked) > stops:
            raise KeyboardInterrupt
        if asked and time.monotonic() - told > AGAIN:
            told = time.monotonic()
            for job in running.values():
                tell(job.handle, signal.Signals(asked[0]))

    def well(name: str, job: Running) -> bool:
        followed[name].pass_on(show)
        line = followed[name].error
        if line is None and (line := _failure(job)) is not None and shutil.disk_usage(workdir).free < ALMOST_FULL:
            line = f"{workdir}: no space left; nothing that was complete is lost"
        if line is not None:
            failed.append(f"{followed[name].stage}: {line}")
            if len(queue.running) > 1:  # the end may be hours away
                show.say(failed[-1])
        return line is None

    heard = SIGNALS if stops else (signal.SIGTERM,)
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in heard}
    try:
        run_all(queue, {name: path.parent for name, path in events.items()}, look=look, well=well)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    rest = f"; {len(queue.dropped)} stages that need it did not start" if queue.dropped else ""
    return failed[0] + rest if failed else None


class _Followed:
    """A job's events; `stage` is the one at work, or the job's name before the first, `error` its first bad input."""

    def __init__(self, name: str, path: Path) -> None:
        self.stage = name
        self.error: str | None = None
        self._follower = Follower(path)

    def pass_on(self, show: Any) -> None:
        """Show what is new."""
        for event in self._follower.new():
            show.event(event)
            self.stage = event["stage"]
            if event["event"] == "error":
                self.error = self.error or str(event["text"])


def _failure(job: Running) -> str | None:
    """Return the line of a rank that failed or died, if one did."""
    handle, failed = job.handle, job.failed()
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
    silent = [rank for rank in [*job.dead, *failed] if rank in failed and "Traceback" not in logs[rank]]
    if silent:
        last = "it died without a message (killed, or out of memory)"
        return f"rank {silent[0]} failed: {last}; log: {tasks[silent[0]].paths.stderr}"
    rank = min(failed, key=lambda rank: tasks[rank].paths.result_pickle.stat().st_mtime_ns)
    return f"rank {rank} failed: {logs[rank].strip().splitlines()[-1][:300]}; log: {tasks[rank].paths.stderr}"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
