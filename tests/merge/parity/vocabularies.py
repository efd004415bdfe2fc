"""Recipes that ask for a vocabulary, and how two outputs with one each are compared: by token.

mergekit numbers the words of a union in a hash table's order, another one in each process.
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from checkpoint.source import read_tensor
from growmerge.merging import Models
from merge.merge import MergedSource
from parity.cases import Case, Known
from parity.compare import Difference, difference

KINDS = {"tied vocabularies": ("float32",), "vocabularies": ("float32", "bfloat16 as it is")}
TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def linear(base: str | None, *models: str, weights: tuple[float, ...] = (0.5, 0.5)) -> str:
    listed = ", ".join(
        f"{{model: {name}, parameters: {{weight: {weight}}}}}" for name, weight in zip(models, weights, strict=True)
    )
    return f"models: [{listed}]\nmerge_method: linear\n" + (f"base_model: {base}\n" if base else "")


TWO = linear("base", "base", "swe")
THREE = linear("base", "base", "swe", "est", weights=(1, 0.5, 0.25))
TOKENS = """
tokenizer:
  source: union
  tokens:
    <zero>: {source: {kind: zero}}
    <new>: {source: {kind: model_token, model: swe, token: <b>}}
    <row>: {source: {kind: model_token, model: base, token_id: 5}}
    <c>: {source: est, force: true}
    a: {source: swe, force: true}
    b: {source: {kind: zero}, force: true}
"""
ROUNDED = Known(reason="mergekit rounds a mean of rows to bfloat16 after each model; ours once", largest=2**-7)
RECIPES = {
    "union of two": TWO + "tokenizer_source: union\n",
    "the base's": TWO + "tokenizer_source: base\n",
    "another model's": TWO + "tokenizer_source: swe\n",
    "union of three": THREE + "tokenizer_source: union\n",
    "union without a base": linear(None, "base", "swe", "est", weights=(1, 0.5, 0.25)) + "tokenizer_source: union\n",
    "the base's, padded": THREE + "tokenizer: {source: base, pad_to_multiple_of: 64}\n",
    "union, padded": THREE + "tokenizer: {source: union, pad_to_multiple_of: 64}\n",
    "tokens with sources": THREE + TOKENS,
    "a base with fewer rows than tokens": linear("short", "short", "swe") + "tokenizer_source: union\n",
    "task vectors": THREE.replace("linear", "task_arithmetic") + "tokenizer_source: union\n",
}
CASES = [
    Case(
        name=f"{name} ({kind})",
        recipe=recipe,
        models=kind,
        variants=variants,
        fast=name in ("union of three", "tokens with sources") and not kind.startswith("tied"),
        known={"bfloat16 as it is": ROUNDED},
    )
    for kind, variants in KINDS.items()
    for name, recipe in RECIPES.items()
]


def same_vocabulary(theirs: Path, models: Models) -> bool:
    """Return whether tokens and what is special among them are equal; their numbers need not be.

    Without a base mergekit starts from any of the models, whose settings hold: tokens alone are compared.
    """
    assert models.vocabulary is not None
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    ours = json.loads(models.vocabulary.files["tokenizer.json"])
    special = {token["content"]: token["special"] for token in ours["added_tokens"]}
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    same = tokenizer.get_vocab().keys() == models.vocabulary.tokens.keys()
    return same and (special == added or models.recipe.base is None)


def difference_by_token(
    theirs: Path, tensors: dict[str, torch.Tensor], merged: MergedSource, models: Models
) -> Difference:
    """Compare rows that are of the same token, rows of padding by their place, and all other tensors."""
    assert models.vocabulary is not None
    order, ours = AutoTokenizer.from_pretrained(theirs).get_vocab(), models.vocabulary.tokens
    found: dict[str, torch.Tensor] = {}
    sorted_: dict[str, torch.Tensor] = {}
    for name, info in merged.infos.items():
        if info.tied_to is not None:
            continue
        found[name], sorted_[name] = read_tensor(merged, name, dtype=info.slots["weight"]), tensors[name]
        if name in TENSORS:
            rows = len(found[name])
            assert rows == len(tensors[name]) == merged.config["vocab_size"]
            found[name] = found[name][[*(ours[token] for token in order), *range(len(ours), rows)]]
            sorted_[name] = tensors[name][[*order.values(), *range(len(order), rows)]]
    return difference(found, sorted_, {name: torch.zeros_like(one, dtype=torch.bool) for name, one in found.items()})
