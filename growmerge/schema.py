"""The pipeline file's keys, as frozen dataclasses: what may be written, its type, unit and default.

`growmerge.config` turns YAML into these and names file and line when it cannot. A field's docstring is its help text.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from growmerge.schema_eval import EvalTask
from growmerge.schema_mixture import AnyMixture
from growmerge.schema_text import Corpus, HeldOut, Prepared, TokenizerConfig
from growmerge.schema_training import Training
from merge.search_settings import Search

GrowthMethod = Literal["exact-split", "symmetric", "diagonal"]
GrownOptimizer = Literal["reset", "scaled", "asymmetric"]
MergeMethod = Literal[
    "linear",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "ram",
    "ramplus_tl",
    "nearswap",
    "arcee_fusion",
    "passthrough",
    "tsv",
    "fisher",
    "regmean",
    "search",
]
"""As in merge/table.py, and `search` for the weights of one of them."""
Labels = Literal["text", "sampled"]
MergedDtype = Literal["float32", "bfloat16", "float16"]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the seed model, in the words of Hugging Face configs."""

    family: Literal["llama"] = "llama"
    """Which architecture."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    """Longest sequence (tokens)."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    hidden_act: Activation = "silu"
    """Of the gate in feed-forward blocks, as transformers names it; gelu is the exact one, by the error function."""


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """Train a model on a mixture."""

    from_: str
    """Stage to start from, a checkpoint's path, or `scratch`."""
    data: str
    """Name of a mixture."""
    at: int | None = None
    """A decay branch: goes on from this step of the run `from`, which lies in its stable phase and is kept
    (`keep_every`), with its optimizer and how it trains, and decays until `steps`; by default for the share of them
    that the run's decay has."""
    seed: int = 0
    """Added to the pipeline's, for a run of its own."""
    training: Mapping[str, object] = field(default_factory=dict)
    """Keys of `training` that differ for this run."""


@dataclass(frozen=True, kw_only=True)
class GrowStage:
    """Grow a model: in width without changing its function (HyperCloning, arXiv 2409.12903), or in depth."""

    from_: str
    """Stage or checkpoint to grow."""
    width: int | None = None
    """Factor of all sizes that are not named below; 2 by default, 1 beside `depth`, `experts` or a size to pad to."""
    hidden: int | None = None
    """Factor of the hidden size; `width` by default, as for the next three."""
    heads: int | None = None
    """Factor of the query heads, a multiple of the key/value heads' factor."""
    kv_heads: int | None = None
    """Factor of the key/value heads."""
    ffn: int | None = None
    """Factor of the feed-forward width."""
    to_hidden: int | None = None
    """Hidden size, which may be no multiple: what lacks after the factors is padded, and the function stays."""
    to_heads: int | None = None
    """Query heads; at least as many attend to one key/value head as before."""
    to_kv_heads: int | None = None
    """Key/value heads."""
    to_ffn: int | None = None
    """Feed-forward width."""
    to_head_dim: int | None = None
    """Elements of a head, a multiple of what they are."""
    depth: str | None = None
    """How layers are added: stack (all of them over and over), interleave (each several times in a row), solar (the
    model's start and its end, which overlap), identity (copies that add nothing yet; it alone keeps the function), or a
    map of the old layers such as 0-23,8-31."""
    layers: int | None = None
    """Layers of the grown model; not with a map."""
    experts: int | None = None
    """Experts a layer that a dense model's feed-forward blocks become; the function stays (sparse upcycling, arXiv
    2212.05055)."""
    experts_per_token: int | None = None
    """To how many of them a token is sent; 2 by default."""
    method: GrowthMethod = "exact-split"
    """How a weight is shared among its copies: unequal parts that add up exactly, equal parts, or the whole to one copy
    (HyperCloning's diagonal)."""
    noise_db: float | None = None
    """Noise on matrices that cancels in the sum, so many dB below the weights; with symmetric and diagonal alone."""
    optimizer: GrownOptimizer = "reset"
    """What the next training has of Adam's moments and step counts: none (a fresh optimizer), scaled as the gradients
    are, or scaled in the first copy and zero in the others (arXiv 2602.02472)."""
    seed: int = 0
    """Added to the pipeline's: of the shares and the noise."""


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """What is counted of each model on text: its diagonal Fisher, or the Gram matrices of its layers' inputs."""

    text: str | tuple[str, ...]
    """Training text of a corpus (`swe`) or a split (`eng.first`), or a file's path (with a /): one for all models, or
    one a model."""
    tokens: int = 100_000
    """Tokens that are scored at most, from the text's start."""
    sequence_length: int | None = None
    """Tokens of a window, which moves by half; 1024 or the model's positions by default."""
    labels: Labels = "text"
    """fisher: of the text itself (empirical Fisher), or drawn from the model (true Fisher)."""


