"""GGUF models of llama.cpp as input, plain or quantised, read lazily.

Files and their types: `checkpoint.gguf_files` and `checkpoint.gguf_types`; names, the order of rows and the config:
`checkpoint.gguf_model`. A quantised tensor is what the `gguf` package unpacks it to, in float32: what its rounding has
lost stays lost. The tokenizer that a file holds is not read: bring the model's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.gguf_files import Entry, Model, read_model
from checkpoint.gguf_model import COMPUTED, FREQUENCIES, INTERLEAVED, architecture_of, config_of, gguf_name
from checkpoint.gguf_types import Packed, unpack
from checkpoint.memory import infos_of
from checkpoint.nanotron import interleaved_rows
from checkpoint.safetensors import Stored, map_file, tensor_in
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, row_major_tiles
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family
from parallel.rows import NORMS


@dataclass(frozen=True, kw_only=True)
class GgufSource:
    """A GGUF model."""

    model: Model
    config: Mapping[str, Any]
    run: RunState = field(default_factory=RunState)
    groups: Mapping[str, Group] = field(default_factory=lambda: {"default": Group()})
    _maps: dict[Path, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Files as mappings: they read just the pages that are asked for."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def _entries(self) -> Mapping[str, Entry]:
        """Hugging Face name -> where the tensor lies"""
        found, left = {}, dict(self.model.entries)
        for name, tensor in self.family.tensors(self.config).items():
            theirs = gguf_name(tensor)
            if tensor.tied_to is not None:
                continue
            if theirs not in left:
                raise InputError(f"{self.model.path}: tensor {theirs} is missing")
            found[name] = left.pop(theirs)
        for theirs, entry in left.items():
            if not theirs.endswith(COMPUTED):
                what = f"which a model of the family {self.family.name} has not"
                raise InputError(f"{entry.path}: holds a tensor {theirs}, {what}")
        return found

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, info in infos_of(self.config, torch.float32).items():
            if info.tied_to is None:
                entry = self._entries[name]
                if entry.shape != info.shape:
                    raise InputError(f"{entry.path}: {name} has shape {entry.shape}, the metadata says {info.shape}")
                dtype = torch.float32 if isinstance(entry.kind, Packed) else entry.kind
                info = Info(shape=info.shape, slots={"weight": dtype})
            infos[name] = info
        return infos

    @cached_property
    def _heads(self) -> dict[str, int]:
        """Tensors whose rows lie in another order -> half the rows of a head."""
        if architecture_of(self.model) not in INTERLEAVED:
            return {}
        half = self.family.axes(self.config)["head_dim"] // 2
        return {name: half for name in self._entries if ".q_proj." in name or ".k_proj." in name}

    @cached_property
    def _offsets(self) -> dict[str, float]:
        """What is added to a tensor where it lies, if anything is."""
        offset, tensors = self.family.norm_offset, self.family.tensors(self.config)
        return {name: offset for name, tensor in tensors.items() if offset and tensor.kind in NORMS}

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        entry, offset = self._entries[name], self._offsets.get(name)
        for at, rows in self._rows(name, box[0]):
            piece = read_entry(entry, self._mapped(entry.path), (rows, *box[1:]))
            if offset is not None:
                piece = piece.float() - offset
            for target in out.values():
                target[at : at + len(piece)].copy_(piece)

    def _rows(self, name: str, rows: slice) -> Iterator[tuple[int, slice]]:
        """Return how many rows are before a piece, and where its rows lie."""
        if name not in self._heads:
            return iter([(0, rows)])
        return interleaved_rows(rows, self._heads[name])

    def _mapped(self, path: Path) -> np.ndarray:
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return self._maps[path]


def read_entry(entry: Entry, mapping: np.ndarray, box: Box) -> torch.Tensor:
    """Return a box of a tensor in a mapped file; its rows may have a step."""
    if not isinstance(entry.kind, Packed):
        stored = Stored(path=entry.path, offset=entry.offset, shape=entry.shape, dtype=entry.kind)
        return tensor_in(mapping, stored)[box]
    rows, columns = box
    block, size = entry.kind.block, entry.kind.size
    first, last = columns.start // block, -(-columns.stop // block)
    raw = mapping[entry.offset : entry.offset + entry.nbytes].reshape(-1, entry.row)
    values = unpack(entry.kind, raw[rows, first * size : last * size])
    return values[:, columns.start - first * block : columns.stop - first * block]


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, or a folder with some and with nothing that says more of a model."""
    if path.is_file():
        return path.suffix == ".gguf"
    return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin"))


def open_gguf(path: Path) -> GgufSource:
    """Open a GGUF file, or the folder of one model, lazily.

    Raises:
        InputError: a file is missing or damaged, or of a kind that is not read; later, when a tensor is missing or has
            another shape.
    """
    model = read_model(path)

    def frequencies() -> torch.Tensor:
        entry = model.entries[FREQUENCIES]
        return read_entry(entry, map_file(entry.path), tuple(slice(0, size) for size in entry.shape)).float()

    return GgufSource(model=model, config=config_of(model, frequencies))
