"""The keys of a file that `growmerge eval` reads, as frozen dataclasses; a docstring is a help text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

TaskKind = Literal["text", "pairs", "corrupt", "samples", "harness"]
EvalPrecision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """Something that every model is asked."""

    kind: TaskKind
    """text: bits per byte of documents; pairs: minimal pairs, how often the good sentence is the likelier one; corrupt:
    pairs made of a text, by swapping neighbouring words and by leaving words out; samples: what the model writes;
    harness: tasks of lm-evaluation-harness."""
    language: str = ""
    """ISO 639-3 code; tasks of one language stand together."""
    domain: str = ""
    """What kind of text it is: `news`, `web`."""
    files: str | tuple[str, ...] | None = None
    """Globs, relative to this YAML file: .jsonl, .parquet, .tsv, .csv; .txt is one document a file."""
    hub: str | None = None
    """A data set of the Hugging Face Hub (`org/name`), or a folder in such a one's form, instead of `files`."""
    config: str | tuple[str, ...] | None = None
    """hub: configurations of it, such as `swe`; `all` of them."""
    split: str = "train"
    """hub: split of it."""
    revision: str | None = None
    """hub: commit or tag."""
    data_files: tuple[str, ...] = ()
    """hub: globs of the data set's files to read; all of them by default."""
    where: Mapping[str, str] = field(default_factory=dict)
    """pairs: columns and the values that rows have to have, such as `{language: swe}`."""
    field: str = "text"
    """text, corrupt: the column that holds the text."""
    good: str | None = None
    """pairs: the column of the good sentence; found by itself in BLIMP's and MultiBLiMP's."""
    bad: str | None = None
    """pairs: the column of the bad one."""
    phenomenon: str | None = None
    """pairs: the column of what pairs are counted under; `UID` or `phenomenon` where there is one, else the file."""
    count: int = 200
    """corrupt: pairs of each kind at most."""
    unlike: tuple[str, ...] = ()
    """corrupt: globs of further texts, such as the training text, in which no corrupted sentence may occur."""
    prompts: tuple[str, ...] = ()
    """samples: what the model goes on from."""
    tokens: int = 60
    """samples: tokens that it writes at most."""
    temperature: float = 0.8
    """samples: of the draws."""
    names: tuple[str, ...] = ()
    """harness: of its tasks or groups, such as `belebele_swe_Latn`."""
    include: str | None = None
    """harness: a folder with further tasks; their code, if they have any, is run by lm-eval."""
    shots: int | None = None
    """harness: examples before each item; as the task says by default."""
    limit: int | None = None
    """harness: items of each task at most, to try it out."""
    window: int | None = None
    """text: tokens of the sliding window; 2048 or the model's positions by default."""
    stride: int | None = None
    """text: tokens between windows; half of the window by default."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What the models are to one another; `{setup}` in a name stands for each of `setups`."""

    source_language: str | None = None
    """The language of the bases, whose forgetting is measured."""
    setups: tuple[str, ...] = ()
    """Such as `[1x, 2x]`, each with models of its own; one that has no joint model, say, is not compared with it."""
    base: str | None = None
    """The model before adaptation, that forgetting is measured against: `base-{setup}`."""
    specialised: Mapping[str, str] = field(default_factory=dict)
    """By language, the model that is adapted to it alone: `{swe: "{setup}-swe"}`."""
    joint: str | None = None
    """The model that is trained on all of these languages."""
    models: str | None = None
    """Glob of a setup's further models, such as merges: by default `{setup}-*`, or all where there are no setups. One
    that several setups match is of that with the longest name."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A file for `growmerge eval`; paths in it are relative to it."""

    models: Mapping[str, str] = field(default_factory=dict)
    """By name: a checkpoint's folder in any format, one with an adapter (`model+adapter`), one of the Hub, or a merge
    recipe (.yml), which is merged in memory."""
    sweep: str | None = None
    """A sweep's spec: each of its merges is merged in memory, and none is written."""
    tasks: Mapping[str, EvalTask]
    """What each model is asked, by name."""
    roles: Roles | None = None
    """What is compared with what: forgetting of the source language, retention of the others after merging."""
    precision: EvalPrecision = "float32"
    """Compute dtype."""
    seed: int = 0
    """Of samples, corruptions and resamples."""
    resamples: int = 2000
    """Resamples of the bootstrap."""
    confidence: float = 0.95
    """Coverage of the intervals."""
