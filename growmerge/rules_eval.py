"""What the keys of `growmerge eval` can be, and what they owe each other; as `growmerge.rules`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from growmerge.rules import ABOVE_0, FROM_0, FROM_1, INNER_SHARE, NAME, Problem, Range
from growmerge.schema_eval import EvalConfig, EvalTask, Roles

RANGES: Mapping[type, Mapping[str, Range]] = {
    EvalTask: {
        "count": FROM_1,
        "tokens": FROM_1,
        "temperature": ABOVE_0,
        "shots": FROM_0,
        "limit": FROM_1,
        "window": Range(at_least=2),
        "stride": FROM_1,
    },
    EvalConfig: {"seed": FROM_0, "resamples": Range(at_least=100), "confidence": INNER_SHARE},
}
OF_KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("files", "hub"), ("text", "pairs", "corrupt")),
    **dict.fromkeys(("config", "revision", "data_files"), ("text", "pairs", "corrupt")),
    "field": ("text", "corrupt"),
    **dict.fromkeys(("good", "bad", "phenomenon", "where"), ("pairs",)),
    **dict.fromkeys(("count", "unlike"), ("corrupt",)),
    **dict.fromkeys(("prompts", "tokens", "temperature"), ("samples",)),
    **dict.fromkeys(("names", "include", "shots", "limit"), ("harness",)),
    **dict.fromkeys(("window", "stride"), ("text",)),
}
"""By key, the kinds of task that it means something to; all others are of every kind."""
UNSET = {one.name: one.default for one in fields(EvalTask)}


def task(task: EvalTask) -> Iterator[Problem]:
    for name, kinds in OF_KINDS.items():
        value = getattr(task, name)
        given = bool(value) if isinstance(value, (tuple, Mapping)) else value != UNSET[name]
        if given and task.kind not in kinds:
            yield name, f"has no meaning for kind {task.kind}: it is of {', '.join(kinds)}"
    if task.kind == "samples" and not task.prompts:
        yield "prompts", "none is given: samples need what the model goes on from"
    if task.kind == "harness" and not task.names:
        yield "names", "none is given: which of lm-eval's tasks?"
    if task.kind in ("samples", "harness"):
        return
    if (task.files is None) == (task.hub is None):
        yield "", "exactly one of `files` (globs) and `hub` (a data set) says where the data is"
    for name in ("config", "revision", "data_files"):
        if task.hub is None and getattr(task, name):
            yield name, "has a meaning for a `hub` data set alone"
    if task.window is not None and task.stride is not None and task.stride >= task.window:
        yield "stride", f"{task.stride} is not below the window of {task.window}: windows have to overlap"


def roles(roles: Roles) -> Iterator[Problem]:
    if roles.base is None and not roles.specialised:
        yield "", "neither `base` nor `specialised` is given: what are models compared with?"
    if (roles.base is None) != (roles.source_language is None):
        given, other = ("source_language", "base") if roles.base is None else ("base", "source_language")
        yield given, f"needs `{other}`: forgetting is of the source language, against the base"
    if roles.joint is not None and not roles.specialised:
        yield "joint", "needs `specialised`: it is compared with in the languages given there"
    for number, setup in enumerate(roles.setups):
        if not NAME.fullmatch(setup):
            yield f"setups.{number}", f"{setup!r} cannot be part of a name: use letters, digits and . + - _"


def config(config: EvalConfig) -> Iterator[Problem]:
    if not config.models and config.sweep is None:
        yield "models", "none is given, and no `sweep` either"
    if not config.tasks:
        yield "tasks", "none is given"
    for key, names in (("models", config.models), ("tasks", config.tasks)):
        for name in names:
            if not NAME.fullmatch(name):
                yield f"{key}.{name}", f"{name!r} cannot be a name: use letters, digits and . + - _"


RULES: Mapping[type, Callable[[Any], Iterator[Problem]]] = {EvalTask: task, Roles: roles, EvalConfig: config}
