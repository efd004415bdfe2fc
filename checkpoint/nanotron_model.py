"""What nanotron calls a model's parameters and sizes, and what Hugging Face calls them.

Facts of huggingface/nanotron and of liu-nlp/nanotron (e1097f2): src/nanotron/models/llama.py and qwen.py (modules),
config/models_config.py (model_config.json), examples/llama/convert_weights.py (what is what).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from checkpoint.tensor_parallel import DIMS
from parallel.errors import InputError
from parallel.family import Family

MODEL_CONFIG = "model_config.json"
OUTSIDE = {
    "model.embed_tokens": "model.token_position_embeddings.pp_block.token_embedding",
    "model.norm": "model.final_layer_norm.pp_block",
    "lm_head": "model.lm_head.pp_block",
}
"""Modules that are in no layer."""
INSIDE = {
    "self_attn.q_proj": "attn.qkv_proj",
    "self_attn.k_proj": "attn.qkv_proj",
    "self_attn.v_proj": "attn.qkv_proj",
    "self_attn.o_proj": "attn.o_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
"""Modules of a layer."""
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
SHARED = (
    *SIZES,
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "use_cache"),
)
"""Keys that mean the same in model_config.json and in config.json."""
UNREAD = ("moe_config", "no_rope_layer", "sliding_window_size")
"""Keys of model_config.json that make another model than a plain Llama or Qwen2 unless they are null."""
ROPE_THETA = 10000.0
"""What a config without `rope_theta` means, here and there."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of nanotron: one tensor, or several, one below the other."""

    name: str
    tensors: tuple[str, ...]
    """Hugging Face names, from the first row to the last."""
    shape: tuple[int, ...]
    """Of the whole parameter, over all ranks."""
    dim: int | None
    """Along which it is cut over the tensor-parallel ranks, each tensor by itself; None if all ranks have it whole."""

    @property
    def folder(self) -> str:
        """Where its files lie in a checkpoint's folder."""
        return "/".join(("model", *self.name.split(".")[:-1]))

    @property
    def leaf(self) -> str:
        """How the names of its files begin."""
        return f"model_{self.name.rpartition('.')[2]}"


