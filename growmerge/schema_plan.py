"""The keys of a file that `growmerge plan` reads, as frozen dataclasses; a docstring is a help text."""

from dataclasses import dataclass

from growmerge.schema import ModelConfig
from growmerge.schema_train import Growth
from parallel.cluster import EFFICIENCY


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a run would have."""

    gpu: str
    """Kind of the GPUs, such as H100: a key of `parallel.gpus.GPUS`."""
    gpus_a_node: int = 8
    nodes: int = 1
    memory_gb: float | None = None
    """Memory of a GPU (GB, 10^9 bytes); by default the kind's."""
    link_gb_s: float | None = None
    """Between GPUs of a node, a GPU, one direction (GB/s); by default the kind's."""
    node_link_gb_s: float | None = None
    """Between nodes, all network cards of a node together, one direction (GB/s); by default 50 a GPU."""
    disk_gb_s: float = 5.0
    """What all nodes together write to the disk (GB/s)."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A file for `growmerge plan`; paths in it are relative to it."""

    model: str | None = None
    """Folder of a model, or its config.json (its weights are not needed), or a name such as llama-70b: a key of
    `parallel.presets.PRESETS`."""
    shape: ModelConfig | None = None
    """Instead of `model`: the shape of a model from scratch."""
    parameters: float | None = None
    """Instead of `model`: a Llama of about so many parameters."""
    vocab_size: int | None = None
    """With `shape`, which needs it, or `parameters` (128256 by default): entries of the tokenizer."""
    grow: Growth | None = None
    """How the model is grown first."""
    cluster: ClusterConfig
    sequence_length: int
    """Tokens in a sample."""
    global_batch: int
    """Sequences a step, over all ranks."""
    tokens: float | None = None
    """Tokens of the whole run; with it hours are printed."""
    zero: int | None = None
    """ZeRO stage; by default all that work are looked at, and so below."""
    tp: int | None = None
    """Tensor-parallel ranks."""
    pp: int | None = None
    """Pipeline stages."""
    sp: int | None = None
    """Sequence-parallel ranks."""
    micro_batch: int | None = None
    """Sequences a data rank and a pass."""
    recompute: bool | None = None
    """Gradient checkpointing."""
    offload: bool | None = None
    """Optimizer state in the CPU's memory."""
    margin: float = 0.08
    """Share of a GPU's memory that stays free: fragments, and what is not modelled."""
    efficiency: float = EFFICIENCY
    """Share of its peak that a GPU sustains while it computes: an assumption."""
