"""The exact k-th largest magnitude of tensors that are never in memory whole.

The magnitude of a float32 number orders as its bit pattern without the sign. A sample says between which two patterns
the k-th lies; one pass over tiles counts what is above and keeps what is between, a few of a hundred. Where a sample
has misled, or too much lies between, three passes find it for certain: count the patterns' high 16 bits; in the bin of
the k-th count the low 15; where only some of those that equal the k-th may stay, count them tile by tile.
Elements of equal magnitude stay lowest row-major index first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod, sqrt
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint.source import Box, Map, row_major_tiles

LOW = 15
"""Bits of a pattern (31 without the sign) that the second of three passes counts."""
WINDOW = 16
"""Tiles whose counts are held at once at most."""
SAMPLE = 1 << 15
"""Elements of a sample at least, as far as there are so many."""
PIECE = 1 << 14
"""Elements that are read at one place of it."""
GROUP = 3
"""Models whose samples are taken together, so that what they have in common is read once."""
SIGMAS = 5.0
"""How far from the sample's k-th the tensor's may be, in standard deviations of its rank."""
BETWEEN = 0.1
"""Share of a tensor that may lie between the two patterns."""

Counted = TypeVar("Counted")
Read = Callable[[Box, Sequence[int]], Sequence[torch.Tensor]]
"""From a box, and the numbers of some of N tensors, to their float32 values in it."""


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
    size = prod(shape)
    if all(count == size for count in keep):
        return [Cut(pattern=0, last=size - 1) for _ in keep]
    return _by_sample(read, shape, tiles, keep, spread) or _by_counting(read, shape, tiles, keep, spread)


def _by_sample(
    read: Read, shape: Sequence[int], tiles: Sequence[Box], keep: Sequence[int], spread: Map
) -> list[Cut] | None:
    """Return the cuts if the sample's bounds hold what is looked for and little else."""
    size, every = prod(shape), range(len(keep))
    wanted = max(SAMPLE, size >> 9)  # what is between, and is kept, is a smaller share the larger the tensor
    pieces = row_major_tiles(shape, PIECE)
    chosen = pieces[:: max(1, len(pieces) * PIECE // (4 * wanted))]  # everywhere: rows are not alike
    step = max(1, sum(prod(_shape(piece)) for piece in chosen) // wanted)

    def bounds_of(models: Sequence[int]) -> list[tuple[int, int]]:
        parts = [
            [magnitudes(values).flatten()[::step].cpu().numpy().copy() for values in read(piece, models)]
            for piece in chosen
        ]
        samples = map(np.concatenate, zip(*parts, strict=True))
        return [_bounds(sample, keep[model] / size) for model, sample in zip(models, samples, strict=True)]

    bounds = [*chain.from_iterable(spread(bounds_of, [every[at : at + GROUP] for at in every[::GROUP]]))]

    def split(tile: Box) -> list[tuple[int, int, int, np.ndarray]]:
        return [_split(values, *ends) for values, ends in zip(read(tile, every), bounds, strict=True)]

    found: list[list[tuple[int, int, int, np.ndarray]]] = []
    for parts in windows(split, tiles, spread, 4 * WINDOW):
        found.append(parts)
        if any(
            sum(len(tile[model][3]) for tile in found[-WINDOW:]) > BETWEEN * WINDOW * prod(_shape(tiles[0]))
            for model in range(len(keep))
        ):
            return None
    cuts = []
    for model, (count, (low, high)) in enumerate(zip(keep, bounds, strict=True)):
        own = [tile[model] for tile in found]
        above, highs, lows = (sum(counts) for counts in zip(*(part[:3] for part in own), strict=True))
        between = np.concatenate([part[3] for part in own])
        left = count - above
        if left <= 0 or left > highs + len(between) + lows:
            return None
        if left <= highs:
            pattern, equal = high, [part[1] for part in own]
        elif left <= highs + len(between):
            left -= highs
            pattern = int(np.partition(between, len(between) - left)[len(between) - left])
            left -= int(np.count_nonzero(between > pattern))
            equal = [int(np.count_nonzero(part[3] == pattern)) for part in own]
        else:
            left -= highs + len(between)
            pattern, equal = low, [part[2] for part in own]
        cuts.append(_cut(read, shape, tiles, model, pattern, left, equal))
    return cuts


def _bounds(values: np.ndarray, share: float) -> tuple[int, int]:
    """Return two patterns between which the one lies that a share of all is not below, by a sample."""
    count = len(values)
    middle, away = count * (1 - share), SIGMAS * sqrt(count * share * (1 - share)) + 2
    low, high = max(0, int(middle - away)), min(count - 1, int(middle + away))
    sorted_there = np.partition(values, [low, high])
    return (0 if low == 0 else int(sorted_there[low])), (0x7FFFFFFF if high == count - 1 else int(sorted_there[high]))


def _split(values: torch.Tensor, low: int, high: int) -> tuple[int, int, int, np.ndarray]:
    """Return how many magnitudes are above `high`, equal to it, equal to `low`, and the patterns between them."""
    above, inside = (_between if values.device.type == "cpu" else _between_anywhere)(values, low, high)
    highs = int(np.count_nonzero(inside == high))
    lows = int(np.count_nonzero(inside == low)) if low != high else 0
    return above, highs, lows, inside[(inside > low) & (inside < high)] if highs + lows < len(inside) else inside[:0]


def _between(values: torch.Tensor, low: int, high: int) -> tuple[int, np.ndarray]:
    """Return how many magnitudes are above `high`, and the patterns from `low` to `high`."""
    doubled = np.left_shift(values.flatten().numpy().view(np.uint32), np.uint32(1))  # without the sign
    above = doubled > np.uint32(2 * high)
    found = np.flatnonzero((doubled >= np.uint32(2 * low)) ^ above)  # a mask for an index takes twice as long
    return int(np.count_nonzero(above)), (doubled[found] >> np.uint32(1)).astype(np.int32)


def _between_anywhere(values: torch.Tensor, low: int, high: int) -> tuple[int, np.ndarray]:
    """Return the same of values on any device."""
    bits = magnitudes(values)
    return int((bits > high).sum()), bits[(bits >= low) & (bits <= high)].cpu().numpy()


def _cut(
    read: Read, shape: Sequence[int], tiles: Sequence[Box], model: int, pattern: int, left: int, equal: Sequence[int]
) -> Cut:
    """Return the cut at a pattern of which the first `left` elements stay, of so many that each tile has."""
    if sum(equal) == left:
        return Cut(pattern=pattern, last=prod(shape) - 1)
    before = np.cumsum([0, *equal])
    number = int(np.searchsorted(before, left)) - 1
    tied = _equal(read(tiles[number], [model])[0], pattern)[left - before[number] - 1]
    start = sum(prod(_shape(tile)) for tile in tiles[:number])
    return Cut(pattern=pattern, last=start + int(tied))


def _equal(values: torch.Tensor, pattern: int) -> np.ndarray:
    """Return the row-major indices of a box's elements of a magnitude."""
    return np.flatnonzero(np.abs(values.flatten().cpu().numpy()) == np.int32(pattern).view(np.float32))


def _shape(box: Box) -> list[int]:
    return [part.stop - part.start for part in box]


def _by_counting(read: Read, shape: Sequence[int], tiles: Sequence[Box], keep: Sequence[int], spread: Map) -> list[Cut]:
    """Return the cuts by three passes at most."""
    models, size = range(len(keep)), prod(shape)

    def high(tile: Box) -> np.ndarray:
        return np.stack(
            [_count(magnitudes(values).bitwise_right_shift_(LOW), 1 << 16) for values in read(tile, models)]
        )

    bins, left = _locate(_total(high, tiles, spread), keep)

    def low(tile: Box) -> np.ndarray:
        return np.stack([_lows(values, where) for values, where in zip(read(tile, models), bins, strict=True)])

    counts = _total(low, tiles, spread)
    lows, left = _locate(counts, left)
    patterns = [(where << LOW) + low for where, low in zip(bins, lows, strict=True)]
    whole = [bool(counts[model, lows[model]] == left[model]) for model in models]
    if all(whole):
        return [Cut(pattern=pattern, last=size - 1) for pattern in patterns]

    def ties(tile: Box) -> np.ndarray:
        found = zip(read(tile, models), patterns, strict=True)
        return np.array([torch.count_nonzero(magnitudes(values) == pattern).item() for values, pattern in found])

    equal = [*windows(ties, tiles, spread)]
    return [
        _cut(read, shape, tiles, model, patterns[model], left[model], [int(counts[model]) for counts in equal])
        if not whole[model]
        else Cut(pattern=patterns[model], last=size - 1)
        for model in models
    ]


def trim(delta: torch.Tensor, cut: Cut, shape: Sequence[int], box: Box) -> torch.Tensor:
    """Return a box of a tensor with what the cut drops set to zero."""
    first, last = _ends(shape, box)
    if last <= cut.last or first > cut.last or delta.numel() == 0:
        # Of those that equal the smallest that stays all do, or none does: one comparison for all.
        largest = cut.pattern - (last <= cut.last)
        if largest < 0:
            return delta
        return _shrunk(delta, largest)
    found = _shrunk(delta.contiguous(), cut.pattern)
    tied = _equal(delta, cut.pattern)
    places = np.unravel_index(tied, tuple(delta.shape))
    index = np.ravel_multi_index([at + part.start for at, part in zip(places, box, strict=True)], tuple(shape))
    stays = torch.from_numpy(tied[index <= cut.last]).to(delta.device)
    found.view(-1)[stays] = delta.reshape(-1)[stays]
    return found


def _shrunk(delta: torch.Tensor, largest: int) -> torch.Tensor:
    """Return a box with zeros for the magnitudes up to a pattern."""
    return F.hardshrink(delta, float(np.int32(largest).view(np.float32)))


def _ends(shape: Sequence[int], box: Box) -> tuple[int, int]:
    """Return the row-major indices of a box's first and last element."""
    first = last = 0
    for size, part in zip(shape, box, strict=True):
        first, last = first * size + part.start, last * size + part.stop - 1
    return first, last


def _lows(values: torch.Tensor, where: int) -> np.ndarray:
    """Count the low bits of the magnitudes that lie in a bin."""
    bits = magnitudes(values).flatten().cpu().numpy()
    found = bits[bits >> LOW == where]
    return np.bincount(found & ((1 << LOW) - 1), minlength=1 << LOW)


def magnitudes(values: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns of the absolute values, int32: they are in the same order."""
    return values.contiguous().view(torch.int32) & 0x7FFFFFFF


def _count(values: torch.Tensor, bins: int) -> np.ndarray:
    return torch.bincount(values.flatten(), minlength=bins).cpu().numpy()


def windows(
    count: Callable[[Box], Counted], tiles: Sequence[Box], spread: Map, size: int = WINDOW
) -> Iterator[Counted]:
    """Yield what is found of tiles in their order, that of few of them alive at a time."""
    for start in range(0, len(tiles), size):
        yield from spread(count, tiles[start : start + size])


def _total(count: Callable[[Box], np.ndarray], tiles: Sequence[Box], spread: Map) -> np.ndarray:
    total: np.ndarray = np.zeros((), dtype=np.int64)
    for counts in windows(count, tiles, spread):
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
