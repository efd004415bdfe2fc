"""What a pipeline's stages name: checked to be there and to fit, with the file's line where it does not."""

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from growmerge.config import Marks, merged_training, problem_in
from growmerge.grids import Draft
from growmerge.hub import place
from growmerge.places import files_of
from growmerge.rules import merge_method
from growmerge.rules_pipeline import parts
from growmerge.schema import GrowStage, MergeStage, Pipeline, TrainStage
from merge.search_settings import SEARCH
from merge.table import METHODS, statistic_of
from parallel.errors import InputError, one_of
from train.schedule import Schedule

Body = TrainStage | GrowStage | MergeStage
SAME_IN_A_BRANCH = ("sequence_length", "global_batch", "lr", "schedule", "warmup", "betas", "dynamics")
"""Keys of a training that its branches share."""


def check_stage(draft: Draft, drafts: Mapping[str, Draft], pipeline: Pipeline, folder: Path) -> None:
    """Check a stage beyond what it reads from.

    Raises:
        InputError: with the line.
    """
    if draft.stage.train:
        _check_train(draft, draft.stage.train, drafts, pipeline)
    if draft.stage.grow:
        _check_grow(draft, draft.stage.grow, drafts, folder)
    if draft.stage.merge:
        _check_merge(draft, draft.stage.merge, pipeline, folder)


def inputs_of(draft: Draft, drafts: Mapping[str, Draft], pipeline: Pipeline, folder: Path) -> tuple[str, ...]:
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


def absences(pipeline: Pipeline, marks: Marks, folder: Path) -> Iterator[InputError]:
    """Yield what is not there of text and tokenizer; a package's text is known once it is downloaded."""
    for language, corpus in pipeline.corpora.items():
        for i, source in enumerate(corpus.sources):
            if source.package or source.files is None:
                continue
            found = glob.iglob(source.files, root_dir=folder, recursive=True)  # noqa: PTH207 - may be absolute
            if next(found, None) is None:
                problem = f"language without text: no file matches {source.files!r} in {folder}"
                yield marks.error(f"corpora.{language}.sources.{i}.files", problem)
    if pipeline.prepared is not None:
        there = folder / pipeline.prepared.folder
        if lacking := [name for name in _read_prepared(pipeline) if not (there / f"{name}.json").is_file()]:
            line = f"not in {there}: {', '.join(lacking)}: make them by `growmerge data prepare`"
            yield marks.error("prepared.folder", line)
    tasks = [(f"evaluation.tasks.{name}", task) for name, task in pipeline.evaluation.tasks.items()]
    for key, globs in ((f"{key}.{part}", getattr(task, part)) for key, task in tasks for part in ("files", "unlike")):
        try:
            files_of(globs or (), folder)
        except InputError as error:
            yield marks.error(key, str(error))
    tokenizer = pipeline.tokenizer.path
    try:
        if tokenizer is not None and not _is_folder(place(folder, tokenizer, tokenizer=True)):
            yield marks.error("tokenizer.path", f"no tokenizer folder {tokenizer!r} in {folder}")
    except InputError as error:
        yield marks.error("tokenizer.path", str(error))


def _read_prepared(pipeline: Pipeline) -> list[str]:
    """Return the prepared corpora that there have to be: a language, or its splits where it has some."""
    return [
        name
        for language, corpus in pipeline.corpora.items()
        if not corpus.sources
        for name in (language, *(f"{language}.{split}" for split in corpus.splits))
    ]


