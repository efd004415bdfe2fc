"""Refusing NaN and infinity where a user asks for it: a source that looks at every value that is read of another."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.source import Box, Slot, Wrapped, empty_box
from parallel.errors import InputError


class NotFiniteError(InputError):
    """A checkpoint holds a NaN or an infinity."""


@dataclass(frozen=True)
class Finite(Wrapped):
    """A source whose values have to be numbers.

    `read` raises NotFiniteError, with the tensor, the slot and the first place, where one is not.
    """

    folder: Path
    """Where the source lies, for the message."""

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        self.source.read(name, box, out, stats)
        for slot, values in out.items():
            finite = torch.isfinite(values)
            if not finite.all():
                at = (~finite).nonzero()[0].tolist()
                place = [part.start + index for part, index in zip(box, at, strict=True)]
                raise NotFiniteError(f"{self.folder}: {name} has {slot} {float(values[tuple(at)])} at {place}")

    def scan(self) -> None:
        """Read every value once.

        Raises:
            NotFiniteError: one of them is not finite.
        """
        for name, info in self.infos.items():
            if info.tied_to is None:
                stats = self.collect(name, map)
                for box in self.tiles(name):
                    self.read(name, box, {s: empty_box(box, d) for s, d in info.slots.items()}, stats)
