"""The keys of a file that `growmerge train` reads, as frozen dataclasses; a docstring is a help text."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from growmerge.schema import GrownOptimizer, GrowthMethod, ModelConfig, Resources
from growmerge.schema_mixture import AnyMixture
from growmerge.schema_training import Training


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How the model is grown before it is trained; what each key means: `GrowStage` of a pipeline file."""

    width: int = 1
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    to_hidden: int | None = None
    to_heads: int | None = None
    to_kv_heads: int | None = None
    to_ffn: int | None = None
    to_head_dim: int | None = None
    depth: str | None = None
    layers: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    method: GrowthMethod = "exact-split"
    noise_db: float | None = None
    optimizer: GrownOptimizer = "reset"
    """What this run has of Adam's state of the model that is grown: none, scaled, or scaled in the first copy alone."""


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """What a run is trained on: token files, and how they are mixed."""

    folder: str
    """Where `growmerge data prepare` put the token files (or Megatron's tools theirs)."""
    mixture: str
    """Name of one of `mixtures`."""
    heldout: tuple[str, ...] | None = None
    """Languages whose held-out text is scored; by default those of the mixture and of the alarms that have some."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A decay branch: goes on from a checkpoint of another run's stable phase, and decays to `training.steps`."""

    run: str
    """Folder of the run."""
    step: int
    """Step of the checkpoint; the run has to have kept it (`keep_every`)."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How held-out text is scored."""

    window: int | None = None
    """Tokens in a window; by default the training sequence length."""
    stride: int | None = None
    """Tokens between windows; by default half of the window."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A file for `growmerge train`; paths in it are relative to it."""

    name: str
    """Of the run; its folder is runs/<name> unless --workdir says another."""
    seed: int = 0
    """Order of samples, dropout, and a model from scratch follow from it."""
    model: str | None = None
    """Checkpoint to start from, of any format and topology."""
    shape: ModelConfig | None = None
    """Instead of `model`: the shape of a model from scratch."""
    grow: Growth | None = None
    """How the model is grown first; nothing is written between."""
    keep_optimizer: bool = False
    """Whether Adam's state of the checkpoint goes on; the run's own steps and schedule begin at 0 all the same."""
    branch: Branch | None = None
    """Instead of `model`: a decay branch of another run."""
    tokenizer: str | None = None
    """Folder of the tokenizer that the text was prepared with; by default the model's."""
    data: TrainData
    mixtures: Mapping[str, AnyMixture]
    """Training data by name; see docs/data.md."""
    training: Training
    evaluation: Windows = field(default_factory=Windows)
    resources: Resources = field(default_factory=Resources)
    """What runs it here: ranks, threads, GPUs. Under torchrun or srun the ranks are those that were started."""
