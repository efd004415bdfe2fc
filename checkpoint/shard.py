"""How a ZeRO-3 engine cuts a model over ranks, and one rank's share of a source.

Every parameter is flattened row-major and cut into n parts, one a rank, of ceil(numel / n) elements, the last padded; a
rank's flat buffer of a sub-group is its parts of the sub-group's parameters, one after the other, padding included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from checkpoint.source import Box, Slot, Source, box_shape, flat_tiles

STATE_SLOTS: tuple[Slot, ...] = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class SubGroup:
    """Parameters that one flat buffer holds, in its order."""

    group: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How a ZeRO-3 engine, running or saved, cuts a model."""

    ranks: int
    sub_groups: tuple[SubGroup, ...]
    frozen: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Name and shape of the tensors that are not trained."""


def numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def part_size(count: int, ranks: int) -> int:
    """Return the elements of a tensor of `count` elements that each rank holds, padding included."""
    return -(-count // ranks)


def part_of(shape: Sequence[int], ranks: int, rank: int) -> tuple[int, int]:
    """Return the elements [start, stop) of a flattened tensor that a rank holds, without padding."""
    count, part = numel(shape), part_size(numel(shape), ranks)
    return min(rank * part, count), min((rank + 1) * part, count)


def read_shard(source: Source, sub_group: SubGroup, ranks: int, rank: int, out: Mapping[Slot, torch.Tensor]) -> None:
    """Fill one rank's flat float32 tensors of a sub-group, one a slot, all zero before, with its part of a source.

    A source without masters gives its weights; of one without optimizer state the zeros stay, as a fresh Adam has them.
    """
    at = 0
    for name, shape in sub_group.tensors:
        start, stop = part_of(shape, ranks, rank)
        read_range(source, name, start, stop, {slot: flat[at : at + stop - start] for slot, flat in out.items()})
        at += part_size(numel(shape), ranks)


def read_range(source: Source, name: str, start: int, stop: int, out: Mapping[Slot, torch.Tensor]) -> None:
    """Fill flat float32 tensors with elements [start, stop) of a tensor's slots, tile by tile.

    A master that the source has not is its weight; other slots that it has not are left as they are.
    """
    info = source.infos[name]
    wanted: dict[Slot, torch.Tensor] = {}
    for slot, target in out.items():
        stored: Slot = "weight" if slot == "master" and slot not in info.slots else slot
        if stored in info.slots:
            wanted[stored] = target
    stats = source.collect(name, map)
    at = 0
    for box in flat_tiles(info.shape, start, stop):
        shape = box_shape(box)
        count = numel(shape)
        source.read(name, box, {slot: flat[at : at + count].view(shape) for slot, flat in wanted.items()}, stats)
        at += count


def flat_runs(shape: Sequence[int], box: Box) -> list[tuple[int, int]]:
    """Return the runs [start, stop) of the row-major flattened tensor that make up a box, in the box's order."""
    whole = len(shape)
    while whole and (box[whole - 1].start, box[whole - 1].stop) == (0, shape[whole - 1]):
        whole -= 1
    if whole == 0:
        return [(0, numel(shape))]
    inner = numel(shape[whole:])
    strides = [numel(shape[dim + 1 :]) for dim in range(whole)]
    last = box[whole - 1]
    runs = []
    for index in product(*(range(part.start, part.stop) for part in box[: whole - 1])):
        base = sum(i * stride for i, stride in zip(index, strides, strict=False))
        runs.append((base + last.start * inner, base + last.stop * inner))
    return runs
