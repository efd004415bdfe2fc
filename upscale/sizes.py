"""Sizes that a model is padded to, and what becomes of its config; how it is padded: `upscale.pad`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parallel.errors import InputError
from parallel.families import family_of
from parallel.rows import JOINED

KEYS = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
"""What may be padded beside ffn, and its key in a Hugging Face config."""
ROTARY = ("default", "linear", "llama3")
"""Rotary embeddings whose frequencies depend on the index over head_dim alone."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the grown model; None for what stays as it is."""

    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    """Feed-forward width; of experts that of each, but for one that sees every token."""
    head_dim: int | None = None
    """Elements of a head, a whole multiple of what they were."""

    def given(self) -> dict[str, int]:
        return {part: size for part, size in asdict(self).items() if size is not None}


def padded_config(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the padded model's Hugging Face config.

    Raises:
        InputError: a size below the model's; heads that key/value heads do not divide, or that leave no room for those
            that attend to one; a head_dim that is no multiple, or whose rotary embedding or norms do not allow it.
    """
    family, before, given = family_of(config), sizes_of(config), sizes.given()
    refused = [part for part in given if part != "ffn"] if family.plain_heads else []
    if refused:
        raise InputError(
            f"size of {refused[0]}: of {family.name} ffn alone can be padded (its LayerNorms subtract the mean of the "
            "whole stream, and its heads are hidden_size / num_attention_heads wide)"
        )
    after = {**before, **given}
    for part, size in given.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < before[part]:
            raise InputError(f"size of {part} is {size!r}: allowed are whole numbers from {before[part]} on")
    asked = f"{after['heads']} heads over {after['kv_heads']} key/value heads"
    if after["heads"] % after["kv_heads"]:
        raise InputError(f"{asked}: not a whole number each")
    group = before["heads"] // before["kv_heads"]
    if after["heads"] // after["kv_heads"] < group:
        raise InputError(f"{asked}: in the model {group} attend to one, and they have to stay together")
    if family.norms_all_heads and any(after[part] != before[part] for part in ("heads", "kv_heads")):
        raise InputError(f"{asked}: {family.name} norms all heads together, new ones with those that are there")
    if after["head_dim"] != before["head_dim"]:
        _check_head_dim(config, before["head_dim"], after["head_dim"])
    keys = {**KEYS, "ffn": family.widths["ffn"]}
    found = {**config, **{keys[part]: size for part, size in (given if family.plain_heads else after).items()}}
    if after["hidden"] != before["hidden"]:
        found["rms_norm_eps"] = config.get("rms_norm_eps", family.norm_eps) * before["hidden"] / after["hidden"]
    return found


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    axes = family_of(config).axes(config)
    heads, kv_heads = axes["q"] // axes["head_dim"], axes["kv"] // axes["head_dim"]
    return {"heads": heads, "kv_heads": kv_heads} | {part: axes[part] for part in ("hidden", "ffn", "head_dim")}


def _check_head_dim(config: Mapping[str, Any], before: int, after: int) -> None:
    family = family_of(config)
    if after % before:
        raise InputError(
            f"head_dim {after}: allowed are multiples of {before}, so that rotary embeddings turn as they did"
        )
    if any("q" in axis.split(JOINED) for axis in family.joined):
        raise InputError(f"head_dim of {family.name}: its queries and keys are in one matrix with its values")
    if family.head_norms:
        raise InputError(f"head_dim of {family.name}: its norms of heads would mix what is new with what is there")
    kind = rotary_of(config)
    if kind not in ROTARY:
        raise InputError(
            f"head_dim with rotary embeddings of type {kind!r}: allowed are {', '.join(ROTARY)}, "
            "whose frequencies depend on the index over head_dim alone"
        )


def rotary_of(config: Mapping[str, Any]) -> str:
    """Return the type of a model's rotary embedding."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(given.get("rope_type") or given.get("type") or "default")
