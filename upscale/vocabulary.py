"""A new vocabulary as a source: any box of the embedding and the head, made from the old rows that it needs.

V rows of the new vocabulary, D columns. A row that was there is kept; a new one starts as the mean of the rows of the
pieces that its token was written with before. Everything else of the model is as it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from checkpoint.provenance import descend
from checkpoint.source import SLOTS, Box, Info, Map, RunState, Slot, Source, Wrapped, empty_box, row_major_tiles
from parallel.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which old rows each new row is made of."""

    pieces: tuple[tuple[int, ...], ...]
    """For each new row: one old row, which it is; several, of which it is the mean; or none: the mean of all."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What becomes of the config beside `vocab_size`: the ids of BOS, EOS and so on."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for the provenance."""


def rows_of(pieces: Sequence[Sequence[int]], *, multiple: int = 1, **more: Any) -> Rows:
    """Return rows, and behind them as many means of all as make their number a multiple of `multiple`.

    Raises:
        InputError: the multiple is below 1.
    """
    if multiple < 1:
        raise InputError(f"rows padded to a multiple of {multiple}: allowed are whole numbers from 1 on")
    padding = [()] * (-len(pieces) % multiple)
    return Rows(pieces=(*map(tuple, pieces), *padding), **more)


def with_vocabulary(source: Source, rows: Rows) -> "VocabularySource":
    """Return the model with a row for each entry of a new vocabulary; nothing is read yet.

    Means are taken in float32 (float64 of a float64 model), piece after piece, and rounded once. Where there are
    masters, a new weight is the mean of masters as well, so that it stays its master, rounded. Adam's moments go with
    the rows that are kept and are zero in new ones.

    Raises:
        InputError: a piece is no row of the model: its vocabulary is another one.
    """
    size = source.config["vocab_size"]
    highest = max((piece for pieces in rows.pieces for piece in pieces), default=-1)
    if highest >= size:
        raise InputError(f"the old tokenizer has a token {highest}, but the model's vocabulary has {size} entries")
    return VocabularySource(source, rows)


@dataclass(frozen=True)
class VocabularySource(Wrapped):
    """A source and its new vocabulary."""

    rows: Rows

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return {**self.source.config, **self.rows.config, "vocab_size": len(self.rows.pieces)}

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        tensors = self.family.tensors(self.config)
        return {name: replace(info, shape=tensors[name].shape) for name, info in self.source.infos.items()}

    @property
    def run(self) -> RunState:
        parents = descend([self.source.run.provenance])
        provenance = {"verb": "vocabulary", "recipe": dict(self.rows.about), **parents}
        return replace(self.source.run, provenance=provenance)

    @cached_property
    def _changed(self) -> frozenset[str]:
        tensors = self.family.tensors(self.config).values()
        return frozenset(tensor.name for tensor in tensors if tensor.axes[0] == "vocab")

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows' pieces, one row's after the other's, and where each row's begin and the last one's end."""
        lengths = np.fromiter(map(len, self.rows.pieces), dtype=np.int64, count=len(self.rows.pieces))
        pieces = np.fromiter((piece for row in self.rows.pieces for piece in row), dtype=np.int64)
        return pieces, np.append(0, np.cumsum(lengths))

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape) if name in self._changed else self.source.tiles(name)

    def collect(self, name: str, spread: Map) -> Any:
        """Return what the old source needs to know first, and the mean of all its rows [D], if a row is made of it."""
        stats = self.source.collect(name, spread)
        if name not in self._changed or all(self.rows.pieces):
            return stats, None
        slot, dtype = self._mean_of(name), self._wide(name)

        def added_up(box: Box) -> np.ndarray:
            values = empty_box(box, dtype)
            self.source.read(name, box, {slot: values}, stats)
            return values.double().sum(0).numpy()

        count, width = self.source.infos[name].shape
        total = torch.zeros(width, dtype=torch.float64)
        tiles = self.source.tiles(name)
        for box, part in zip(tiles, spread(added_up, tiles), strict=True):
            total[box[1]] += torch.from_numpy(part)
        return stats, (total / count).to(dtype)

    def _mean_of(self, name: str) -> Slot:
        return "master" if "master" in self.source.infos[name].slots else "weight"

    def _wide(self, name: str) -> torch.dtype:
        return torch.promote_types(self.source.infos[name].slots[self._mean_of(name)], torch.float32)

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        inner, mean = stats if stats is not None else self.collect(name, map)
        if name not in self._changed:
            return self.source.read(name, box, out, inner)
        rows, columns = box
        pieces, bounds = self._flat
        starts = bounds[rows.start : rows.stop]
        lengths = bounds[rows.start + 1 : rows.stop + 1] - starts
        wanted, place = np.unique(pieces[bounds[rows.start] : bounds[rows.stop]], return_inverse=True)
        # Which line of the old values each row's first piece is.
        at = starts - bounds[rows.start]
        old = self._read_old(name, wanted, columns, out, inner)
        kept, made, unknown = lengths == 1, lengths > 1, lengths == 0
        for slot, target in out.items():
            _put(target, kept, old[slot][place[at[kept]]])
            if slot not in SLOTS[:2]:
                _put(target, ~kept, torch.zeros(()))
                continue
            _put(target, made, _means(old[self._mean_of(name)], place, at[made], lengths[made]))
            if unknown.any():
                _put(target, unknown, mean[columns])
        return None

    def _read_old(
        self, name: str, wanted: np.ndarray, columns: slice, out: Mapping[Slot, torch.Tensor], stats: Any
    ) -> dict[Slot, torch.Tensor]:
        """Read sorted rows of the old tensor, neighbours at once: [rows, columns] for each slot that is needed."""
        slots = dict.fromkeys([*out, self._mean_of(name)] if {*out} & {*SLOTS[:2]} else out)
        shape = (len(wanted), columns.stop - columns.start)
        old = {slot: torch.empty(shape, dtype=self._wide(name)) for slot in slots}
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        edges = [0, *breaks.tolist(), len(wanted)]
        for first, last in pairwise(edges):
            if first < last:
                box = (slice(int(wanted[first]), int(wanted[first]) + last - first), columns)
                self.source.read(name, box, {slot: values[first:last] for slot, values in old.items()}, stats)
        return old


def _put(target: torch.Tensor, rows: np.ndarray, values: torch.Tensor) -> None:
    """Set the rows of `target` that a mask chooses, rounding once."""
    target[torch.from_numpy(np.flatnonzero(rows))] = values.to(target.dtype)


def _means(old: torch.Tensor, place: np.ndarray, at: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """Return the mean of each row's pieces, added in their order: the same in any box."""
    total = torch.zeros((len(at), old.shape[1]), dtype=old.dtype)
    for number in range(int(lengths.max(initial=0))):
        there = np.flatnonzero(lengths > number)
        total[torch.from_numpy(there)] += old[place[at[there] + number]]
    return total / torch.from_numpy(lengths).to(old.dtype)[:, None]
