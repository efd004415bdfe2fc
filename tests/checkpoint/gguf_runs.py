"""GGUF files as llama.cpp's converter writes them, by gguf's own writer and names: independent of what reads them."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""Where llama.cpp's name is not Hugging Face's."""


def tiny(model_type="llama", **changes):
    """Return a tiny random model, its norms and biases too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.uniform_(-0.5, 0.5)
            parameter.data += 0.0 if "bias" in name or "gemma" in model_type else 1.0
        elif "embed" in name or "lm_head" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


def permuted(tensor, heads):
    """Return q or k as llama.cpp's rotary embedding wants its rows: neighbours turn together."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def tensors_of(model):
    """Return the tensors of a model as llama.cpp stores them, by its names, float32."""
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, leaf = name.rpartition(".")
        data = tensor.float().numpy()
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):
            data = permuted(data, config.num_attention_heads if "q_proj" in module else config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            data = data + np.float32(1)
        found[f"{names.get_name(module)}.{leaf}"] = np.ascontiguousarray(data)
    return found


def keys_of(model):
    """Return what a file says of a model."""
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    said = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        said |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch == "llama":
        said |= {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim}
    if arch == "phi3":
        said |= {"rope.dimension_count": config.hidden_size // config.num_attention_heads}
        said |= {"rope.scaling.original_context_length": config.original_max_position_embeddings}
    if arch in ("gemma2", "gemma3", "phi3"):
        said["attention.sliding_window"] = config.sliding_window or 0
    if arch == "gemma2":
        said["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        said["final_logit_softcapping"] = float(config.final_logit_softcapping)
    tokens = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    return {f"{arch}.{key}": value for key, value in said.items()} | {
        "general.name": "tiny",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"token {number}" for number in range(config.vocab_size)],
        "tokenizer.ggml.scores": [0.5 * number for number in range(config.vocab_size)],
        **{f"tokenizer.ggml.{key}_token_id": value for key, value in tokens.items()},
    }


TYPES = {
    str: GGUFValueType.STRING,
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    list: GGUFValueType.ARRAY,
}


def write_gguf(path, model, kind="F32", *, keys=None, tensors=None, arch=None, **options):
    """Write a model; return the path, and each tensor's data as it is stored and its type, by llama.cpp's names.

    Args:
        kind: type of the matrices; where rows are not of whole blocks they are F16. Vectors are F32.
        keys: further metadata, or other; None takes a key out.
        tensors: further tensors, (data, type) or data in float32; None takes one out.
    """
    arch = arch or ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in {**keys_of(model), **(keys or {})}.items():
        if value is not None:
            writer.add_key_value(key, value, TYPES[type(value)])
    stored = {}
    for name, data in {**tensors_of(model), **(tensors or {})}.items():
        if data is not None:
            stored[name] = data if isinstance(data, tuple) else quantized(data, GGMLQuantizationType[kind])
            writer.add_tensor(name, stored[name][0], raw_dtype=stored[name][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, stored


def quantized(data, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if data.ndim < 2:
        return data, GGMLQuantizationType.F32
    if data.shape[-1] % block:
        return data.astype(np.float16), GGMLQuantizationType.F16
    try:
        return gguf.quants.quantize(data, kind), kind
    except NotImplementedError:  # of these gguf can only unpack: any bytes will do, but scales that are finite
        blocks = np.random.default_rng(0).integers(0, 256, (data.size // block, size), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
        blocks[:, :2] = blocks[:, 2:4] = blocks[:, -2:] = scale
        return blocks.reshape(*data.shape[:-1], data.shape[-1] // block * size), kind
