"""What Megatron-LM calls a model's parameters, and which rows of Hugging Face's tensors each is made of.

A parameter of Megatron-Core's GPTModel is one tensor, or several, cut into pieces of rows that lie one below the other:

- `self_attention.linear_qkv` has for each key/value head its query heads, then the key's rows, then the value's.
- `mlp.linear_fc1` of SwiGLU is gate over up, and a tensor-parallel rank has its part of both.
- `embedding.word_embeddings` and `output_layer` end in rows of padding, which no token has.
- A norm is its own module with the local layer spec, and part of the linear layer behind it with Transformer Engine's.

Facts of megatron_core 0.16.1: core/models/gpt/gpt_model.py and gpt_layer_specs.py (modules),
core/transformer/transformer_layer.py and attention.py (their order, and that of rows) and core/transformer/mlp.py.
What Megatron-LM calls a model's sizes: `checkpoint.megatron_arguments`, whose functions are found here too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint.megatron_arguments import arguments_of, config_of
from checkpoint.tensor_parallel import DIMS
from parallel.errors import InputError
from parallel.family import Family
from parallel.rows import Tensor

__all__ = ["Parameter", "Piece", "arguments_of", "config_of", "parameters_of"]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
OUTSIDE = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": HEAD,
}
"""Tensors that are in no layer."""
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
INSIDE = {
    **dict.fromkeys(QKV, "self_attention.linear_qkv"),
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    **dict.fromkeys(GATE_UP, "mlp.linear_fc1"),
    "mlp.down_proj": "mlp.linear_fc2",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}
"""Modules of a layer."""
FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Where Transformer Engine keeps the weight of a layer's norm."""
ORDER = (
    *("input_layernorm.weight", "self_attention.linear_proj.weight", "self_attention.linear_proj.bias"),
    *(f"self_attention.linear_qkv.{leaf}" for leaf in ("layer_norm_weight", "weight", "bias")),
    *("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight", "pre_mlp_layernorm.weight"),
    *(f"mlp.linear_fc1.{leaf}" for leaf in ("layer_norm_weight", "weight", "bias")),
    *("mlp.linear_fc2.weight", "mlp.linear_fc2.bias"),
)
"""Parameters of a layer, of either spec, as its modules are registered."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows [start, stop) of a tensor, by its Hugging Face on-disk name."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of Megatron-Core."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter, over all tensor-parallel ranks, its vocabulary padded."""
    dim: int | None
    """Along which it is cut over the tensor-parallel ranks, into equal parts; None if all ranks have it whole."""
    pieces: tuple[Piece, ...]
    """From the first row to the last; rows of padding at the end are in none."""
    halves: int = 1
    """So many equal parts along dim 0, each of which is cut by itself: gate and up."""
    layer: int | None = None


def parameters_of(
    family: Family, config: Mapping[str, Any], *, padded_vocab: int, fused_norms: bool = False
) -> dict[str, Parameter]:
    """Return every parameter that Megatron-Core has of a model, by its name; a tied head is none.

    They come in the order in which the model registers them, which is the order of an optimizer's parameters.

    Args:
        padded_vocab: rows of the embedding and of the head, at least as many as the vocabulary has tokens.
        fused_norms: whether names are those of Transformer Engine's layer spec, rather than of the local one.

    Raises:
        InputError: Megatron-Core has no module for a tensor of the model.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in family.tensors(config).items():
        if tensor.tied_to is None:
            parts.setdefault(megatron_name(name, fused_norms=fused_norms), []).append(tensor)
    sizes = family.axes(config)
    found = [_parameter(name, tensors, sizes, padded_vocab) for name, tensors in parts.items()]
    return {parameter.name: parameter for parameter in sorted(found, key=_place)}


def megatron_name(name: str, *, fused_norms: bool = False) -> str:
    """Return the name of the parameter that a Hugging Face tensor is in.

    Raises:
        InputError: Megatron-Core has none.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    number, _, inner = name.removeprefix("model.layers.").partition(".")
    module, _, leaf = inner.rpartition(".")
    if module not in INSIDE:
        raise InputError(f"{name}: Megatron-Core's GPT models have no such tensor")
    there = f"{INSIDE[module]}.{leaf}"
    return f"decoder.layers.{number}.{FUSED.get(there, there) if fused_norms else there}"


def _place(parameter: Parameter) -> tuple[int, int, int]:
    """Return what sorts parameters into the order of the model's modules."""
    if parameter.layer is None:
        return (0 if parameter.name == EMBEDDING else 2), 0, 0
    inner = parameter.name.removeprefix(f"decoder.layers.{parameter.layer}.")
    return 1, parameter.layer, ORDER.index(inner)


def _parameter(name: str, tensors: list[Tensor], sizes: Mapping[str, int], padded_vocab: int) -> Parameter:
    """Return a parameter of the tensors that are in it, in the family's order: q, k, v; gate, up."""
    first = tensors[0]
    rows = padded_vocab if first.axes[0] == "vocab" else sum(tensor.shape[0] for tensor in tensors)
    return Parameter(
        name=name,
        shape=(rows, *first.shape[1:]),
        dim=DIMS.get(first.split),
        pieces=tuple(_grouped(tensors, sizes) if first.axes[0] == "q" else _stacked(tensors)),
        halves=len(tensors) if first.axes[0] == "ffn" else 1,
        layer=first.layer,
    )


def _stacked(tensors: list[Tensor]) -> Iterator[Piece]:
    for tensor in tensors:
        yield Piece(tensor=tensor.name, start=0, stop=tensor.shape[0])


def _grouped(tensors: list[Tensor], sizes: Mapping[str, int]) -> Iterator[Piece]:
    """Return q, k and v as they lie for each key/value head, one after the other."""
    groups = sizes["kv"] // sizes["head_dim"]
    for group in range(groups):
        for tensor in tensors:
            rows = tensor.shape[0] // groups
            yield Piece(tensor=tensor.name, start=group * rows, stop=(group + 1) * rows)
