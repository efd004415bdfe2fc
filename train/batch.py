"""Samples and batches: token ids, where documents begin, which corpus a sample is from, and what counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of the order."""

    ids: np.ndarray
    """Token ids [T + 1]: inputs and, one to the right, targets."""
    starts: np.ndarray | None = None
    """Where in `ids` documents begin, if they are masked from one another; the first position need not be listed."""
    corpus: int = 0
    """Number of its corpus."""


SampleAt = Callable[[int], Sample]
"""From a global sample number to the sample; a pure function."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One pass of one rank: B samples of T tokens."""

    ids: torch.Tensor
    """[B, T + 1], int64."""
    weights: torch.Tensor
    """[B, T], float32: 1 where a token counts. 0 for what fills up a short rank, and for targets that begin a document
    which is masked from the one before."""
    corpus: torch.Tensor
    """[B], int64."""
    positions: torch.Tensor | None = None
    """[B, T], int64: restart where a document begins, which is how transformers knows what to mask; None without."""


def plain_batch(ids: torch.Tensor) -> Batch:
    """Return a batch of token ids [B, T + 1] of one corpus of which every target counts."""
    return Batch(
        ids=ids, weights=torch.ones(ids.shape[0], ids.shape[1] - 1), corpus=torch.zeros(len(ids), dtype=torch.long)
    )


def batch_of(samples: Sequence[Sample], real: Sequence[bool]) -> Batch:
    """Put samples together; one that is not real counts nothing."""
    ids = torch.from_numpy(np.stack([sample.ids for sample in samples]).astype(np.int64))
    length = ids.shape[1] - 1
    weights = torch.zeros(len(samples), length)
    positions = None
    if any(sample.starts is not None for sample in samples):
        positions = torch.arange(length).repeat(len(samples), 1)
    for row, (sample, counts) in enumerate(zip(samples, real, strict=True)):
        weights[row] = float(counts)
        if sample.starts is not None and positions is not None:
            positions[row], unpredicted = restarting(sample.starts, length)
            weights[row, unpredicted] = 0.0
    corpus = torch.tensor([sample.corpus for sample in samples])
    return Batch(ids=ids, weights=weights, corpus=corpus, positions=positions)


def restarting(starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (position ids [T] that restart at each start, input positions whose target is a document's first token).

    A document's first token is not predicted from the document before it, which the mask hides.
    """
    inside = starts[(starts > 0) & (starts < length)]
    begins = np.zeros(length, dtype=np.int64)
    begins[inside] = inside
    positions = np.arange(length) - np.maximum.accumulate(begins)
    first = starts[(starts > 0) & (starts <= length)] - 1
    return torch.from_numpy(positions), torch.from_numpy(first.astype(np.int64))


def count_tokens(batches: Sequence[Batch], corpora: int) -> torch.Tensor:
    """Return the tokens that count, by corpus [corpora], float64."""
    counts = torch.zeros(corpora, dtype=torch.float64)
    for batch in batches:
        counts.index_add_(0, batch.corpus, batch.weights.double().sum(1))
    return counts
