"""Rows of the tables that families are: which tensors a model has, what each axis means, and how each is split.

Axes: vocab (V), hidden (D), q (H * head_dim), kv (K * head_dim), ffn (F), head_dim; and of what a family keeps in one
matrix those joined, such as q+kv+kv, or qkv (each head's queries, keys and values one behind the other).
Mixtures of experts also have experts (E; ffn is then the width of one), shared_ffn (of the expert that sees all
tokens) and one (1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["embedding", "matrix", "norm", "post_norm", "final_norm", "head", "bias", "norm_bias"]
"""A post_norm acts on what a sublayer adds to the residual stream, a norm on what it reads; a LayerNorm's bias is a
norm_bias."""
NORMS: tuple[Kind, ...] = ("norm", "post_norm", "final_norm")
JOINED = "+"
"""In the name of an axis that is several."""
Split = Literal["column", "row", "vocab", "none"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a family's table."""

    name: str
    """In the running model, and on disk but for `Family.spelled`; `{layer}` stands for the layer's number."""
    axes: tuple[str, ...]
    """What each dim is, outermost first; for a matrix (output, input), as torch.nn.Linear stores it."""
    kind: Kind
    split: Split
    """Tensor-parallel cut (Megatron's terms): column cuts dim 0, row cuts dim 1, vocab cuts dim 0 of the embedding."""
    when: str | None = None
    """The row exists only if this config key is true."""
    unsaid: bool = False
    """What a config without that key means."""

    def exists(self, config: Mapping[str, Any]) -> bool:
        return self.when is None or bool(config.get(self.when, self.unsaid))

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of a concrete model: a Row with its layer filled in and its shape known."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: Kind
    split: Split
    layer: int | None
    tied_to: str | None
    """The name whose storage this one shares, if it is an alias."""

    @property
    def makes(self) -> str:
        """The axis of what the tensor makes or changes: its rows', also where each expert has a matrix."""
        return self.axes[max(0, len(self.axes) - 2)]


LAYER = "model.layers.{layer}."
"""What the names of a layer's tensors begin with, in most families."""


def linear(
    name: str, axes: tuple[str, str], split: Split, *, bias: str | bool = False, kind: Kind = "matrix"
) -> tuple[Row, ...]:
    """Return the rows of a layer's Linear: its weight and, if the config key `bias` is true (or always), its bias."""
    rows = [Row(name=f"{LAYER}{name}.weight", axes=axes, kind=kind, split=split)]
    if bias:
        # A row-parallel bias is added once, after the sum over ranks.
        cut: Split = "column" if split == "column" else "none"
        when = bias if isinstance(bias, str) else None
        rows.append(Row(name=f"{LAYER}{name}.bias", axes=axes[:1], kind="bias", split=cut, when=when))
    return tuple(rows)


def norms(*names: str, axis: str = "hidden", kind: Kind = "norm") -> tuple[Row, ...]:
    """Return the rows of a layer's norms, whose weights are as long as `axis`."""
    return tuple(Row(name=f"{LAYER}{name}.weight", axes=(axis,), kind=kind, split="none") for name in names)


def attention(*, qkv_bias: str | bool = False, o_bias: str | bool = False) -> tuple[Row, ...]:
    """Return the rows of a layer's attention with a Linear each for queries, keys, values and output."""
    return (
        *linear("self_attn.q_proj", ("q", "hidden"), "column", bias=qkv_bias),
        *linear("self_attn.k_proj", ("kv", "hidden"), "column", bias=qkv_bias),
        *linear("self_attn.v_proj", ("kv", "hidden"), "column", bias=qkv_bias),
        *linear("self_attn.o_proj", ("hidden", "q"), "row", bias=o_bias),
    )


def mlp(bias: str | bool = False) -> tuple[Row, ...]:
    """Return the rows of a layer's gated MLP."""
    return (
        *linear("mlp.gate_proj", ("ffn", "hidden"), "column", bias=bias),
        *linear("mlp.up_proj", ("ffn", "hidden"), "column", bias=bias),
        *linear("mlp.down_proj", ("hidden", "ffn"), "row", bias=bias),
    )


def model(*layer: Row) -> tuple[Row, ...]:
    """Return the rows of a model from those of a layer: the embedding before them, last norm and head behind."""
    return (
        Row(name="model.embed_tokens.weight", axes=("vocab", "hidden"), kind="embedding", split="vocab"),
        *layer,
        Row(name="model.norm.weight", axes=("hidden",), kind="final_norm", split="none"),
        Row(name="lm_head.weight", axes=("vocab", "hidden"), kind="head", split="vocab"),
    )
