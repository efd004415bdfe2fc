"""What values of the pipeline file can be: ranges of numbers, and what the keys of one mapping owe each other.

The keys of the whole file: `growmerge.rules_pipeline`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from growmerge.schema import (
    Check,
    Evaluation,
    GrowStage,
    MergeStage,
    ModelConfig,
    Pipeline,
    Resources,
    Stage,
    StatisticsConfig,
    Study,
    Subsets,
    TrainStage,
)
from growmerge.schema_text import Corpus, HeldOut, Prepared, TextSource, TokenizerConfig
from growmerge.schema_training import Rewarming, Training
from merge.search_settings import SEARCH, Search, search_of
from merge.settings import check_count, settings_of
from merge.table import METHODS, STATISTICS, statistic_of
from parallel.errors import InputError, one_of
from parallel.mesh import mesh_of
from upscale.factors import FAINTEST

Problem = tuple[str, str]
"""Where (a key inside the mapping, or empty for the mapping itself) and what is wrong there."""
NAME = re.compile(r"\w[\w.+-]{0,99}")
"""Names become folders and jobs."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers that are allowed: all of the bounds that are given have to hold."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Return the range in words, such as `above 0 and at most 1`."""
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


ABOVE_0 = Range(above=0)
FROM_0 = Range(at_least=0)
FROM_1 = Range(at_least=1)
FACTOR = Range(at_least=1, at_most=1000)
SHARE = Range(at_least=0, at_most=1)
INNER_SHARE = Range(above=0, below=1)

RANGES: Mapping[type, Mapping[str, Range]] = {
    TextSource: {"min_words": FROM_1},
    HeldOut: {"share": INNER_SHARE, "max_bytes": FROM_1, "ngram": FROM_1},
    TokenizerConfig: {"vocab_size": Range(at_least=258)},  # 256 bytes, and the begin and end of a text
    ModelConfig: {
        "hidden_size": FROM_1,
        "num_hidden_layers": Range(at_least=1, at_most=10_000),
        "num_attention_heads": FROM_1,
        "num_key_value_heads": FROM_1,
        "intermediate_size": FROM_1,
        "max_position_embeddings": FROM_1,
        "rope_theta": ABOVE_0,
        "rms_norm_eps": ABOVE_0,
    },
    Training: {
        "steps": FROM_1,
        "sequence_length": FROM_1,
        "global_batch": FROM_1,
        "micro_batch": FROM_1,
        "lr": FROM_0,
        "warmup": FROM_0,
        "decay": FROM_0,
        "floor": SHARE,
        "betas": Range(at_least=0, below=1),
        "eps": ABOVE_0,
        "weight_decay": FROM_0,
        "clip": ABOVE_0,
        "checkpoint_every": FROM_1,
        "keep": FROM_1,
        "keep_every": FROM_1,
        "evaluate_every": FROM_0,
        "zero": Range(at_least=0, at_most=3),
        **dict.fromkeys(("tp", "sp", "pp", "stop_after"), FROM_1),
        "skip_sigma": ABOVE_0,
        "stall_minutes": FROM_0,
    },
    Rewarming: {"at": FROM_0, "steps": FROM_1, "start": SHARE},
    TrainStage: {"at": FROM_1, "seed": FROM_0},
    Subsets: {"least": FROM_1, "most": FROM_1},
    Prepared: {"sample_bytes": FROM_1},
    GrowStage: {
        **dict.fromkeys(("width", "hidden", "heads", "kv_heads", "ffn"), FACTOR),
        "noise_db": Range(at_least=0, at_most=FAINTEST),
        "seed": FROM_0,
    },
    StatisticsConfig: {"tokens": FROM_1, "sequence_length": Range(at_least=2)},
    Evaluation: {
        "stride": FROM_1,
        "window": FROM_1,
        "pairs": FROM_0,
        "resamples": Range(at_least=100),
        "confidence": INNER_SHARE,
        "sample_tokens": FROM_0,
    },
    Check: {"by": FROM_0},
    Resources: {
        "nodes": FROM_1,
        "restarts": FROM_0,
        "lead_seconds": FROM_1,
        "per_job": FROM_1,
        "ranks": FROM_1,
        "threads": FROM_1,
        "minutes": FROM_1,
        **dict.fromkeys(("memory_gb", "cores", "total_memory_gb"), FROM_1),
    },
    Pipeline: {"seed": FROM_0},
}
"""By dataclass and field; for a list, the range of each number in it."""


def text_source(source: TextSource) -> Iterator[Problem]:
    if source.files is None:
        missing = "`files`: which files of the wheel" if source.package else "`files` (a glob) or `package`"
        yield "", f"no text: it needs {missing}"
    for name in ("sha256", "python_version"):
        if source.package is None and getattr(source, name) is not None:
            yield name, "has a meaning for a `package` alone, and none is given"
    if source.package is not None and not re.fullmatch(r"[\w.-]+==[\w.+!-]+", source.package):
        yield "package", f"{source.package!r} is not pinned: write name==version, such as homeassistant==2025.4.4"
    if source.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", source.sha256):
        yield "sha256", f"{source.sha256!r} is not a SHA-256: 64 hexadecimal digits in lower case"


def corpus(corpus: Corpus) -> Iterator[Problem]:
    for name, share in corpus.splits.items():
        if not re.fullmatch(r"[\w-]+", name):
            yield f"splits.{name}", f"{name!r} cannot be a split's name: use letters, digits, - and _"
        if not 0 < share <= 1:
            yield f"splits.{name}", f"{share:g} is not a share: allowed is above 0 and at most 1"
    if corpus.splits and abs(sum(corpus.splits.values()) - 1) > 1e-6:
        yield "splits", f"the shares add up to {sum(corpus.splits.values()):g}, not to 1"


def model(model: ModelConfig) -> Iterator[Problem]:
    hidden, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    if hidden % heads:
        yield "num_attention_heads", f"{heads} heads do not divide hidden_size {hidden}"
    elif hidden // heads % 2:
        yield (
            "num_attention_heads",
            f"{heads} heads of {hidden // heads}: rotary embedding needs an even size of a head",
        )
    if heads % kv_heads:
        yield "num_key_value_heads", f"{kv_heads} kv heads do not divide num_attention_heads {heads}"


def training(training: Training) -> Iterator[Problem]:
    if training.steps is not None and training.warmup > training.steps:
        yield "warmup", f"{training.warmup} steps of warm-up are more than the run's {training.steps} steps"
    if training.decay > max(1, training.steps or 1) or (training.decay > 1 and training.decay % 1):
        yield "decay", f"{training.decay:g} is no length: a share from 0 to 1, or whole steps of the run's"
    if training.schedule == "cosine" and any("branch" in str(value) for value in training.alarms.values()):
        yield "alarms", "a cosine has no stable phase to branch off from: use stop, or schedule: wsd or constant"
    if training.compile and training.pp > 1:
        yield "compile", "does not work in a pipeline: use tp, or leave it out"
    earliest = training.warmup
    for number, each in enumerate(training.rewarm):
        if each.at < earliest or (training.steps is not None and each.at + each.steps > training.steps):
            yield f"rewarm.{number}", f"has to lie between step {earliest}, the end of the warm-up before, and the end"
        earliest = each.at + each.steps
    if training.offload == "nvme":
        yield (
            "offload",
            "nvme is not supported: DeepSpeed keeps such a state out of its checkpoints, so that a run could neither "
            "save in the background nor go on with other ranks; use cpu",
        )
    if training.zero == 0 and training.offload != "none":
        yield "offload", "needs ZeRO, which decides what lies where: use zero: 1 or more"
    if training.zero == 0 and training.precision == "bfloat16":
        yield "zero", "0 keeps no float32 master copy of bfloat16 weights: use zero: 1, or precision: float32"
    if training.documents == "masked" and training.sp > 1:
        yield "documents", "masked does not work with sequence parallelism yet: use packed, or sp: 1"
    try:
        mesh_of(
            training.tp * training.sp * training.pp,
            zero=training.zero,
            tp=training.tp,
            sp=training.sp,
            pp=training.pp,
        )
    except InputError as error:
        yield "zero", str(error)


def stage(stage: Stage) -> Iterator[Problem]:
    verbs = [verb for verb in ("train", "grow", "merge") if getattr(stage, verb) is not None]
    if len(verbs) != 1:
        yield "", f"a stage is exactly one of train, grow, merge; given: {' and '.join(verbs) or 'none'}"
    for variable, values in stage.each.items():
        if not (values.values if isinstance(values, Subsets) else values):
            yield f"each.{variable}", "the list of values is empty"


def subsets(subsets: Subsets) -> Iterator[Problem]:
    if len({*subsets.subsets}) != len(subsets.subsets):
        yield "subsets", "a name is given twice"
    if (subsets.most or len(subsets.subsets)) > len(subsets.subsets):
        yield "most", f"{subsets.most} of {len(subsets.subsets)} names"


def train_stage(stage: TrainStage) -> Iterator[Problem]:
    if stage.at is not None and stage.seed:
        yield "seed", "a branch goes on with its run's samples: it has no seed of its own"


def merge(merge: MergeStage) -> Iterator[Problem]:
    if not merge.from_:
        yield "from_", "no models to merge: the list is empty"
    if merge.method == SEARCH and merge.search is None:
        yield "", "method search needs `search`: the method whose weights are searched for, and development texts"
    method = merge_method(merge)
    statistic = statistic_of(method)
    if METHODS[method].base == "needed" and merge.base is None:
        yield "", f"method {method} needs `base`, the stage or checkpoint that the models all started from"
    if statistic and merge.statistics is None:
        yield "", f"method {method} needs `statistics`: the text that each model is run on, such as {{text: swe}}"
    if merge.weights and len(merge.weights) != len(merge.from_):
        yield "weights", f"{len(merge.weights)} weights for {len(merge.from_)} models: give one a model"
    text = merge.statistics.text if statistic and merge.statistics else ""
    if not isinstance(text, str) and len(text) != len(merge.from_):
        yield "statistics.text", f"{len(text)} texts for {len(merge.from_)} models: give one for all, or one a model"
    elsewhere = {"weight", *STATISTICS}
    for name in merge.parameters:
        if name in elsewhere or not any(name in method.parameters for method in METHODS.values()):
            yield f"parameters.{name}", one_of("parameter", name, METHODS[method].parameters.keys() - elsewhere)
    try:
        check_count(method, len(merge.from_))
        folders = {statistic: merge.from_} if statistic else {}
        settings_of(method, {**merge_parameters(merge), **folders}, merge.from_)
    except InputError as error:
        first = str(error).split()[0]  # the line begins with the parameter's name
        yield {"weights": "weights"}.get(first, f"parameters.{first}" if first in merge.parameters else ""), str(error)


def merge_method(merge: MergeStage) -> str:
    """Return the method that makes a merge's model: what a search is for, if it is one."""
    return merge.search.method if merge.method == SEARCH and merge.search else merge.method


