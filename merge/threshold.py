"""The exact k-th largest magnitude of tensors that are never in memory whole.

The magnitude of a float32 number orders as its bit pattern without the sign. Three passes over tiles find the k-th:
count the patterns' high 16 bits; in the bin that holds the k-th, count the low 15; where only some of the elements
that equal the k-th may stay, count them tile by tile. Elements of equal magnitude stay lowest row-major index first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint.source import Box, Map

LOW = 15
"""Bits of a pattern (31 without the sign) that the second pass counts."""
WINDOW = 16
"""Tiles whose counts are held at once at most."""

Read = Callable[[Box], Sequence[torch.Tensor]]
"""From a box to the N tensors' float32 values in it."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What stays of a tensor: magnitudes above a pattern, and those equal to it up to an index."""

    pattern: int
    """Bit pattern of the smallest magnitude that stays."""
    last: int
    """Row-major index of the last element of that magnitude that stays."""


def find_cuts(read: Read, shape: Sequence[int], tiles: Sequence[Box], keep: Sequence[int], spread: Map) -> list[Cut]:
    """Return, for each of N tensors of one shape, the cut that keeps its `keep[i]` largest magnitudes.

    Args:
        tiles: boxes that cover the shape once, each contiguous and in row-major order; the result does not depend
            on how they are cut.
        keep: elements that stay, 1 to the tensor's size.
        spread: maps a function over tiles.
    """
    models = range(len(keep))
    size = prod(shape)
    if all(count == size for count in keep):
        return [Cut(pattern=0, last=size - 1) for _ in models]

    def high(tile: Box) -> np.ndarray:
        return np.stack([_count(magnitudes(values).bitwise_right_shift_(LOW), 1 << 16) for values in read(tile)])

    bins, left = _locate(_total(high, tiles, spread), keep)

    def low(tile: Box) -> np.ndarray:
        return np.stack([_lows(values, where) for values, where in zip(read(tile), bins, strict=True)])

    counts = _total(low, tiles, spread)
    lows, left = _locate(counts, left)
    patterns = [(where << LOW) + low for where, low in zip(bins, lows, strict=True)]
    whole = [bool(counts[model, lows[model]] == left[model]) for model in models]
    if all(whole):
        return [Cut(pattern=pattern, last=size - 1) for pattern in patterns]

    def ties(tile: Box) -> np.ndarray:
        found = zip(read(tile), patterns, strict=True)
        return np.array([np.count_nonzero(magnitudes(values).numpy() == pattern) for values, pattern in found])

    before = np.cumsum([np.zeros(len(keep), dtype=np.int64), *_windows(ties, tiles, spread)], axis=0)
    cuts = []
    for model in models:
        if whole[model]:
            cuts.append(Cut(pattern=patterns[model], last=size - 1))
            continue
        number = int(np.searchsorted(before[:, model], left[model])) - 1
        bits = magnitudes(read(tiles[number])[model])
        tied = (bits.flatten() == patterns[model]).nonzero()[left[model] - before[number, model] - 1].item()
        start = sum(prod(part.stop - part.start for part in tile) for tile in tiles[:number])
        cuts.append(Cut(pattern=patterns[model], last=start + int(tied)))
    return cuts


def trim(delta: torch.Tensor, cut: Cut, shape: Sequence[int], box: Box) -> torch.Tensor:
    """Return a box of a tensor with what the cut drops set to zero."""
    first, last = _ends(shape, box)
    if last <= cut.last or first > cut.last or delta.numel() == 0:
        # Of those that equal the smallest that stays all do, or none does: one comparison for all.
        largest = cut.pattern - (last <= cut.last)
        if largest < 0:
            return delta
        return F.hardshrink(delta, float(np.int32(largest).view(np.float32)))
    bits = magnitudes(delta).numpy()
    index = np.ravel_multi_index(tuple(np.ogrid[box]), tuple(shape))
    stays = (bits > cut.pattern) | ((bits == cut.pattern) & (index <= cut.last))
    return delta * torch.from_numpy(stays)


def _ends(shape: Sequence[int], box: Box) -> tuple[int, int]:
    """Return the row-major indices of a box's first and last element."""
    first = last = 0
    for size, part in zip(shape, box, strict=True):
        first, last = first * size + part.start, last * size + part.stop - 1
    return first, last


def _lows(values: torch.Tensor, where: int) -> np.ndarray:
    """Count the low bits of the magnitudes that lie in a bin."""
    bits = magnitudes(values).flatten().numpy()
    found = bits[bits >> LOW == where]
    return np.bincount(found & ((1 << LOW) - 1), minlength=1 << LOW)


def magnitudes(values: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns of the absolute values, int32: they are in the same order."""
    return values.contiguous().view(torch.int32) & 0x7FFFFFFF


def _count(values: torch.Tensor, bins: int) -> np.ndarray:
    return torch.bincount(values.flatten(), minlength=bins).numpy()


def _windows(count: Callable[[Box], np.ndarray], tiles: Sequence[Box], spread: Map) -> Iterator[np.ndarray]:
    """Yield the tiles' counts in order, few of them alive at a time."""
    for start in range(0, len(tiles), WINDOW):
        yield from spread(count, tiles[start : start + WINDOW])


def _total(count: Callable[[Box], np.ndarray], tiles: Sequence[Box], spread: Map) -> np.ndarray:
    total: np.ndarray = np.zeros((), dtype=np.int64)
    for counts in _windows(count, tiles, spread):
        total = total + counts
    return total


def _locate(counts: np.ndarray, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return, for each row of counts, the bin of its rank-th largest element, and the rank within that bin."""
    bins, left = [], []
    for row, rank in zip(counts, ranks, strict=True):
        from_top = np.cumsum(row[::-1])
        place = int(np.searchsorted(from_top, rank))
        bins.append(len(row) - 1 - place)
        left.append(rank - int(from_top[place] - row[::-1][place]))
    return bins, left
