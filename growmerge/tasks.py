"""Tasks: what a pipeline file comes to, in order, each with the key that says whether it has been done.

A task's key is the hash of its configuration and of its inputs' keys. Its folder is `stages/<name>/<key>`, so a changed
configuration runs what depends on it anew and nothing else, and going back to an old one finds the old results.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoint import manifest
from growmerge.config import merged_training
from growmerge.graph import Node
from growmerge.hub import PREFIX, place
from growmerge.places import files_of
from growmerge.references import is_path
from growmerge.resolved import corpora_of, resolved
from growmerge.rules import merge_method, merge_parameters
from growmerge.schema import MergeStage, Pipeline, TrainStage
from growmerge.schema_text import VOCABULARY, Corpus
from merge.search_settings import SEARCH
from merge.table import statistic_of
from parallel.errors import InputError
from train.data.places import opened

VERSIONS = {
    "text": 1,
    "tokens": 3,
    "pairs": 1,
    "train": 1,
    "grow": 2,
    "statistics": 1,
    "merge": 6,
    "evaluate": 3,
    "baselines": 1,
    "report": 3,
}
"""Raised when a verb's results change, so that old ones are not taken for new."""


ADDED: Mapping[str, Any] = {
    **dict.fromkeys(("hidden", "heads", "kv_heads", "ffn", "noise_db", "experts", "experts_per_token")),
    "optimizer": "reset",
    "dynamics": "free",
    "schedule": "wsd",
    "floor": 0.0,
    "decay_embeddings": True,
    "decay_norms": False,
    "hidden_act": "silu",
    "at": None,
    "branches": (),
    "dtype": None,
    "allow_unrelated": False,
    "documents": "packed",
    "alarms": {},
    "zero": 3,
    "tp": 1,
    "sp": 1,
    "pp": 1,
    "offload": "none",
    "rewarm": (),
    "kernels": "auto",
    **dict.fromkeys(("recompute", "compile"), False),
    "skip_sigma": 6.0,
    "stop_after": 8,
}
"""Keys of stages that the first versions did not have, with the values that stand for what those did: with these they
are left out of a task's configuration, so that older results are still up to date."""


WITHOUT_RESULT = ("checkpoint_every", "keep", "keep_every", "saves", "stall_minutes", "tracker")
"""Keys of a training that no result depends on."""


TOPOLOGY = ("zero", "tp", "sp", "pp", "offload", "recompute", "compile", "kernels", "micro_batch")
"""Keys of a training that say how it is computed: a run may go on at another topology."""
EVALUATION = "evaluation"
"""Folder of a workdir with the verdicts of its models, and their scores."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to do."""

    name: str
    verb: str
    config: Mapping[str, Any]
    """All that its result depends on but its inputs; plain JSON."""
    inputs: tuple[str, ...]
    """Names of the tasks whose results it reads."""
    key: str
    folder: Path

    @property
    def done(self) -> bool:
        """Whether its result is there, every file of the size that its manifest says."""
        try:
            manifest.check(self.folder)
        except InputError:
            return False
        return True


