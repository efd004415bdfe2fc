"""What Megatron-LM's arguments say of a model, and what Hugging Face's config says of the same.

A checkpoint has the arguments of the run that wrote it. Of the models that they can describe those are read that are a
Llama, Mistral, Qwen2 or Qwen3 of Hugging Face's; what such a model has not is refused by the argument's name.

Facts of NVIDIA/Megatron-LM: megatron/training/arguments.py (names and defaults), megatron/training/checkpointing.py
(load_args_from_checkpoint) and tools/checkpoint/loader_llama_mistral.py; of megatron_core 0.16.1:
core/transformer/utils.py (a window of (w, 0) sees w tokens besides the last) and
core/models/common/embeddings/rotary_pos_embedding.py (the one scaling of Llama 3.1, and linear interpolation).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.errors import InputError
from parallel.families import FAMILIES
from parallel.family import Family

SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
}
"""Megatron's name -> Hugging Face's."""
NEEDED: dict[str, object] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
}
"""Arguments that a model has to have."""
ABSENT = (
    *("rotary_interleaved", "apply_layernorm_1p", "apply_residual_connection_post_layernorm", "qk_l2_norm"),
    *("multi_latent_attention", "attention_output_gate", "experimental_attention_variant", "softmax_scale"),
    *("num_experts", "mtp_num_layers", "no_rope_freq", "window_attn_skip_freq", "squared_relu", "quick_geglu"),
    *("glu_linear_offset", "activation_func_clamp_value", "heterogeneous_layers_config_path"),
    *("is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern", "retro_add_retriever", "use_legacy_models"),
)
"""Arguments that make another model unless they are false, zero or None."""
DEFAULTS: dict[str, object] = {"rotary_percent": 1.0, "softmax_type": "vanilla"}
"""Arguments that make another model unless they have, or lack, this value."""
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Of the families that Megatron-Core's GPTModel can be."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-Core's scaling of rotary embeddings has fixed."""
ROPE_THETA = 10000.0
"""What arguments or a config without it mean."""


