"""The stages of a pipeline as a graph: references resolved, everything in an order that can be run."""

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from growmerge.config import VARIABLE, Marks
from growmerge.grids import Draft, Verb, fill, grid
from growmerge.references import absences, branched, check_bases, check_stage, check_used, inputs_of
from growmerge.schema import Check, GrowStage, MergeStage, Pipeline, Study, TrainStage
from parallel.errors import InputError, one_of

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
    """Names of the stages that it reads from, in order, a merge's base last; paths are not among them."""
    template: str
    """The key in the file that it came from, such as `{setup}-{method}`."""
    variables: Mapping[str, str]
    """Values of the grid's variables for this stage."""
    where: str
    """File and line."""


def expand(pipeline: Pipeline, marks: Marks, path: Path, absent: list[str] | None = None) -> dict[str, Node]:
    """Return the pipeline's stages by name, each after those that it reads from; otherwise in the file's order.

    Args:
        marks: what `load_pipeline` returned beside the pipeline.
        path: the pipeline file; checkpoints' paths in it are relative to its folder.
        absent: takes a line for each text, tokenizer and prepared corpus that is not there yet, which is an error
            otherwise.

    Raises:
        InputError: something named that is not there (a stage, mixture, language, ...); two of one name; a cycle.
    """
    drafts: dict[str, Draft] = {}
    for template, item in marks.stages.items():
        for draft in grid(template, item, pipeline.stages[template].each, marks):
            if draft.name in drafts:
                first = drafts[draft.name]
                at = first.marks.at(f"stages.{first.template}")
                raise marks.error(f"stages.{template}", f"a second stage is called {draft.name!r}; the first: {at}")
            drafts[draft.name] = draft
    drafts = {name: branched(draft, drafts, pipeline) for name, draft in drafts.items()}
    folder = path.absolute().parent
    inputs = {name: inputs_of(draft, drafts, pipeline, folder) for name, draft in drafts.items()}
    for draft in drafts.values():
        check_stage(draft, drafts, pipeline, folder)
    check_used(drafts.values(), marks)
    check_bases(drafts, inputs)
    for error in absences(pipeline, marks, folder):
        if absent is None:
            raise error
        absent.append(str(error))
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

    Its variables range over the values that they have in the grids and, as `setup`, `language` and `method`,
    in the study.

    Raises:
        InputError: there is no such variable.
    """
    values: dict[str, dict[str, None]] = {}
    for node in nodes.values():
        for variable, value in node.variables.items():
            values.setdefault(variable, {})[value] = None
    for variable, names in _study_values(study, ("setup", "language", "method")).items() if study else ():
        values.setdefault(variable, {}).update(dict.fromkeys(names))
    used = dict.fromkeys(VARIABLE.findall(template))
    for variable in used:
        if variable not in values:
            raise InputError(one_of("variable", variable, values))
    found = set(_fill_all(template, {variable: values[variable] for variable in used}).values())
    return [name for name in nodes if name in found]


def study_branches(study: Study, nodes: Mapping[str, Node]) -> dict[str, dict[str, list[str]]]:
    """Return the models of each adaptation at several lengths and seeds, its own last: by language, then by setup.

    Raises:
        InputError: a template with a variable that no grid has.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for (setup, language), adapted in study_stages(study, "adapted").items() if study.branches else ():
        here = {"setup": setup, "language": language}
        templates = [VARIABLE.sub(lambda one: here.get(one[1], one[0]), one) for one in study.branches]  # noqa: B023
        names = [name for template in templates for name in match(nodes, template)]
        found.setdefault(language, {})[setup] = list(dict.fromkeys([*names, adapted]))
    return found


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


def _order(drafts: Mapping[str, Draft], inputs: Mapping[str, Sequence[str]]) -> list[str]:
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
    """Check that a study's languages have text and its parts are stages; only `joint` may be left out as a whole."""
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
    _check_branches(study, nodes, marks)


def _check_branches(study: Study, nodes: Mapping[str, Node], marks: Marks) -> None:
    """Check that every template of branches stands for a train stage."""
    for number, template in enumerate(study.branches):
        key = f"study.branches.{number}"
        with marks.within(key):
            found = match(nodes, template, study)
            if not found:
                raise InputError(one_of("stage", template, nodes))
            for name in found:
                if nodes[name].verb != "train":
                    raise InputError(f"{name} does not train: branches are trainings")


def _check_check(check: Check, key: str, pipeline: Pipeline, nodes: Mapping[str, Node], marks: Marks) -> None:
    _check_language(check.language, f"{key}.language", pipeline, marks)
    for i, template in enumerate(check.models):
        where = f"{key}.models.{i}"
        with marks.within(where):
            found = match(nodes, template, pipeline.study)
        if not found:
            raise marks.error(where, one_of("stage", template, nodes))
