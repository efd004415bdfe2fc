"""The time of a training step: computing, what the ranks tell one another, and waiting in a pipeline. Modelled.

A pure function of a model's config, of how it is trained and on what; each assumption is a constant with its reason.

Letters: n ranks of a group, P elements on a rank before ZeRO cuts them, D hidden, V vocab.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from parallel.cluster import Cluster, latency, rate_of, ring
from parallel.families import family_of
from parallel.planner import ALL_REDUCE, PREFETCH, REUSE, Memory
from parallel.sizes import Setup, Sizes

OVERLAP = 0.7
"""ZeRO-3 gathers and reduces beside computing: what is longer than this share of it, training waits for."""
HOST_S, HOOKS_S, AGAIN = 1.5e-3, 4.1e-3, 1.9
"""What the host's process takes a layer and a pass to start its kernels (about 110 a layer); with ZeRO-3 DeepSpeed's
hooks besides; and how much more that is with recompute. Measured on a core of a server's CPU, where nothing else took
time. A GPU that computes faster waits for it."""
HOST_LINK_GB_S = 25.0
"""Between a GPU and its host's memory (PCIe 4.0 x16: 32)."""
HOST_MEMORY_GB_S = 20.0
"""Of the host's memory, for one GPU's share of offloaded Adam."""
UPDATE_BYTES = 34
"""What AdamW moves of memory an element: gradient, master weight and moments read, the latter three written, weight."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Where a step's seconds go; the parts add up to the step."""

    compute: float
    """Forward and backward, recomputing included; or what the host takes to start all that, if it is more."""
    gather: float
    """Of all-gathers of weights what training waits for."""
    reduce: float
    """Of reductions of gradients what training waits for."""
    tensor: float
    """All-reduces of tensor parallelism."""
    sequence: float
    """All-to-alls of sequence parallelism."""
    bubble: float
    """Waiting for the pipeline to fill and to drain, and handing on."""
    update: float
    """AdamW; offloaded, with what travels to the host and back."""

    @property
    def seconds(self) -> float:
        return sum(vars(self).values())


def flops_per_token(config: Mapping[str, Any], sequence_length: int) -> float:
    """Return the FLOPs of a token's forward and backward pass: 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

    N counts the parameters that a token is multiplied with: the head is among them, also where it is the embedding, and
    the look-up in the embedding is not; of experts those that it is sent to. L layers, H heads of size Q, T the tokens
    that attention spans: the sequence, or in a layer with a sliding window no more than the window. As in the paper no
    half is taken off for the causal mask, and what recomputing activations costs is not counted.
    """
    family = family_of(config)
    tensors = family.tensors(config).values()
    multiplied = sum(prod(tensor.shape) for tensor in tensors if tensor.kind != "embedding") - family.idle(config)
    spans = sum(min(sequence_length, window or sequence_length) for window in _windows(config))
    return 6.0 * multiplied + 12.0 * family.axes(config)["q"] * spans


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """Return each layer's sliding window (tokens), None where it attends to all."""
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    # Mistral and Mixtral have one without naming their layers' kinds; Qwen's configs hold windows that are not used.
    return [window if family_of(config).name in ("mistral", "mixtral") else None] * layers


