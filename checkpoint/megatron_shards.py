"""How a parameter of Megatron-Core lies on its tensor-parallel ranks, in rows of Hugging Face's tensors.

What is cut along dim 0 (`linear_qkv`, `linear_fc1`, the vocabulary) or dim 1 (`linear_proj`, `linear_fc2`) is cut into
equal parts, in the order of the ranks; gate and up each by itself. All else every rank has whole.

Facts of megatron_core 0.16.1: core/tensor_parallel/layers.py, and core/transformer/mlp.py for gate and up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from checkpoint.megatron_model import Parameter
from checkpoint.source import Box, Slot


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows [start, stop) of a tensor, the rank that has them, and the first of them in its shard."""

    tensor: str
    start: int
    stop: int
    rank: int
    at: int


def runs_of(parameter: Parameter, ranks: int) -> list[Run]:
    """Return where each row of a parameter's tensors lies; of what is not cut along dim 0, on rank 0."""
    cuts = ranks if parameter.dim == 0 else 1
    rows = parameter.shape[0] // (parameter.halves * cuts)
    runs, whole = [], 0
    for piece in parameter.pieces:
        start = piece.start
        while start < piece.stop:
            part, within = divmod(whole, rows)
            half, rank = divmod(part, cuts)
            count = min(rows - within, piece.stop - start)
            at = half * rows + within
            runs.append(Run(tensor=piece.tensor, start=start, stop=start + count, rank=rank, at=at))
            start, whole = start + count, whole + count
    return runs


def local_shape(parameter: Parameter, ranks: int) -> tuple[int, ...]:
    """Return the shape of a rank's shard."""
    return tuple(size // ranks if dim == parameter.dim else size for dim, size in enumerate(parameter.shape))


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A parameter's shards."""

    parameter: Parameter
    ranks: Sequence[Mapping[Slot, torch.Tensor]]
    """By tensor-parallel rank; they stay in their files until they are read."""

    @property
    def slots(self) -> dict[Slot, torch.dtype]:
        return {slot: tensor.dtype for slot, tensor in self.ranks[0].items()}

    @cached_property
    def _runs(self) -> Mapping[str, Sequence[Run]]:
        found: dict[str, list[Run]] = {}
        for run in runs_of(self.parameter, len(self.ranks)):
            found.setdefault(run.tensor, []).append(run)
        return found

    def fill(self, name: str, box: Box, slot: Slot, out: torch.Tensor) -> None:
        """Fill `out`, of the box's shape, with that box of a tensor."""
        rows, *columns = box
        for run in self._runs[name]:
            low, high = max(run.start, rows.start), min(run.stop, rows.stop)
            if low < high:
                within = slice(low - run.start + run.at, high - run.start + run.at)
                target = out[low - rows.start : high - rows.start]
                if self.parameter.dim == 1:
                    self._fill_columns(within, columns[0], slot, target)
                else:
                    target.copy_(self.ranks[run.rank][slot][(within, *columns)])

    def _fill_columns(self, rows: slice, columns: slice, slot: Slot, out: torch.Tensor) -> None:
        width = self.parameter.shape[1] // len(self.ranks)
        for rank, shard in enumerate(self.ranks):
            low, high = max(rank * width, columns.start), min((rank + 1) * width, columns.stop)
            if low < high:
                part = shard[slot][rows, low - rank * width : high - rank * width]
                out[:, low - columns.start : high - columns.start].copy_(part)
