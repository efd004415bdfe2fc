"""Model families as tables: which tensors a model has, what each axis means, and how each is split.

One table a family drives the files (names and shapes), growth (which axis grows by which factor) and tensor
parallelism (which dim is cut). A family is data: `docs/adding-a-family.md` says how to write one.

Axes: vocab (V), hidden (D), q (H * head_dim), kv (K * head_dim), ffn (F), head_dim; and of what a family keeps in one
matrix those joined, such as q+kv+kv, or qkv (each head's queries, keys and values one behind the other).
Mixtures of experts also have experts (E; ffn is then the width of one), shared_ffn (of the expert that sees all
tokens) and one (1).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from parallel.errors import InputError, one_of

Kind = Literal["embedding", "matrix", "norm", "post_norm", "final_norm", "head", "bias", "norm_bias"]
"""A post_norm acts on what a sublayer adds to the residual stream, a norm on what it reads; a LayerNorm's bias is a
norm_bias."""
NORMS: tuple[Kind, ...] = ("norm", "post_norm", "final_norm")
JOINED = "+"
"""In the name of an axis that is several."""
PER_TOKEN = "num_experts_per_tok"
"""The config key that says to how many experts a token is sent."""
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
    plain_heads: bool = False
    """Each head has keys and values of its own and is hidden_size / num_attention_heads wide, whatever configs say."""
    widths: Mapping[str, str] = field(default_factory=lambda: {"ffn": "intermediate_size"})
    """Feed-forward axis -> the config key that says its size."""
    experts: tuple[str, ...] = ()
    """Config keys that say how many experts a layer has: the first that is there counts, the last is the usual one."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config key -> the values with which the table holds, or no value at all."""
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of rows that Hugging Face files spell otherwise than the running model, whose names the table has -> names
    there; with `{expert}` one a matrix of each expert, and several stand one below the other (`checkpoint.experts`)."""

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return any(row.kind in NORMS and row.axes != ("hidden",) for row in self.rows)

    @property
    def uncut(self) -> str | None:
        """Why the model cannot be cut over tensor-parallel ranks; None if it can."""
        if self.experts:
            return "has experts, all of a layer in one tensor, which is not cut within each of them"
        if self.norms_all_heads:
            return "norms all heads together, and a rank has some of them"
        fused = self.joined or self.plain_heads
        return "has queries, keys and values in one matrix, which is not cut between heads" if fused else None

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
        kv_heads = config.get("num_key_value_heads") or heads
        if self.plain_heads:
            head_dim, kv_heads = config["hidden_size"] // heads, heads
        sizes = {
            "vocab": config["vocab_size"],
            "hidden": config["hidden_size"],
            "q": heads * head_dim,
            "kv": kv_heads * head_dim,
            **{axis: config[key] for axis, key in self.widths.items()},
            "head_dim": head_dim,
        }
        if self.experts:
            sizes |= {"experts": self.experts_of(config), "one": 1}
        if self.plain_heads:
            sizes["qkv"] = 3 * heads * head_dim
        return sizes | {axis: sum(sizes[part] for part in axis.split(JOINED)) for axis in self.joined}

    def experts_of(self, config: Mapping[str, Any]) -> int:
        """Return how many experts a layer has."""
        return int(next(config[key] for key in self.experts if key in config))

    def check(self, config: Mapping[str, Any]) -> None:
        """Check that the table describes a config of its model types.

        Raises:
            InputError: not all layers have experts, or it does not say how many, or to how many a token is sent.
        """
        for key, allowed in self.fixed.items():
            if config.get(key, allowed[0]) not in allowed:
                raise InputError(
                    f"{key} is {config[key]!r}: of {self.name} only models with {allowed[0]!r} are known, whose layers "
                    "all have experts"
                )
        if not self.experts:
            return
        count = next((key for key in self.experts if key in config), self.experts[-1])
        for key in (count, PER_TOKEN, *self.widths.values()):
            size = config.get(key)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"{key} of a {self.name} model is {size!r}: allowed are whole numbers from 1 on")
        if config[PER_TOKEN] > config[count]:
            raise InputError(f"{PER_TOKEN} is {config[PER_TOKEN]}, but {count} is {config[count]}")

    @cached_property
    def joined(self) -> tuple[str, ...]:
        """Axes that are several, one behind the other."""
        return tuple(dict.fromkeys(axis for row in self.rows for axis in row.axes if JOINED in axis))

    def tensors(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return every tensor of the model by name, in the order of the running model; aliases are listed."""
        sizes, tied = self.axes(config), self.is_tied(config)
        conditions = tuple(row.exists(config) for row in self.rows)
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
        rows = [row for row in self.rows if row.exists(config)]
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

    def active_ffn(self, config: Mapping[str, Any]) -> int:
        """Return the feed-forward width that a token is computed with: of experts those that it is sent to."""
        sizes = self.axes(config)
        return sizes["ffn"] * (config[PER_TOKEN] if self.experts else 1) + sizes.get("shared_ffn", 0)

    def idle(self, config: Mapping[str, Any]) -> int:
        """Return the number of parameters of the experts that a token is not sent to."""
        if not self.experts:
            return 0
        held = [prod(tensor.shape) for tensor in self.tensors(config).values() if len(tensor.axes) == 3]
        experts = self.experts_of(config)
        return sum(held) // experts * (experts - config[PER_TOKEN])


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


