"""Grids taken apart: one concrete stage for every combination of a stage's variables, each checked on its own."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from growmerge.config import VARIABLE, Marks, build_stage
from growmerge.rules import NAME
from growmerge.schema import GrowStage, MergeStage, Stage, Subsets, TrainStage
from parallel.document import Item
from parallel.errors import InputError, one_of

Verb = Literal["train", "grow", "merge"]
RESERVED = ("text", "tokens", "pairs", "statistics", "evaluate", "baselines", "report", "scratch")
"""Names that stages cannot have: what runs around them is called so."""
LARGEST = 10_000
"""Stages that one grid may come to."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A concrete stage before its references are known to be good."""

    name: str
    template: str
    variables: Mapping[str, str]
    stage: Stage
    marks: Marks

    @property
    def verb(self) -> Verb:
        return "train" if self.stage.train else "grow" if self.stage.grow else "merge"

    @property
    def body(self) -> TrainStage | GrowStage | MergeStage:
        body = self.stage.train or self.stage.grow or self.stage.merge
        assert body is not None, f"{self.name} has no verb"
        return body

    def key(self, *names: str) -> str:
        return ".".join(["stages", self.template, self.verb, *names])

    def references(self) -> list[tuple[str, str]]:
        """Return (key, value) of everything that it reads from."""
        if isinstance(self.body, MergeStage):
            found = [(self.key("from", str(i)), value) for i, value in enumerate(self.body.from_)]
            return [*found, (self.key("base"), self.body.base)] if self.body.base else found
        return [(self.key("from"), self.body.from_)]


def grid(template: str, item: Item, each: Mapping[str, tuple[str, ...] | Subsets], marks: Marks) -> Iterator[Draft]:
    """Yield a draft for every combination of a stage's variables, the last one varying fastest.

    Args:
        template: the stage's key in the file.
        item: the stage as written.
        each: the variables' values.

    Raises:
        InputError: an unknown variable, a name that cannot be one, a grid too large; a filled-in stage that is wrong.
    """
    key = f"stages.{template}"
    lists = {name: values.values if isinstance(values, Subsets) else values for name, values in each.items()}
    if empty := next((name for name, values in lists.items() if not values), None):
        raise marks.error(f"{key}.each.{empty}", "the list of values is empty")
    if (count := math.prod(len(values) for values in lists.values())) > LARGEST:
        raise marks.error(f"{key}.each", f"the grid comes to {count} stages; allowed are {LARGEST}")
    for choice in itertools.product(*(range(len(values)) for values in lists.values())):
        values = {name: lists[name][i] for name, i in zip(lists, choice, strict=True)}
        with marks.within(key):
            name = fill(template, values)
        if not NAME.fullmatch(name) or name in RESERVED:
            raise marks.error(
                key, f"{name!r} cannot be a stage's name: letters, digits and . _ + -, but not {', '.join(RESERVED)}"
            )
        own = Marks(file=marks.file)
        sets = {name for name, given in each.items() if isinstance(given, Subsets)}
        stage = build_stage(
            _fill_stage(item, dict(zip(lists, choice, strict=True)), values, sets, marks, key), key, own
        )
        yield Draft(name=name, template=template, variables=values, stage=stage, marks=own)


def _fill_stage(
    item: Item, choice: Mapping[str, int], values: Mapping[str, str], sets: Collection[str], marks: Marks, key: str
) -> Item:
    """Return a stage as written, with one choice of its variables filled in.

    Args:
        choice: the number of each variable's value.
        values: the values themselves.
        sets: variables whose values are subsets: an entry of a list that has one is repeated for each of its names.
    """
    parts = _mapping(item)
    lists = _mapping(parts["each"]) if "each" in parts else {}

    def written(name: str) -> Item:
        """Return where a variable's value stands in the file."""
        return lists[name] if name in sets else _list(lists[name])[choice[name]]

    def entries(item: Item) -> list[tuple[Item, Mapping[str, str]]]:
        found = dict.fromkeys(VARIABLE.findall(item.value)) if isinstance(item.value, str) else {}
        used = {name: values[name].split("+") for name in found if name in sets}
        return [(item, {**values, **dict(zip(used, one, strict=True))}) for one in itertools.product(*used.values())]

    def filled(item: Item, key: str, values: Mapping[str, str]) -> Item:
        if isinstance(item.value, dict):
            return replace(
                item, value={name: filled(part, f"{key}.{name}", values) for name, part in item.value.items()}
            )
        if isinstance(item.value, tuple):
            parts = [pair for part in item.value for pair in entries(part)]
            return replace(item, value=tuple(filled(part, f"{key}.{i}", own) for i, (part, own) in enumerate(parts)))
        if not VARIABLE.search(item.value):
            return item
        with marks.within(key):
            text = fill(item.value, values)
        whole = VARIABLE.fullmatch(item.value)
        # What is nothing but a variable is wrong where its values are listed.
        return replace(written(whole[1]) if whole else item, value=text, tag="filled")

    return replace(
        item,
        value={name: part if name == "each" else filled(part, f"{key}.{name}", values) for name, part in parts.items()},
    )


def _mapping(item: Item) -> dict[str, Item]:
    assert isinstance(item.value, dict), f"line {item.line}: load_pipeline lets only a mapping through"
    return item.value


def _list(item: Item) -> tuple[Item, ...]:
    assert isinstance(item.value, tuple), f"line {item.line}: load_pipeline lets only a list through"
    return item.value


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return a text with every `{variable}` filled in.

    Raises:
        InputError: there is no such variable.
    """
    for variable in VARIABLE.findall(text):
        if variable not in values:
            raise InputError(one_of("variable", variable, values))
    return VARIABLE.sub(lambda found: values[found[1]], text)
