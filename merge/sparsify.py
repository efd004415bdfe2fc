"""Which elements of a task vector stay: by size (TIES, Breadcrumbs), by chance (DARE), by both (DELLA).

A sparsifier is asked twice: `collect` says what it has to know of the whole tensor, `keep` does a box. Random numbers
depend on (seed, model, tensor, element) alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from checkpoint.source import Box, Map, box_shape
from merge.threshold import Cut, find_cuts, magnitudes, trim
from upscale.split import uniform_at

Read = Callable[[Box], torch.Tensor]
"""From a box to a task vector's float32 values in it."""
SMALLEST = 1e-7
"""Sums of magnitudes below this are not brought back by rescaling."""


@dataclass(frozen=True, kw_only=True)
class Sparsifier:
    """How a task vector is made sparse."""

    kind: Literal["magnitude", "random", "outliers", "ranked"]
    density: float
    """Share of the elements that stay; all of them, and as they are, from 1 on."""
    gamma: float = 0.0
    """outliers: share of the elements, the largest, that go."""
    epsilon: float = 0.0
    """ranked: by how much the chance to stay is below and above the density, from a row's smallest to its largest."""
    rescale: bool = False
    """Bring the sum of magnitudes back to what it was."""
    key: str = ""
    """Of the random numbers: seed and model."""

    @property
    def whole(self) -> bool:
        """Whether a box needs whole rows."""
        return self.kind == "ranked" and 0 < self.density < 1


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a sparsifier knows of a whole tensor."""

    cut: Cut | None = None
    """Of what may stay."""
    outliers: Cut | None = None
    """Of what goes of that."""
    factor: float = 1.0
    """By which the rest is multiplied."""


def collect(
    sparsifier: Sparsifier, name: str, read: Read, shape: Sequence[int], tiles: Sequence[Box], spread: Map
) -> Kept:
    """Find what `keep` needs to know.

    Args:
        name: of the tensor; a part of the random numbers' key.
        tiles: boxes that cover the shape once, contiguous, in row-major order.
    """
    if sparsifier.density >= 1 or sparsifier.density <= 0:
        return Kept()
    found = Kept()
    size = math.prod(shape)
    if sparsifier.kind == "magnitude":
        stays = max(1, int(sparsifier.density * size))
        found = Kept(cut=find_cuts(lambda box: [read(box)], shape, tiles, [stays], spread)[0])
    elif sparsifier.kind == "outliers":
        stays = int(sparsifier.density * size)
        top = min(int(sparsifier.gamma * size), size - stays)  # the density goes first
        ranks = [rank for rank in (top + stays, top) if rank]
        cuts = find_cuts(lambda box: [read(box)] * len(ranks), shape, tiles, ranks, spread) if ranks else []
        found = Kept(cut=cuts[0] if stays else None, outliers=cuts[1] if len(cuts) > 1 else None)
    if not sparsifier.rescale:
        return found

    def sums(tile: Box) -> np.ndarray:
        delta = read(tile)
        kept = keep(sparsifier, name, delta, found, shape, tile)
        return np.array([one.abs().sum().item() for one in (delta, kept)])  # of a tile; of all in float64

    before, after = sum(spread(sums, tiles), np.zeros(2))
    return Kept(cut=found.cut, outliers=found.outliers, factor=before / after if min(before, after) >= SMALLEST else 1)


def keep(
    sparsifier: Sparsifier, name: str, delta: torch.Tensor, kept: Kept, shape: Sequence[int], box: Box
) -> torch.Tensor:
    """Return a box of a task vector with zeros for what goes; the rest is as it was, not yet times `kept.factor`.

    Args:
        delta: the box; whole rows of it if `sparsifier.whole`.
    """
    if sparsifier.density >= 1:
        return delta
    if sparsifier.density <= 0 or (sparsifier.kind == "outliers" and kept.cut is None):
        return torch.zeros_like(delta)
    if sparsifier.kind in ("magnitude", "outliers"):
        assert kept.cut is not None, "a cut was not collected"
        found = trim(delta, kept.cut, shape, box)
        return found if kept.outliers is None else found - trim(delta, kept.outliers, shape, box)
    # Below zero where it stays; the sign, spread over all bits, is the mask. (torch.where takes five times as long.)
    over = uniform_at(f"{sparsifier.key}/{name}", box)
    over -= chances(delta, sparsifier) if sparsifier.kind == "ranked" else sparsifier.density
    mask = over.view(torch.int32).bitwise_right_shift_(31)
    return mask.bitwise_and_(delta.view(torch.int32)).view(torch.float32)


def chances(delta: torch.Tensor, sparsifier: Sparsifier) -> torch.Tensor:
    """Return each element's chance to stay: linear in the rank of its magnitude within its row (arXiv 2406.11617).

    From density - epsilon for the smallest to density + epsilon for the largest; of equal ones the first ranks higher.
    """
    length = delta.shape[-1]
    order = magnitudes(delta).sort(dim=-1, descending=True, stable=True).indices
    places = torch.empty_like(order).scatter_(-1, order, torch.arange(length).expand_as(order))
    rank = 1 - places.float() / (length - 1) if length > 1 else torch.full(delta.shape, 0.5)
    return rank.mul_(2 * sparsifier.epsilon).add_(sparsifier.density - sparsifier.epsilon)


def whole_rows(box: Box, shape: Sequence[int]) -> tuple[Box, Box]:
    """Return the rows that a box lies in, and where in them it lies."""
    if not box:
        return box, box
    rows = (*box[:-1], slice(0, shape[-1]))
    return rows, (*(slice(0, size) for size in box_shape(box)[:-1]), box[-1])
