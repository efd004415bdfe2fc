"""The stages of a pipeline as a graph: grids taken apart, references resolved, everything in an order that can be run."""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

from growmerge.config import VARIABLE, Marks, build_stage, merged_training, problem_in
from growmerge.document import Item
from growmerge.rules import NAME
from growmerge.schema import Check, GrowStage, MergeStage, Pipeline, Stage, Study, TrainStage
from parallel.errors import InputError, one_of

Verb = Literal["train", "grow", "merge"]
RESERVED = ("text", "tokens", "pairs", "evaluate", "baselines", "report", "scratch")
"""Names that stages cannot have: what runs around them is called so."""
LARGEST_GRID = 10_000
"""Stages that one grid may come to."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "seed": (),
    "base": ("setup",),
    "adapted": ("setup", "language"),
    "joint": ("setup",),
    "merged": ("setup", "method"),
}
"""The study's parts, each a template with these variables."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One concrete stage."""

    name: str
    verb: Verb
    stage: TrainStage | GrowStage | MergeStage
    """Its configuration, all variables filled in."""
    inputs: tuple[str, ...]
    """Names of the stages that it reads from, in order, a merge's base last; paths of checkpoints are not among them."""
    template: str
    """The key in the file that it came from, such as `{setup}-{method}`."""
    variables: Mapping[str, str]
    """Values of the grid's variables for this stage."""
    where: str
    """File and line."""


@dataclass(frozen=True, kw_only=True)
class _Draft:
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


def expand(pipeline: Pipeline, marks: Marks, path: Path) -> dict[str, Node]:
    """Return the pipeline's stages by name, each after those that it reads from; otherwise in the file's order.

    Args:
        marks: what `load_pipeline` returned beside the pipeline.
        path: the pipeline file; checkpoints' paths in it are relative to its folder.

    Raises:
        InputError: a variable, stage, mixture, language or checkpoint that is not there; two stages of one name; a cycle.
    """
    drafts: dict[str, _Draft] = {}
    for template, item in marks.stages.items():
        for draft in _grid(template, item, pipeline.stages[template].each, marks):
            if draft.name in drafts:
                first = drafts[draft.name]
                at = first.marks.at(f"stages.{first.template}")
                raise marks.error(f"stages.{template}", f"a second stage is called {draft.name!r}; the first: {at}")
            drafts[draft.name] = draft
    inputs = {name: _inputs(draft, drafts, pipeline, path.absolute().parent) for name, draft in drafts.items()}
    for draft in drafts.values():
        if draft.stage.train:
            _check_train(draft, draft.stage.train, pipeline)
    nodes = {}
    for name in _order(drafts, inputs):
        draft = drafts[name]
        nodes[name] = Node(
            name=name,
            verb=draft.verb,
            stage=draft.body,
            inputs=inputs[name],
            template=draft.template,
            variables=draft.variables,
            where=marks.at(f"stages.{draft.template}"),
        )
    _check_study(pipeline, nodes, marks)
    for number, check in enumerate(pipeline.checks):
        _check_check(check, f"checks.{number}", pipeline, nodes, marks)
    return nodes


def match(nodes: Mapping[str, Node], template: str, study: Study | None = None) -> list[str]:
    """Return the stages that a template such as `{setup}-swe` stands for, in the nodes' order.

    Its variables range over the values that they have in the grids and, as `setup`, `language` and `method`, in the study.

    Raises:
        InputError: there is no such variable.
    """
    values: dict[str, dict[str, None]] = {}
    for node in nodes.values():
        for variable, value in node.variables.items():
            values.setdefault(variable, {})[value] = None
    for variable, names in _study_values(study, ("setup", "language", "method")).items() if study else ():
        values.setdefault(variable, {}).update(dict.fromkeys(names))
    used = {variable: values[variable] for variable in VARIABLE.findall(template) if variable in values}
    return [name for name in nodes if name in set(_fill_all(template, used).values())]


def study_stages(study: Study, part: str) -> dict[tuple[str, ...], str]:
    """Return the stages of a part of the study, such as `{("1x", "swe"): "1x-swe", ...}` for `adapted`.

    Args:
        part: a key of PARTS; the values are in the order of its variables.

    Raises:
        InputError: the part's template has a variable that the part does not have.
    """
    return _fill_all(getattr(study, part), _study_values(study, PARTS[part]))


def _study_values(study: Study, variables: Sequence[str]) -> dict[str, Sequence[str]]:
    values = {"setup": study.setups, "language": study.languages, "method": study.methods}
    return {variable: values[variable] for variable in variables}


