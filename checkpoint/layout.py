"""Layouts: which bytes of which tensor go where in which file. The writer asks a layout and pulls them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from checkpoint.source import Slot, Source


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A run of elements of one slot of one tensor, contiguous in row-major order, at an offset of a file."""

    offset: int
    """Byte offset in the file."""
    tensor: str
    slot: Slot
    dtype: torch.dtype
    start: int = 0
    """First element of the flattened tensor."""
    stop: int | None = None
    """One past the last element; the tensor's end by default."""


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """One output file: how it is created at its full size, and with what it is then filled."""

    name: str
    tensors: tuple[str, ...]
    """Names of the tensors that it holds data of."""
    create: Callable[[Path], Sequence[Fragment]]
    """Create the file with its header and its full size, data zero, and return where the data goes."""
    source: Source | None = None
    """What its data is read from; by default the source that is laid out, but it may be a view of that one."""


class Layout(Protocol):
    """How a checkpoint format lays a source out in files."""

    def files(self, source: Source) -> Sequence[FilePlan]:
        """Return the plan of every data file."""

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        """Return the small files beside them, by name."""
