"""What stages have cost, and what went wrong on the way, by what their jobs have said."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from growmerge.events import read_events
from train.tracker import TIMINGS, read_metrics

ENDS = ("done", "error", "stopped")
"""Events that end an attempt at a stage."""
TOLD = ("error", "stopped", "warning")
"""Events that a reader should know of."""


def events_by_stage(workdir: Path, only: str = "") -> dict[str, list[dict[str, Any]]]:
    """Return the events of each stage of a workdir in the order of time.

    Args:
        only: name of the one stage of a training's workdir, whose events may name none.
    """
    jobs = workdir / "jobs"
    logs = [workdir / "log.jsonl", *sorted([*jobs.glob("*/events.jsonl"), *jobs.glob("*/*/events.jsonl")])]
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in (event for log in logs for event in read_events(log)):
        if stage := event.get("stage", only):
            # What a job of this machine says is copied into the run's log.
            seen.setdefault((event["time"], event["event"], stage, event.get("step")), {**event, "stage": stage})
    found: dict[str, list[dict[str, Any]]] = {}
    for event in sorted(seen.values(), key=lambda event: float(event["time"])):
        found.setdefault(event["stage"], []).append(event)
    return found


def attempts(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the seconds of each attempt at a stage; of one that was killed, until its last word."""
    found: list[float] = []
    began = last = None
    for event in events:
        if event["event"] == "start":
            if began is not None and last is not None:
                found.append(last - began)
            began = last = event["time"]
        elif began is not None:
            last = event["time"]
            if event["event"] in ENDS:
                found.append(last - began)
                began = None
    return found if began is None or last is None else [*found, last - began]


def costs(
    stages: Mapping[str, str], said: Mapping[str, Sequence[Mapping[str, Any]]], *, ranks: int, threads: int, gpus: int
) -> dict[str, Any]:
    """Return what stages have cost, lost attempts included: {"rows", "core_hours", "gpu_hours"}.

    A row: {"stage", "verb", "seconds", "ranks", "gpus", "memory_gb", "hours"}; hours are of GPUs where there are any,
    else of cores.

    Args:
        stages: their verbs.
        said: their events.
        ranks: of a job that does not say how many it has, as for the next two.
        threads: a rank.
        gpus: all of a job's.
    """
    rows = []
    for stage, verb in stages.items():
        events = said.get(stage, ())
        if not (seconds := sum(attempts(events))):
            continue
        done: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "done"), {})
        width, devices = done.get("ranks", ranks), done.get("gpus", gpus)
        hours = seconds * (devices or width * done.get("threads", threads)) / 3600
        about = {"seconds": round(seconds, 1), "ranks": width, "gpus": devices}
        row = {"stage": stage, "verb": verb, **about, "memory_gb": done.get("memory_gb"), "hours": round(hours, 6)}
        rows.append(row)
    cores = sum(row["hours"] for row in rows if not row["gpus"])
    on_gpus = [row["hours"] for row in rows if row["gpus"]]
    return {"rows": rows, "core_hours": round(cores, 6), "gpu_hours": round(sum(on_gpus), 6) if on_gpus else None}


def incidents(stages: Iterable[str], said: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return what went wrong, a row a stage and kind: {"stage", "event", "times", "text"}; the text is the last one's.

    A stage that was begun again, after a kill, a failure or a preemption, is `requeued`.
    """
    found = []
    for stage in stages:
        events = said.get(stage, ())
        again = len(attempts(events)) - 1 if any(event["event"] == "start" for event in events) else 0
        # What ran to its end and was then begun anew was asked for anew.
        again -= sum(event["event"] == "done" for event in events[:-1])
        for kind in TOLD:
            if texts := [str(event.get("text", "")) for event in events if event["event"] == kind]:
                found.append({"stage": stage, "event": kind, "times": len(texts), "text": texts[-1]})
        if again > 0:
            found.append({"stage": stage, "event": "requeued", "times": again, "text": ""})
    return found


def training_seconds(folder: Path) -> list[list[float]]:
    """Return [step, seconds of training up to it] of a run at each of its evaluations; steps alone count."""
    times: dict[int, float] = {}
    tokens = 0
    rates = {line["step"]: line.get("tokens_per_second") for line in read_metrics(folder / TIMINGS)}
    seconds = 0.0
    for line in read_metrics(folder / "metrics.jsonl"):
        if "evaluation" in line:
            times[line["step"]] = seconds
        elif rate := rates.get(line["step"]):
            seconds += (line["tokens"] - tokens) / rate
        tokens = line["tokens"]
    return [[step, round(at, 3)] for step, at in times.items()]
