"""What an engine is asked for, as plain data: importing it takes no torch, so that a mistake is told at once."""

from dataclasses import dataclass, field

from parallel.mesh import Mesh

PATIENCE_S = 600.0
"""Seconds that rank 0 waits for the other ranks' shards after its own, and that a save waits for the one before it."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What DeepSpeed is asked for."""

    micro_batch: int
    """Samples a rank and a pass."""
    accumulation: int
    """Passes a step."""
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    precision: str
    """float32 or bfloat16 (compute and stored weights; master copy and gradient sums are float32)."""
    dynamics: str = "free"
    """Which of the factors that growth gave the source's groups are applied, a key of DYNAMICS."""
    decay_embeddings: bool = True
    decay_norms: bool = False
    zero: int = 3
    """ZeRO stage: what is cut over the ranks (1: the optimizer's state, 2: gradients too, 3: weights too)."""
    mesh: Mesh = field(default_factory=Mesh)
    """dp is set from the number of ranks."""
    sequence_length: int | None = None
    """Tokens in a sample; only needed with sequence parallelism."""
    offload: bool = False
    """Keep the optimizer's state, and its step, in the CPU's memory."""
    recompute: bool = False
    """Gradient checkpointing: keep each layer's input alone, and compute the rest again in the backward pass."""
    compile: bool = False
    """torch.compile."""
    kernels: str = "auto"
    """auto: FlashAttention-2 and Liger's kernels where they are installed and CUDA is; torch: only what torch has."""
