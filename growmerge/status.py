"""`growmerge status`, `logs` and `cancel`: what runs, what waits and why, from any shell, whoever submitted it."""

import json
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from checkpoint import manifest
from checkpoint.files import read_json
from growmerge.events import read_events
from growmerge.submitted import NO_WORD, SUBMITTED, Entry, ran, submitted, under_way, why
from merge.search_settings import RESULT
from parallel.errors import InputError, one_of
from slurm import graph
from slurm.lease import Owner, holder
from slurm.queue import Queued

TAIL = 2**16
"""Bytes at a file's end that its last events are looked for in."""
COLORS = {"done": "green", "running": "cyan", "failed": "red", "not started": "red"}
NUMBERS = ("step", "loss", "tokens/s", "left", "restarts")
EVERY_S = 5.0
"""Seconds between two looks of `--watch`."""
LEASES = ("lease.json", "job.json")
"""Of a run on this machine, and of its job."""
GONE_S = 120.0
"""How long jobs that are cancelled may take to go: a training saves meanwhile."""
ENDED_S = 10.0
"""Seconds that a run of this machine has to end in when it is cancelled."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a stage."""

    stage: str
    state: str
    """done, running, waiting, failed, or not started (and never will be)."""
    job: str
    nodes: str = ""
    step: str = ""
    loss: float | None = None
    tokens_per_second: float | None = None
    left_s: float | None = None
    """Seconds until its last step, at the speed of its last steps."""
    restarts: int = 0
    note: str = ""
    """Why it waits or failed, or what a search has found."""


def rows(workdir: Path) -> list[Row]:
    """Return the stages of a workdir's last submission, or of its last run on this machine.

    Raises:
        InputError: nothing was run from it; the scheduler does not answer.
    """
    entries = submitted(workdir)
    here = _here(workdir)
    if not entries and not here and (owner := _owner(workdir)) is not None:
        return [Row(stage=workdir.name, state="running", job="", note=f"by {owner}")]  # it has just begun
    if not entries and not here:
        raise InputError(f"{workdir}: nothing was run or submitted from here")
    found = under_way(entries)
    # Text was fetched here before anything was submitted.
    before = [row for row in here if row.stage not in entries]
    return before + [_row(name, entry, found.get(name), entries) for name, entry in entries.items()]


def _row(name: str, entry: Entry, job: Queued | None, entries: Mapping[str, Entry]) -> Row:
    if manifest.is_complete(entry.result):
        return Row(stage=name, state="done", job=entry.ids[0], note=_found(entry.result))
    about: dict[str, Any] = {"stage": name, "job": job.id if job else entry.ids[0]}
    if job is None:
        if ran(entry):
            return Row(state="failed", note=why(entry), **about)
        missing = [
            other for other in entry.after if other in entries and not manifest.is_complete(entries[other].result)
        ]
        if missing:
            return Row(state="not started", note=f"it needs {missing[0]}", **about)
        others = [other for other in entries.values() if other.ids == entry.ids and ran(other)]
        return Row(state="not started", note="its job ended before" if others else NO_WORD, **about)
    about["restarts"] = job.restarts + entry.ids.index(job.id)
    if job.state != "RUNNING":
        note = job.why if job.state == "PENDING" else job.state.lower()
        return Row(state="waiting", note=note, **about)
    events = [event for event in last_events(entry.folder / "events.jsonl") if event.get("stage", name) == name]
    if len([one for one in entries.values() if one.folder == entry.folder]) > 1:
        if not events:
            return Row(state="waiting", note="waits for others of its job", **about)
        if events[-1]["event"] == "error":
            return Row(state="failed", note=str(events[-1]["text"]), **about)
    return Row(state="running", nodes=job.nodes, **about, **progress(events))


def _found(result: Path) -> str:
    """Return what the search of a finished merge has found; nothing of other stages."""
    path = result / "model" / RESULT
    if not path.is_file():
        return ""
    found = read_json(path)
    start, best = found["start"]["mean"], found["best"]["mean"]
    return f"searched: {start:.4f} -> {best:.4f} bits per byte, {found['merges']} merges"


