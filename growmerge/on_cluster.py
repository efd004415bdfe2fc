"""A pipeline on a SLURM cluster: a job a stage, all submitted at once; who submitted them may watch, or leave.

`submitted.json` in the workdir remembers the jobs. `growmerge run` on a workdir whose jobs are under way watches these,
and submits what is not.
"""

import getpass
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
SILENT_S, LATE_S = 600.0, 60.0
"""How long the scheduler may not answer, and a result be late after its job's end (network file systems)."""
POLL_S = 2.0
"""Seconds between two looks at the jobs: one question to the scheduler for all of them."""
TOGETHER = ("train", "evaluate")
"""Verbs whose work all ranks share; of the others one rank does it all."""
LINES = 5
"""Last lines of a failed job's log that are shown."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A job that was submitted."""

    id: str
    user: str
    """Who submitted it."""
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
        name: Entry(**{key: workdir / value if key in PLACES else value for key, value in one.items()})
        for name, one in known.items()
    }


def submit_stages(plan: Any, todo: Sequence[str], show: Any, began: float) -> None:
    """Submit what is to be done and is not under way.

    Raises:
        InputError: the scheduler rejects a job, or does not answer.
    """
    entries = submitted(plan.workdir)
    running = under_way(entries)
    changed = [name for name in todo if name in running and entries[name].result != plan.tasks[name].folder]
    if changed:
        raise InputError(
            f"{plan.workdir}: the job of {changed[0]} is under way with another configuration: "
            f"`growmerge cancel {plan.workdir}` first"
        )
    # Asked after the scheduler, so that what has just ended is not done again.
    todo = [name for name in todo if name in running or not plan.tasks[name].done]
    new = [name for name in todo if name not in running]
    if running:
        show.say(f"{len(running)} jobs are under way already")
    if new:
        _submit(plan, new, entries, running, began)
        show.say(f"{len(new)} jobs submitted; they go on without this command")


def under_way(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return the ids of the jobs that have not ended, by stage."""
    found = _queued(entries)
    return {name: entry.id for name, entry in entries.items() if entry.id in found}


def _queued(entries: Mapping[str, Entry]) -> dict[str, Queued]:
    found: dict[str, Queued] = {}
    for user in {entry.user for entry in entries.values()}:
        found |= queued((entry.id for entry in entries.values() if entry.user == user), user)
    return found


def _plain(entry: Entry, workdir: Path) -> dict[str, str]:
    places = {place: str(getattr(entry, place).relative_to(workdir)) for place in PLACES}
    return {"id": entry.id, "user": entry.user, **places}


def _submit(plan: Any, new: Sequence[str], entries: dict[str, Entry], running: Mapping[str, str], began: float) -> None:
    """Submit stages; `entries` and the file get each as soon as the scheduler has taken it."""
    from growmerge.worker import Order, work

    resources = plan.pipeline.resources
    place = plan.workdir / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    threads = resources.threads or 1
    waited = {*new, *running}
    jobs: dict[str, Planned] = {}
    (plan.workdir / "leases").mkdir(exist_ok=True)
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
            lease=plan.workdir / "leases" / f"{task.key}.json",
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
    user = getpass.getuser()

    def note(ids: Mapping[str, str]) -> None:
        for at, name in enumerate(new):
            if name in ids:
                log, result = logs / f"{ids[name]}_0_log.err", plan.tasks[name].folder
                folder = place / f"{at:04d}"
                entries[name] = Entry(id=ids[name], user=user, folder=folder, log=log, result=result)
        write_json(plan.workdir / SUBMITTED, {name: _plain(one, plan.workdir) for name, one in entries.items()})

    submit_all(jobs, logs, running=running, note=note)


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
    left, gone = set(entries), dict[str, float]()
    answered = time.monotonic()
    while left:
        show.tick()
        for name in sorted(left):
            for event in followers[name].new():
                show.event(event)
        try:
            running = under_way(entries)
            answered = time.monotonic()
        except InputError:
            if time.monotonic() - answered > SILENT_S:
                raise
            running = dict.fromkeys(left, "")
        for name in sorted(left - set(running)):
            late = time.monotonic() - gone.setdefault(name, time.monotonic()) > LATE_S
            if plan.tasks[name].done or late or not ran(entries[name]) or _said(entries[name]):
                left.remove(name)
                for event in followers[name].new():
                    show.event(event)
        time.sleep(POLL_S if left else 0)
    missing = [name for name in entries if not plan.tasks[name].done]
    failed = [name for name in missing if ran(entries[name])]
    if not missing:
        return None
    waiting = len(missing) - len(failed)
    rest = f"; {waiting} stages that need it did not start" if waiting else ""
    return (f"{failed[0]}: {why(entries[failed[0]])}" if failed else f"{missing[0]}: its job is gone") + rest


def _said(entry: Entry) -> list[str]:
    """Return what a job said of why it failed."""
    events = read_events(entry.folder / "events.jsonl")
    return [str(event["text"]) for event in events if event["event"] == "error"]


def ran(entry: Entry) -> bool:
    """Return whether a job has started."""
    return (entry.folder / "events.jsonl").is_file() or entry.log.is_file()


def why(entry: Entry) -> str:
    """Return why a job failed: its own words, or the last lines of its log."""
    if said := _said(entry):
        return said[-1]
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
    found = _queued(entries)
    return {name: (entry, found.get(entry.id)) for name, entry in entries.items()}
