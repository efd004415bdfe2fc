"""YAML to the dataclasses of `growmerge.schema`; an error names file, line, key, value and what is allowed."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from growmerge import rules, rules_data, rules_eval, rules_mixture, rules_pipeline
from growmerge.overlay import read_layers
from growmerge.schema import Pipeline, Stage, TrainStage
from growmerge.schema_training import Training
from parallel.document import Item, read_document
from parallel.errors import InputError, one_of

VARIABLE = re.compile(r"\{([^{}]*)\}")
"""A variable of a grid, such as `{setup}`."""
STAGES = "stages."
Kind = TypeVar("Kind")
LARGEST = 2**63 - 1
RANGES = {**rules.RANGES, **rules_data.RANGES, **rules_mixture.RANGES, **rules_eval.RANGES}
RULES = {**rules.RULES, **rules_data.RULES, **rules_mixture.RULES, **rules_pipeline.RULES, **rules_eval.RULES}
OVERRIDES: Mapping[tuple[type, str], type] = {(TrainStage, "training"): Training}
"""Fields that hold some keys of another dataclass: each given key is checked as if it stood there."""
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Where each key of a file stands, by dotted path such as `stages.seed.train.from`."""

    file: Path
    lines: dict[str, int] = field(default_factory=dict)
    others: dict[str, Path] = field(default_factory=dict)
    """The file of a key that is written in another one."""
    stages: dict[str, Item] = field(default_factory=dict)
    """The stages as written, for grids to fill in."""

    def at(self, key: str) -> str:
        """Return `file:line` of a key, or of the nearest key around it that is written."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.others.get(key, self.file)}:{self.lines.get(key, 1)}"

    def note(self, key: str, item: Item) -> None:
        """Keep where a key stands."""
        self.lines[key] = item.line
        if item.file != self.file:
            self.others[key] = item.file

    def error(self, key: str, problem: str) -> InputError:
        """Return the line that says what is wrong at a key."""
        return InputError(f"{self.at(key)}: {key}: {problem}" if key else f"{self.at(key)}: {problem}")

    @contextmanager
    def within(self, key: str) -> Iterator[None]:
        """Say of errors raised inside, by what knows no file, that they are at a key."""
        try:
            yield
        except InputError as error:
            raise self.error(key, str(error)) from None


def load_pipeline(path: Path, scale: str | None = None) -> tuple[Pipeline, Marks]:
    """Read a pipeline file, with what it extends, at a scale of it if one is asked for (`growmerge.overlay`).

    What holds a `{variable}`, in stages, is kept as text; `growmerge.graph.expand` fills it in and checks it.

    Raises:
        InputError: the file cannot be read, or a key, type or value in it is wrong.
    """
    marks = Marks(file=path)
    root = read_layers(path, scale)
    pipeline: Pipeline = _Builder(marks, grids=True).build(Pipeline, root, "")
    stages = root.value["stages"].value if isinstance(root.value, dict) else {}
    marks.stages.update(cast(dict[str, Item], stages))
    return pipeline, marks


def load_file(kind: type[Kind], path: Path) -> tuple[Kind, Marks]:
    """Read a file that is one dataclass of any schema.

    Raises:
        InputError: the file cannot be read, or a key, type or value in it is wrong.
    """
    marks = Marks(file=path)
    built: Kind = _Builder(marks, grids=False).build(kind, read_document(path), "")
    return built, marks


def build_stage(item: Item, key: str, marks: Marks) -> Stage:
    """Build one concrete stage, its variables filled in; its keys' lines are added to `marks`."""
    stage: Stage = _Builder(marks, grids=False).build(Stage, item, key)
    return stage


def merged_training(pipeline: Pipeline, stage: TrainStage) -> Training:
    """Return how a stage trains: `training` of the pipeline, overlaid with the stage's own keys.

    Steps that are not given are what the mixture comes to, where that is known (`growmerge.lengths`).
    """
    training = replace(pipeline.training, **cast(Mapping[str, Any], stage.training))
    if training.steps is None and pipeline.prepared is not None:
        from growmerge.lengths import steps_of  # which reads files by this module

        training = replace(training, steps=steps_of(pipeline, stage.data, training))
    return training


