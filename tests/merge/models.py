"""Tiny models whose task vectors are small whole steps: exact in float32, with many zeros and many equal ones."""

from typing import Any

import torch

from checkpoint.memory import MemorySource
from checkpoint.source import RunState

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MATRIX = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def model(
    seed: int, dtype: torch.dtype = torch.float32, provenance: dict[str, Any] | None = None, **changes: object
) -> MemorySource:
    """A base (seed 0), or a model that differs from it by steps of 1/64."""
    config = {**CONFIG, **changes}
    tensors = {}
    for name, tensor in MemorySource(config=config, tensors={}).family.tensors(config).items():
        if tensor.tied_to is None:
            value = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
            if seed:
                step = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 * seed + len(name)))
                value = value.bfloat16().float() + (step * 4).round() / 64
            tensors[name] = value.bfloat16().float().to(dtype)
    return MemorySource(config=config, tensors=tensors, run=RunState(provenance=provenance or {}))
