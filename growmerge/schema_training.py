"""The keys of how a run trains, as frozen dataclasses: given for all runs, and in a stage where it differs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DecayShape = Literal["linear", "sqrt", "cosine"]
Dynamics = Literal["preserve", "mup", "free"]
Precision = Literal["float32", "bfloat16"]
Kernels = Literal["auto", "torch"]
Documents = Literal["packed", "masked"]
Offload = Literal["none", "cpu", "nvme"]
Saves = Literal["auto", "background", "blocking"]
ScheduleKind = Literal["wsd", "cosine", "constant"]
TrackerKind = Literal["jsonl", "wandb"]


@dataclass(frozen=True, kw_only=True)
class Rewarming:
    """Warming up again within a run, such as where new data begins (arXiv 2403.08763)."""

    at: int
    """Steps taken before it."""
    steps: int
    """Steps until the peak is reached again."""
    start: float = 0.0
    """Factor of the peak rate that it rises from."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a run trains. Given once for all runs, and again in a stage where it differs."""

    steps: int | None = None
    """Optimizer steps; by default what the mixture comes to, where the sizes of its corpora are known beforehand: those
    of the `prepared` folder."""
    sequence_length: int = 2048
    """Tokens in a sample."""
    global_batch: int = 8
    """Samples a step, over all ranks."""
    micro_batch: int | None = None
    """Samples a rank and a pass; by default what one pass a step needs."""
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: ScheduleKind = "wsd"
    """wsd: stable at the peak, then decay; cosine: half a cosine after the warm-up; constant: no decay."""
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: float = 0.2
    """wsd: share of the steps, at the end, in which the rate falls; above 1 whole steps."""
    decay_shape: DecayShape = "linear"
    floor: float = 0.0
    """Factor of the peak rate that wsd and cosine fall towards."""
    rewarm: tuple[Rewarming, ...] = ()
    """Where the rate warms up again; a cosine then falls anew over the steps that are left."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of matrices and, unless said otherwise, embeddings."""
    decay_embeddings: bool = True
    """Whether embeddings are decayed as matrices are."""
    decay_norms: bool = False
    """Whether norms and biases are decayed, too."""
    clip: float = 1.0
    """Gradient norm at which gradients are clipped."""
    dynamics: Dynamics = "free"
    """Which factors of growth a grown model's parameter groups get: all, so that after symmetric growth it trains as
    the small one did (preserve); those of learning rate, weight decay and eps, clipping as usual (mup); none (free)."""
    precision: Precision = "bfloat16"
    """Compute and stored weight dtype; master copy and gradient sums are always float32."""
    documents: Documents = "packed"
    """packed: a sample's tokens see all before them; masked: those of their own document alone, position ids restart,
    and a document's first token is not a target."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept; with two, a damaged one costs the steps since the one before it."""
    keep_every: int | None = None
    """Checkpoints kept for good: those whose step is a multiple of this (to branch off from)."""
    saves: Saves = "auto"
    """background: a save copies the state in the CPU's memory and goes on while it is written; blocking: it waits until
    all is on disk; auto: in the background where a second copy fits into half of the memory that is free."""
    evaluate_every: int = 0
    """Steps between held-out evaluations (0: at the start and the end alone)."""
    alarms: Mapping[str, float | str] = field(default_factory=dict)
    """By language, how far held-out bits per byte may rise above the run's start: `+0.05`, `+5%`; then what happens:
    `+0.05 stop`, `+0.05 branch` (decay from the last checkpoint before it); a warning otherwise."""
    zero: int = 3
    """What DeepSpeed cuts over the ranks: nothing (0, float32 alone), the optimizer's state (1), gradients too (2),
    weights too (3)."""
    tp: int = 1
    """Tensor-parallel ranks (AutoTP), which share each matrix."""
    sp: int = 1
    """Sequence-parallel ranks (Ulysses), which share each sequence."""
    pp: int = 1
    """Pipeline stages; with zero: 1."""
    offload: Offload = "none"
    """cpu: keep the optimizer's state in the CPU's memory, and step there."""
    recompute: bool = False
    """Gradient checkpointing: keep each layer's input alone and compute the rest again in the backward pass."""
    compile: bool = False
    """torch.compile."""
    kernels: Kernels = "auto"
    """auto: on GPUs FlashAttention-2 and Liger's kernels, each where it is installed; torch: only what torch has."""
    skip_sigma: float = 6.0
    """A step whose loss or gradient norm is so many standard deviations above the mean of the last 128 is skipped."""
    stop_after: int = 8
    """Skipped steps in a row after which the run stops, naming the data that it saw."""
    stall_minutes: float = 30.0
    """Without progress for so long, a rank prints the stacks of its threads and ends; 0: never."""
    tracker: TrackerKind = "jsonl"
    """Where the log goes beside JSON lines: wandb."""
