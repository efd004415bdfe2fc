"""The files that nanotron saves a parameter in, one for each tensor-parallel rank, read as one tensor.

`model/<module>/<...>/model_<leaf>[_pp-rank-P-of-N_tp-rank-T-of-M].safetensors`, the only tensor `data`. Of what is not
cut there is one file, without ranks in its name. The metadata of the others says which part the file is:
`local_global_slices_pairs` is `LOCAL#GLOBAL[;...]`, each side a `start,stop,step` for every dim, joined by `|`, with
None for a slice's end; so a rank's shard of fused q, k and v is three pairs. `unsharded_shape` is the whole shape.

Facts of huggingface/nanotron: src/nanotron/serialize/weights.py, serialize/utils.py, parallel/parameters.py
(SlicesPair) and parallel/sharded_parameters.py.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.nanotron_model import Parameter
from checkpoint.safetensors import Stored, read_header, tensor_in
from parallel.errors import InputError

DATA = "data"
SLICES = "local_global_slices_pairs"
RANKS = r"(?:_pp-rank-(\d+)-of-(\d+)_tp-rank-(\d+)-of-(\d+)(_exp-rank-\d+-of-\d+)?)?\.safetensors"

Take = Callable[[int, slice, slice], torch.Tensor]
"""Gives rows (with a step) and columns of the shard of a tensor-parallel rank; what has one dim has one column."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Elements [start, stop) of a parameter along the dim that is cut, and where they begin in a rank's shard."""

    start: int
    stop: int
    rank: int
    at: int


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Where a parameter lies."""

    parameter: Parameter
    stored: tuple[Stored, ...]
    """By tensor-parallel rank; one alone if it is not cut."""
    runs: tuple[Run, ...]
    """In order; they cover the parameter once."""

    @property
    def dtype(self) -> torch.dtype:
        return self.stored[0].dtype

    def fill(self, rows: slice, columns: slice, out: torch.Tensor, take: Take) -> None:
        """Fill `out` [rows, columns] with rows (with a step) and columns of the parameter."""
        step = rows.step or 1
        if self.parameter.dim == 1:
            for run in self.runs:
                low, high = max(run.start, columns.start), min(run.stop, columns.stop)
                if low < high:
                    local = slice(low - run.start + run.at, high - run.start + run.at)
                    out[:, low - columns.start : high - columns.start].copy_(take(run.rank, rows, local))
            return
        for run in self.runs:
            # Of the rows that are wanted, the first in this run and the first past it.
            first = max(0, -(-(run.start - rows.start) // step))
            last = min(len(out), -(-(run.stop - rows.start) // step))
            if first < last:
                begin = rows.start + first * step - run.start + run.at
                local = slice(begin, begin + (last - first - 1) * step + 1, step)
                out[first:last].copy_(take(run.rank, local, columns))


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as rows and columns; what has one dim has one column."""
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(1)


def mapped(stored: Stored) -> torch.Tensor:
    """Return a tensor that lies in its file, as rows and columns.

    torch maps it, not numpy, which would keep every file open: a large model has thousands.
    """
    size = stored.path.stat().st_size
    data = torch.from_file(str(stored.path), shared=False, size=size, dtype=torch.uint8)
    return matrix(tensor_in(data.numpy(), stored))


def find_shards(folder: Path, parameter: Parameter) -> Shards:
    """Find the files of a parameter in a checkpoint's folder and read their headers.

    Raises:
        InputError: a file is missing or damaged, or together they are not the parameter.
    """
    stored = tuple(_stored(path) for path in _paths(folder, parameter))
    dtypes = {shard.dtype for shard in stored}
    if len(dtypes) > 1:
        raise InputError(f"{stored[0].path}: {stored[0].dtype}, but other shards beside it are not")
    if parameter.dim is None or not _has_ranks(stored[0].path):
        if stored[0].shape != parameter.shape:
            raise _wrong_shape(stored[0].path, stored[0].shape, parameter)
        whole = Run(start=0, stop=parameter.shape[parameter.dim or 0], rank=0, at=0)
        return Shards(parameter=parameter, stored=stored, runs=(whole,))
    runs = sorted((run for rank, shard in enumerate(stored) for run in _runs(shard, rank, parameter)), key=_start)
    ends = [0, *(run.stop for run in runs)]
    if [run.start for run in runs] != ends[:-1] or ends[-1] != parameter.shape[parameter.dim]:
        raise InputError(
            f"{stored[0].path}: its {SLICES} and those of the {len(stored) - 1} shards beside it "
            f"do not cover {parameter.name}, {parameter.shape}, once"
        )
    return Shards(parameter=parameter, stored=stored, runs=tuple(runs))


