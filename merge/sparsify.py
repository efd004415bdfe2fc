"""Which elements of a task vector stay: by size (TIES, Breadcrumbs), by chance (DARE), by both (DELLA).

A sparsifier is asked twice: `collect` says what it has to know of the whole tensor, `keep` does a box. Random numbers
depend on (seed, model, tensor, element) alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from checkpoint.source import Box, Map, box_shape
from checkpoint.streams import chosen_at, uniform_at
from merge.threshold import Cut, Read, find_cuts, magnitudes, trim

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
    finite: bool = False
    """Whether all values are known to be."""


def collect(
    sparsifiers: Sequence[Sparsifier],
    name: str,
    read: Read,
    shape: Sequence[int],
    tiles: Sequence[Box],
    spread: Map,
) -> list[Kept]:
    """Find what `keep` needs to know, of N task vectors in one pass.

    Args:
        sparsifiers: one a task vector.
        name: of the tensor; a part of the random numbers' key.
        read: from a box, and numbers of task vectors, to their float32 values in it, which need not be finite.
        tiles: boxes that cover the shape once, contiguous, in row-major order.
    """
    found = _cuts(sparsifiers, read, shape, tiles, spread)
    rescaled = [number for number, one in enumerate(sparsifiers) if one.rescale and 0 < one.density < 1]
    if not rescaled:
        return found

    def sums(tile: Box) -> np.ndarray:
        """Return sums of magnitudes, before and after; of a tile in float32, of all in float64."""
        total = np.zeros((2, len(rescaled)))
        deltas = read(tile, rescaled)
        room = torch.empty_like(deltas[0])
        for place, (number, delta) in enumerate(zip(rescaled, deltas, strict=True)):
            sizes = torch.abs(delta, out=room)
            kept = keep(sparsifiers[number], name, sizes, found[number], shape, tile)
            total[:, place] = sizes.sum().item(), kept.sum().item()
        return total

    for number, (before, after) in zip(rescaled, sum(spread(sums, tiles)).T, strict=True):
        finite = math.isfinite(before)
        factor = before / after if finite and min(before, after) >= SMALLEST else 1.0
        found[number] = replace(found[number], factor=factor, finite=finite)
    return found


def _cuts(
    sparsifiers: Sequence[Sparsifier],
    read: Read,
    shape: Sequence[int],
    tiles: Sequence[Box],
    spread: Map,
) -> list[Kept]:
    """Return the cuts of those that go by size."""
    size = math.prod(shape)
    ranks: dict[tuple[int, str], int] = {}
    """Elements that are at least as large as a cut, by the sparsifier's number and which of its cuts."""
    for number, one in enumerate(sparsifiers):
        if not 0 < one.density < 1 or one.kind in ("random", "ranked"):
            continue
        stays = int(one.density * size)
        top = min(int(one.gamma * size), size - stays)  # the density goes first
        wanted = {"cut": max(1, stays)} if one.kind == "magnitude" else {"cut": stays and top + stays, "outliers": top}
        ranks |= {(number, which): rank for which, rank in wanted.items() if rank}

    numbers = [number for number, _ in ranks]

    def of_ranks(tile: Box, which: Sequence[int]) -> list[torch.Tensor]:
        wanted = [numbers[rank] for rank in which]
        once = [*dict.fromkeys(wanted)]
        deltas = dict(zip(once, read(tile, once), strict=True))
        return [deltas[number] for number in wanted]

    cuts = find_cuts(of_ranks, shape, tiles, [*ranks.values()], spread) if ranks else []
    known = dict(zip(ranks, cuts, strict=True))
    return [Kept(cut=known.get((at, "cut")), outliers=known.get((at, "outliers"))) for at in range(len(sparsifiers))]


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
    return _mask(sparsifier, name, delta, box).mul_(delta)


def _mask(sparsifier: Sparsifier, name: str, delta: torch.Tensor, box: Box) -> torch.Tensor:
    """Return 1 for what stays and 0 for what goes, float32. (torch.where takes ten times as long.)"""
    key = f"{sparsifier.key}/{name}"
    if sparsifier.kind == "random":
        stays = chosen_at(key, box, sparsifier.density)
    else:
        stays = (uniform_at(key, box).to(delta.device) < chances(delta, sparsifier)).cpu().numpy()
    return torch.from_numpy(stays.view(np.int8).astype(np.float32)).to(delta.device)


def chances(delta: torch.Tensor, sparsifier: Sparsifier) -> torch.Tensor:
    """Return each element's chance to stay: linear in the rank of its magnitude within its row (arXiv 2406.11617).

    From density - epsilon for the smallest to density + epsilon for the largest; of equal ones the first ranks higher.
    """
    length = delta.shape[-1]
    order = magnitudes(delta).sort(dim=-1, descending=True, stable=True).indices
    places = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=delta.device).expand_as(order))
    rank = 1 - places.float() / (length - 1) if length > 1 else torch.full_like(delta, 0.5)
    return rank.mul_(2 * sparsifier.epsilon).add_(sparsifier.density - sparsifier.epsilon)


def whole_rows(box: Box, shape: Sequence[int]) -> tuple[Box, Box]:
    """Return the rows that a box lies in, and where in them it lies."""
    if not box:
        return box, box
    rows = (*box[:-1], slice(0, shape[-1]))
    return rows, (*(slice(0, size) for size in box_shape(box)[:-1]), box[-1])
