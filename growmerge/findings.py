"""What a report takes from metrics and verdicts, as plain JSON: pipelines, single runs and evaluations share it."""

import platform
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from growmerge import __version__
from growmerge.verdicts import headline

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "submitit")


def versions() -> dict[str, str]:
    """Return the versions of what computes here, by name."""
    return {"python": platform.python_version(), "growmerge": __version__, **{name: version(name) for name in PACKAGES}}


def curve(lines: Sequence[Mapping[str, Any]], flops_per_token: float | None = None) -> list[dict[str, Any]]:
    """Return the evaluations of a training's metrics: step, tokens, FLOPs so far, and each language's documents."""
    return [
        {
            "step": line["step"],
            "tokens": line["tokens"],
            **({} if flops_per_token is None else {"flops": flops_per_token * line["tokens"]}),
            "scores": {name: entry["documents"] for name, entry in line["evaluation"]["languages"].items()},
        }
        for line in lines
        if "evaluation" in line
    ]


def losses(lines: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return [step, loss in nats a token] of a training's metrics."""
    return [[line["step"], line["loss"]] for line in lines if "loss" in line]


def asked(verdicts: Mapping[str, Mapping[str, Any]], without: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the tasks of verdicts with each model's main number, and those of its parts where it has some.

    {"name", "kind", "language", "domain", "unit", "less_is_better", "values": {model: {value, low, high}},
    "parts": {model: {part: {value, low, high}}}}.

    Args:
        verdicts: by model.
        without: names of tasks that are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for model, verdict in verdicts.items():
        for name, task in verdict["tasks"].items():
            number = headline(task)
            if name in without or number is None:
                continue
            about = {key: task[key] for key in ("kind", "language", "domain")}
            unit, value = number
            entry = found.setdefault(
                name, {"name": name, **about, "unit": unit, "less_is_better": unit == "bits per byte", "values": {}}
            )
            entry["values"][model] = {key: value[key] for key in ("value", "low", "high")}
            if len(parts := _parts(task)) > 1:
                entry.setdefault("parts", {})[model] = parts
    return [*found.values()]


def _parts(task: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the phenomena of minimal pairs by name."""
    how = task.get("sum") or task.get("per_token") or {"phenomena": {}}
    return {kind: {key: part[key] for key in ("value", "low", "high")} for kind, part in how["phenomena"].items()}


def fertility(verdicts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how many tokens each model's tokenizer makes of a task's words, and of how many bytes a token is."""
    return [
        {"model": model, "task": name, **{key: task.get(key) for key in ("tokens_per_word", "bytes_per_token")}}
        for model, verdict in verdicts.items()
        for name, task in verdict["tasks"].items()
        if "bytes_per_token" in task
    ]


def samples(verdicts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what models wrote: {"stage", "language", "prompt", "text"}."""
    return [
        {"stage": model, "language": task["language"], "prompt": one["prompt"], "text": one["text"]}
        for model, verdict in verdicts.items()
        for task in verdict["tasks"].values()
        for one in task.get("samples", ())
    ]
