"""Merge recipes, and what the values in them mean.

What a recipe says of each tensor is worked out in `merge.resolve`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.search_settings import Search
from merge.table import Parameter
from parallel.document import Item

DTYPES = ("float32", "float16", "bfloat16", "float64")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value of a parameter, or of the tensors that a filter names."""

    values: tuple[Item, ...]
    """One, or those of a gradient from the first layer to the last."""
    gradient: bool
    filter: str | None
    line: int


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is given for a parameter at one place of the file."""

    name: str
    line: int
    settings: tuple[Setting, ...]
    """The first that fits a tensor counts."""


Parameters = Mapping[str, Given]


@dataclass(frozen=True, kw_only=True)
class Input:
    """A model, or some layers of it."""

    model: str
    """As written: `path`, `path@revision`, `path+adapter`."""
    line: int
    layers: tuple[int, int] | None = None
    """First layer, and the one behind the last; all by default."""
    parameters: Parameters = field(default_factory=dict)
    checkpoints: int | None = None
    """So many of the last checkpoints of a training run, whose folder `model` is, instead of one model."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers of the merged model that are made from as many of each input."""

    inputs: tuple[Input, ...]
    line: int
    base: str | None = None
    """Instead of the recipe's."""
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as written."""

    file: Path
    method: str
    slices: tuple[Slice, ...]
    """One for `models`, with all layers."""
    whole: bool
    """Whether it lists models, not slices."""
    base: str | None = None
    parameters: Parameters = field(default_factory=dict)
    module: Parameters = field(default_factory=dict)
    """Those of the module, where there is one."""
    dtype: str | None = None
    """Of the merged model's tensors; by default each has that of the base, or else of the first model."""
    tokenizer_source: str | None = None
    tokenizer: Mapping[str, Any] | None = None
    """As written, in plain values."""
    chat_template: str | None = None
    seed: int | None = None
    """Of methods that draw random numbers; None if the recipe gives none."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """Of the keys at the top that have a value."""
    warnings: tuple[str, ...] = ()
    """Keys that change nothing, each with its line."""
    text: str = ""
    """The file."""
    search: Search | None = None
    """How weights are searched for, if they are."""

    @property
    def models(self) -> tuple[str, ...]:
        """Every model once, as written: the base first, then in the order of the file."""
        named = [one.model for part in self.slices for one in part.inputs]
        bases = [base for base in (self.base, *(part.base for part in self.slices)) if base]
        return tuple(dict.fromkeys([*bases, *named]))

    def line_of(self, model: str) -> int:
        """Return where a model is merged or, if it is not, where it is the base."""
        merged = [one.line for part in self.slices for one in part.inputs if one.model == model]
        bases = [part.line for part in self.slices if part.base == model]
        return [*merged, *bases, self.lines.get("base_model", 1)][0]

    def at(self, key: str) -> str:
        return f"{self.file}:{self.lines.get(key, 1)}"


def plain(item: Item) -> Any:
    """Return a value of the file as text, number, list or mapping."""
    if isinstance(item.value, dict):
        return {name: plain(value) for name, value in item.value.items()}
    if isinstance(item.value, tuple):
        return [plain(value) for value in item.value]
    if item.tag in ("int", "float"):
        return _number(item.value, item.tag)
    if item.tag in ("bool", "null"):
        return None if item.tag == "null" else SWITCH.get(item.value.lower(), item.value)
    return item.value


def _number(text: str, tag: str) -> int | float | str:
    """Return what YAML 1.1 takes for a number; as text what nobody means by it, such as 8:24 for 504."""
    digits = text.replace("_", "").lower()
    try:
        if tag == "float":
            return float(re.sub(r"\.(?=inf$|nan$)", "", digits))
        return int(digits, 8 if re.fullmatch(r"[-+]?0[0-7]+", digits) else 0)
    except ValueError:
        return text


def typed(item: Item, parameter: Parameter) -> Any:
    """Return a value of the file as a parameter's kind, as far as it is one: YAML reads 1e-5 as text."""
    if item.tag == "null" or not isinstance(item.value, str):
        return plain(item)
    text = item.value
    if parameter.kind is str:
        return text
    if item.tag == "bool" or (parameter.kind is bool and text.lower() in SWITCH):  # in quotes, too
        return SWITCH.get(text.lower(), text)
    try:
        number = float(plain(item))
    except (ValueError, OverflowError):
        return text
    if not math.isfinite(number):
        return text
    return bool(number) if parameter.kind is bool and number in (0, 1) else number
