"""The stages of a pipeline as a graph: references resolved, everything in an order that can be run."""

import glob
import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

from growmerge.config import VARIABLE, Marks, merged_training, problem_in
from growmerge.grids import Draft, Verb, fill, grid
from growmerge.hub import place
from growmerge.places import files_of
from growmerge.rules import merge_method
from growmerge.rules_pipeline import parts
from growmerge.schema import Check, GrowStage, MergeStage, Pipeline, Study, TrainStage
from merge.search_settings import SEARCH
from merge.table import METHODS, statistic_of
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


def expand(pipeline: Pipeline, marks: Marks, path: Path) -> dict[str, Node]:
    """Return the pipeline's stages by name, each after those that it reads from; otherwise in the file's order.

    Args:
        marks: what `load_pipeline` returned beside the pipeline.
        path: the pipeline file; checkpoints' paths in it are relative to its folder.

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
    folder = path.absolute().parent
    inputs = {name: _inputs(draft, drafts, pipeline, folder) for name, draft in drafts.items()}
    for draft in drafts.values():
        if draft.stage.train:
            _check_train(draft, draft.stage.train, pipeline)
        if draft.stage.grow:
            _check_grow(draft, draft.stage.grow, drafts, folder)
        if draft.stage.merge:
            _check_merge(draft, draft.stage.merge, pipeline, folder)
    _check_used(drafts.values(), marks)
    _check_text(pipeline, marks, folder)
    tokenizer = pipeline.tokenizer.path
    with marks.within("tokenizer.path"):
        if tokenizer is not None and not _is_folder(place(folder, tokenizer)):
            raise InputError(f"no tokenizer folder {tokenizer!r} in {folder}")
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


# ---- references


def _inputs(draft: Draft, drafts: Mapping[str, Draft], pipeline: Pipeline, folder: Path) -> tuple[str, ...]:
    """Return the names of the stages that a stage reads from; paths and `scratch` are checked and left out."""
    found: dict[str, None] = {}
    for key, value in draft.references():
        if value in drafts:
            found[value] = None
        elif is_path(value):
            with draft.marks.within(key):
                found_there = _is_folder(place(folder, value))
            if not found_there:
                raise draft.marks.error(key, f"no checkpoint folder {value!r} in {folder}")
        elif value == "scratch" and draft.verb == "train":
            if pipeline.model is None:
                raise draft.marks.error(key, "scratch needs `model:`, the shape of the model, and there is none")
        else:
            names = [*drafts, "scratch"] if draft.verb == "train" else drafts
            raise draft.marks.error(key, f"{one_of('stage', value, names)} (a checkpoint's path needs a /)")
    return tuple(found)


def is_path(name: str) -> bool:
    """Whether a name in a pipeline file is a path, and no stage or corpus."""
    return "/" in name or name.startswith(".")


def texts_of(stage: MergeStage) -> dict[str, str]:
    """Return the texts that a merge goes by, by their keys in the stage, such as `statistics.text.0`."""
    found = {}
    if stage.statistics and statistic_of(merge_method(stage)):
        text = stage.statistics.text
        several = {f"statistics.text.{i}": one for i, one in enumerate(text)}
        found = {"statistics.text": text} if isinstance(text, str) else several
    if stage.search and stage.method == SEARCH:
        found |= {f"search.texts.{language}": text for language, text in stage.search.texts.items()}
    return found


def _check_text(pipeline: Pipeline, marks: Marks, folder: Path) -> None:
    """Check that text on disk is there; a package's is known once it is downloaded."""
    for language, corpus in pipeline.corpora.items():
        for i, source in enumerate(corpus.sources):
            if source.package or source.files is None:
                continue
            found = glob.iglob(source.files, root_dir=folder, recursive=True)  # noqa: PTH207 - may be absolute
            if next(found, None) is None:
                problem = f"language without text: no file matches {source.files!r} in {folder}"
                raise marks.error(f"corpora.{language}.sources.{i}.files", problem)
    for name, task in pipeline.evaluation.tasks.items():
        for key in ("files", "unlike"):
            with marks.within(f"evaluation.tasks.{name}.{key}"):
                files_of(getattr(task, key) or (), folder)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _check_train(draft: Draft, stage: TrainStage, pipeline: Pipeline) -> None:
    """Check a training stage's mixture, and that its own keys and the pipeline's together make a training."""
    if stage.data not in pipeline.mixtures:
        raise draft.marks.error(draft.key("data"), one_of("mixture", stage.data, pipeline.mixtures))
    training = merged_training(pipeline, stage)
    if training.steps is None:
        raise draft.marks.error(draft.key("training"), "no number of steps: give `steps` here or in `training:`")
    if problem := problem_in(training):
        raise draft.marks.error(draft.key("training", problem[0]), problem[1])


def _check_grow(draft: Draft, stage: GrowStage, drafts: Mapping[str, Draft], folder: Path) -> None:
    """Check that what keeps the optimizer's state is grown from something that has one."""
    if stage.optimizer == "reset":
        return
    if stage.from_ in drafts:
        parent = drafts[stage.from_].body
        found = isinstance(parent, TrainStage) or (isinstance(parent, GrowStage) and parent.optimizer != "reset")
    else:
        # DeepSpeed's formats, by the names of their files: to open them takes torch.
        path = place(folder, stage.from_)
        found = (path / "zero").is_dir() or any(path.glob("*optim_states.pt"))
    if not found:
        raise draft.marks.error(
            draft.key("optimizer"),
            f"{stage.optimizer}, but {stage.from_!r} has no optimizer state: a train stage has, a grow stage that "
            "keeps it, and a DeepSpeed checkpoint",
        )


def _check_merge(draft: Draft, stage: MergeStage, pipeline: Pipeline, folder: Path) -> None:
    """Check that the texts that a merge goes by are there, and what searches."""
    for key, text in texts_of(stage).items():
        if is_path(text):
            if not (folder / text).is_file():
                raise draft.marks.error(draft.key(key), f"no file {text!r} in {folder}")
        elif text not in parts(pipeline):
            line = one_of("corpus or split", text, parts(pipeline))
            raise draft.marks.error(draft.key(key), f"{line} (a file's path needs a /)")
    if stage.method == SEARCH and find_spec("cma") is None:
        raise draft.marks.error(draft.key("method"), "cma is not installed: pip install 'growmerge[search]'")


def _check_used(drafts: Iterable[Draft], marks: Marks) -> None:
    """Check that a merge's `statistics` and `search` mean something to a method of its grid."""
    able = {"statistics": [name for name in METHODS if statistic_of(name)], "search": [SEARCH]}
    given: dict[tuple[str, str], dict[str, None]] = {}
    for draft in drafts:
        merge = draft.stage.merge
        for key in able if merge else ():
            if merge and getattr(merge, key) is not None:
                given.setdefault((draft.template, key), {}).update({merge.method: None, merge_method(merge): None})
    for (template, key), methods in given.items():
        if not methods.keys() & {*able[key]}:
            line = f"means nothing to method {', '.join(methods)}: it is for {' and '.join(able[key])}"
            raise marks.error(f"stages.{template}.merge.{key}", line)


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


def _check_check(check: Check, key: str, pipeline: Pipeline, nodes: Mapping[str, Node], marks: Marks) -> None:
    _check_language(check.language, f"{key}.language", pipeline, marks)
    for i, template in enumerate(check.models):
        where = f"{key}.models.{i}"
        with marks.within(where):
            found = match(nodes, template, pipeline.study)
        if not found:
            raise marks.error(where, one_of("stage", template, nodes))