def _start(run: Run) -> int:
    return run.start


def _has_ranks(path: Path) -> bool:
    return "_tp-rank-" in path.name


def _paths(folder: Path, parameter: Parameter) -> list[Path]:
    """Return a parameter's files, by tensor-parallel rank."""
    inside = folder / parameter.folder
    pattern = re.compile(re.escape(parameter.leaf) + RANKS)
    names = sorted(path.name for path in inside.iterdir()) if inside.is_dir() else []
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    if not matches:
        ranks = "" if parameter.dim is None else "_pp-rank-*_tp-rank-*"
        raise InputError(f"{inside / parameter.leaf}{ranks}.safetensors: missing")
    if matches[0][3] is None or parameter.dim is None:
        if len(matches) > 1 or matches[0][3] is not None:
            raise InputError(f"{inside / matches[-1][0]}: does not belong here: {parameter.name} is one file")
        return [inside / matches[0][0]]
    sizes = {(match[1], match[2], match[4], match[5]) for match in matches}
    if len(sizes) > 1:
        raise InputError(f"{inside}: shards of several runs ({matches[0][0]}, {matches[-1][0]}); keep those of one")
    if matches[0][5] is not None:
        raise InputError(f"{inside / matches[0][0]}: of a mixture of experts, which is not read")
    by_rank = {int(match[3]): match[0] for match in matches}
    stage, stages, tensor_ranks = matches[0][1], matches[0][2], int(matches[0][4])
    for rank in range(tensor_ranks):
        if rank not in by_rank:
            name = f"{parameter.leaf}_pp-rank-{stage}-of-{stages}_tp-rank-{rank}-of-{tensor_ranks}.safetensors"
            raise InputError(f"{inside / name}: missing (the checkpoint has tensor parallelism {tensor_ranks})")
    return [inside / by_rank[rank] for rank in range(tensor_ranks)]


def _stored(path: Path) -> Stored:
    header = read_header(path)
    if DATA not in header:
        raise InputError(f"{path}: holds no tensor {DATA!r}, so it is not of nanotron")
    return header[DATA]


def _wrong_shape(path: Path, shape: Sequence[int], parameter: Parameter) -> InputError:
    return InputError(f"{path}: is of a tensor of shape {tuple(shape)}, model_config.json says {parameter.shape}")


def _runs(stored: Stored, rank: int, parameter: Parameter) -> Iterator[Run]:
    """Return what a shard has of its parameter, as its metadata says."""
    assert parameter.dim is not None
    metadata = _metadata(stored.path)
    # numpy's numbers may be written as np.int64(5).
    whole = tuple(int(number) for number in re.findall(r"(?<![\w.])\d+", metadata.get("unsharded_shape", "")))
    if whole != parameter.shape:
        raise _wrong_shape(stored.path, whole, parameter)
    for pair in metadata.get(SLICES, "").split(";"):
        try:
            (local, other), (part, others) = (
                _along(text, shape, parameter.dim)
                for text, shape in zip(pair.split("#"), (stored.shape, parameter.shape), strict=True)
            )
        except ValueError:
            raise InputError(f"{stored.path}: {SLICES} {pair!r} is no pair of slices of its tensors") from None
        if part.stop - part.start != local.stop - local.start or other != others:
            raise InputError(f"{stored.path}: {SLICES} {pair!r}: its two sides differ in size")
        yield Run(start=part.start, stop=part.stop, rank=rank, at=local.start)


def _along(text: str, shape: Sequence[int], dim: int) -> tuple[slice, list[int]]:
    """Return a slice along a dim and the sizes of the other dims, which are whole; raise ValueError if they are not."""
    slices = [
        slice(*(None if number == "None" else int(number) for number in part.split(","))).indices(size)
        for part, size in zip(text.split("|"), shape, strict=True)
    ]
    others = [size for number, size in enumerate(shape) if number != dim]
    rest = [found for number, found in enumerate(slices) if number != dim]
    if rest != [(0, size, 1) for size in others] or slices[dim][2] != 1:
        raise ValueError(text)
    return slice(*slices[dim][:2]), others


def _metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file, whose header has been read, says besides."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__")
    if not isinstance(metadata, dict) or SLICES not in metadata:
        raise InputError(f"{path}: its metadata has no {SLICES}, so which part of the tensor it is is not known")
    return metadata
