"""DeepSpeed ZeRO-3 checkpoints of tensor-parallel runs (AutoTP): the pieces of all ranks, read as whole tensors.

Layout (DeepSpeed 0.19): the files of `checkpoint.zero3`, once for each tensor-parallel rank t (`_mp_rank_{t:02d}_`).
A matrix is first cut over the tensor-parallel ranks along one dim, in order and not always evenly (131 rows are 66 and
65), then each piece over the data-parallel ranks as ZeRO-3 cuts any tensor. Which dim may be cut, the family's table
says: column and vocab cut dim 0, row cuts dim 1. Whether a tensor is cut, the pieces' shapes say (embeddings often are
not). One that is not is the same on all ranks and read from the first. The rule: `checkpoint.tensor_parallel`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoint.source import Box, Group, Info, Map, RunState, Slot, row_major_tiles
from checkpoint.tensor_parallel import DIMS, Cut
from checkpoint.zero3 import open_rank
from checkpoint.zero_files import load_model, model_name
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family
from parallel.rows import Split


def bounds(shape: Sequence[int], split: Split, pieces: Sequence[Sequence[int]]) -> Cut | None:
    """Return how a tensor is cut; None if it is whole.

    Raises:
        ValueError: the pieces do not make up the tensor.
    """
    if all(tuple(piece) == tuple(shape) for piece in pieces):
        return None
    if split not in DIMS:
        raise ValueError("is never cut")
    dim = DIMS[split]
    rest = [*shape[:dim], *shape[dim + 1 :]]
    ends = [0]
    for piece in pieces:
        if [*piece[:dim], *piece[dim + 1 :]] != rest:
            raise ValueError(f"is cut along dim {dim}")
        ends.append(ends[-1] + piece[dim])
    if ends[-1] != shape[dim]:
        raise ValueError(f"has {shape[dim]} along dim {dim}")
    return dim, ends


class RankSource(Protocol):
    """What one tensor-parallel rank has of a saved run."""

    @property
    def tensor_rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def groups(self) -> Mapping[str, Group]: ...
    @property
    def run(self) -> RunState: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def info(self, name: str) -> Info: ...
    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TensorParallelSource:
    """A saved run with tensor parallelism."""

    folder: Path
    pieces: tuple[RankSource, ...]
    """What each tensor-parallel rank has."""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.pieces[0].config

    @property
    def groups(self) -> Mapping[str, Group]:
        return self.pieces[0].groups

    @property
    def run(self) -> RunState:
        return self.pieces[0].run

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def _bounds(self) -> dict[str, Cut | None]:
        found = {}
        for name, tensor in self.family.tensors(self.config).items():
            if tensor.tied_to is not None:
                continue
            for piece in self.pieces:
                if name not in piece.shapes:
                    raise InputError(f"{self.folder / model_name(0, piece.tensor_rank)}: tensor {name} is missing")
            shapes = [piece.shapes[name] for piece in self.pieces]
            try:
                found[name] = bounds(tensor.shape, tensor.split, shapes)
            except ValueError as error:
                listed = " + ".join(str(shape) for shape in shapes)
                raise InputError(
                    f"{self.folder}: {name} has pieces {listed}; config.json says {tensor.shape}, which {error}"
                ) from error
        return found

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, tensor in self.family.tensors(self.config).items():
            if tensor.tied_to is not None:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
                continue
            assert name in self._bounds, f"{name}: neither an alias nor cut"
            found = [replace(piece.info(name), shape=tensor.shape) for piece in self.pieces]
            if any(info != found[0] for info in found):
                raise InputError(f"{self.folder}: {name} has other slots, or another group, on some ranks")
            infos[name] = found[0]
        return infos

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        cut = self._bounds[name]
        if cut is None:
            self.pieces[0].read(name, box, out)
            return
        dim, ends = cut
        wanted = box[dim]
        for piece, begin, end in zip(self.pieces, ends, ends[1:], strict=False):
            start, stop = max(wanted.start, begin), min(wanted.stop, end)
            if start < stop:
                place = (*box[:dim], slice(start - begin, stop - begin), *box[dim + 1 :])
                part = {slot: target.narrow(dim, start - wanted.start, stop - start) for slot, target in out.items()}
                piece.read(name, place, part)


def is_zero3_tp(folder: Path) -> bool:
    """Return whether a folder holds a ZeRO-3 run with tensor parallelism; its second rank tells."""
    return (folder / model_name(0, 1)).is_file() and not (folder / "zero").is_dir()


def open_zero3_tp(folder: Path) -> TensorParallelSource:
    """Open a ZeRO-3 checkpoint folder of a run with tensor parallelism lazily.

    `config.json`, the model's Hugging Face config, has to lie in the folder or in the one above.

    Raises:
        InputError: a file is missing or damaged, or a tensor holds several fused ones, each cut; later, when a tensor
            is missing or its pieces do not make up what config.json says.
    """
    model = load_model(folder / model_name(0))
    fused = model.get("universal_checkpoint_info", {}).get("parameter_with_sub_params")
    if fused:
        raise InputError(f"{folder / model_name(0)}: has fused tensors whose parts are cut one by one; not read")
    ranks = model["mp_world_size"]
    for rank in range(ranks):
        if not (folder / model_name(0, rank)).is_file():
            raise InputError(f"{folder / model_name(0, rank)}: missing (the run had tensor parallelism {ranks})")
    return TensorParallelSource(folder=folder, pieces=tuple(open_rank(folder, rank, ranks) for rank in range(ranks)))
