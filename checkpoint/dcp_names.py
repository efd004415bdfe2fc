"""What the entries of a DCP folder are called: where each tensor of a model lies, by Hugging Face name.

A key is a prefix (`model.` or `app.model.` of a state dict that holds a model and an optimizer, or none) and the
parameter's name in the running model: of transformers, or of torchtitan's Llama 3. Optimizer state has a prefix of its
own that ends in `state.`, the name, and `.exp_avg`, `.exp_avg_sq` or `.step`.

torchtitan turns neighbouring elements 2i and 2i + 1 of a head's query (complex rotary embeddings, as Meta's Llama),
transformers i and i + head_dim / 2: the rows of q_proj and k_proj stand in another order. With fused attention, rows of
each kv head follow one another: its query heads, its key head, its value head.
(torchtitan/models/llama3/state_dict_adapter.py and protocols/state_dict_adapter.py)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.errors import InputError
from parallel.families import LLAMA, family_of
from parallel.rows import Tensor

QUERY = "model.layers.{layer}.self_attn.q_proj.weight"
FUSED = "layers.{layer}.attention.qkv_linear.wqkv.weight"
TITAN: Mapping[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("tok_embeddings.weight",),
    QUERY: (
        *("layers.{layer}.attention.wq.weight", "layers.{layer}.attention.qkv_linear.wq.weight"),
        FUSED,
    ),
    "model.layers.{layer}.self_attn.k_proj.weight": (
        *("layers.{layer}.attention.wk.weight", "layers.{layer}.attention.qkv_linear.wk.weight"),
        FUSED,
    ),
    "model.layers.{layer}.self_attn.v_proj.weight": (
        *("layers.{layer}.attention.wv.weight", "layers.{layer}.attention.qkv_linear.wv.weight"),
        FUSED,
    ),
    "model.layers.{layer}.self_attn.o_proj.weight": ("layers.{layer}.attention.wo.weight",),
    "model.layers.{layer}.mlp.gate_proj.weight": ("layers.{layer}.feed_forward.w1.weight",),
    "model.layers.{layer}.mlp.up_proj.weight": ("layers.{layer}.feed_forward.w3.weight",),
    "model.layers.{layer}.mlp.down_proj.weight": ("layers.{layer}.feed_forward.w2.weight",),
    "model.layers.{layer}.input_layernorm.weight": ("layers.{layer}.attention_norm.weight",),
    "model.layers.{layer}.post_attention_layernorm.weight": ("layers.{layer}.ffn_norm.weight",),
    "model.norm.weight": ("norm.weight",),
    "lm_head.weight": ("output.weight", "lm_head.weight"),
}
"""Hugging Face name -> what versions of torchtitan call it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a tensor is of a stored one."""

    name: str
    """In the running model."""
    shape: tuple[int, ...]
    """Of the stored tensor."""
    rows: torch.Tensor | None = None
    """The stored row of each row, where they differ."""


def naming(path: Path, config: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, dict[str, Part]]:
    """Return the prefix of the model's keys, and what each tensor is of which stored one, by Hugging Face name.

    A tensor that is not there has the name that it would have.

    Raises:
        InputError: the keys are in no naming that is known, or of several models.
    """
    family = family_of(config)
    tensors = family.tensors(config)
    # No other tensor of any naming ends as the first query does.
    for table in ({QUERY: (QUERY,)}, TITAN):
        found = prefixes(keys, [name.format(layer=0) for name in table[QUERY]])
        if len(found) > 1:
            raise InputError(f"{path}: holds several models ({', '.join(sorted(found))}), where one is expected")
        for before in found:
            if table is not TITAN:
                return before, {name: Part(name=name, shape=tensor.shape) for name, tensor in tensors.items()}
            if family is LLAMA:
                there = {key.removeprefix(before) for key in keys}
                return before, {name: _titan(tensor, config, there) for name, tensor in tensors.items()}
    raise InputError(
        f"{path}: holds no {family.name} model as config.json says under names that are known: "
        "those of transformers, or of torchtitan's Llama 3"
    )


def prefixes(keys: Iterable[str], names: Iterable[str], endings: Iterable[str] = ("",)) -> set[str]:
    """Return what stands before the names in keys that end in one, followed by one of the endings."""
    known = set(names)
    found = set()
    for key in keys:
        for ending in endings:
            if key.endswith(ending):
                found |= {before for before, rest in tails(key.removesuffix(ending)) if rest in known}
    return found


def tails(key: str) -> Iterator[tuple[str, str]]:
    """Cut a key in two before each of its components."""
    parts = key.split(".")
    for at in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:at]), ".".join(parts[at:])


def _titan(tensor: Tensor, config: Mapping[str, Any], there: set[str]) -> Part:
    """Return where torchtitan's Llama 3 has a tensor; one that it has not (a bias) keeps its name."""
    general = tensor.name.replace(f"layers.{tensor.layer}.", "layers.{layer}.", 1)
    names = [name.format(layer=tensor.layer) for name in TITAN.get(general, (general,))]
    name = next((name for name in names if name in there), names[0])
    sizes = LLAMA.axes(config)
    head = sizes["head_dim"]
    heads, kv_heads = sizes["q"] // head, sizes["kv"] // head
    rows = None
    shape = tensor.shape
    if name == FUSED.format(layer=tensor.layer):
        queries = heads // kv_heads
        shape = (sizes["q"] + 2 * sizes["kv"], sizes["hidden"])
        fused = torch.arange(shape[0]).view(kv_heads, queries + 2, head)
        kinds = {"q_proj": fused[:, :queries], "k_proj": fused[:, queries], "v_proj": fused[:, queries + 1]}
        rows = kinds[tensor.name.split(".")[-2]].reshape(-1)
    if tensor.name.endswith(("q_proj.weight", "k_proj.weight")):
        rotary = torch.arange(tensor.shape[0]).view(-1, head // 2, 2).transpose(1, 2).reshape(-1)
        rows = rotary if rows is None else rows[rotary]
    return Part(name=name, shape=shape, rows=rows)