def step_time(sizes: Sizes, setup: Setup, memory: Memory, cluster: Cluster, flops_a_token: float) -> StepTime:
    """Return the seconds of a step by part.

    Args:
        sizes: of the model on one tensor-parallel rank.
        memory: of the rank, for its elements.
        flops_a_token: `flops_per_token` of the whole model.
    """
    passes, mesh = setup.accumulation, setup.mesh
    a_pass = _pass_seconds(sizes, setup, cluster, flops_a_token)
    tensor = passes * _tensor(sizes, setup, cluster)
    sequence = passes * _sequence(sizes, setup, cluster)
    gather, reduce = _zero(sizes, setup, memory, cluster)
    compute = passes * a_pass
    if setup.zero == 3:
        # Both run beside computing; what is left over is shared out between them.
        left = max(0.0, 1 - OVERLAP * compute / (gather + reduce)) if gather + reduce else 0.0
        gather, reduce = gather * left, reduce * left
    # (p - 1) / (m + p - 1) of the step is bubble (arXiv 2104.04473, section 2.2): p - 1 passes more.
    bubble = (mesh.pp - 1) * a_pass
    if mesh.pp > 1:
        stride = cluster.gpus // mesh.pp
        size = setup.width * setup.tokens * sizes.hidden
        hand_on = size / rate_of(cluster, 2, stride) + latency(cluster, 2, stride)
        bubble += 2 * (passes + mesh.pp - 1) * hand_on
    share = -(-memory.elements // setup.shards) if setup.zero else memory.elements
    return StepTime(
        compute=compute,
        gather=gather,
        reduce=reduce,
        tensor=tensor,
        sequence=sequence,
        bubble=bubble,
        update=_update(share, setup, cluster),
    )


def _pass_seconds(sizes: Sizes, setup: Setup, cluster: Cluster, flops_a_token: float) -> float:
    """Return the computing of one pass on the rank with most of it.

    A pipeline's stages have as many layers as the fullest, and the last has the head; a tied head is whole on every
    tensor-parallel rank. Recomputing is one more forward pass of the layers.
    """
    mesh = setup.mesh
    head = 6.0 * sizes.vocab * sizes.hidden
    layers = flops_a_token - head
    layers *= (4 / 3 if setup.recompute else 1.0) * -(-sizes.layers // mesh.pp) / sizes.layers
    head /= 1 if sizes.tied else mesh.tp
    flops = setup.tokens * (layers / mesh.tp + head)
    host = HOST_S + (HOOKS_S if setup.zero == 3 else 0.0)
    host *= (AGAIN if setup.recompute else 1.0) * -(-sizes.layers // mesh.pp)
    return max(flops / (cluster.gpu.flops * cluster.efficiency), host)


def _zero(sizes: Sizes, setup: Setup, memory: Memory, cluster: Cluster) -> tuple[float, float]:
    """Return the seconds a step that ZeRO gathers weights and reduces gradients.

    Stage 3 gathers forward and backward, all but what it kept from one to the other, and reduce-scatters, each pass.
    Stage 2 all-reduces buckets each pass, stage 1 once a step (DeepSpeed 0.19.8 does not reduce-scatter there); both
    gather weights after the step. Stage 0 reduces.
    """
    ranks, stride = setup.shards, setup.mesh.tp
    if ranks == 1:
        return 0.0, 0.0
    rate, start = rate_of(cluster, ranks, stride), latency(cluster, ranks, stride)
    elements, passes = memory.elements, setup.accumulation
    at_once = ALL_REDUCE if setup.zero == 1 and setup.width == 2 else setup.bucket
    reduce = ring(setup.reduced * elements, ranks, rate) + _sent(sizes, elements, at_once) * start
    if setup.zero < 3:
        gather = ring(setup.width * elements, ranks, rate) + -(-elements // ALL_REDUCE) * start
        return (gather if setup.zero else 0.0), (passes if setup.zero == 2 else 1) * 2 * reduce
    apart = min(elements, sizes.layers * sizes.layer_apart + sizes.embedding + sizes.head)
    again = max(0, apart - REUSE // 2)
    gather = sum(
        ring(setup.width * part, ranks, rate) + _sent(sizes, part, PREFETCH) * start for part in (apart, again)
    )
    small = ring(setup.width * (elements - apart), ranks, rate) + start
    return passes * gather + small, passes * reduce


def _sent(sizes: Sizes, elements: int, at_once: int) -> int:
    """Return in how many collectives elements go, of so many at once: a tensor that is larger goes alone."""
    return -(-elements // max(at_once, sizes.layer // len(sizes.layer_tensors)))


def _tensor(sizes: Sizes, setup: Setup, cluster: Cluster) -> float:
    """Return the seconds a pass of tensor parallelism: all-reduces of the hidden states (arXiv 1909.08053, section 3).

    Two a layer forward, two more where that is done again; backward one for each matrix cut by columns: AutoTP reduces
    the gradients of the same input one by one. A head of its own has its logits gathered, and is one more such matrix.
    """
    ranks = setup.mesh.tp
    if ranks == 1:
        return 0.0
    rate, start = rate_of(cluster, ranks, 1), latency(cluster, ranks, 1)
    hidden = 2 * (ring(setup.width * setup.tokens * sizes.hidden, ranks, rate) + start)
    logits = 0.0 if sizes.tied else ring(setup.width * setup.tokens * sizes.vocab, ranks, rate) + start + hidden
    return sizes.layers * ((4 if setup.recompute else 2) + sizes.columns) * hidden + logits


def _sequence(sizes: Sizes, setup: Setup, cluster: Cluster) -> float:
    """Return the seconds a pass of Ulysses: an all-to-all each of queries, keys, values and what attention gives, a
    layer (arXiv 2309.14509, section 3.1), forward and backward, and again where the forward pass is."""
    ranks = setup.mesh.sp
    if ranks == 1:
        return 0.0
    rate, start = rate_of(cluster, ranks, 1), latency(cluster, ranks, 1)
    key = max(sizes.key, sizes.query // sizes.heads * ranks)  # fewer heads than ranks are repeated
    size = setup.width * setup.tokens * (2 * sizes.query + 2 * key)
    return sizes.layers * (3 if setup.recompute else 2) * (ring(size, ranks, rate) + 4 * start)


def _update(share: int, setup: Setup, cluster: Cluster) -> float:
    """Return the seconds of AdamW on so many elements, which memory bounds; offloaded they travel, too.

    ZeRO-3 has the sums of gradients with the host: each pass after the first fetches them and brings them back.
    """
    if not setup.offload:
        return UPDATE_BYTES * share / (cluster.gpu.memory_gb_s * 1e9)
    sums = 8 * (setup.accumulation - 1) if setup.zero == 3 else 0
    moved = (4 + setup.width + sums) * share / (HOST_LINK_GB_S * 1e9)
    return moved + UPDATE_BYTES * share / (HOST_MEMORY_GB_S * 1e9)


def save_seconds(memory: Memory, cluster: Cluster, total: int) -> tuple[float, float]:
    """Return (seconds that training waits for a save, seconds until all is written).

    Args:
        total: bytes of the checkpoint.
    """
    return memory.host["checkpoint buffers"] / (HOST_LINK_GB_S * 1e9), total / (cluster.disk_gb_s * 1e9)
