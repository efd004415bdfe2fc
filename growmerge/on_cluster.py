"""A pipeline on a SLURM cluster: a job a stage, all submitted at once; who submitted them may watch, or leave.

`submitted.json` in the workdir remembers the jobs. `growmerge run` on a workdir whose jobs are under way watches these,
and submits what is not.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import read_json, write_json
from growmerge.events import Follower, read_events
from growmerge.tasks import Task
from parallel.errors import InputError
from slurm.executor import Job
from slurm.graph import Planned, submit_all
from slurm.queue import Queued, queued

SUBMITTED = "submitted.json"
PLACES = ("folder", "log", "result")
"""Of an entry, relative to the workdir."""
POLL_S = 5.0
"""Seconds between two questions to the scheduler, one for all jobs."""
TOGETHER = ("train", "evaluate")
"""Verbs whose work all ranks share; of the others one rank does it all."""
LINES = 5
"""Last lines of a failed job's log that are shown."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A job that was submitted."""

    id: str
    folder: Path
    """Of its events."""
    log: Path
    """What its first rank printed as errors."""
    result: Path
    """Folder that is complete when it has ended well."""


def submitted(workdir: Path) -> dict[str, Entry]:
    """Return the last job of each stage."""
    path = workdir / SUBMITTED
    known = read_json(path) if path.is_file() else {}
    return {
        name: Entry(id=one["id"], **{place: workdir / one[place] for place in PLACES}) for name, one in known.items()
    }


def submit_stages(plan: Any, todo: Sequence[str], show: Any, began: float) -> None:
    """Submit what is to be done and is not under way.

    Raises:
        InputError: the scheduler rejects a job, or does not answer.
    """
    entries = submitted(plan.workdir)
    running = queued(entries[name].id for name in todo if name in entries)
    under_way = {name: entries[name].id for name in todo if name in entries and entries[name].id in running}
    new = [name for name in todo if name not in under_way]
    if under_way:
        show.say(f"{len(under_way)} jobs are under way already")
    if new:
        entries |= _submit(plan, new, under_way, began)
        write_json(plan.workdir / SUBMITTED, {name: _plain(one, plan.workdir) for name, one in entries.items()})
        show.say(f"{len(new)} jobs submitted; they go on without this command")


def _plain(entry: Entry, workdir: Path) -> dict[str, str]:
    return {"id": entry.id, **{place: str(getattr(entry, place).relative_to(workdir)) for place in PLACES}}


def _submit(plan: Any, new: list[str], under_way: Mapping[str, str], began: float) -> dict[str, Entry]:
    from growmerge.worker import Order, work

    resources = plan.pipeline.resources
    place = plan.workdir / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    threads = resources.threads or 1
    waited = {*new, *under_way}
    jobs: dict[str, Planned] = {}
    for number, name in enumerate(new):
        task: Task = plan.tasks[name]
        together = task.verb in TOGETHER
        folder = place / f"{number:04d}"
        folder.mkdir(parents=True)
        order = Order(
            pipeline=plan.pipeline,
            nodes=plan.nodes,
            tasks=plan.tasks,
            todo=(name,),
            base=plan.base,
            workdir=plan.workdir,
            events=folder / "events.jsonl",
            rendezvous=None,
            threads=threads,
            began=began,
            launcher=None,
            lease=folder / "lease.json",
        )
        job = Job(
            name=f"{plan.pipeline.name}/{name}",
            function=work,
            arguments=(order,),
            ranks=resources.ranks if together else 1,
            nodes=resources.nodes if together else 1,
            threads=threads,
            minutes=resources.minutes,
            memory_gb=resources.memory_gb,
            gpus=resources.gpus if together else 0,
            slurm=resources.slurm,
            restarts=resources.restarts,
            lead_s=resources.lead_seconds,
            failures=place / "failures",
        )
        jobs[name] = Planned(job=job, after=tuple(other for other in task.inputs if other in waited))
    logs = place / "logs"
    ids = submit_all(jobs, logs, running=under_way)
    return {
        name: Entry(
            id=ids[name],
            folder=place / f"{at:04d}",
            log=logs / f"{ids[name]}_0_log.err",
            result=plan.tasks[name].folder,
        )
        for at, name in enumerate(new)
    }


def watch_stages(plan: Any, names: Sequence[str], show: Any) -> str | None:
    """Show how far the jobs are until all have ended; return what failed, if something did."""
    entries = {name: entry for name, entry in submitted(plan.workdir).items() if name in names}
    try:
        return _watch(plan, entries, show)
    except KeyboardInterrupt:
        show.say("no longer watched; the jobs go on, and the same command watches them again")
        raise


def _watch(plan: Any, entries: Mapping[str, Entry], show: Any) -> str | None:
    followers = {name: Follower(entry.folder / "events.jsonl") for name, entry in entries.items()}
    left = set(entries)
    asked = 0.0
    failed: list[str] = []
    while left:
        for name in sorted(left):
            for event in followers[name].new():
                show.event(event)
        show.tick()
        if time.monotonic() - asked > POLL_S:
            asked = time.monotonic()
            running = queued(entries[name].id for name in left)
            for name in sorted(name for name in left if entries[name].id not in running):
                left.remove(name)
                for event in followers[name].new():
                    show.event(event)
                if not plan.tasks[name].done and ran(entries[name]):
                    failed.append(f"{name}: {why(entries[name])}")
        time.sleep(0.2)
    missing = [name for name in entries if not plan.tasks[name].done]
    if not missing:
        return None
    waiting = len(missing) - len(failed)
    rest = f"; {waiting} stages that need it did not start" if waiting else ""
    return (failed[0] if failed else f"{missing[0]}: its job is gone, and left no result") + rest


def ran(entry: Entry) -> bool:
    """Return whether a job has started."""
    return (entry.folder / "events.jsonl").is_file() or entry.log.is_file()


def why(entry: Entry) -> str:
    """Return why a job failed: its own words, or the last lines of its log."""
    errors = [event for event in read_events(entry.folder / "events.jsonl") if event["event"] == "error"]
    if errors:
        return str(errors[-1]["text"])
    lines = entry.log.read_text(errors="replace").strip().splitlines() if entry.log.is_file() else []
    last = " | ".join(line.strip() for line in lines[-LINES:])
    return f"its job {entry.id} failed: {last[-500:] or 'it left no word'}; log: {entry.log}"


def states(workdir: Path) -> dict[str, tuple[Entry, Queued | None]]:
    """Return the last job of each stage, and what the scheduler says of it; nothing of those that have ended.

    Raises:
        InputError: nothing was submitted from this workdir.
    """
    entries = submitted(workdir)
    if not entries:
        raise InputError(f"{workdir}: no jobs of a cluster were submitted from here")
    found = queued(entry.id for entry in entries.values())
    return {name: (entry, found.get(entry.id)) for name, entry in entries.items()}