def merge_parameters(merge: MergeStage) -> dict[str, Any]:
    """Return the values of a merge's method's parameters that are given, or are not as the method has them."""
    takes = METHODS[merge_method(merge)].parameters
    given: dict[str, Any] = {"density": 0.5, "weight": list(merge.weights or [1.0] * len(merge.from_))}
    return {name: value for name, value in {**given, **merge.parameters}.items() if name in takes}


def search(search: Search) -> Iterator[Problem]:
    try:
        search_of(vars(search))
    except InputError as error:
        first = str(error).split()[0].rstrip(":")
        yield first if hasattr(search, first) else "method", str(error)


def resources(resources: Resources) -> Iterator[Problem]:
    if resources.ranks % resources.nodes:
        yield "nodes", f"{resources.ranks} ranks cannot be shared evenly by {resources.nodes} nodes"
    for name in ("cores", "total_memory_gb"):
        if resources.pack and getattr(resources, name) is not None:
            yield name, "has a meaning with `pack: false` alone: a single job takes what it takes"


def study(study: Study) -> Iterator[Problem]:
    for name in ("languages", "setups"):
        if not getattr(study, name):
            yield name, "the list is empty"


def check(check: Check) -> Iterator[Problem]:
    if not check.models:
        yield "models", "the list is empty"


RULES: Mapping[type, Callable[[Any], Iterator[Problem]]] = {
    TextSource: text_source,
    Corpus: corpus,
    ModelConfig: model,
    Training: training,
    Resources: resources,
    Stage: stage,
    Subsets: subsets,
    TrainStage: train_stage,
    MergeStage: merge,
    Search: search,
    Study: study,
    Check: check,
}
"""By dataclass: what its keys owe each other. The first problem found is the one that is told."""