def parameters_of(family: Family, config: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return every parameter that nanotron saves of a model, by its name; a tied head is none.

    Raises:
        InputError: nanotron has no module for a tensor of the model.
    """
    tensors = family.tensors(config)
    parts: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.tied_to is None:
            # The family's order within a layer (q, k, v; gate, up) is nanotron's, too.
            parts.setdefault(nanotron_name(name), []).append(name)
    found = {}
    for name, names in parts.items():
        rows = sum(tensors[part].shape[0] for part in names)
        first = tensors[names[0]]
        shape = (rows, *first.shape[1:])
        found[name] = Parameter(name=name, tensors=tuple(names), shape=shape, dim=DIMS.get(first.split))
    return found


def nanotron_name(name: str) -> str:
    """Return the name of the parameter that a Hugging Face tensor is in.

    Raises:
        InputError: nanotron has none.
    """
    module, _, leaf = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    if inner not in INSIDE:
        raise InputError(f"{name}: nanotron's models have no such tensor")
    return f"model.decoder.{number}.pp_block.{INSIDE[inner]}.{leaf}"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model_config.json says."""

    config: Mapping[str, Any]
    """The Hugging Face config of the same model."""
    interleaved: bool
    """Rotary embeddings turn neighbouring rows of a head; Hugging Face's turn row i and row i + head_dim/2."""
    head_divisor: float
    """By which the head divides its weight (liu-nlp/nanotron's HyperCloning); 1 otherwise."""


def read_model_config(folder: Path) -> ModelConfig:
    """Read the model_config.json of a checkpoint.

    Raises:
        InputError: it is missing, no JSON, or of a model that is not read.
    """
    path = folder / MODEL_CONFIG
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no keys of a model")
    qwen = bool(found.get("is_qwen2_config"))
    if not qwen and not found.get("is_llama_config"):
        kinds = ", ".join(key for key in found if key.startswith("is_") and key.endswith("_config")) or "of no kind"
        raise InputError(f"{path}: {kinds}: allowed are models with is_llama_config or is_qwen2_config")
    for key in UNREAD:
        if found.get(key) is not None:
            raise InputError(f"{path}: {key} is {found[key]!r}: models with it are not read, only null is")
    for key in SIZES:
        if type(found.get(key)) is not int or found[key] < 1:
            raise InputError(f"{path}: {key} is {found.get(key)!r}: allowed are whole numbers above 0")
    if found["hidden_size"] % found["num_attention_heads"]:
        raise InputError(
            f"{path}: hidden_size {found['hidden_size']} is no multiple of "
            f"num_attention_heads {found['num_attention_heads']}"
        )
    divisor = found.get("lm_head_normalization_factor", 1)
    if isinstance(divisor, bool) or not isinstance(divisor, int | float) or not 1 <= divisor < float("inf"):
        raise InputError(f"{path}: lm_head_normalization_factor is {divisor!r}: allowed are numbers from 1 on")
    # Before nanotron had the key, its Llama always interleaved.
    interleaved = found.get("rope_interleaved", found.get("interleaved_rotary", not qwen))
    return ModelConfig(config=_hugging_face(found, qwen), interleaved=bool(interleaved), head_divisor=divisor)


def _hugging_face(found: Mapping[str, Any], qwen: bool) -> dict[str, Any]:
    """Return the Hugging Face config; nanotron's Qwen2 without biases is a Llama, and its Llama never has any."""
    biased = qwen and bool(found.get("attention_bias"))
    kind = ("Qwen2ForCausalLM", "qwen2") if biased else ("LlamaForCausalLM", "llama")
    config: dict[str, Any] = {"architectures": [kind[0]], "model_type": kind[1]}
    config |= {key: found[key] for key in SHARED if key in found}
    config["num_key_value_heads"] = found.get("num_key_value_heads") or found["num_attention_heads"]
    config["tie_word_embeddings"] = bool(found.get("tie_word_embeddings"))
    scaling = dict(found.get("rope_scaling") or {})
    kind_of_rope = scaling.pop("rope_type", scaling.pop("type", "default"))
    theta = float(found.get("rope_theta", ROPE_THETA))
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": kind_of_rope, **scaling}
    if not biased:
        config |= {"attention_bias": False, "mlp_bias": False}
    return config


def model_config_of(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model_config.json of a Hugging Face config, the keys that all versions of nanotron know.

    Raises:
        InputError: nanotron has no such model.
    """
    if family.name not in ("llama", "qwen2"):
        raise InputError(f"nanotron has no model of the {family.name} family: allowed are llama and qwen2")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if family.axes(config)["head_dim"] * heads != hidden:
        raise InputError(
            f"{heads} heads of {family.axes(config)['head_dim']} do not make up hidden_size {hidden}, "
            "and nanotron derives the size of a head from it"
        )
    for key in ("attention_bias", "mlp_bias"):
        if family.name == "llama" and config.get(key):
            raise InputError(f"{key} is true: nanotron's Llama has no biases")
    if config.get("use_sliding_window"):
        raise InputError("use_sliding_window is true: it is not written for nanotron, only false is")
    rope = dict(config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", ROPE_THETA))
    scaling = rope if rope.get("rope_type", "default") != "default" else config.get("rope_scaling")
    eos = config.get("eos_token_id")
    return {
        **{key: config[key] for key in SHARED if key in config},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "tie_word_embeddings": family.is_tied(config),
        # nanotron knows one end; models with several list the usual one first.
        **({"eos_token_id": eos[0]} if isinstance(eos, list) else {}),
        "rope_theta": theta,
        "rope_scaling": scaling or None,
        "rope_interleaved": False,
        **({"is_llama_config": True} if family.name == "llama" else {"is_qwen2_config": True, "attention_bias": True}),
    }
