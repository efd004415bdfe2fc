"""How DeepSpeed's AutoTP cuts a model over tensor-parallel ranks, and what one rank has of a source.

A tensor is cut along one dim, in the order of the ranks, or whole on all of them. As DeepSpeed 0.19.8 does it
(module_inject/auto_tp.py and tp_shard.py), in terms of the family's table:

- column cuts dim 0, a bias with its matrix; row cuts dim 1 and leaves the bias whole.
- What runs along heads is cut between key/value heads: 3 over 2 ranks are 2 and 1, and their query heads go with them.
  All else is cut as evenly as it goes: 131 rows over 2 ranks are 66 and 65. The first ranks get what is over.
- Of the vocab tensors a head of its own is cut, by rows, and the embedding is whole. A tied pair is whole, or with
  `vocab_parallel` both are cut: what DeepSpeed does depends on its config. A `partition_config`, or
  `vocab_parallel_lm_head: false`, keeps a tied pair whole; `autotp_size` alone cuts it.

The presets ("preset_model": "llama") are the exception: they keep any head whole, and are not written for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from checkpoint.source import Box, Info, Slot, Source, Wrapped, box_shape, full_box, row_major_tiles
from parallel.errors import InputError
from parallel.rows import Split

DIMS: dict[Split, int] = {"column": 0, "vocab": 0, "row": 1}
"""The dim that a split cuts."""

Cut = tuple[int, list[int]]
"""The dim along which a tensor is cut, and where each piece begins and the last ends."""


def cuts_of(source: Source, ranks: int, *, vocab_parallel: bool = False) -> dict[str, Cut]:
    """Return how AutoTP cuts each tensor that it cuts.

    Raises:
        InputError: the family cannot be cut, or a rank would get nothing of a tensor. DeepSpeed cuts such a
            model too, but its ZeRO-3 cannot run the empty piece: it fails in the first forward pass (0.19.8).
    """
    family, config = source.family, source.config
    if ranks > 1 and family.uncut:
        raise InputError(f"{ranks} tensor-parallel ranks: {family.name} {family.uncut}")
    sizes = family.axes(config)
    kv_heads = sizes["kv"] // sizes["head_dim"]
    cuts = {}
    for name, tensor in family.tensors(config).items():
        cut_vocab = vocab_parallel if family.is_tied(config) else tensor.kind == "head"
        if tensor.split not in DIMS or (tensor.split == "vocab" and not cut_vocab):
            continue
        dim = DIMS[tensor.split]
        size = tensor.shape[dim]
        along_heads = tensor.axes[dim] in ("q", "kv")
        units = kv_heads if along_heads else size
        if units < ranks:
            what = "key/value heads" if along_heads else f"elements along dim {dim}"
            raise InputError(
                f"{name} has {units} {what}: DeepSpeed cannot train it on {ranks} tensor-parallel ranks, "
                f"since some would get none; at most {units} are possible"
            )
        share, over = divmod(units, ranks)
        cuts[name] = dim, [(rank * share + min(rank, over)) * size // units for rank in range(ranks + 1)]
    return cuts


@dataclass(frozen=True)
class Piece(Wrapped):
    """What one tensor-parallel rank has of a source: boxes of some tensors, the others whole."""

    boxes: Mapping[str, Box]

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        return {
            name: replace(info, shape=box_shape(self.boxes.get(name, full_box(info.shape))))
            for name, info in self.source.infos.items()
        }

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        if name in self.boxes:
            within = self.boxes[name]
            box = tuple(
                slice(at.start + part.start, at.start + part.stop) for at, part in zip(within, box, strict=True)
            )
        self.source.read(name, box, out, stats)


def piece_of(source: Source, cuts: Mapping[str, Cut], rank: int) -> Piece:
    """Return what a tensor-parallel rank has of a source that is cut so."""
    boxes = {}
    for name, (dim, ends) in cuts.items():
        box = list(full_box(source.infos[name].shape))
        box[dim] = slice(ends[rank], ends[rank + 1])
        boxes[name] = tuple(box)
    return Piece(source, boxes)