def _fill_all(template: str, values: Mapping[str, Iterable[str]]) -> dict[tuple[str, ...], str]:
    """Return the template filled with every combination of the values, the last variable varying fastest."""
    combinations = itertools.product(*values.values())
    return {choice: fill(template, dict(zip(values, choice, strict=True))) for choice in combinations}


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return a text with every `{variable}` filled in.

    Raises:
        InputError: there is no such variable.
    """
    for variable in VARIABLE.findall(text):
        if variable not in values:
            raise InputError(one_of("variable", variable, values))
    return VARIABLE.sub(lambda found: values[found[1]], text)


# ---- grids


def _grid(template: str, item: Item, each: Mapping[str, tuple[str, ...]], marks: Marks) -> Iterator[_Draft]:
    """Yield a draft for every combination of the variables, the last one varying fastest."""
    key = f"stages.{template}"
    if (count := math.prod(len(values) for values in each.values())) > LARGEST_GRID:
        raise marks.error(f"{key}.each", f"the grid comes to {count} stages; allowed are {LARGEST_GRID}")
    for choice in itertools.product(*(range(len(values)) for values in each.values())):
        values = {name: each[name][i] for name, i in zip(each, choice, strict=True)}
        with marks.within(key):
            name = fill(template, values)
        if not NAME.fullmatch(name) or name in RESERVED:
            raise marks.error(
                key, f"{name!r} cannot be a stage's name: letters, digits and . _ + -, but not {', '.join(RESERVED)}"
            )
        own = Marks(file=marks.file)
        stage = build_stage(_fill_stage(item, choice, marks, key), key, own)
        yield _Draft(name=name, template=template, variables=values, stage=stage, marks=own)


def _fill_stage(item: Item, choice: Sequence[int], marks: Marks, key: str) -> Item:
    """Return a stage as written, with one choice of its variables filled in."""
    parts = _mapping(item)
    lists = _mapping(parts["each"]) if "each" in parts else {}
    chosen = {name: _list(values)[i] for (name, values), i in zip(lists.items(), choice, strict=True)}

    def filled(item: Item, key: str) -> Item:
        if isinstance(item.value, dict):
            return replace(item, value={name: filled(part, f"{key}.{name}") for name, part in item.value.items()})
        if isinstance(item.value, tuple):
            return replace(item, value=tuple(filled(part, f"{key}.{i}") for i, part in enumerate(item.value)))
        if not VARIABLE.search(item.value):
            return item
        with marks.within(key):
            text = fill(item.value, {name: str(part.value) for name, part in chosen.items()})
        whole = VARIABLE.fullmatch(item.value)
        # What is nothing but a variable is wrong where its values are listed.
        return Item(value=text, tag="filled", line=chosen[whole[1]].line if whole else item.line)

    return replace(
        item, value={name: part if name == "each" else filled(part, f"{key}.{name}") for name, part in parts.items()}
    )


def _mapping(item: Item) -> dict[str, Item]:
    assert isinstance(item.value, dict), f"line {item.line}: load_pipeline lets only a mapping through"
    return item.value


def _list(item: Item) -> tuple[Item, ...]:
    assert isinstance(item.value, tuple), f"line {item.line}: load_pipeline lets only a list through"
    return item.value


# ---- references


def _inputs(draft: _Draft, drafts: Mapping[str, _Draft], pipeline: Pipeline, folder: Path) -> tuple[str, ...]:
    """Return the names of the stages that a stage reads from; paths and `scratch` are checked and left out."""
    found: dict[str, None] = {}
    for key, value in draft.references():
        if value in drafts:
            found[value] = None
        elif "/" in value or value.startswith("."):
            if not _is_folder(folder / value):
                raise draft.marks.error(key, f"no checkpoint folder {value!r} in {folder}")
        elif value == "scratch" and draft.verb == "train":
            if pipeline.model is None:
                raise draft.marks.error(key, "scratch needs `model:`, the shape of the model, and there is none")
        else:
            names = [*drafts, "scratch"] if draft.verb == "train" else drafts
            raise draft.marks.error(key, f"{one_of('stage', value, names)} (a checkpoint's path needs a /)")
    return tuple(found)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _check_train(draft: _Draft, stage: TrainStage, pipeline: Pipeline) -> None:
    """Check a training stage's mixture, and that its own keys and the pipeline's together make a training."""
    if stage.data not in pipeline.mixtures:
        raise draft.marks.error(draft.key("data"), one_of("mixture", stage.data, pipeline.mixtures))
    training = merged_training(pipeline, stage)
    if training.steps is None:
        raise draft.marks.error(draft.key("training"), "no number of steps: give `steps` here or in `training:`")
    if problem := problem_in(training):
        raise draft.marks.error(draft.key("training", problem[0]), problem[1])


def _order(drafts: Mapping[str, _Draft], inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names so that each comes after its inputs, otherwise in the file's order."""
    names = list(drafts)
    sorter = TopologicalSorter(inputs)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = error.args[1][:-1]
        start = min(range(len(cycle)), key=lambda i: names.index(cycle[i]))
        cycle = [*cycle[start:], *cycle[:start], cycle[start]]
        draft = drafts[cycle[0]]
        raise draft.marks.error(draft.key("from"), f"a cycle: {' -> '.join(cycle)}") from None
    place = {name: i for i, name in enumerate(names)}
    ready: list[int] = []
    order = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, place[name])
        name = names[heapq.heappop(ready)]
        order.append(name)
        sorter.done(name)
    return order


# ---- what the study and the checks name


def _check_language(language: str, key: str, pipeline: Pipeline, marks: Marks) -> None:
    if language not in pipeline.corpora:
        raise marks.error(key, f"language without text: {one_of('corpus', language, pipeline.corpora)}")


def _check_study(pipeline: Pipeline, nodes: Mapping[str, Node], marks: Marks) -> None:
    """Check that a study's languages have text and its parts are stages; `joint`, unless written, may have none at all."""
    study = pipeline.study
    if study is None:
        return
    _check_language(study.source_language, "study.source_language", pipeline, marks)
    for i, language in enumerate(study.languages):
        _check_language(language, f"study.languages.{i}", pipeline, marks)
    for part in PARTS:
        key = f"study.{part}"
        with marks.within(key):
            names = list(study_stages(study, part).values())
        if part == "joint" and key not in marks.lines and not set(names) & set(nodes):
            continue
        for name in names:
            if name not in nodes:
                raise marks.error(key, f"{getattr(study, part)!r} asks for an {one_of('stage', name, nodes)}")


def _check_check(check: Check, key: str, pipeline: Pipeline, nodes: Mapping[str, Node], marks: Marks) -> None:
    _check_language(check.language, f"{key}.language", pipeline, marks)
    for i, template in enumerate(check.models):
        where = f"{key}.models.{i}"
        with marks.within(where):
            found = match(nodes, template, pipeline.study)
        if not found:
            raise marks.error(where, one_of("stage", template, nodes))
