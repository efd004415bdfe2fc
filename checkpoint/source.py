"""The one idea: a checkpoint is a source of tensors, and transformations wrap sources.

    open_checkpoint(path)                -> Source     any format, lazily
    grow(source, recipe)                 -> Source     upscale/
    merge(sources, method, ...)          -> Source     merge/
    write_checkpoint(source, path, ...)                 pulls tile after tile into the files of a layout
    read_shard(source, layout, rank)                    the same pieces into one rank's memory

A tensor is known by its Hugging Face on-disk name, unfused, unsharded and unpadded, and has up to four slots that
belong together: `weight`, `master` (float32 copy that the optimizer updates), `exp_avg` and `exp_avg_sq` (Adam).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch

from parallel.family import Family

Slot = Literal["weight", "master", "exp_avg", "exp_avg_sq"]
SLOTS: tuple[Slot, ...] = ("weight", "master", "exp_avg", "exp_avg_sq")

Box = tuple[slice, ...]
"""A rectangular piece of a tensor: one slice with start and stop a dim, in canonical coordinates."""

TILE = 1 << 18
"""Elements in a tile at most: what fits a core's cache. Never a setting: results must not depend on it."""

In = TypeVar("In")
Out = TypeVar("Out")
Map = Callable[[Callable[[In], Out], Iterable[In]], Iterable[Out]]
"""`map`, or what does the same with many workers: how work over tiles is spread."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a source knows of one tensor without reading it."""

    shape: tuple[int, ...]
    slots: Mapping[Slot, torch.dtype]
    """The slots that exist, with the dtype that each is stored in."""
    group: str = "default"
    """Name of the optimizer's parameter group; never an index."""
    tied_to: str | None = None
    """The owner's name if this is an alias of another tensor; an alias is never read."""
    trainable: bool = True


