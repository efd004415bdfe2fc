"""Is an imported model the published one? Logits of both, in float32."""

from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint.hyperllama import FoldedHead
from checkpoint.open import open_checkpoint
from checkpoint.source import Source
from eval.model import load_model, stream_model
from parallel.memory import available_memory, give_back_freed

BATCHES, LENGTH = 4, 64
"""Token sequences that both models read, and their length (tokens)."""


def difference(opened: Source, folder: Path) -> float:
    """Return the largest difference of logits between a published model and a plain Llama, as a share of the largest.

    The published model computes its own way: nothing is folded, and the logits of its stored weights are divided. One
    model at a time is in memory; a module at a time where there is too little for that.

    Args:
        opened: the published model, its head folded if it divides by a number.
        folder: the plain one.

    Raises:
        InputError: a model lacks a tensor.
    """
    raw, divisor = (opened.source, opened.divisor) if isinstance(opened, FoldedHead) else (opened, 1.0)
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, int(opened.config.get("max_position_embeddings", LENGTH)))
    batches = [torch.randint(0, opened.config["vocab_size"], (1, length), generator=generator) for _ in range(BATCHES)]
    published = [logits / divisor for logits in _logits(raw, batches)]
    plain = _logits(open_checkpoint(folder), batches)
    # torch's max, which does not lose a NaN.
    largest = torch.stack([logits.abs().max() for logits in published]).max().item()
    pairs = zip(published, plain, strict=True)
    found = torch.stack([(one - other).abs().max() for one, other in pairs]).max().item()
    return found / largest if largest else found


@torch.inference_mode()
def _logits(source: Source, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a model's logits [1, T, V] of each batch [1, T]."""
    fits = 4 * source.family.parameters(source.config) < 0.8 * available_memory()
    model = (load_model if fits else stream_model)(source)
    found = [model(input_ids=ids).logits for ids in batches]
    del model
    give_back_freed()
    return found
