"""What a log record holds beside the loss: gradient norms and clone asymmetry by block, loss by language, text seen,
speed against the device's peak, memory. Pure functions; the loop sums over ranks what has to be summed.

Letters: B batch, T tokens, L languages.
"""

import math
import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from parallel.errors import InputError
from parallel.families import family_of
from parallel.gpus import PEAK_FLOPS as PEAK_FLOPS
from parallel.gpus import peak_flops as peak_flops
from parallel.rows import NORMS, Tensor
from parallel.timing import flops_per_token as flops_per_token
from upscale.factors import AxisGrowth, Recipe, axis_growths
from upscale.verify import clone_asymmetry

SAMPLED = 1024
"""Entries of a dim of the small model that are looked at for how far copies are apart."""


def speed(
    tokens: int, seconds: float, *, flops_a_token: float, devices: int, peak: float | None
) -> dict[str, float | None]:
    """Return tokens/s over all devices, and the model FLOPs utilisation: their FLOPs as a share of the devices' peak.

    Args:
        tokens: trained on in these seconds by all devices together.
        peak: FLOP/s of one device, from `peak_flops`; without it there is no utilisation (None).
    """
    rate = tokens / seconds if seconds > 0 else math.nan
    return {"tokens_per_second": rate, "mfu": rate * flops_a_token / (devices * peak) if peak else None}


def peak_memory() -> dict[str, int]:
    """Return this process' peaks since its start (bytes): resident, and allocated and reserved on the device."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["device_allocated"] = torch.cuda.max_memory_allocated()
        found["device_reserved"] = torch.cuda.max_memory_reserved()
    return found


def blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the block of each tensor by name: embedding, layers/N/attention, layers/N/mlp, norms or head.

    All norms are one block, wherever they stand; a bias belongs to its matrix. An alias is listed with its own block.
    """
    return {name: _block(tensor) for name, tensor in family_of(config).tensors(config).items()}


def _block(tensor: Tensor) -> str:
    if tensor.kind in (*NORMS, "norm_bias"):
        return "norms"
    if tensor.layer is None:
        return tensor.kind
    return f"layers/{tensor.layer}/{'mlp' if '.mlp.' in tensor.name else 'attention'}"


def block_norms(squares: Mapping[str, float], blocks: Mapping[str, str]) -> dict[str, float]:
    """Return the gradient's norm by block, the blocks in the model's order.

    Args:
        squares: squared norm of each tensor's gradient, over all ranks; tied tensors once, under their owner's name.
        blocks: of every tensor.
    """
    parts: dict[str, list[float]] = {block: [] for block in dict.fromkeys(blocks.values())}
    for name, square in squares.items():
        parts[blocks[name]].append(square)
    return {block: math.sqrt(math.fsum(found)) for block, found in parts.items() if found}


def factors_of(provenance: Mapping[str, Any]) -> dict[str, int] | None:
    """Return the factors by which a model was grown last, from its provenance; None if it was not, or was padded."""
    recipe = provenance.get("recipe")
    if provenance.get("verb") != "grow" or not isinstance(recipe, Mapping):
        return None
    if any(value for key, value in recipe.items() if key.startswith("to_")):
        return None
    return {part: recipe.get(part) or recipe.get("width") or 1 for part in _SIZES}


def growths_of(recipe: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, tuple[AxisGrowth, ...]]:
    """Return what became of each tensor's dims when a model was grown, from the grown model alone.

    Args:
        recipe: factors of hidden, heads, kv_heads and ffn, as a grown checkpoint's provenance records them.
        config: the grown model's.

    Raises:
        InputError: the sizes are no multiples of the factors.
    """
    made_by = Recipe(**{part: recipe.get(part, 1) for part in _SIZES})  # type: ignore[arg-type]
    factors, small = made_by.factors(), dict(config)
    keys = [(part, key) for part, key in _SIZES.items() if part != "ffn"]
    for part, key in (*keys, *(("ffn", key) for key in family_of(config).widths.values())):
        size = config.get(key) or config["num_attention_heads"]
        small[key], rest = divmod(size, factors[part])
        if rest:
            raise InputError(f"{key} is {size}, which growth by {factors[part]} ({part}) cannot have made")
    family = family_of(config)
    small["head_dim"] = family.axes(config)["head_dim"]
    axes = axis_growths(made_by, small)
    return {name: tuple(axes[axis] for axis in tensor.axes) for name, tensor in family.tensors(small).items()}


_SIZES = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
}


def clone_asymmetries(
    tensors: Iterable[tuple[str, torch.Tensor]],
    growths: Mapping[str, Sequence[AxisGrowth]],
    blocks: Mapping[str, str],
) -> dict[str, float]:
    """Return how far copies are from one another in a grown model by block: the mean over the block's tensors of
    `upscale.verify.clone_asymmetry`. 0 in all blocks means that the model trains as the small one would. Of each dim
    the first SAMPLED entries stand for all.

    Args:
        tensors: (name, whole weight), one after the other; each is held no longer than it takes.
        growths: of every tensor's dims (`growths_of`).
        blocks: of every tensor.
    """
    parts: dict[str, list[float]] = {block: [] for block in dict.fromkeys(blocks.values())}
    for name, tensor in tensors:
        parts[blocks[name]].append(clone_asymmetry(tensor, growths[name], sampled=SAMPLED))
    return {block: math.fsum(found) / len(found) for block, found in parts.items() if found}


def language_sums(losses: torch.Tensor, weights: torch.Tensor, languages: torch.Tensor, count: int) -> torch.Tensor:
    """Return (sum of losses, tokens) by language, float64 [L, 2]; sums of several passes and ranks may be added up.

    Args:
        losses: of each token (nats), [B, T].
        weights: 1 or 0 for each sample [B] or token [B, T]; what has weight 0 counts nowhere.
        languages: number of each sample's or token's language, [B] or [B, T].
        count: L.
    """
    spread = [values if values.dim() == 2 else values[:, None].expand_as(losses) for values in (weights, languages)]
    weight, language = (values.reshape(-1) for values in spread)
    # Where the weight is 0 the loss may be anything, nan as well.
    loss = torch.where(weight != 0, losses.detach().reshape(-1).double() * weight, 0.0)
    found = []
    for number in range(count):
        here = language == number
        found.append(torch.stack([torch.where(here, loss, 0.0).sum(), torch.where(here, weight.double(), 0.0).sum()]))
    return torch.stack(found)


def language_losses(names: Sequence[str], sums: torch.Tensor) -> dict[str, float]:
    """Return the mean loss of a token (nats) by language, of the languages that had any.

    Args:
        sums: `language_sums`, added up over passes and ranks, [L, 2].
    """
    rows = zip(names, sums.tolist(), strict=True)
    return {name: loss / tokens for name, (loss, tokens) in rows if tokens}


def bytes_seen(tokens: Mapping[str, int], corpora: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the UTF-8 bytes of text seen by corpus: its tokens seen, at the corpus' mean bytes a token.

    Exact after whole epochs. Tokens seen by corpus are a function of the step alone (`train.data.order.Mixture.usage`),
    so no counter has to survive a resume.

    Args:
        tokens: seen of each corpus.
        corpora: (bytes, tokens) of each whole corpus.
    """
    return {name: round(seen * corpora[name][0] / corpora[name][1]) for name, seen in tokens.items()}