def branched(draft: Draft, drafts: Mapping[str, Draft], pipeline: Pipeline) -> Draft:
    """Return a branch with all that it has of the run that it goes on with; any other stage as it is.

    If it says no number of steps, its decay has the share of them that the run's has of the run's.
    """
    branch = draft.stage.train
    if branch is None or branch.at is None:
        return draft
    run = drafts[branch.from_].stage.train if branch.from_ in drafts else None
    if run is None or run.at is not None:
        raise draft.marks.error(
            draft.key("from"), f"a branch goes on with the run of a train stage, not {branch.from_!r}"
        )
    of = merged_training(pipeline, run)
    share = of.decay if of.decay <= 1 or of.steps is None else of.decay / of.steps
    training = {"steps": round(branch.at / (1 - share)) if share < 1 else of.steps} | dict(branch.training)
    if isinstance(training["steps"], int):
        training["decay"] = training["steps"] - branch.at
    whole = replace(branch, seed=run.seed, training={**run.training, **training})
    return replace(draft, stage=replace(draft.stage, train=whole))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _check_train(draft: Draft, stage: TrainStage, drafts: Mapping[str, Draft], pipeline: Pipeline) -> None:
    """Check a training stage's mixture, and that its own keys and the pipeline's together make a training."""
    if stage.data not in pipeline.mixtures:
        raise draft.marks.error(draft.key("data"), one_of("mixture", stage.data, pipeline.mixtures))
    training = merged_training(pipeline, stage)
    if training.steps is None:
        line = "no number of steps: give `steps` here or in `training:`"
        if pipeline.prepared is not None:
            line += f", or under prepared.sizes those of all corpora of {stage.data}"
        raise draft.marks.error(draft.key("training"), line)
    if stage.at is not None:
        _check_branch(draft, stage, drafts, pipeline)
    if problem := problem_in(training):
        raise draft.marks.error(draft.key("training", problem[0]), problem[1])


def _check_branch(draft: Draft, stage: TrainStage, drafts: Mapping[str, Draft], pipeline: Pipeline) -> None:
    """Check that a branch begins in the stable phase of its run, at a checkpoint that is kept."""
    run = drafts[stage.from_].stage.train
    assert run is not None and stage.at is not None, "branched lets nothing else through"
    training, of = merged_training(pipeline, stage), merged_training(pipeline, run)
    assert training.steps is not None and of.steps is not None, "checked before"
    for name in SAME_IN_A_BRANCH:
        if getattr(training, name) != getattr(of, name):
            raise draft.marks.error(
                draft.key("training", name), f"a branch goes on as its run does, with {name} {getattr(of, name)}"
            )
    if of.keep_every is None or stage.at % of.keep_every or stage.at % of.checkpoint_every:
        kept = f"keep_every: {of.keep_every}, checkpoint_every: {of.checkpoint_every}"
        line = f"{stage.from_} keeps no checkpoint of step {stage.at} ({kept}): it is kept if both divide it"
        raise draft.marks.error(draft.key("at"), line)
    with draft.marks.within(draft.key("at")):
        rates = Schedule(kind=of.schedule, steps=of.steps, warmup=of.warmup, decay=of.decay)
        rates.branch(stage.at, training.steps - stage.at)


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


def check_bases(drafts: Mapping[str, Draft], inputs: Mapping[str, Sequence[str]]) -> None:
    """Check that the models of merges stem from their base, as far as the file says where they come from."""
    bodies = {name: draft.body for name, draft in drafts.items()}
    for draft in drafts.values():
        stage = draft.stage.merge
        if stage and not stage.allow_unrelated and (others := unrelated(stage, bodies, inputs)):
            line = f"{others[0]} was not trained from {stage.base}: name what it was, or give allow_unrelated: true"
            raise draft.marks.error(draft.key("base"), line)


def unrelated(stage: MergeStage, bodies: Mapping[str, Body], inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the stages that a merge takes and that do not go back to its base; none if its method goes by no base.

    Of what goes back to a checkpoint's path that is not known here.
    """
    if stage.base not in inputs or METHODS[merge_method(stage)].base == "none":
        return []
    lines = {name: _ancestors(name, inputs) for name in stage.from_ if name in inputs}
    known = {name: line for name, line in lines.items() if not any(_reads_path(bodies[one]) for one in line)}
    return [name for name, line in known.items() if stage.base not in line]


def _reads_path(stage: Body) -> bool:
    named = (*stage.from_, stage.base or "") if isinstance(stage, MergeStage) else (stage.from_,)
    return any(is_path(name) for name in named)


def _ancestors(name: str, inputs: Mapping[str, Sequence[str]]) -> set[str]:
    """Return a stage and all that it goes back to."""
    found, left = {name}, [name]
    while left:
        for one in inputs[left.pop()]:
            if one not in found:
                found.add(one)
                left.append(one)
    return found


def check_used(drafts: Iterable[Draft], marks: Marks) -> None:
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