def _here(workdir: Path) -> list[Row]:
    """Return what the log of runs on this machine says."""
    at: dict[str, list[dict[str, Any]]] = {}
    failed = False
    for event in read_events(workdir / "log.jsonl"):
        if event["event"] == "end":
            failed = event["failed"]
        elif event["event"] == "run":
            failed = False
        elif "stage" in event:
            at.setdefault(event["stage"], []).append(event)
    owner = _owner(workdir)
    found = []
    for name, events in at.items():
        kinds = [event["event"] for event in events]
        last = max((number for number, kind in enumerate(kinds) if kind == "start"), default=0)
        if "done" in kinds[last:]:
            outcome = [str(event["text"]) for event in events[last:] if event["event"] == "outcome"]
            found.append(Row(stage=name, state="done", job="", note="".join(outcome)))
            continue
        errors = [str(event["text"]) for event in events[last:] if event["event"] == "error"]
        state = "failed" if errors else "running" if owner else "stopped"
        note = (errors or [f"by {owner}" if owner else "its run failed" if failed else "its run was stopped"])[-1]
        found.append(Row(stage=name, state=state, job="", note=note, **progress(events[last:])))
    return found


def _owner(workdir: Path) -> Owner | None:
    """Return who runs stages of a workdir on a machine, if somebody does."""
    return next((owner for name in LEASES if (owner := holder(workdir / name)) is not None), None)


