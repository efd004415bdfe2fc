"""Sweeps: one spec of models, methods and parameters to many recipes, one for every subset of the models.

each: {setup: [1x, 2x]}              # optional: all of it again for every value; {setup} is filled in everywhere
models: {swe: runs/{setup}-swe, est: runs/{setup}-est, fin: runs/{setup}-fin}
base_model: runs/{setup}-eng
subsets: {least: 2}                  # or a list of lists of names
methods:
  linear: {}
  ties: {density: [0.3, 0.5]}        # a list is tried value by value; weight is 1 unless given
dtype: bfloat16
seed: 1                              # of methods that draw random numbers
materialize: true                    # false: recipes, which `growmerge eval` merges in memory, instead of models
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merge.recipe import DTYPES, plain, typed
from merge.settings import checked
from merge.table import METHODS
from parallel.document import Item, read_document
from parallel.errors import InputError, one_of

KEYS = ("each", "models", "base_model", "subsets", "methods", "dtype", "seed", "name", "materialize")
NAME = re.compile(r"\w[\w.+-]{0,199}")
MOST = 100_000
"""Merges in a sweep at most."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One of a sweep's merges."""

    name: str
    """Of its folder."""
    group: Mapping[str, str]
    """Values of `each`; merges of one group share their models."""
    method: str
    models: Mapping[str, str]
    """What is merged: names in the spec, and where each is."""
    base: str | None
    parameters: Mapping[str, Any]
    dtype: str | None
    seed: int | None = None

    def recipe(self, place: Callable[[str], str] = str) -> str:
        """Return mergekit's YAML.

        Args:
            place: from where a model is, as the spec says, to what the recipe says.
        """
        takes = METHODS[self.method]
        given = {**({"weight": 1.0} if "weight" in takes.parameters else {}), **self.parameters}
        models = [{"model": place(path)} for path in self.models.values()]
        found: dict[str, Any] = {"merge_method": self.method, "models": models}
        if self.base is not None and takes.base != "none":
            found["base_model"] = place(self.base)
        if given:
            found["parameters"] = given
        if self.dtype is not None:
            found["dtype"] = self.dtype
        if self.seed is not None:
            found["seed"] = self.seed
        return str(yaml.safe_dump(found, sort_keys=False, allow_unicode=True))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A spec, written out."""

    file: Path
    groups: tuple[tuple[Merge, ...], ...]
    """Merges by the values of `each`, in the order of the file."""
    seed: int | None = None
    """Of methods that draw random numbers; None if the spec gives none."""
    materialize: bool = True
    """Whether models are written, or their recipes alone."""

    @property
    def merges(self) -> tuple[Merge, ...]:
        return tuple(merge for group in self.groups for merge in group)


def read_sweep(path: Path) -> Sweep:
    """Read a spec.

    Raises:
        InputError: anything wrong with it, with its line.
    """
    top = read_document(path)
    reader = _Reader(path)
    keys = reader.mapping(top, "the spec")
    for name, item in keys.items():
        if name not in KEYS:
            raise reader.error(item.line, one_of("key", name, KEYS))
    keys = {name: item for name, item in keys.items() if item.tag != "null"}
    for name in ("models", "methods"):
        if name not in keys:
            raise reader.error(top.line, f"the key {name} is missing")
    each = {name: reader.texts(item, name) for name, item in reader.given(keys, "each").items()}
    groups = []
    for values in itertools.product(*each.values()):
        filled = dict(zip(each, values, strict=True))
        groups.append(tuple(reader.merges(keys, filled)))
    merges = [merge for group in groups for merge in group]
    names = [merge.name for merge in merges]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise reader.error(reader.line(keys, "name"), f"two merges are called {twice!r}: name needs more of {{...}}")
    if len(merges) > MOST:
        raise reader.error(top.line, f"it comes to {len(merges)} merges; allowed are {MOST}")
    return Sweep(
        file=path, groups=tuple(groups), seed=reader.seed(keys), materialize=reader.switch(keys, "materialize", True)
    )


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path

    def error(self, line: int, problem: str) -> InputError:
        return InputError(f"{self._path}:{line}: {problem}")

    def line(self, keys: Mapping[str, Item], name: str) -> int:
        return keys[name].line if name in keys else 1

    def mapping(self, item: Item, what: str) -> dict[str, Item]:
        if not isinstance(item.value, dict) or not item.value:
            raise self.error(item.line, f"{what}: {item.given} is given; a mapping of keys to values is needed")
        return item.value

    def given(self, keys: Mapping[str, Item], name: str) -> dict[str, Item]:
        return self.mapping(keys[name], name) if name in keys else {}

    def text(self, item: Item, what: str) -> str:
        if not isinstance(item.value, str) or item.tag == "null" or not item.value.isprintable():
            raise self.error(item.line, f"{what}: {item.given} is given; text is needed")
        return item.value

    def texts(self, item: Item, what: str) -> list[str]:
        if not isinstance(item.value, tuple) or not item.value:
            raise self.error(item.line, f"{what}: {item.given} is given; a list with one entry at least is needed")
        return [self.text(part, what) for part in item.value]

    def seed(self, keys: Mapping[str, Item]) -> int | None:
        if "seed" not in keys:
            return None
        seed = plain(keys["seed"])
        if type(seed) is not int or seed < 0:
            line, given = keys["seed"].line, keys["seed"].given
            raise self.error(line, f"seed is {given}: a whole number, 0 or more, is needed")
        return seed

    def switch(self, keys: Mapping[str, Item], name: str, default: bool) -> bool:
        if name not in keys:
            return default
        found = plain(keys[name])
        if type(found) is not bool:
            raise self.error(keys[name].line, f"{name} is {keys[name].given}: true or false is needed")
        return found

    def fill(self, text: str, values: Mapping[str, str], line: int) -> str:
        """Return a text with the values of variables in the place of `{variable}`."""
        for name in re.findall(r"\{([^{}]*)\}", text):
            if name not in values:
                raise self.error(line, one_of("variable", name, values))
            text = text.replace("{" + name + "}", values[name])
        return text

    def merges(self, keys: Mapping[str, Item], filled: Mapping[str, str]) -> Iterator[Merge]:
        models = {
            name: self.fill(self.text(item, name), filled, item.line)
            for name, item in self.mapping(keys["models"], "models").items()
        }
        base = None
        if "base_model" in keys:
            base = self.fill(self.text(keys["base_model"], "base_model"), filled, keys["base_model"].line)
        dtype = self.text(keys["dtype"], "dtype") if "dtype" in keys else None
        if dtype is not None and dtype not in DTYPES:
            raise self.error(keys["dtype"].line, one_of("dtype", dtype, DTYPES))
        seed = self.seed(keys)
        subsets = self._subsets(keys, [*models])
        for method, item in self.mapping(keys["methods"], "methods").items():
            if method not in METHODS:
                raise self.error(item.line, one_of("merge method", method, METHODS))
            if METHODS[method].base == "needed" and base is None:
                raise self.error(item.line, f"{method} needs a base_model: what all models started from")
            takes = METHODS[method]
            # A method of two models has the pairs.
            fitting = [one for one in subsets if takes.least <= len(one) <= (takes.most or len(one))]
            if not fitting:
                count = takes.least if takes.least == takes.most else f"{takes.least} or more"
                beside = " beside the base" if takes.base == "needed" else ""
                raise self.error(item.line, f"no subset has as many models as {method} takes: {count}{beside}")
            for parameters, varied in self._grid(method, item):
                for chosen in fitting:
                    parts = {"method": method, "models": "_".join(chosen), "parameters": varied, **filled}
                    yield Merge(
                        name=self._name(keys, parts, filled),
                        group=filled,
                        method=method,
                        models={name: models[name] for name in chosen},
                        base=base,
                        parameters=parameters,
                        dtype=dtype,
                        seed=seed,
                    )

    def _subsets(self, keys: Mapping[str, Item], models: Sequence[str]) -> list[tuple[str, ...]]:
        item = keys.get("subsets")
        if item is not None and isinstance(item.value, tuple):
            found = []
            for part in item.value:
                names = self.texts(part, "subsets")
                for name in names:
                    if name not in models:
                        raise self.error(part.line, one_of("model", name, models))
                found.append(tuple(names))
            return found
        bounds = {"least": 2, "most": len(models)}
        for name, value in self.given(keys, "subsets").items():
            if name not in bounds:
                raise self.error(value.line, one_of("key of subsets", name, bounds))
            number = plain(value)
            if type(number) is not int or not 1 <= number <= len(models):
                raise self.error(value.line, f"{name}: {value.given} is given; allowed is 1 to {len(models)}")
            bounds[name] = number
        sizes = range(bounds["least"], bounds["most"] + 1)
        if not sizes:
            if bounds["most"] < 2 and "subsets" not in keys:
                raise self.error(keys["models"].line, "one model is given; a sweep merges two at least")
            raise self.error(self.line(keys, "subsets"), f"no subset has {bounds['least']} to {bounds['most']} models")
        return [chosen for size in sizes for chosen in itertools.combinations(models, size)]

    def _grid(self, method: str, item: Item) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield the method's parameters for each combination of the values listed, and what tells them apart."""
        takes = METHODS[method].parameters
        given = {} if item.tag == "null" or item.value == {} else self.mapping(item, method)
        lists: dict[str, list[Any]] = {}
        for name, value in given.items():
            if name not in takes:
                raise self.error(value.line, one_of(f"parameter of {method}", name, takes))
            if takes[name].kind is str:
                raise self.error(value.line, f"{name}: a sweep has no statistics; `growmerge merge` takes them")
            if isinstance(value.value, dict) or (isinstance(value.value, tuple) and not value.value):
                raise self.error(value.line, f"{name}: {value.given} is given; a value or a list of values is needed")
            try:
                parts = value.value if isinstance(value.value, tuple) else (value,)
                lists[name] = [checked(name, typed(one, takes[name]), takes[name]) for one in parts]
            except InputError as error:
                raise self.error(value.line, str(error)) from None
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            varied = [f"{name}{chosen[name]}" for name in lists if len(lists[name]) > 1]
            yield chosen, "-".join(varied)

    def _name(self, keys: Mapping[str, Item], parts: Mapping[str, str], filled: Mapping[str, str]) -> str:
        if "name" in keys:
            name = self.fill(self.text(keys["name"], "name"), parts, keys["name"].line)
        else:
            found = (*filled.values(), parts["method"], parts["parameters"], parts["models"])
            name = "-".join(part for part in found if part)
        if not NAME.fullmatch(name):
            raise self.error(self.line(keys, "name"), f"{name!r} is no folder's name: letters, digits and . _ + -")
        return name