def build_tasks(pipeline: Pipeline, nodes: Mapping[str, Node], workdir: Path, base: Path) -> dict[str, Task]:
    """Return all tasks by name, inputs before what reads them.

    Args:
        base: folder of the pipeline file, which relative paths in it start from.
    """
    tasks: dict[str, Task] = {}

    def add(name: str, verb: str, config: Mapping[str, Any], inputs: tuple[str, ...]) -> None:
        plain = json.loads(json.dumps(config))
        content = [name, verb, VERSIONS[verb], plain, [tasks[other].key for other in inputs]]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        tasks[name] = Task(
            name=name, verb=verb, config=plain, inputs=inputs, key=key, folder=workdir / "stages" / name / key
        )

    corpora = {language: _content(corpus) for language, corpus in pipeline.corpora.items()}
    text = {"corpora": corpora, "heldout": asdict(pipeline.heldout), "seed": pipeline.seed}
    if pipeline.prepared is not None:
        text["prepared"] = {"sample_bytes": pipeline.prepared.sample_bytes, "stamps": _prepared_stamps(pipeline, base)}
    add("text", "text", {**text, "files": _stamps(pipeline, base)}, ())
    tokenizer = asdict(pipeline.tokenizer) | {"vocab_size": pipeline.tokenizer.vocab_size or VOCABULARY}
    stamp = _path_stamp(pipeline.tokenizer.path, base, tokenizer=True)
    add("tokens", "tokens", {"tokenizer": tokenizer, "stamp": stamp}, ("text",))
    add("pairs", "pairs", {"pairs": pipeline.evaluation.pairs, "seed": pipeline.seed}, ("text",))
    for node in nodes.values():
        counted = statistics_of(node.stage, pipeline.seed) if isinstance(node.stage, MergeStage) else []
        for name, about in counted:
            model = about["from_"]
            if name not in tasks:
                stamps = {} if model in nodes else {model: _path_stamp(model, base)}
                config = {**about, "stamps": {**stamps, **_text_stamps([about["text"]], base)}}
                add(name, "statistics", config, (*((model,) if model in nodes else ()), "tokens"))
        config = _stage_config(pipeline, node, base)
        reads = [*dict.fromkeys(name for name, _ in counted)]
        if node.verb in ("train", "grow") or "search" in config:
            reads.append("tokens")
        add(node.name, node.verb, config, (*node.inputs, *reads))
    asked = {"evaluation": _evaluation(pipeline), "seed": pipeline.seed, **_asked(pipeline, base)}
    for node in nodes.values():
        add(f"evaluate/{node.name}", "evaluate", asked, (node.name, "tokens", "pairs"))
    add("baselines", "baselines", {"seed": pipeline.seed}, ("tokens",))
    shown = {
        "name": pipeline.name,
        "title": pipeline.title,
        "study": _without_added(pipeline.study) if pipeline.study else None,
        "checks": [asdict(check) for check in pipeline.checks],
        "evaluation": asdict(pipeline.evaluation),
        "corpora": {language: asdict(corpus) for language, corpus in pipeline.corpora.items()},
    }
    add("report", "report", shown, tuple(tasks))
    return tasks


LABELS = ("edition", "rights_holder", "licence")
"""What the report says of a text source; the text does not depend on it."""


def _content(corpus: Corpus) -> dict[str, Any]:
    """Return what a corpus' text depends on."""
    sources = [{key: value for key, value in asdict(source).items() if key not in LABELS} for source in corpus.sources]
    return {"sources": sources, "splits": dict(corpus.splits)}


def _evaluation(pipeline: Pipeline) -> dict[str, Any]:
    """What scores depend on; the window is the training sequence length unless given."""
    evaluation = pipeline.evaluation
    window = evaluation.window or pipeline.training.sequence_length
    return {
        "window": window,
        "stride": evaluation.stride or max(1, window // 2),
        "sample_tokens": evaluation.sample_tokens,
    }


def _asked(pipeline: Pipeline, base: Path) -> dict[str, Any]:
    """What the tasks of the file itself ask of a model, with the sizes and times of their files."""
    tasks = pipeline.evaluation.tasks
    if not tasks:
        return {}
    found = {}
    for name, task in tasks.items():
        files = [path for globs in (task.files, task.unlike) if globs for path in files_of(globs, base)]
        files += sorted((base / task.include).rglob("*")) if task.include else []
        found[name] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()]
    return {"tasks": {name: asdict(task) for name, task in tasks.items()}, "stamps": found}


def _stage_config(pipeline: Pipeline, node: Node, base: Path) -> dict[str, Any]:
    seed = pipeline.seed + (0 if isinstance(node.stage, MergeStage) else node.stage.seed)
    config = {**_without_added(node.stage), "seed": seed, "precision": pipeline.training.precision}
    named = [config["from_"]] if isinstance(config["from_"], str) else list(config["from_"])
    paths = [name for name in [*named, config.get("base")] if name and name not in (*node.inputs, "scratch")]
    config["stamps"] = {path: _path_stamp(path, base) for path in paths}
    if isinstance(node.stage, MergeStage):
        config["parameters"] = merge_parameters(node.stage)
        config["precision"] = config.pop("dtype", config["precision"])
        for key in ("weights", "statistics", "search"):
            config.pop(key, None)
        if counted := statistics_of(node.stage, pipeline.seed):
            config["statistics"] = [name for name, _ in counted]
        if node.stage.method == SEARCH and node.stage.search:
            search = node.stage.search
            config["search"] = {**asdict(search), "seed": pipeline.seed + search.seed}
            config["stamps"] |= _text_stamps(search.texts.values(), base)
    if isinstance(node.stage, TrainStage):
        config["training"] = _without_added(merged_training(pipeline, node.stage))
        config["mixture"] = resolved(node.stage.data, pipeline.mixtures)
        config["precision"] = config["training"]["precision"]
        dropped = (*WITHOUT_RESULT, *TOPOLOGY)
        config["training"] = {key: value for key, value in config["training"].items() if key not in dropped}
        config["evaluation"] = {key: _evaluation(pipeline)[key] for key in ("window", "stride")}
        config["evaluation"]["languages"] = _scored_languages(pipeline, node.stage)
        if node.stage.from_ == "scratch" and pipeline.model is not None:
            config["model"] = _without_added(pipeline.model)
    return config