@dataclass(frozen=True, kw_only=True)
class MergeStage:
    """Merge models into one."""

    from_: tuple[str, ...]
    """Stages or checkpoints to merge, in this order."""
    method: MergeMethod
    base: str | None = None
    """Stage or checkpoint that they all started from (needed by most methods)."""
    weights: tuple[float, ...] = ()
    """One weight a model; all 1 by default."""
    parameters: Mapping[str, bool | float | tuple[float, ...]] = field(default_factory=dict)
    """The method's other parameters, by mergekit's names; a list for those that every model has of its own. `density`
    is 0.5 by default. What another method takes is ignored, so that a grid of methods can share them."""
    statistics: StatisticsConfig | None = None
    """fisher, regmean: the statistics of the models, which are made first; merges share those that are the same."""
    dtype: MergedDtype | None = None
    """Of the merged weights; by default the precision of training."""
    allow_unrelated: bool = False
    """Merge models that do not stem from the base, too."""
    search: Search | None = None
    """search: of which method, and on which development texts: each named as the text of statistics is. Its `seed` is
    added to the pipeline's."""


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """Every subset of some names, from the smallest to the largest."""

    subsets: tuple[str, ...]
    """The names."""
    least: int = 2
    """Names in a subset at least."""
    most: int | None = None
    """At most; all of them by default."""

    @property
    def values(self) -> tuple[str, ...]:
        """Each subset as its names, joined by +."""
        sizes = range(self.least, (self.most or len(self.subsets)) + 1)
        return tuple("+".join(names) for size in sizes for names in itertools.combinations(self.subsets, size))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, or with `each` a grid of them: exactly one of the verbs."""

    train: TrainStage | None = None
    grow: GrowStage | None = None
    merge: MergeStage | None = None
    each: Mapping[str, tuple[str, ...] | Subsets] = field(default_factory=dict)
    """Variables and their values: the stage is repeated for every combination, `{variable}` filled in everywhere. A
    subset is its names joined by +, and in a list an entry a name."""


OWN_TASKS = {"text": "heldout", "corrupt": "pairs", "samples": "samples"}
"""Names of what every pipeline asks its models, by kind; a language's code follows: `heldout-swe`."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How every model is evaluated."""

    stride: int | None = None
    """Tokens between windows; each token is scored once, with at least window - stride tokens before it
    (but at a document's start); by default half of the window."""
    window: int | None = None
    """Tokens in a window; by default the training sequence length."""
    pairs: int = 200
    """Acceptability pairs a language and kind (swap, drop)."""
    resamples: int = 2000
    """Resamples of the bootstrap."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    sample_tokens: int = 40
    """Tokens of each text sample in the report."""
    tasks: Mapping[str, EvalTask] = field(default_factory=dict)
    """Further tasks, asked of every model, as in a file of `growmerge eval` (docs/evaluation.md)."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A bound that the run has to meet: the model must beat a baseline by so many bits per byte."""

    models: tuple[str, ...]
    """Stages; a grid's template such as `{setup}-swe` stands for all of its stages."""
    language: str
    by: float
    """Bits per byte; the whole interval has to lie beyond it."""
    beats: Literal["unigram"] = "unigram"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Which stages answer the paper's questions; `{setup}`, `{language}` and `{method}` are filled in."""

    source_language: str
    """The language of the seed, whose forgetting is measured."""
    languages: tuple[str, ...]
    """The languages adapted to."""
    setups: tuple[str, ...]
    """Names of the setups, the small one first."""
    methods: tuple[MergeMethod, ...] = ()
    """Merge methods compared."""
    seed: str = "seed"
    base: str = "base-{setup}"
    adapted: str = "{setup}-{language}"
    joint: str = "{setup}-joint"
    merged: str = "{setup}-{method}"
    branches: tuple[str, ...] = ()
    """Further models of the adaptations, decayed earlier, and repeats with other seeds: templates with {setup} and
    {language}, other variables with all their values. Compared at equal tokens and at equal FLOPs."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job gets."""

    ranks: int = 2
    """Training processes, one a device."""
    nodes: int = 1
    """Nodes of a cluster that share the ranks evenly."""
    gpus: int = 0
    """GPUs a node, one a rank; 0 computes on the CPU."""
    threads: int | None = None
    """Threads a process; by default the cores divided by the ranks."""
    minutes: int = 60
    """Time limit of a SLURM job."""
    memory_gb: int | None = None
    """Memory limit of a job (GB); none by default."""
    pack: bool = True
    """On this machine: run all stages in one job, which share one group of ranks; otherwise a job a stage."""
    cores: int | None = None
    """On this machine, with pack: false: cores that jobs take at a time; all by default."""
    total_memory_gb: int | None = None
    """On this machine, with pack: false: memory of the jobs at work, by their `memory_gb` (GB); all by default."""
    restarts: int = 3
    """How often a job of a cluster that failed is tried again; being preempted or out of time does not count."""
    lead_seconds: int | None = None
    """Seconds before its time limit, or a preemption, at which a job of a cluster is told to save; by default what the
    cluster's profile says, or 120."""
    profile: str | None = None
    """Name of a cluster's profile (configs/clusters), or its path; see docs/cluster.md."""
    per_job: int = 1
    """On a cluster: merges, and evaluations, that share a job, one after the other."""
    slurm: Mapping[str, str | int] = field(default_factory=dict)
    """Further sbatch options, such as `partition: gpu`."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A whole pipeline file."""

    name: str
    title: str = ""
    """Headline of the report."""
    seed: int = 0
    """Everything random follows from it."""
    corpora: Mapping[str, Corpus]
    """Text by language code (ISO 639-3)."""
    prepared: Prepared | None = None
    """Where the corpora are that have no `sources`."""
    heldout: HeldOut = field(default_factory=HeldOut)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig | None = None
    """Shape of a model trained from scratch."""
    mixtures: Mapping[str, AnyMixture]
    """Training data by name: weights of corpora (`swe`) and splits (`eng.first`), or a long form; see docs/data.md."""
    training: Training = field(default_factory=Training)
    stages: Mapping[str, Stage]
    evaluation: Evaluation = field(default_factory=Evaluation)
    study: Study | None = None
    checks: tuple[Check, ...] = ()
    resources: Resources = field(default_factory=Resources)
