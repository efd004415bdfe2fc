"""What was submitted from a workdir, what the scheduler says of it, and why what failed has failed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from growmerge.events import read_events
from parallel.errors import InputError
from slurm.graph import Taken
from slurm.queue import Queued, queued

SUBMITTED = "submitted.json"
NEVER = "DependencyNeverSatisfied"
"""Of a job that the scheduler is about to remove."""
ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]+(Error|Exception|Interrupt|Exit)\b")
"""How the last line of a traceback begins."""
SCHEDULER = re.compile(r"(srun|slurmstepd\S*): error: (?!.*: Terminated$)")
"""What SLURM says of an end; of ranks that it ended because of another it says that they were terminated."""
NO_WORD = "its job is gone and left no log: is the workdir on a file system that the nodes share?"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was submitted of a stage."""

    stage: str
    ids: tuple[str, ...]
    """Of its job and that job's successors."""
    soft: bool
    user: str
    """Who submitted it."""
    folder: Path
    """Of its job's events."""
    result: Path
    key: str
    after: tuple[str, ...]
    """As of its Unit."""

    @property
    def taken(self) -> Taken:
        return Taken(ids=self.ids, soft=self.soft)

    def log_of(self, rank: int) -> Path:
        """Return the file of what a rank wrote as errors: of the last of its jobs that has started."""
        paths = [self.folder.parent / "logs" / f"{one}_{rank}_log.err" for one in self.ids]
        return next((path for path in reversed(paths) if path.is_file()), paths[0])


def submitted(workdir: Path) -> dict[str, Entry]:
    """Return the last job of each stage."""
    path = workdir / SUBMITTED
    known = read_json(path)["stages"] if path.is_file() else {}
    return {
        name: Entry(
            stage=name,
            ids=tuple(one["ids"]),
            soft=one["soft"],
            user=one["user"],
            folder=workdir / one["folder"],
            result=workdir / one["result"],
            key=one["key"],
            after=tuple(one["after"]),
        )
        for name, one in known.items()
    }


def refuse_here(workdir: Path) -> None:
    """Refuse to work on this machine in what a cluster works in.

    Raises:
        InputError: a job from this workdir is under way, as far as the scheduler can be asked.
    """
    try:
        running = under_way(submitted(workdir))
    except InputError:
        return
    if running:
        raise InputError(
            f"{workdir}: the job of {next(iter(running))} is under way on a cluster: watch it there, or "
            f"`growmerge cancel {workdir}` first"
        )


def under_way(entries: Mapping[str, Entry]) -> dict[str, Queued]:
    """Return what the scheduler says of the jobs that have not ended, by stage."""
    answers: dict[str, Queued] = {}
    for user in {entry.user for entry in entries.values()}:
        answers |= queued((one for entry in entries.values() if entry.user == user for one in entry.ids), user)
    found = {}
    for name, entry in entries.items():
        jobs = [answers[one] for one in entry.ids if one in answers and answers[one].reason != NEVER]
        if jobs:  # of a job and its successors, the one that runs, or else the next
            found[name] = next((job for job in jobs if job.state == "RUNNING"), jobs[0])
    return found


def events_of(entry: Entry) -> list[dict[str, Any]]:
    """Return what a stage's job has said of it."""
    events = read_events(entry.folder / "events.jsonl")
    return [event for event in events if event.get("stage", entry.stage) == entry.stage]


def said(entry: Entry) -> list[str]:
    """Return what a job said of why it failed."""
    return [str(event["text"]) for event in events_of(entry) if event["event"] == "error"]


def ran(entry: Entry) -> bool:
    """Return whether a stage has been begun, or its job at least has left a word."""
    if any(event["event"] in ("start", "error") for event in events_of(entry)):
        return True
    return not (entry.folder / "events.jsonl").is_file() and entry.log_of(0).is_file()


def why(entry: Entry) -> str:
    """Return why a job failed: its own words, or the last lines of its log."""
    if found := said(entry):
        return found[-1]
    log = entry.log_of(0)
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    # An exception's own line; else how SLURM says that it ended (killed, out of memory); else what was said last.
    found = [line for line in lines if ERROR.match(line)] or [line for line in lines if SCHEDULER.match(line)] or lines
    return f"its job {entry.ids[0]} failed: {found[-1].strip()[-500:] if found else 'it left no word'}; log: {log}"