def statistics_of(merge: MergeStage, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Return (task, configuration) of the statistics of each model that a merge goes by; none for most methods."""
    statistic, asked = statistic_of(merge_method(merge)), merge.statistics
    if statistic is None or asked is None:
        return []
    texts = [asked.text] * len(merge.from_) if isinstance(asked.text, str) else asked.text
    how: dict[str, Any] = {"tokens": asked.tokens, "sequence_length": asked.sequence_length}
    if statistic == "fisher":
        how |= {"labels": asked.labels, "seed": seed if asked.labels == "sampled" else 0}
    found = []
    for model, text in zip(merge.from_, texts, strict=True):
        about = {"statistic": statistic, "from_": model, "text": text, **how}
        mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:6]
        found.append((f"statistics/{statistic}-{Path(model).name}-{mark}", about))
    return found


def _without_added(settings: Any) -> dict[str, Any]:
    """Return a dataclass' fields but those of ADDED that are as they would be without them."""
    return {key: value for key, value in asdict(settings).items() if key not in ADDED or value != ADDED[key]}


def trained_languages(pipeline: Pipeline, stage: TrainStage) -> set[str]:
    """Return the languages of what a training reads, replay included."""
    steps = merged_training(pipeline, stage).steps
    return {name.partition(".")[0] for name in corpora_of(stage.data, pipeline.mixtures, steps=steps)}


def _scored_languages(pipeline: Pipeline, stage: TrainStage) -> list[str]:
    """Return the languages of a training and, for the forgetting, the study's source language."""
    names = trained_languages(pipeline, stage)
    if pipeline.study is not None:
        names.add(pipeline.study.source_language)
    return [language for language in pipeline.corpora if language in names]


def _text_stamps(texts: Iterable[str], base: Path) -> dict[str, Any]:
    """Sizes and times of the texts that are files."""
    stats = {text: (base / text).stat() for text in texts if is_path(text)}
    return {text: [stat.st_size, stat.st_mtime_ns] for text, stat in stats.items()}


def _path_stamp(path: str | None, base: Path, *, tokenizer: bool = False) -> Any:
    """What a folder outside the pipeline is known by: its manifest, or its files' sizes and times."""
    if path is None:
        return None
    folder = place(base, path, tokenizer=tokenizer)
    if path.startswith(PREFIX):
        return folder.name  # the commit
    if manifest.is_complete(folder):
        return manifest.digest(manifest.read_manifest(folder))
    return [[name.name, name.stat().st_size, name.stat().st_mtime_ns] for name in sorted(folder.glob("*"))]


def _prepared_stamps(pipeline: Pipeline, base: Path) -> dict[str, Any]:
    """Sizes and times of what says what is in the prepared folder."""
    assert pipeline.prepared is not None, "asked for where there is one"
    folder = base / pipeline.prepared.folder
    paths = {name: folder / f"{name}.json" for name, corpus in pipeline.corpora.items() if not corpus.sources}
    stats = {name: path.stat() for name, path in paths.items()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _stamps(pipeline: Pipeline, base: Path) -> list[Any]:
    """Names, sizes and times of the text files on disk that the corpora read."""
    found = []
    with opened(base) as find:
        for corpus in pipeline.corpora.values():
            for source in corpus.sources:
                patterns = [] if source.package else [source.files, source.untranslated]
                for file in (file for pattern in patterns if pattern for file in find(pattern)):
                    stat = (base / file.name).stat()
                    found.append([file.name, stat.st_size, stat.st_mtime_ns])
    return found
