"""What a GGUF file's metadata and names say in Hugging Face's terms: the config of its model, a tensor's name.

llama.cpp calls tensors the same in all architectures: `token_embd`, `blk.{n}.attn_q`, `output_norm`, `output` (a model
without it is tied). Of its llama (and Mistral, which is the same to it) the rows of q and k are in another order: row
2i of a head is Hugging Face's row i, row 2i + 1 its row i + head_dim/2. Gemma's norms are stored as what they multiply
by, Hugging Face's plus 1. What a file does not say is what llama.cpp computes with: Gemma scales attention by
1/sqrt(head_dim), but its 27B models by 1/sqrt(hidden_size / heads); the frequencies of Llama 3's rotary embedding are
divided by the tensor `rope_freqs`.

Facts of ggml-org/llama.cpp: conversion/ (base.py, llama.py, gemma.py, qwen.py, phi.py, olmo.py), src/llama-model.cpp
(the attention's scale), and gguf-py 0.19 (constants.py: names and keys).
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint.gguf_files import Model
from parallel.errors import InputError, one_of
from parallel.rows import Tensor

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
}
"""`model_type` and class of each architecture that is read."""
INTERLEAVED = ("llama",)
"""Those whose rows of q and k are in another order."""
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
SOFT_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
FURTHER: Mapping[str, Mapping[str, str]] = {
    "gemma2": {**WINDOW, **SOFT_CAPS},
    "gemma3": {**WINDOW, **SOFT_CAPS},
    "phi3": {**WINDOW, "rope.scaling.original_context_length": "original_max_position_embeddings"},
}
"""Keys that an architecture has beside the usual ones; 0 stands for none."""
TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}
WIDE_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models."""
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FREQUENCIES = "rope_freqs.weight"
COMPUTED = ("rope_freqs.weight", "attn_rot_embd.weight")
"""Endings of tensors that are no weights."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all models of Llama 3 have in common."""


def gguf_name(tensor: Tensor) -> str:
    """Return what llama.cpp calls a tensor."""
    module, _, leaf = tensor.name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    inner = module.removeprefix(f"model.layers.{tensor.layer}.")
    # With norms on both sides this one acts on what attention adds; alone it is the feed-forward's.
    after = inner == "post_attention_layernorm" and tensor.kind == "post_norm"
    return f"blk.{tensor.layer}.{'post_attention_norm' if after else INSIDE[inner]}.{leaf}"


def architecture_of(model: Model) -> str:
    """Return the architecture of a model.

    Raises:
        InputError: it is not read.
    """
    found = model.metadata.get("general.architecture")
    if found not in ARCHITECTURES:
        raise InputError(f"{model.path}: {one_of('architecture', found, ARCHITECTURES)}")
    return str(found)


def config_of(model: Model, frequencies: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """Return the Hugging Face config of a model.

    Args:
        frequencies: gives what the frequencies of its rotary embedding are divided by, [head_dim / 2].

    Raises:
        InputError: it says too little, or something that is not read.
    """
    path, arch = model.path, architecture_of(model)
    said = {key.removeprefix(f"{arch}."): value for key, value in model.metadata.items() if key.startswith(f"{arch}.")}
    kind, name = ARCHITECTURES[arch]
    config: dict[str, Any] = {"architectures": [name], "model_type": kind}
    for key, ours in SIZES.items():
        config[ours] = _size(path, arch, key, said.get(key))
    kv_heads = said.get("attention.head_count_kv", config["num_attention_heads"])
    config["num_key_value_heads"] = _size(path, arch, "attention.head_count_kv", kv_heads)
    if "attention.layer_norm_rms_epsilon" not in said:
        raise InputError(f"{path}: {arch}.attention.layer_norm_rms_epsilon is missing")
    config["rms_norm_eps"] = said["attention.layer_norm_rms_epsilon"]
    embedding = model.entries.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{path}: tensor token_embd.weight is missing")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in model.entries
    for theirs, ours in TOKENS.items():
        config[f"{ours}_token_id"] = model.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    for key, ours in FURTHER.get(arch, {}).items():
        if key in said:
            config[ours] = said[key] or None
    if arch == "olmo2" and "attention.sliding_window" in said:
        raise InputError(f"{path}: {arch}.attention.sliding_window is of OLMo 3, which is not read")
    if "blk.0.attn_q.bias" in model.entries and arch != "qwen2":  # whose biases are always there
        config["attention_bias"] = True
    if "blk.0.ffn_gate.bias" in model.entries:
        config["mlp_bias"] = True
    return config | _attention(path, arch, said, config, frequencies if FREQUENCIES in model.entries else None)


def _size(path: Path, arch: str, key: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {arch}.{key} is {value!r}: allowed are whole numbers above 0")
    return value


def _attention(
    path: Path,
    arch: str,
    said: Mapping[str, Any],
    config: Mapping[str, Any],
    frequencies: Callable[[], torch.Tensor] | None,
) -> dict[str, Any]:
    """Return the size of a head, what attention is scaled by, and the rotary embedding."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    whole = said.get("rope.dimension_count") if arch == "llama" else None
    head_dim = said.get("attention.key_length", whole or hidden // heads)
    turned = said.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        raise InputError(
            f"{path}: {arch}.rope.dimension_count is {turned}: a rotary embedding of a part of the {head_dim} elements "
            "of a head is not read"
        )
    found: dict[str, Any] = {}
    if arch not in ("qwen2", "phi3", "olmo2") or head_dim != hidden // heads:
        found["head_dim"] = head_dim
    rope = _rope(path, arch, said, head_dim, frequencies)
    if arch in WIDE_GEMMA:
        wide = config["num_hidden_layers"] == WIDE_GEMMA[arch]
        found["query_pre_attn_scalar"] = hidden // heads if wide else head_dim
    if arch == "gemma3":
        local = {"rope_theta": said.get("rope.freq_base_swa", 10_000.0), "rope_type": "default"}
        return found | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    return found | {"rope_parameters": rope}


def _rope(
    path: Path, arch: str, said: Mapping[str, Any], head_dim: int, frequencies: Callable[[], torch.Tensor] | None
) -> dict[str, Any]:
    theta = said.get("rope.freq_base", 1_000_000.0 if arch == "gemma3" else 10_000.0)
    kind = said.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"{path}: {arch}.rope.scaling.type is {kind!r}: allowed are none, linear and yarn")
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if kind != "none":
        if "rope.scaling.factor" not in said:
            raise InputError(f"{path}: {arch}.rope.scaling.factor is missing")
        rope |= {"rope_type": kind, "factor": said["rope.scaling.factor"]}
    if kind == "yarn":
        keys = {
            "original_context_length": "original_max_position_embeddings",
            "yarn_attn_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        rope |= {ours: said[f"rope.scaling.{key}"] for key, ours in keys.items() if f"rope.scaling.{key}" in said}
    return rope if frequencies is None else rope | _llama3(path, theta, head_dim, frequencies())


def _llama3(path: Path, theta: float, head_dim: int, divisors: torch.Tensor) -> dict[str, Any]:
    """Return the rotary scaling that has such divisors: that of Llama 3, or none."""
    factor = float(divisors.max())
    if factor == 1.0:
        return {}
    waves = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, length = LLAMA3.values()
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=1e-4):
        common = ", ".join(f"{key} {value:g}" for key, value in LLAMA3.items())
        raise InputError(f"{path}: {FREQUENCIES} is not that of Llama 3 ({common}), and no other is read")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