def config_of(arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the Hugging Face config of a model of Megatron's arguments.

    Its `vocab_size` is the argument's; where no argument has it, that of the padded vocabulary.

    Args:
        where: the file that has the arguments, for errors.

    Raises:
        InputError: an argument is missing, makes no sense, or is of no model of Hugging Face's that is read.
    """
    _check_kind(arguments, where)
    sizes = {theirs: _size(arguments, name, where) for name, theirs in SIZES.items()}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    # Without grouped queries its number of groups is a default that is not used.
    groups = _size(arguments, "num_query_groups", where) if arguments.get("group_query_attention") else heads
    if heads % groups:
        raise InputError(f"{where}: num_attention_heads {heads} is no multiple of num_query_groups {groups}")
    head_dim = hidden // heads if arguments.get("kv_channels") is None else _size(arguments, "kv_channels", where)
    kind = _family_of(arguments, where)
    if hidden % heads and (arguments.get("kv_channels") is None or FAMILIES[kind].whole_heads):
        raise InputError(f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, **sizes}
    config |= {"num_key_value_heads": groups, "head_dim": head_dim, "hidden_act": "silu"}
    config["rms_norm_eps"] = float(arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5)))
    config["vocab_size"] = _vocabulary(arguments, where)
    config["tie_word_embeddings"] = not arguments.get("untie_embeddings_and_output_weights", False)
    config["rope_parameters"] = _rope(arguments)
    if arguments.get("init_method_std") is not None:
        config["initializer_range"] = arguments["init_method_std"]
    if kind == "llama":
        config |= dict.fromkeys(("attention_bias", "mlp_bias"), bool(arguments.get("add_bias_linear", True)))
    if kind == "mistral":
        config["sliding_window"] = _window(arguments, where)
    if kind == "qwen3":
        config["attention_bias"] = False
    return config


def arguments_of(family: Family, config: Mapping[str, Any]) -> dict[str, object]:
    """Return Megatron's arguments of the model of a Hugging Face config.

    Raises:
        InputError: Megatron-Core has no such model.
    """
    if family.name not in ARCHITECTURES:
        allowed = ", ".join(ARCHITECTURES)
        raise InputError(f"Megatron-LM has no model of the {family.name} family: allowed are {allowed}")
    if config.get("use_sliding_window"):
        raise InputError("use_sliding_window is true: it is not written for Megatron-LM, only false is")
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise InputError(f"hidden_act is {act!r}: Megatron-LM's SwiGLU has silu")
    asks = family.name in ("llama", "qwen3")  # the others have biases always or never, whatever a config says
    attention, mlp = (asks and bool(config.get(key)) for key in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        raise InputError(
            f"attention_bias is {attention} and mlp_bias is {mlp}: Megatron-LM's linear layers all have biases or none"
        )
    axes = family.axes(config)
    groups = axes["kv"] // axes["head_dim"]
    window = config.get("sliding_window") if family.name == "mistral" else None
    return {
        **{name: config[theirs] for name, theirs in SIZES.items() if theirs in config},
        "seq_length": config.get("max_position_embeddings", 2048),
        "kv_channels": axes["head_dim"],
        "group_query_attention": groups != config["num_attention_heads"],
        "num_query_groups": groups,
        "vocab_size": config["vocab_size"],
        "normalization": "RMSNorm",
        "norm_epsilon": config.get("rms_norm_eps", family.norm_eps),
        "swiglu": True,
        "add_bias_linear": attention,
        "add_qkv_bias": family.name == "qwen2",
        "qk_layernorm": family.head_norms,
        "untie_embeddings_and_output_weights": not family.is_tied(config),
        "position_embedding_type": "rope",
        **_rope_arguments(config),
        **({"window_size": (window - 1, 0)} if window else {}),
        "init_method_std": config.get("initializer_range", 0.02),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "hidden_dropout": 0.0,
    }


def _check_kind(arguments: Mapping[str, Any], where: Path) -> None:
    """Raise InputError if an argument makes another model than those that are read."""
    for name, needed in NEEDED.items():
        if arguments.get(name) != needed:
            raise InputError(f"{where}: {name} is {arguments.get(name)!r}: models with {needed!r} alone are read")
    for name in ABSENT:
        if arguments.get(name):
            raise InputError(f"{where}: {name} is {arguments[name]!r}: models with it are not read")
    for name, default in DEFAULTS.items():
        if arguments.get(name, default) not in (default, None):
            raise InputError(f"{where}: {name} is {arguments[name]!r}: only {default!r} is read")


def _size(arguments: Mapping[str, Any], name: str, where: Path) -> int:
    value = arguments.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"{where}: {name} is {value!r}: allowed are whole numbers above 0")
    return value


def _family_of(arguments: Mapping[str, Any], where: Path) -> str:
    """Return the family of Hugging Face's that has what the arguments give a model besides a Llama's parts."""
    parts = {
        "qk_layernorm": bool(arguments.get("qk_layernorm")),
        "add_qkv_bias": bool(arguments.get("add_qkv_bias")),
        "window_size": arguments.get("window_size") is not None,
        "add_bias_linear": bool(arguments.get("add_bias_linear", True)),
    }
    have = [name for name, there in parts.items() if there]
    if len(have) > 1:
        raise InputError(f"{where}: {' and '.join(have)}: no model of Hugging Face's that is read has both")
    kinds = {"qk_layernorm": "qwen3", "add_qkv_bias": "qwen2", "window_size": "mistral", "add_bias_linear": "llama"}
    return kinds[have[0]] if have else "llama"


def _vocabulary(arguments: Mapping[str, Any], where: Path) -> int:
    """Return the vocabulary's size, without its padding where an argument says what that is."""
    padded = _size(arguments, "padded_vocab_size", where)
    size = arguments.get("vocab_size")
    # With NullTokenizer vocab_size does not count the token that ends a document.
    if type(size) is not int or not 0 < size <= padded or arguments.get("tokenizer_type") == "NullTokenizer":
        return padded
    return size


def _window(arguments: Mapping[str, Any], where: Path) -> int:
    window = arguments["window_size"]
    if not isinstance(window, tuple | list) or len(window) != 2 or window[1] != 0 or window[0] < 0:
        raise InputError(f"{where}: window_size is {window!r}: only (w, 0) is read, w tokens before each")
    return int(window[0]) + 1


def _rope(arguments: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(arguments.get("rotary_base") or ROPE_THETA), "rope_type": "default"}
    if arguments.get("use_rope_scaling"):
        return rope | {"rope_type": "llama3", "factor": float(arguments.get("rope_scaling_factor") or 8.0), **LLAMA3}
    factor = float(arguments.get("rotary_seq_len_interpolation_factor") or 1.0)
    return rope if factor == 1.0 else rope | {"rope_type": "linear", "factor": factor}


def _rope_arguments(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the arguments of a config's rotary embeddings.

    Raises:
        InputError: they are scaled as Megatron-Core's cannot be.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or ROPE_THETA)
    kind = rope.get("rope_type", rope.get("type", "default"))
    base: dict[str, object] = {
        # Its parser takes whole numbers alone.
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": kind == "llama3",
    }
    if kind == "default":
        return base
    if kind == "linear":
        return base | {"rotary_seq_len_interpolation_factor": rope["factor"]}
    if kind == "llama3" and all(rope.get(key) == value for key, value in LLAMA3.items()):
        return base | {"rope_scaling_factor": rope["factor"]}
    raise InputError(
        f"rope_type is {kind!r}: Megatron-LM has default, linear, and llama3 with "
        + ", ".join(f"{key} {value:g}" for key, value in LLAMA3.items())
    )
