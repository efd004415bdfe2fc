"""The mixture-of-experts family that a dense family becomes, and the config of such a model; how: `upscale.upcycle`.

Facts of what configs mean by keys that they lack: transformers 5.23, models/{llama,mistral,mixtral,qwen2,qwen3,
qwen2_moe,qwen3_moe}/configuration_*.py, and modeling_rope_utils.py for the base of rotary embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.errors import InputError
from parallel.families import MIXTRAL, QWEN2_MOE, QWEN3_MOE, family_of
from parallel.family import PER_TOKEN, Family

MOST_EXPERTS = 10_000
THETA = 10_000.0
"""The base of rotary embeddings of a dense config that has none; Mixtral's is another."""
FOR_DENSE = ("layer_types", "max_window_layers")
"""Keys that a model with experts has no use for: all its layers attend to all."""


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """What a dense family's models with experts are."""

    family: Family
    architecture: str
    """Of transformers."""
    lacks: tuple[str, ...] = ()
    """Config keys of the dense family that stand for what its sibling has not; they may not be true."""
    unsaid: Mapping[str, Any] = field(default_factory=dict)
    """What the dense family's config means by keys that it lacks, where the sibling's means something else."""
    adds: Mapping[str, Any] = field(default_factory=dict)


_QWEN: Mapping[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
"""All layers have experts, and the gates of those that a token is sent to are made to add up to one."""

SIBLINGS: Mapping[str, Sibling] = {
    "llama": Sibling(
        family=MIXTRAL,
        architecture="MixtralForCausalLM",
        lacks=("attention_bias", "mlp_bias"),
        unsaid={"max_position_embeddings": 2048, "sliding_window": None},
    ),
    "mistral": Sibling(family=MIXTRAL, architecture="MixtralForCausalLM", unsaid={"sliding_window": 4096}),
    "qwen2": Sibling(family=QWEN2_MOE, architecture="Qwen2MoeForCausalLM", lacks=("use_sliding_window",), adds=_QWEN),
    "qwen3": Sibling(family=QWEN3_MOE, architecture="Qwen3MoeForCausalLM", lacks=("use_sliding_window",), adds=_QWEN),
}
"""By the dense family's name."""


def sibling_of(dense: Family) -> Sibling:
    """Return what a family's models with experts are.

    Raises:
        InputError: it has experts already, or no sibling that is known.
    """
    if dense.experts or dense.name not in SIBLINGS:
        why = "has experts already" if dense.experts else "has no sibling with experts"
        raise InputError(f"{dense.name} {why}: experts is for models of {', '.join(SIBLINGS)}")
    return SIBLINGS[dense.name]


def moe_config(config: Mapping[str, Any], experts: int | None, per_token: int | None) -> dict[str, Any]:
    """Return the Hugging Face config of a dense model whose feed-forward blocks become experts.

    Args:
        experts: E, in each layer.
        per_token: to how many of them a token is sent; 2 by default.

    Raises:
        InputError: see `sibling_of`; a number that makes no sense; a model that has what its sibling has not.
    """
    dense = family_of(config)
    sibling = sibling_of(dense)
    if isinstance(experts, bool) or not isinstance(experts, int) or not 2 <= experts <= MOST_EXPERTS:
        raise InputError(f"experts is {experts!r}: allowed are whole numbers from 2 to {MOST_EXPERTS}")
    each = 2 if per_token is None else per_token
    if isinstance(each, bool) or not isinstance(each, int) or not 2 <= each <= experts:
        raise InputError(
            f"experts_per_token is {each!r} of {experts} experts: allowed are whole numbers from 2 to {experts} "
            "(of one the gate is 1 whatever the router says, which then learns nothing)"
        )
    kinds = config.get("layer_types") or ()
    found = next((key for key in sibling.lacks if config.get(key)), None)
    if found is None and any(kind != "full_attention" for kind in kinds):
        found = "layer_types"
    if found is not None:
        raise InputError(
            f"{found} is {config[found]!r}: models of {sibling.family.name}, which {dense.name} with experts would be, "
            "have no such thing"
        )
    sizes = dense.axes(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "rms_norm_eps": dense.norm_eps,
        **({} if "rope_theta" in rope else {"rope_theta": THETA}),
        **sibling.unsaid,
        **{key: value for key, value in config.items() if key not in FOR_DENSE},
        "architectures": [sibling.architecture],
        "model_type": sibling.family.model_types[0],
        "num_key_value_heads": sizes["kv"] // sizes["head_dim"],
        "head_dim": sizes["head_dim"],
        **dict.fromkeys(sibling.family.widths.values(), sizes["ffn"]),
        sibling.family.experts[-1]: experts,
        PER_TOKEN: each,
        **sibling.adds,
    }
