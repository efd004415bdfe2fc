"""Model families as tables: which tensors a model has, what each axis means, and how each is split.

One table a family drives the files (names and shapes), growth (which axis grows by which factor) and tensor
parallelism (which dim is cut). A family is data: `docs/adding-a-family.md` says how to write one.

Axes: vocab (V), hidden (D), q (H * head_dim), kv (K * head_dim), ffn (F), head_dim; and of what a family keeps in one
matrix those joined, such as q+kv+kv.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from parallel.errors import InputError, one_of

Kind = Literal["embedding", "matrix", "norm", "post_norm", "final_norm", "head", "bias"]
"""A post_norm acts on what a sublayer adds to the residual stream, a norm on what it reads."""
NORMS: tuple[Kind, ...] = ("norm", "post_norm", "final_norm")
JOINED = "+"
"""In the name of an axis that is several."""
Split = Literal["column", "row", "vocab", "none"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a family's table."""

    name: str
    """Hugging Face on-disk name; `{layer}` stands for the layer's number."""
    axes: tuple[str, ...]
    """What each dim is, outermost first; for a matrix (output, input), as torch.nn.Linear stores it."""
    kind: Kind
    split: Split
    """Tensor-parallel cut (Megatron's terms): column cuts dim 0, row cuts dim 1, vocab cuts dim 0 of the embedding."""
    when: str | None = None
    """The row exists only if this config key is true."""

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


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models that share one table."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` values of Hugging Face configs that this table describes."""
    rows: tuple[Row, ...]
    tied: Mapping[str, str]
    """alias -> owner, when `tie_word_embeddings` is set."""
    tied_by_default: bool = False
    """What a config without `tie_word_embeddings` means."""
    head_dim: int | None = None
    """What a config without `head_dim` means; hidden_size / num_attention_heads if None."""
    logits_divisor: str | None = None
    """The config key, if there is one, by which the model divides its logits."""
    attention_scale: str | None = None
    """The config key, if there is one, that says what attention is scaled by; 1 / sqrt(head_dim) if None."""
    norm_eps: float = 1e-6
    """What a config without `rms_norm_eps` means."""
    norm_offset: float = 0.0
    """Norms multiply by this plus their weight."""
    scaled_embeddings: bool = False
    """The model multiplies its embeddings by sqrt(hidden_size)."""
    whole_heads: bool = False
    """transformers refuses a hidden size that is no multiple of the number of query heads."""

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return any(row.kind in NORMS and row.axes != ("hidden",) for row in self.rows)

    @property
    def uncut(self) -> str | None:
        """Why the model cannot be cut over tensor-parallel ranks; None if it can."""
        if self.norms_all_heads:
            return "norms all heads together, and a rank has some of them"
        return "has queries, keys and values in one matrix, whose rows are cut in order" if self.joined else None

    @property
    def norms_all_heads(self) -> bool:
        """Whether such a norm takes its mean over all heads."""
        return any(row.kind in NORMS and row.axes[0] in ("q", "kv") for row in self.rows)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Return whether the head is the embedding."""
        return bool(config.get("tie_word_embeddings", self.tied_by_default))

    def axes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Return the size of each axis (elements) for a Hugging Face config."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or self.head_dim or config["hidden_size"] // heads
        sizes = {
            "vocab": config["vocab_size"],
            "hidden": config["hidden_size"],
            "q": heads * head_dim,
            "kv": (config.get("num_key_value_heads") or heads) * head_dim,
            "ffn": config["intermediate_size"],
            "head_dim": head_dim,
        }
        return sizes | {axis: sum(sizes[part] for part in axis.split(JOINED)) for axis in self.joined}

    @cached_property
    def joined(self) -> tuple[str, ...]:
        """Axes that are several, one behind the other."""
        return tuple(dict.fromkeys(axis for row in self.rows for axis in row.axes if JOINED in axis))

    def tensors(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return every tensor of the model by on-disk name, in the order of the running model; aliases are listed."""
        sizes, tied = self.axes(config), self.is_tied(config)
        conditions = tuple(bool(config.get(row.when)) for row in self.rows if row.when is not None)
        key = (tuple(sizes.values()), tied, config["num_hidden_layers"], conditions)
        if key not in self._known:
            self._known[key] = self._tensors(config, sizes, self.tied if tied else {})
        return {**self._known[key]}

    @cached_property
    def _known(self) -> dict[Any, dict[str, Tensor]]:
        """Tensors of models that were asked for: the hundred merges of a sweep ask hundreds of times."""
        return {}

    def _tensors(
        self, config: Mapping[str, Any], sizes: Mapping[str, int], aliases: Mapping[str, str]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, row, layer in self._names(config):
            shape = tuple(sizes[axis] for axis in row.axes)
            found[name] = Tensor(
                name=name,
                shape=shape,
                axes=row.axes,
                kind=row.kind,
                split=row.split,
                layer=layer,
                tied_to=aliases.get(name),
            )
        return found

    def in_layer(self, tensor: Tensor, layer: int) -> str:
        """Return the name of the tensor of another layer that corresponds to a layer's tensor."""
        rows = (row for row in self.rows if row.per_layer)
        return next(row.name.format(layer=layer) for row in rows if row.name.format(layer=tensor.layer) == tensor.name)

    def _names(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Row, int | None]]:
        rows = [row for row in self.rows if row.when is None or config.get(row.when)]
        first = next(i for i, row in enumerate(rows) if row.per_layer)
        last = max(i for i, row in enumerate(rows) if row.per_layer)
        for row in rows[:first]:
            yield row.name, row, None
        for layer in range(config["num_hidden_layers"]):
            for row in rows[first : last + 1]:
                yield row.name.format(layer=layer), row, layer
        for row in rows[last + 1 :]:
            yield row.name, row, None

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Return the number of parameters, a tied tensor counted once."""
        total = 0
        for tensor in self.tensors(config).values():
            if tensor.tied_to is None:
                count = 1
                for size in tensor.shape:
                    count *= size
                total += count
        return total


_LAYER = "model.layers.{layer}."


def _linear(
    name: str, axes: tuple[str, str], split: Split, *, bias: str | bool = False, kind: Kind = "matrix"
) -> tuple[Row, ...]:
    """Return the rows of a layer's Linear: its weight and, if the config key `bias` is true (or always), its bias."""
    rows = [Row(name=f"{_LAYER}{name}.weight", axes=axes, kind=kind, split=split)]
    if bias:
        # A row-parallel bias is added once, after the sum over ranks.
        cut: Split = "column" if split == "column" else "none"
        when = bias if isinstance(bias, str) else None
        rows.append(Row(name=f"{_LAYER}{name}.bias", axes=axes[:1], kind="bias", split=cut, when=when))
    return tuple(rows)