@dataclass(frozen=True, kw_only=True)
class Group:
    """An optimizer's parameter group: its own values, and the factors by which growth asks to multiply them."""

    lr: float = 0.0
    weight_decay: float = 0.0
    lr_factor: float = 1.0
    weight_decay_factor: float = 1.0
    eps_factor: float = 1.0
    norm_weight: float = 1.0
    """Weight of the group's squared gradient norm in clipping."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    step: int = 0
    """Optimizer steps taken (Adam's bias correction)."""


FACTORS = ("lr_factor", "weight_decay_factor", "eps_factor", "norm_weight")
"""The fields of Group that growth sets."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Plain data of the run that a checkpoint belongs to."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    seed: int | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the training that wrote it wants back when it goes on."""
    provenance: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Anything that tensors can be read from. Reading is thread-safe and never changes a source."""

    @property
    def family(self) -> Family: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face config of the model that the tensors make."""

    @property
    def infos(self) -> Mapping[str, Info]:
        """Every tensor by name, in the family's order, aliases included."""

    @property
    def groups(self) -> Mapping[str, Group]: ...

    @property
    def run(self) -> RunState: ...

    def tiles(self, name: str) -> Sequence[Box]:
        """Return boxes that cover the tensor once, in row-major order; they depend on the shape alone."""

    def collect(self, name: str, spread: Map) -> Any:
        """Return what `read` needs to know of the whole tensor first (None for most sources).

        `spread` maps a function over tiles; results are combined in tile order, so they depend on no schedule.
        """

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        """Fill `out[slot]`, tensors of the box's shape, with that box of each slot, rounded once to `out`'s dtype.

        All slots of a box are asked for together, since splits and noise are one decision for weight and master.
        `stats` is what `collect(name, ...)` returned. Aliases are not read: ask for `infos[name].tied_to`.
        """


def read_together(
    sources: Sequence[Source], name: str, box: Box, outs: Mapping[Slot, torch.Tensor], stats: Sequence[Any]
) -> None:
    """Read a box of sources into rows [sources, *box] of `outs[slot]`, to the same bytes as their `read`.

    Those of one class that has a `read_together` of its own are read by that.

    Args:
        stats: what each returned from `collect`.
    """
    kind: Any = type(sources[0])
    if len(sources) > 1 and hasattr(kind, "read_together") and all(type(source) is kind for source in sources):
        kind.read_together(sources, name, box, outs, stats)
        return
    for number, (source, known) in enumerate(zip(sources, stats, strict=True)):
        source.read(name, box, {slot: rows[number] for slot, rows in outs.items()}, known)


def full_box(shape: Sequence[int]) -> Box:
    """Return the box that is the whole tensor."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def empty_box(box: Box, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor for a box, its values undefined, in memory that fits what was freed of its size.

    torch aligns a tensor within a larger block, and what it frees is less than it asks for next: the heap of a merge
    grew by a tile for each tile, and two of three page faults came of that. numpy does not.
    """
    return empty_tensor(box_shape(box), dtype)


def empty_tensor(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the same for a shape."""
    if dtype == torch.float32:  # for most, and many a tensor
        return torch.from_numpy(np.empty(shape, dtype=np.float32))
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def row_major_tiles(shape: Sequence[int], tile: int = TILE) -> list[Box]:
    """Cut a tensor into boxes of at most `tile` elements that are contiguous in row-major order, in that order.

    Whole rows while a row fits in a tile; otherwise pieces of one row. A scalar is one box without dims.
    """
    if not shape:
        return [()]
    if 0 in shape:
        return []
    head, *rest = shape
    inner = 1
    for size in rest:
        inner *= size
    if inner <= tile:
        rows = max(1, tile // inner)
        whole = full_box(rest)
        return [(slice(at, min(at + rows, head)), *whole) for at in range(0, head, rows)]
    return [(slice(at, at + 1), *piece) for at in range(head) for piece in row_major_tiles(rest, tile)]


def flat_tiles(shape: Sequence[int], start: int, stop: int, tile: int = TILE) -> Iterator[Box]:
    """Cut elements [start, stop) of the row-major flattened tensor into boxes of at most a tile, in order."""
    for box in flat_boxes(shape, start, stop):
        for part in row_major_tiles(box_shape(box), tile):
            yield tuple(
                slice(outer.start + inner.start, outer.start + inner.stop)
                for outer, inner in zip(box, part, strict=True)
            )


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Return the boxes, in order, whose concatenation is elements [start, stop) of the row-major flattened tensor.

    At most 2 * ndim - 1 boxes: pieces of a first row, whole rows, pieces of a last row.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [(slice(start, stop),)] if shape else [()]
    inner = 1
    for size in shape[1:]:
        inner *= size
    first, offset = divmod(start, inner)
    boxes: list[Box] = []
    if offset:
        end = min(stop, (first + 1) * inner) - first * inner
        boxes += [(slice(first, first + 1), *piece) for piece in flat_boxes(shape[1:], offset, end)]
        first += 1
    last, tail = divmod(stop, inner)
    if first < last:
        boxes.append((slice(first, last), *full_box(shape[1:])))
    if tail and first <= last:
        boxes += [(slice(last, last + 1), *piece) for piece in flat_boxes(shape[1:], 0, tail)]
    return boxes


def read_tensor(source: Source, name: str, slot: Slot = "weight", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Read one whole tensor of a source into memory; an alias is read from its owner."""
    owner = source.infos[name].tied_to or name
    info = source.infos[owner]
    out = torch.empty(info.shape, dtype=dtype)
    stats = source.collect(owner, map)
    for box in source.tiles(owner):
        source.read(owner, box, {slot: out[box]}, stats)
    return out


@dataclass(frozen=True)
class Wrapped:
    """A source that says what another one says: the start of those that change one thing."""

    source: Source

    @property
    def family(self) -> Family:
        return self.source.family

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    @property
    def infos(self) -> Mapping[str, Info]:
        return self.source.infos

    @property
    def groups(self) -> Mapping[str, Group]:
        return self.source.groups

    @property
    def run(self) -> RunState:
        return self.source.run

    def tiles(self, name: str) -> Sequence[Box]:
        return self.source.tiles(name)

    def collect(self, name: str, spread: Map) -> Any:
        return self.source.collect(name, spread)

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        self.source.read(name, box, out, stats)


class NewRun(Wrapped):
    """A source with Adam's moments and step counts, at step 0 of a run of its own."""

    @property
    def run(self) -> RunState:
        return RunState(provenance=self.source.run.provenance)


class WithoutState(NewRun):
    """A source's weights and masters alone, at step 0: what a new run starts from."""

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        return {
            name: replace(info, slots={slot: dtype for slot, dtype in info.slots.items() if slot in SLOTS[:2]})
            for name, info in self.source.infos.items()
        }

    @property
    def groups(self) -> Mapping[str, Group]:
        return {name: replace(group, step=0) for name, group in self.source.groups.items()}
