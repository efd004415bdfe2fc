"""Tiny random Llamas, their weights as sources, and what tests ask of all of them."""

from collections.abc import Iterable
from itertools import product

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from checkpoint.memory import MemorySource
from checkpoint.source import Source, read_tensor


def tied_in_turn(*axes: Iterable[str]) -> list[object]:
    """Return the parameters of all combinations, each with tied embeddings and untied; every other one is slow.

    Each value of an axis is there with either.
    """
    found = []
    for places in product(*(enumerate(axis) for axis in axes)):
        names = [name for _, name in places]
        for tied in (True, False):
            slow = [pytest.mark.slow] if (sum(place for place, _ in places) + (not tied)) % 2 else []
            found.append(pytest.param(*names, tied, id="-".join((*names, "tied" if tied else "untied")), marks=slow))
    return found


def config(tied: bool = True, **changes: object) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        **changes,
    }


def model_of(settings: dict, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A stock transformers model in float32 with these weights."""
    kept = {key: value for key, value in settings.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings["model_type"], **kept), dtype=torch.float32)
    missing, unexpected = model.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing)
    model.tie_weights()
    return model.eval()


def random_source(tied: bool = True, dtype: torch.dtype = torch.float32, **changes: object) -> MemorySource:
    """Weights large enough for logits of some size, norms far from 1."""
    settings = config(tied, **changes)
    random = torch.Generator().manual_seed(5)
    tensors = {}
    names = MemorySource(config=settings, tensors={}).family.tensors(settings)
    for name, tensor in names.items():
        if tensor.tied_to is None:
            spread = 0.3 if len(tensor.shape) > 1 else 0.4
            start = 0.0 if len(tensor.shape) > 1 else 1.0
            tensors[name] = (torch.randn(tensor.shape, generator=random) * spread + start).to(dtype)
    return MemorySource(config=settings, tensors=tensors)


def loaded(source: Source) -> PreTrainedModel:
    names = [name for name, info in source.infos.items() if info.tied_to is None]
    return model_of(dict(source.config), {name: read_tensor(source, name) for name in names})