def problem_in(value: object) -> tuple[str, str] | None:
    """Return (key, problem) of the first rule that a dataclass breaks, if it breaks one."""
    rule = RULES.get(type(value))
    return next(rule(value), None) if rule else None


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass by key as written in YAML (`from` for `from_`)."""
    return {name.rstrip("_"): hint for name, hint in get_type_hints(kind).items()}


class _Builder:
    def __init__(self, marks: Marks, *, grids: bool) -> None:
        self._marks = marks
        self._grids = grids
        """Whether text with a variable may stand for any value, in stages."""
        self._unfilled = 0

    def build(self, hint: Any, item: Item, key: str) -> Any:
        self._marks.note(key, item)
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, UnionType):
            return self._union(hint, item, key)
        if is_dataclass(hint):
            return self._dataclass(cast(type, hint), item, key)
        if origin is tuple:
            return self._tuple(hint, item, key)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            named = self._mapping(item, key)
            return {name: self.build(arguments[1], named[name], _join(key, name)) for name in named}
        return self._scalar(hint, item, key)

    def _union(self, hint: Any, item: Item, key: str) -> Any:
        kinds = get_args(hint)
        if item.tag == "null" and NoneType in kinds:
            return None
        kinds = tuple(kind for kind in kinds if kind is not NoneType)
        return self.build(next((kind for kind in kinds if _fits(kind, item)), kinds[0]), item, key)

    def _mapping(self, item: Item, key: str) -> dict[str, Item]:
        if not isinstance(item.value, dict):
            raise self._marks.error(key, f"{item.given} is given; allowed is a mapping of keys to values")
        return item.value

    def _tuple(self, hint: Any, item: Item, key: str) -> tuple[Any, ...]:
        kinds = get_args(hint)
        if not isinstance(item.value, tuple):
            example = f", such as [{item.value}]" if item.tag == "str" and item.given == repr(item.value) else ""
            raise self._marks.error(key, f"{item.given} is given; allowed is a list{example}")
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(item.value)
        elif len(kinds) != len(item.value):
            raise self._marks.error(key, f"a list of {len(item.value)} is given; allowed is a list of {len(kinds)}")
        pairs = zip(kinds, item.value, strict=True)
        return tuple(self.build(kind, part, _join(key, str(i))) for i, (kind, part) in enumerate(pairs))

    def _dataclass(self, kind: type, item: Item, key: str) -> Any:
        unfilled = self._unfilled
        values = self._fields(kind, item, key)
        required = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
        for name in required:
            if name not in values:
                raise self._marks.error(key, f"the key {name.rstrip('_')!r} is missing; needed are {_names(required)}")
        built = kind(**values)
        filled = self._unfilled == unfilled or not key.startswith(STAGES)
        if filled and (problem := problem_in(built)):
            raise self._marks.error(_join(key, problem[0].rstrip("_")), problem[1])
        return built

    def _fields(self, kind: type, item: Item, key: str) -> dict[str, Any]:
        """Return the values that are given, by field."""
        hints = _hints(kind)
        given = self._mapping(item, key)
        for name, part in given.items():
            self._marks.note(_join(key, name), part)
            if name not in hints:
                where = self._marks.at(_join(key, name)) + (f": {key}" if key else "")
                raise InputError(f"{where}: {one_of('key', name, hints)}")
        values = {}
        for one in fields(kind):
            name = one.name.rstrip("_")
            if name not in given:
                continue
            where = _join(key, name)
            if (kind, one.name) in OVERRIDES:
                self._marks.note(where, given[name])
                values[one.name] = self._fields(OVERRIDES[kind, one.name], given[name], where)
            else:
                values[one.name] = self.build(hints[name], given[name], where)
                self._check_range(kind, one.name, values[one.name], where)
        return values

    def _check_range(self, kind: type, name: str, value: Any, key: str) -> None:
        allowed = RANGES.get(kind, {}).get(name)
        for number in value if isinstance(value, tuple) else (value,):
            if allowed and isinstance(number, (int, float)) and not allowed.holds(number):
                raise self._marks.error(key, f"{number:.12g} is out of range: allowed is {allowed}")

    def _scalar(self, hint: Any, item: Item, key: str) -> Any:
        if not isinstance(item.value, str):
            words = "one of " + _names(get_args(hint)) if get_origin(hint) is Literal else _WORDS[hint]
            raise self._marks.error(key, f"{item.given} is given; allowed is {words}")
        text = item.value
        if _CONTROL.search(text):
            raise self._marks.error(key, f"{text!r} holds a control character")
        if self._grids and key.startswith(STAGES) and VARIABLE.search(text):
            self._unfilled += 1
            return text
        if get_origin(hint) is Literal:
            if text not in get_args(hint):
                raise self._marks.error(key, one_of(key.rpartition(".")[2], text, get_args(hint)))
            return text
        if not _fits(hint, item):
            raise self._marks.error(key, _misfit(hint, item))
        if hint is bool:
            return text.lower() in ("true", "yes", "on")
        return text if hint is str else hint(text.replace("_", ""))


def _fits(hint: Any, item: Item) -> bool:
    """Whether a value is what a type takes: a scalar, or a mapping with a key of a dataclass.

    YAML 1.1 reads 6e-3 as text, so a number may come as text.
    """
    if get_origin(hint) is tuple:
        return isinstance(item.value, tuple)
    if not isinstance(item.value, str):
        mapping = is_dataclass(hint) and isinstance(item.value, dict)
        return mapping and not _hints(cast(type, hint)).keys().isdisjoint(item.value)
    if hint is str:
        return item.tag in ("str", "filled")
    if hint is bool:
        return item.tag == "bool" or (item.tag == "filled" and item.value in ("true", "false"))
    if hint is int:
        whole = item.tag in ("int", "filled") and len(item.value) < 40 and _WHOLE.fullmatch(item.value)
        return bool(whole) and abs(int(item.value.replace("_", ""))) <= LARGEST
    number = item.tag in ("int", "float", "str", "filled") and _NUMBER.fullmatch(item.value)
    return bool(number) and math.isfinite(float(item.value.replace("_", "")))


def _misfit(hint: Any, item: Item) -> str:
    """Return why a scalar is not what a type takes, and what to write."""
    if hint is str and item.tag != "null":
        return f"{item.given} is read as {item.tag} by YAML, not as text: write it in quotes"
    hints = {int: " in plain decimal digits", float: ", such as 0.5 or 6e-3"}
    return f"{item.given} is not {_WORDS[hint]}; allowed is {_WORDS[hint]}{hints.get(hint, '')}"


def _names(names: Any) -> str:
    return ", ".join(str(name).rstrip("_") for name in names)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key and name else key or name
