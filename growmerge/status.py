"""`growmerge status`, `logs` and `cancel`: what runs, what waits and why, from any shell, whoever submitted it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoint import manifest
from growmerge.on_cluster import Entry, ran, states, submitted, why
from parallel.errors import InputError, one_of
from slurm.graph import cancel
from slurm.queue import Queued

TAIL = 2**16
"""Bytes at a file's end that its last events are looked for in."""
COLORS = {"done": "green", "running": "cyan", "failed": "red", "not started": "red"}


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
    """Why it waits or failed."""


def rows(workdir: Path) -> list[Row]:
    """Return the stages of a workdir's last submission.

    Raises:
        InputError: nothing was submitted from it; the scheduler does not answer.
    """
    return [_row(name, *found) for name, found in states(workdir).items()]


def _row(name: str, entry: Entry, waiting: Queued | None) -> Row:
    if manifest.is_complete(entry.result):
        return Row(stage=name, state="done", job=entry.id)
    if waiting is None:
        if ran(entry):
            return Row(stage=name, state="failed", job=entry.id, note=why(entry))
        return Row(stage=name, state="not started", job=entry.id, note="a stage that it needs has failed")
    if waiting.state != "RUNNING":
        note = waiting.why if waiting.state == "PENDING" else waiting.state.lower()
        return Row(stage=name, state="waiting", job=entry.id, restarts=waiting.restarts, note=note)
    return Row(
        stage=name,
        state="running",
        job=entry.id,
        nodes=waiting.nodes,
        restarts=waiting.restarts,
        **progress(entry.folder / "events.jsonl"),
    )


def progress(path: Path) -> dict[str, Any]:
    """Return how far a training is by its last events, as fields of a Row."""
    steps = [event for event in last_events(path) if event["event"] == "step"]
    if not steps:
        return {}
    first, last = steps[max(0, len(steps) - 20)], steps[-1]
    done = last["step"] - first["step"]
    left = (last["steps"] - last["step"]) * (last["time"] - first["time"]) / done if done > 0 else None
    return {
        "step": f"{last['step']}/{last['steps']}",
        "loss": last["loss"],
        "tokens_per_second": last["tokens_per_second"],
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


def show(workdir: Path, *, as_json: bool = False) -> None:
    """Print the stages, as a table or as JSON."""
    found = rows(workdir)
    if as_json:
        print(json.dumps([vars(row) for row in found], indent=1))
        return
    table = Table(box=None, header_style="bold")
    right = {"step", "loss", "tokens/s", "left", "restarts"}
    for column in ("stage", "state", "job", "nodes", "step", "loss", "tokens/s", "left", "restarts", "why"):
        table.add_column(column, justify="right" if column in right else "left")
    for row in found:
        table.add_row(
            row.stage,
            f"[{COLORS.get(row.state, 'yellow')}]{row.state}",
            row.job,
            row.nodes,
            row.step,
            "" if row.loss is None else f"{row.loss:.3f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if row.left_s is None else duration(row.left_s),
            str(row.restarts or ""),
            row.note,
        )
    console = Console()
    console.print(table)
    counts: Mapping[str, int] = {state: sum(row.state == state for row in found) for state in (*COLORS, "waiting")}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count))


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
    if stage not in entries:
        raise InputError(one_of("stage", stage, entries))
    path = entries[stage].log
    path = path.with_name(f"{entries[stage].id}_{rank}_log.err")
    if not path.is_file():
        raise InputError(f"{path}: no such log; the job has not started, or has no rank {rank}")
    return path


def cancel_all(workdir: Path, stages: tuple[str, ...]) -> int:
    """Cancel the jobs of stages, all by default; return how many had not ended."""
    found = states(workdir)
    for stage in stages:
        if stage not in found:
            raise InputError(one_of("stage", stage, found))
    ids = [entry.id for name, (entry, waiting) in found.items() if waiting is not None and name in (stages or found)]
    cancel(ids)
    return len(ids)
