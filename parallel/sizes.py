"""How a model is trained, and what of it a tensor-parallel rank has: what the planner's memory and time start from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from parallel.families import family_of
from parallel.mesh import Mesh
from parallel.rows import NORMS

PERSISTENT = 10**6
"""ZeRO-3 leaves tensors of up to so many elements whole on every rank; as `train.engine.PERSISTENT`."""
BUCKET = 5 * 10**7
"""Elements of the buffer that gradients are reduced from; as `train.engine.BUCKET`."""
CHUNK = 2**28
"""Bytes of the logits in float32 that are computed at once, where more than two such chunks are needed."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained."""

    zero: int
    mesh: Mesh
    micro_batch: int
    """Sequences a data rank and a pass."""
    accumulation: int
    """Passes a step."""
    sequence_length: int
    precision: str = "bfloat16"
    recompute: bool = False
    """Gradient checkpointing of whole layers."""
    offload: bool = False
    """Optimizer state, and its step, in the CPU's memory."""
    cuda: bool = True
    """Whether it runs on a GPU, of whose memory CUDA itself takes some."""
    bucket: int = BUCKET

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def reduced(self) -> int:
        """Bytes of a gradient's number as ranks send it: DeepSpeed takes float32 beside sequence parallelism."""
        return 4 if self.mesh.sp > 1 else self.width

    @property
    def shards(self) -> int:
        """Ranks that ZeRO cuts over: those of a sequence as well."""
        return self.mesh.dp * self.mesh.sp

    @property
    def tokens(self) -> int:
        """Tokens a rank and a pass."""
        return self.micro_batch * self.sequence_length // self.mesh.sp


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Elements of a model on one tensor-parallel rank; all its layers are alike."""

    layers: int
    hidden: int
    heads: int
    query: int
    key: int
    ffn: int
    """Of experts: of all that a token is sent to."""
    vocab: int
    tied: bool
    embedding: int
    """Not cut: see `train.build.partition_config`."""
    head: int
    """Of its own; 0 where it is the embedding."""
    final: int
    """The norm before the head."""
    layer_tensors: tuple[int, ...]
    """Of each tensor of a layer."""
    columns: int
    """A layer's matrices that tensor parallelism cuts by columns."""
    norms: int
    """Norms of the hidden states, a layer."""
    head_norms: bool
    """Whether queries and keys are normed."""

    @cached_property
    def layer(self) -> int:
        return sum(self.layer_tensors)

    @cached_property
    def layer_apart(self) -> int:
        """Of a layer's tensors, those that ZeRO-3 gathers for each use."""
        return sum(count for count in self.layer_tensors if count > PERSISTENT)

    @cached_property
    def layer_largest(self) -> int:
        return max(self.layer_tensors)

    @cached_property
    def largest(self) -> int:
        """The largest tensor of all."""
        return max(self.layer_largest, self.embedding, self.head)

    @property
    def whole(self) -> int:
        """Elements of the whole model on this rank."""
        return self.embedding + self.layers * self.layer + self.final + self.head


def sizes_of(config: Mapping[str, Any], tp: int = 1) -> Sizes:
    """Return the sizes of a Hugging Face config's model on a rank of so many tensor-parallel ones."""
    family = family_of(config)
    table = family.tensors({**config, "num_hidden_layers": 1}).values()
    axes = family.axes(config)
    counts = {"embedding": 0, "final_norm": 0, "head": 0}
    layer: list[int] = []
    columns = norms = 0
    for tensor in table:
        if tensor.tied_to is not None:
            continue
        cut = tensor.split in ("column", "row") or tensor.kind == "head"
        count = -(-prod(tensor.shape) // tp) if cut else prod(tensor.shape)
        if tensor.layer is None:
            counts["final_norm" if tensor.kind == "norm_bias" else tensor.kind] += count
            continue
        layer.append(count)
        columns += tensor.kind == "matrix" and tensor.split == "column"
        if tensor.kind in NORMS:
            norms += tensor.axes == ("hidden",)
    return Sizes(
        layers=config["num_hidden_layers"],
        hidden=axes["hidden"],
        heads=-(-axes["q"] // axes["head_dim"] // tp),
        query=-(-axes["q"] // tp),
        key=-(-axes["kv"] // tp),
        ffn=-(-family.active_ffn(config) // tp),
        vocab=axes["vocab"],
        tied=family.is_tied(config),
        embedding=counts["embedding"],
        head=counts["head"],
        final=counts["final_norm"],
        layer_tensors=tuple(layer),
        columns=columns,
        norms=norms,
        head_norms=family.head_norms,
    )


def layer_activations(sizes: Sizes, width: int, *, sequence_parallel: bool = False) -> int:
    """Return the bytes a token that a layer keeps for its backward pass.

    After Korthikanti et al. (arXiv 2205.05198, section 4.1), for SwiGLU, grouped queries, flash attention and norms in
    float32 as transformers computes them: of the MLP gate, up, act(gate) and their product; of attention queries, keys,
    values, what comes out, and a float32 log-sum a head; of each norm its input in float32, that normed, and that
    times the weight. What tensor parallelism does not cut is whole on each rank. Ulysses' all-to-all makes a copy of
    what attention gives.
    """
    queries = 3 if sequence_parallel else 2
    attention = width * (queries * sizes.query + 2 * sizes.key) + 4 * sizes.heads
    norms = sizes.norms * sizes.hidden * (4 + 2 * width)
    if sizes.head_norms:
        norms += (sizes.query + sizes.key) * (4 + 2 * width)
    return width * 4 * sizes.ffn + attention + norms


def tokens_a_chunk(vocab: int, tokens: int) -> int:
    """Return of how many of a pass' tokens the logits are computed at once."""
    return tokens if 4 * vocab * tokens <= 2 * CHUNK else max(1, CHUNK // (4 * vocab))