def _neox_linear(name: str, axes: tuple[str, str], split: Split, bias: str | None = None) -> tuple[Row, ...]:
    weight = Row(name=f"gpt_neox.layers.{{layer}}.{name}.weight", axes=axes, kind="matrix", split=split)
    cut: Split = "column" if split == "column" else "none"
    name = weight.name.replace(".weight", ".bias")
    return (weight, Row(name=name, axes=axes[:1], kind="bias", split=cut, when=bias, unsaid=True))


def _layer_norm(name: str, kind: Kind = "norm") -> tuple[Row, ...]:
    """Return the rows of a LayerNorm: its weight and its bias."""
    return (
        Row(name=f"{name}.weight", axes=("hidden",), kind=kind, split="none"),
        Row(name=f"{name}.bias", axes=("hidden",), kind="norm_bias", split="none"),
    )


GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    rows=(
        Row(name="gpt_neox.embed_in.weight", axes=("vocab", "hidden"), kind="embedding", split="vocab"),
        *_layer_norm("gpt_neox.layers.{layer}.input_layernorm"),
        *_layer_norm("gpt_neox.layers.{layer}.post_attention_layernorm"),
        *_neox_linear("attention.query_key_value", ("qkv", "hidden"), "column", bias="attention_bias"),
        *_neox_linear("attention.dense", ("hidden", "q"), "row", bias="attention_bias"),
        *_neox_linear("mlp.dense_h_to_4h", ("ffn", "hidden"), "column"),
        *_neox_linear("mlp.dense_4h_to_h", ("hidden", "ffn"), "row"),
        *_layer_norm("gpt_neox.final_layer_norm", kind="final_norm"),
        Row(name="lm_head.weight", axes=("vocab", "hidden"), kind="head", split="vocab"),
    ),
    tied={"lm_head.weight": "gpt_neox.embed_in.weight"},
    spelled={"lm_head.weight": ("embed_out.weight",)},
    whole_heads=True,
    plain_heads=True,
)


GATE_UP, DOWN = (f"{_LAYER}mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def _experts(*, router_first: bool) -> tuple[Row, ...]:
    """Return the rows of a layer's experts, fused as transformers runs them, and of the router before them."""
    router = _linear("mlp.gate", ("experts", "hidden"), "none")
    experts = (
        Row(name=GATE_UP, axes=("experts", "ffn+ffn", "hidden"), kind="matrix", split="none"),
        Row(name=DOWN, axes=("experts", "hidden", "ffn"), kind="matrix", split="none"),
    )
    return (*router, *experts) if router_first else (*experts, *router)


_QWEN_EXPERT = f"{_LAYER}mlp.experts.{{expert}}."
_MIXTRAL_EXPERT = f"{_LAYER}block_sparse_moe.experts.{{expert}}."

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    rows=_model(*_attention(), *_experts(router_first=True), *_TWO_NORMS),
    tied=_TIED,
    norm_eps=1e-5,
    experts=("num_experts", "num_local_experts"),
    spelled={
        f"{_LAYER}mlp.gate.weight": (f"{_LAYER}block_sparse_moe.gate.weight",),
        GATE_UP: (f"{_MIXTRAL_EXPERT}w1.weight", f"{_MIXTRAL_EXPERT}w3.weight"),
        DOWN: (f"{_MIXTRAL_EXPERT}w2.weight",),
    },
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    rows=_model(
        *(replace(row, unsaid=True) for row in _attention(qkv_bias="qkv_bias")),
        *_experts(router_first=True),
        *_linear("mlp.shared_expert.gate_proj", ("shared_ffn", "hidden"), "column"),
        *_linear("mlp.shared_expert.up_proj", ("shared_ffn", "hidden"), "column"),
        *_linear("mlp.shared_expert.down_proj", ("hidden", "shared_ffn"), "row"),
        *_linear("mlp.shared_expert_gate", ("one", "hidden"), "none"),
        *_TWO_NORMS,
    ),
    tied=_TIED,
    widths={"ffn": "moe_intermediate_size", "shared_ffn": "shared_expert_intermediate_size"},
    experts=("num_experts",),
    fixed={"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    spelled={
        GATE_UP: (f"{_QWEN_EXPERT}gate_proj.weight", f"{_QWEN_EXPERT}up_proj.weight"),
        DOWN: (f"{_QWEN_EXPERT}down_proj.weight",),
    },
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    rows=_model(*_OPTIONAL_BIAS, *_HEAD_NORMS, *_experts(router_first=False), *_TWO_NORMS),
    tied=_TIED,
    widths={"ffn": "moe_intermediate_size"},
    experts=("num_local_experts", "num_experts"),
    fixed=QWEN2_MOE.fixed,
    spelled=QWEN2_MOE.spelled,
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE, GEMMA2, GEMMA3, OLMO2, PHI3, GPT_NEOX),
        *(MIXTRAL, QWEN2_MOE, QWEN3_MOE),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family whose table describes a Hugging Face config.

    Raises:
        InputError: no family knows the config's `model_type`, or its table does not hold for it (`Family.check`).
    """
    by_type = {kind: family for family in FAMILIES.values() for kind in family.model_types}
    model_type = config.get("model_type")
    if model_type not in by_type:
        raise InputError(one_of("model_type", model_type, by_type))
    by_type[model_type].check(config)
    return by_type[model_type]