def progress(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how far a training is by its last events, as fields of a Row."""
    begun = max((number for number, event in enumerate(events) if event["event"] == "start"), default=0)
    steps = [event for event in events[begun:] if event["event"] == "step"]
    if not steps:
        return {}
    first, last = steps[max(0, len(steps) - 20)], steps[-1]
    done = last["step"] - first["step"]
    left = (last["steps"] - last["step"]) * (last["time"] - first["time"]) / done if done > 0 else None
    return {
        "step": f"{last['step']}/{last['steps']}",
        "loss": last.get("loss"),  # of training alone
        "tokens_per_second": last.get("tokens_per_second"),
        "left_s": left,
    }


def last_events(path: Path) -> list[dict[str, Any]]:
    """Return the last events of a file, which may be long."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL))
        lines = file.read().splitlines()
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def show(workdir: Path, *, as_json: bool = False, watch: bool = False) -> None:
    """Print the stages, as a table or as JSON; or keep showing them until all have ended."""
    found = rows(workdir)
    if as_json:
        print(json.dumps([vars(row) for row in found], indent=1))
        return
    console = Console()
    if not watch:
        console.print(_table(found))
        return
    with Live(_table(found), console=console, auto_refresh=False) as live:
        while any(row.state in ("running", "waiting") for row in found):
            time.sleep(EVERY_S)
            found = rows(workdir)
            live.update(_table(found), refresh=True)


def _table(found: Sequence[Row]) -> Group:
    table = Table(box=None, header_style="bold")
    cells = {
        "stage": [row.stage for row in found],
        "state": [row.state for row in found],
        "job": [row.job for row in found],
        "nodes": [row.nodes for row in found],
        "step": [row.step for row in found],
        "loss": ["" if row.loss is None else f"{row.loss:.3f}" for row in found],
        "tokens/s": ["" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}" for row in found],
        "left": ["" if row.left_s is None else duration(row.left_s) for row in found],
        "restarts": [str(row.restarts or "") for row in found],
        # Of what has failed there is more to say than fits into a column.
        "why": [row.note if row.state != "failed" else "" for row in found],
    }
    given = [column for column in cells if any(cells[column])]
    for column in given:
        table.add_column(column, justify="right" if column in NUMBERS else "left", no_wrap=column != "why")
    for number, row in enumerate(found):
        style = COLORS.get(row.state, "yellow")
        table.add_row(*(Text(cells[column][number], style if column == "state" else "") for column in given))
    states = dict.fromkeys((*COLORS, "waiting", "stopped"))
    counts = {state: sum(row.state == state for row in found) for state in states}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return Group(table, summary, *(Text(f"{row.stage}: {row.note}") for row in found if row.state == "failed"))


def duration(seconds: float) -> str:
    """Return a time as `3 h 05 min`, `12 min` or `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def log_of(workdir: Path, stage: str, rank: int) -> Path:
    """Return the file that holds what a rank of a stage's last job printed as errors.

    Raises:
        InputError: no such stage, or no such rank.
    """
    entries = submitted(workdir)
    if not entries:
        return _log_here(workdir, rank)
    if stage not in entries:
        raise InputError(one_of("stage", stage, entries))
    path = entries[stage].log_of(rank)
    if not path.is_file():
        raise InputError(f"{path}: no such log; the job has not started, or has no rank {rank}")
    return path


def _log_here(workdir: Path, rank: int) -> Path:
    """Return the log of a rank of the last job on this machine; its stages share it."""
    found = sorted((workdir / "jobs").glob(f"*/*_{rank}_log.err"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"{workdir}: no job from here has a log of a rank {rank}")
    return found[-1]


def cancel(workdir: Path, stages: Sequence[str]) -> str:
    """Cancel the jobs of stages and of what needs them, all by default, or end the run of this machine.

    Returns what was done, once the scheduler has none of them any more: the same command may be given again.

    Raises:
        InputError: no such stage; somebody else's jobs; a run of another machine, or one that does not end.
    """
    entries = submitted(workdir)
    for stage in stages:
        if stage not in entries:
            raise InputError(one_of("stage", stage, entries))
    owner = None if stages else holder(workdir / LEASES[0])
    if owner is not None:  # before its jobs, or it might submit more
        _end(owner, workdir)
    wanted = with_those_that_need_it(stages, entries)
    jobs = {entries[name].ids: entries[name].taken for name in under_way(entries) if name in wanted}
    graph.cancel(jobs.values())
    until = time.monotonic() + GONE_S
    while any(name in wanted for name in under_way(entries)) and time.monotonic() < until:
        time.sleep(1)
    named = sorted(name for name, entry in entries.items() if entry.ids in jobs)
    done = f"{len(jobs)} jobs cancelled" + (f": {', '.join(named)}" if jobs and stages else "")
    return f"ended: {owner}" + (f"; {done}" if jobs else "") if owner else done


def with_those_that_need_it(stages: Sequence[str], entries: Mapping[str, Entry]) -> set[str]:
    """Return stages, those that share a job with them, and all that need one of these; without any, all."""
    found = {*(stages or entries)}
    while True:
        ids = {entries[name].ids for name in found}
        more = {name for name, entry in entries.items() if entry.ids in ids or found.intersection(entry.after)}
        if more <= found:
            return found
        found |= more


def _end(owner: Owner, workdir: Path) -> None:
    """End a run of this machine; its ranks notice, and end as well."""
    if owner.host != socket.gethostname():
        raise InputError(f"{workdir}: its run is on another machine: {owner}; cancel it there")
    try:
        os.kill(owner.pid, signal.SIGTERM)
    except OSError as error:
        raise InputError(f"{workdir}: {owner}: {error}") from error
    until = time.monotonic() + ENDED_S
    while _owner(workdir) is not None:
        if time.monotonic() > until:
            raise InputError(f"{workdir}: asked to end, and still there: {owner}")
        time.sleep(0.2)


def again(workdir: Path) -> dict[str, str | None]:
    """Return the command that submitted from a workdir: verb, file, profile.

    Raises:
        InputError: nothing was submitted from it.
    """
    path = workdir / SUBMITTED
    if not path.is_file():
        raise InputError(f"{workdir}: no jobs of a cluster were submitted from here")
    found: dict[str, str | None] = read_json(path)["again"]
    return found
