"""`growmerge report`: what a workdir holds, finished or not, as a page, as markdown, and as tables and figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint import manifest
from checkpoint.files import read_json
from growmerge import heat
from growmerge.costs import costs, events_by_stage, incidents, training_seconds
from growmerge.findings import asked, curve, fertility, losses, samples, versions
from growmerge.report import analyse
from growmerge.report_files import write_report
from growmerge.run import FROM, Plan, alone, load, publish
from growmerge.shapes import multiplied, parameters
from growmerge.status import rows
from growmerge.training import RUN
from growmerge.verdicts import COMPARISONS
from parallel.errors import InputError
from train.tracker import read_metrics

CONFIDENCE, RESAMPLES = 0.95, 2000
"""Of intervals where no file says."""


def report_on(workdir: Path) -> Path:
    """Write the report of a workdir of `run`, `train` or `eval`; return the page's path.

    Raises:
        InputError: nothing of growmerge is there; the pipeline's file is gone or wrong.
    """
    if (workdir / FROM).is_file():
        known = read_json(workdir / FROM)
        plan = load(Path(known["file"]), workdir, known["profile"], known.get("scale"))
        if plan.tasks["report"].done:
            publish(plan)
            # With the page that this version makes of the numbers.
            return write_report(read_json(workdir / "results.json"), workdir)
        return write_report(analyse(_unfinished(plan)), workdir)
    if (workdir / RUN).is_file():
        return write_report(analyse(of_training(workdir)), workdir)
    if verdicts := _verdicts(workdir):
        return write_report(analyse(of_verdicts(workdir, verdicts)), workdir)
    if (workdir / "results.json").is_file():  # of a run that did not say yet which file it is of
        return write_report(read_json(workdir / "results.json"), workdir)
    raise InputError(f"{workdir}: nothing of `growmerge run`, `train` or `eval` is there")


def _unfinished(plan: Plan) -> dict[str, Any]:
    """Return what is known of a pipeline that is not done, and how far it is."""
    from growmerge.results import gather  # seconds of torch, which other reports do without

    states = {row.stage: {"stage": row.stage, "state": row.state, "note": row.note} for row in _rows(plan.workdir)}
    shown = []
    for name, task in plan.tasks.items():
        now = {"stage": name, "state": "done", "note": ""} if task.done else states.get(name)
        # What was done under another configuration of the file has to be done again.
        if now is None or (now["state"] == "done" and not task.done):
            now = {"stage": name, "state": "waiting", "note": ""}
        shown.append(now)
    done = sum(one["state"] == "done" for one in shown)
    context = alone(plan, plan.pipeline.resources.threads or 1, _began(plan.workdir), lambda event: None)
    return gather(context, {"done": done, "stages": len(shown), "rows": shown})


def _rows(workdir: Path) -> list[Any]:
    try:
        return rows(workdir)
    except InputError:  # the scheduler does not answer, or nothing has begun
        return []


def _began(workdir: Path) -> float:
    """Return when the first stage of a workdir began (seconds since the epoch); now, if none has."""
    from time import time

    times = [events[0]["time"] for events in events_by_stage(workdir).values()]
    return float(min(times, default=time()))


def of_training(workdir: Path) -> dict[str, Any]:
    """Return what a run of `growmerge train` holds, as `growmerge.results.gather` does of a pipeline."""
    known = read_json(workdir / RUN)
    name = str(known.get("name", workdir.name))
    metrics = read_metrics(workdir / "metrics.jsonl")
    finished = bool(known["finished"]) and manifest.is_complete(workdir / "model")
    config = _config_of(workdir)
    a_token = 6 * multiplied(config) if config else None
    points = curve(metrics, a_token)
    steps = [line for line in metrics if "loss" in line]
    tokens = steps[-1]["tokens"] if steps else 0
    languages = dict.fromkeys(language for point in points for language in point["scores"])
    said = events_by_stage(workdir, name)
    flops = None if a_token is None else a_token * tokens
    model: dict[str, Any] = {
        "verb": "train",
        "parents": [],
        "parameters": parameters(config) if config else None,
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": tokens,
        "flops": flops,
        "total_flops": None,
        "method": None,
    }
    about: dict[str, Any] = {
        **_base(name, known.get("seed")),
        "languages": {language: language for language in languages},
        "models": {name: model},
        "scores": {name: dict(points[-1]["scores"])} if points else {},
        "curves": {name: points} if points else {},
        "losses": {name: losses(metrics)} if steps else {},
        "graph": [{"name": name, "verb": "train", "inputs": []}],
        "timings": {
            "curves": {name: training_seconds(workdir)},
            "cost": costs({name: "train"}, said, ranks=1, threads=1, gpus=0),
            "incidents": incidents([name], said),
        },
    }
    if not finished:
        now = [{"stage": row.stage, "state": row.state, "note": row.note} for row in _rows(workdir)]
        about["progress"] = {"done": 0, "stages": 1, "rows": now}
    return about


def _config_of(workdir: Path) -> dict[str, Any] | None:
    """Return the config of a run's model, or of its newest checkpoint while it has none."""
    found = [workdir / "model", *sorted((workdir / "checkpoints").glob("step-*"), reverse=True)]
    return next((read_json(one / "config.json") for one in found if (one / "config.json").is_file()), None)


def _verdicts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the verdicts of an evaluation's folder by model."""
    read = [read_json(path) for path in sorted(folder.glob("*.json")) if path.name != COMPARISONS]
    return {one["model"]["name"]: one for one in read if isinstance(one.get("model"), Mapping) and "tasks" in one}


def of_verdicts(folder: Path, verdicts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a folder of `growmerge eval` holds, as `growmerge.results.gather` does of a pipeline."""
    first = next(iter(verdicts.values()))
    tasks = asked(verdicts)
    compared = folder / COMPARISONS
    return {
        **_base(folder.absolute().name, first["seed"]),
        "confidence": first["confidence"],
        "resamples": first["resamples"],
        "languages": {},
        "models": {
            name: {
                "verb": verdict["model"]["provenance"].get("verb", "given"),
                "parents": [],
                "parameters": verdict["model"]["parameters"],
                **dict.fromkeys(("steps", "tokens", "flops", "total_flops", "method")),
            }
            for name, verdict in verdicts.items()
        },
        "scores": {},
        "tasks": tasks,
        "fertility": fertility(verdicts),
        "samples": samples(verdicts),
        "heat": heat.of_verdicts(verdicts, tasks),
        "comparisons": read_json(compared)["comparisons"] if compared.is_file() else [],
        "graph": [],
        "timings": {},
        "versions": dict(first["versions"]),
    }


def _base(name: str, seed: int | None) -> dict[str, Any]:
    about = {"name": name, "title": name, "seed": seed, "confidence": CONFIDENCE, "resamples": RESAMPLES}
    return {**about, "pairs": {}, "baselines": {}, "growth": [], "checks": [], "samples": [], "versions": versions()}
