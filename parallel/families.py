"""The families of models, as data: `docs/adding-a-family.md` says how to write one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from parallel.errors import InputError, one_of
from parallel.family import Family
from parallel.rows import LAYER, Kind, Row, Split, attention, linear, mlp, model, norms

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_TWO_NORMS = norms("input_layernorm", "post_attention_layernorm")
_OPTIONAL_BIAS = attention(qkv_bias="attention_bias", o_bias="attention_bias")
_HEAD_NORMS = norms("self_attn.q_norm", "self_attn.k_norm", axis="head_dim")

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    rows=model(*_OPTIONAL_BIAS, *mlp("mlp_bias"), *_TWO_NORMS),
    tied=_TIED,
    whole_heads=True,
)
MISTRAL = Family(name="mistral", model_types=("mistral",), rows=model(*attention(), *mlp(), *_TWO_NORMS), tied=_TIED)
QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    rows=model(*attention(qkv_bias=True), *mlp(), *_TWO_NORMS),
    tied=_TIED,
)
QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    rows=model(*_OPTIONAL_BIAS, *_HEAD_NORMS, *mlp(), *_TWO_NORMS),
    tied=_TIED,
    head_dim=128,
)
GRANITE = Family(
    name="granite",
    model_types=("granite",),
    rows=model(*_OPTIONAL_BIAS, *mlp("mlp_bias"), *_TWO_NORMS),
    tied=_TIED,
    logits_divisor="logits_scaling",
    attention_scale="attention_multiplier",
)

_FOUR_NORMS = (
    *norms("input_layernorm"),
    *norms("post_attention_layernorm", kind="post_norm"),
    *norms("pre_feedforward_layernorm"),
    *norms("post_feedforward_layernorm", kind="post_norm"),
)
GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    rows=model(*_OPTIONAL_BIAS, *mlp(), *_FOUR_NORMS),
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
    rows=model(*_OPTIONAL_BIAS, *_HEAD_NORMS, *mlp(), *_FOUR_NORMS),
)

OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    rows=model(
        *attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *norms("self_attn.q_norm", axis="q"),
        *norms("self_attn.k_norm", axis="kv"),
        *mlp(),
        *norms("post_attention_layernorm", "post_feedforward_layernorm", kind="post_norm"),
    ),
    tied=_TIED,
    norm_eps=1e-5,
)

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    rows=model(
        *linear("self_attn.qkv_proj", ("q+kv+kv", "hidden"), "column"),
        *linear("self_attn.o_proj", ("hidden", "q"), "row"),
        *linear("mlp.gate_up_proj", ("ffn+ffn", "hidden"), "column"),
        *linear("mlp.down_proj", ("hidden", "ffn"), "row"),
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


GATE_UP, DOWN = (f"{LAYER}mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def _experts(*, router_first: bool) -> tuple[Row, ...]:
    """Return the rows of a layer's experts, fused as transformers runs them, and of the router before them."""
    router = linear("mlp.gate", ("experts", "hidden"), "none")
    experts = (
        Row(name=GATE_UP, axes=("experts", "ffn+ffn", "hidden"), kind="matrix", split="none"),
        Row(name=DOWN, axes=("experts", "hidden", "ffn"), kind="matrix", split="none"),
    )
    return (*router, *experts) if router_first else (*experts, *router)


_QWEN_EXPERT = f"{LAYER}mlp.experts.{{expert}}."
_MIXTRAL_EXPERT = f"{LAYER}block_sparse_moe.experts.{{expert}}."

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    rows=model(*attention(), *_experts(router_first=True), *_TWO_NORMS),
    tied=_TIED,
    norm_eps=1e-5,
    experts=("num_experts", "num_local_experts"),
    spelled={
        f"{LAYER}mlp.gate.weight": (f"{LAYER}block_sparse_moe.gate.weight",),
        GATE_UP: (f"{_MIXTRAL_EXPERT}w1.weight", f"{_MIXTRAL_EXPERT}w3.weight"),
        DOWN: (f"{_MIXTRAL_EXPERT}w2.weight",),
    },
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    rows=model(
        *(replace(row, unsaid=True) for row in attention(qkv_bias="qkv_bias")),
        *_experts(router_first=True),
        *linear("mlp.shared_expert.gate_proj", ("shared_ffn", "hidden"), "column"),
        *linear("mlp.shared_expert.up_proj", ("shared_ffn", "hidden"), "column"),
        *linear("mlp.shared_expert.down_proj", ("hidden", "shared_ffn"), "row"),
        *linear("mlp.shared_expert_gate", ("one", "hidden"), "none"),
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
    rows=model(*_OPTIONAL_BIAS, *_HEAD_NORMS, *_experts(router_first=False), *_TWO_NORMS),
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