def _norms(*names: str, axis: str = "hidden", kind: Kind = "norm") -> tuple[Row, ...]:
    return tuple(Row(name=f"{_LAYER}{name}.weight", axes=(axis,), kind=kind, split="none") for name in names)


def _attention(*, qkv_bias: str | bool = False, o_bias: str | bool = False) -> tuple[Row, ...]:
    return (
        *_linear("self_attn.q_proj", ("q", "hidden"), "column", bias=qkv_bias),
        *_linear("self_attn.k_proj", ("kv", "hidden"), "column", bias=qkv_bias),
        *_linear("self_attn.v_proj", ("kv", "hidden"), "column", bias=qkv_bias),
        *_linear("self_attn.o_proj", ("hidden", "q"), "row", bias=o_bias),
    )


def _mlp(bias: str | bool = False) -> tuple[Row, ...]:
    return (
        *_linear("mlp.gate_proj", ("ffn", "hidden"), "column", bias=bias),
        *_linear("mlp.up_proj", ("ffn", "hidden"), "column", bias=bias),
        *_linear("mlp.down_proj", ("hidden", "ffn"), "row", bias=bias),
    )


def _model(*layer: Row) -> tuple[Row, ...]:
    return (
        Row(name="model.embed_tokens.weight", axes=("vocab", "hidden"), kind="embedding", split="vocab"),
        *layer,
        Row(name="model.norm.weight", axes=("hidden",), kind="final_norm", split="none"),
        Row(name="lm_head.weight", axes=("vocab", "hidden"), kind="head", split="vocab"),
    )


_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_TWO_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_OPTIONAL_BIAS = _attention(qkv_bias="attention_bias", o_bias="attention_bias")
_HEAD_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", axis="head_dim")

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    rows=_model(*_OPTIONAL_BIAS, *_mlp("mlp_bias"), *_TWO_NORMS),
    tied=_TIED,
    whole_heads=True,
)
MISTRAL = Family(name="mistral", model_types=("mistral",), rows=_model(*_attention(), *_mlp(), *_TWO_NORMS), tied=_TIED)
QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    rows=_model(*_attention(qkv_bias=True), *_mlp(), *_TWO_NORMS),
    tied=_TIED,
)
QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    rows=_model(*_OPTIONAL_BIAS, *_HEAD_NORMS, *_mlp(), *_TWO_NORMS),
    tied=_TIED,
    head_dim=128,
)
GRANITE = Family(
    name="granite",
    model_types=("granite",),
    rows=_model(*_OPTIONAL_BIAS, *_mlp("mlp_bias"), *_TWO_NORMS),
    tied=_TIED,
    logits_divisor="logits_scaling",
    attention_scale="attention_multiplier",
)

_FOUR_NORMS = (
    *_norms("input_layernorm"),
    *_norms("post_attention_layernorm", kind="post_norm"),
    *_norms("pre_feedforward_layernorm"),
    *_norms("post_feedforward_layernorm", kind="post_norm"),
)
GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    rows=_model(*_OPTIONAL_BIAS, *_mlp(), *_FOUR_NORMS),
    tied=_TIED,
    tied_by_default=True,
    head_dim=256,
    attention_scale="query_pre_attn_scalar",
    norm_offset=1.0,
    scaled_embeddings=True,
    whole_heads=True,
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    rows=_model(*_OPTIONAL_BIAS, *_HEAD_NORMS, *_mlp(), *_FOUR_NORMS),
)

OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    rows=_model(
        *_attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *_norms("self_attn.q_norm", axis="q"),
        *_norms("self_attn.k_norm", axis="kv"),
        *_mlp(),
        *_norms("post_attention_layernorm", "post_feedforward_layernorm", kind="post_norm"),
    ),
    tied=_TIED,
    norm_eps=1e-5,
)

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    rows=_model(
        *_linear("self_attn.qkv_proj", ("q+kv+kv", "hidden"), "column"),
        *_linear("self_attn.o_proj", ("hidden", "q"), "row"),
        *_linear("mlp.gate_up_proj", ("ffn+ffn", "hidden"), "column"),
        *_linear("mlp.down_proj", ("hidden", "ffn"), "row"),
        *_TWO_NORMS,
    ),
    tied=_TIED,
    norm_eps=1e-5,
)

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE, GEMMA2, GEMMA3, OLMO2, PHI3)
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family whose table describes a Hugging Face config.

    Raises:
        InputError: no family knows the config's `model_type`.
    """
    by_type = {kind: family for family in FAMILIES.values() for kind in family.model_types}
    model_type = config.get("model_type")
    if model_type not in by_type:
        raise InputError(one_of("model_type", model_type, by_type))
    return by_type[model_type]
