"""Writing nanotron checkpoints: the weights, one file for each parameter and tensor-parallel rank.

The format: `checkpoint.nanotron_shards`. nanotron reads them with any parallelism, in a run that begins
(`init_method: {path: ...}`) or that goes on without its optimizer (`load_optimizer: false`). The optimizer's state is
not written: nanotron's loader finds none if tensor or pipeline parallelism has changed.
"""

import functools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.layout import FilePlan, Fragment
from checkpoint.nanotron import METADATA
from checkpoint.nanotron_model import MODEL_CONFIG, Parameter, model_config_of, parameters_of
from checkpoint.nanotron_shards import DATA, SLICES
from checkpoint.safetensors import CODES
from checkpoint.source import Source
from checkpoint.tensor_parallel import Cut, piece_of
from parallel.errors import InputError

VERSION = "1.4"
"""Of the format, as nanotron counts since 2024; it refuses files of a later one than its own."""


@dataclass(frozen=True, kw_only=True)
class NanotronLayout:
    """A nanotron folder of one pipeline stage, weights alone."""

    tp: int = 1
    """Tensor-parallel ranks."""
    dtype: torch.dtype | None = None
    """Output dtype; each tensor's own by default, and of tensors in one parameter the first one's."""

    def files(self, source: Source) -> list[FilePlan]:
        """Return a plan for each parameter and rank; what is not cut is one file.

        Raises:
            InputError: nanotron has no such model, or cannot cut it over so many ranks.
        """
        if self.tp < 1:
            raise InputError(f"a nanotron checkpoint of {self.tp} tensor-parallel ranks cannot be written: at least 1")
        model_config_of(source.family, source.config)
        cuts = self._cuts(source)
        plans = []
        pieces = [piece_of(source, cuts, rank) for rank in range(self.tp)]
        for parameter in parameters_of(source.family, source.config).values():
            for rank, piece in enumerate(pieces if parameter.dim is not None else [source]):
                name, metadata = self._file(parameter, cuts, rank)
                dtype = self.dtype or source.infos[parameter.tensors[0]].slots["weight"]
                shapes = {tensor: piece.infos[tensor].shape for tensor in parameter.tensors}
                create = functools.partial(_create, shapes=shapes, dtype=dtype, metadata=metadata)
                plans.append(FilePlan(name=name, tensors=parameter.tensors, create=create, source=piece))
        return plans

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        """Return the model's config, and how far the run was."""
        run = source.run
        stage = {"name": "growmerge", "start_training_step": 1, "consumed_train_samples": run.samples}
        metas = {"consumed_train_samples": run.samples, "last_train_step": run.step, "last_stage_idx": 0}
        metadata = {"version": VERSION, "tp": self.tp, "dp": 1, "metas": {**metas, "data_stages": [stage]}}
        return {MODEL_CONFIG: _json(model_config_of(source.family, source.config)), METADATA: _json(metadata)}

    def _cuts(self, source: Source) -> dict[str, Cut]:
        """Return how each tensor is cut: into equal parts, between heads where it has some."""
        axes = source.family.axes(source.config)
        tensors = source.family.tensors(source.config)
        cuts: dict[str, Cut] = {}
        for parameter in parameters_of(source.family, source.config).values():
            if parameter.dim is None:
                continue
            for name in parameter.tensors:
                size, axis = tensors[name].shape[parameter.dim], tensors[name].axes[parameter.dim]
                heads = axis in ("q", "kv")
                units = size // axes["head_dim"] if heads else size
                if units % self.tp:
                    what = "heads" if heads else f"elements along dim {parameter.dim}"
                    raise InputError(
                        f"{name} has {units} {what}: nanotron cuts it into equal parts, so the number of "
                        f"tensor-parallel ranks has to divide that, and {self.tp} does not"
                    )
                cuts[name] = parameter.dim, [rank * size // self.tp for rank in range(self.tp + 1)]
        return cuts

    def _file(self, parameter: Parameter, cuts: Mapping[str, Cut], rank: int) -> tuple[str, dict[str, str]]:
        """Return a file's name and metadata."""
        if parameter.dim is None:
            return f"{parameter.folder}/{parameter.leaf}.safetensors", {}
        local = whole = 0
        pairs = []
        for name in parameter.tensors:
            ends = cuts[name][1]
            size = ends[rank + 1] - ends[rank]
            sides = ((local, local + size), (whole + ends[rank], whole + ends[rank + 1]))
            pairs.append("#".join(_slices(side, parameter) for side in sides))
            local, whole = local + size, whole + ends[-1]
        metadata = {"version": VERSION, SLICES: ";".join(pairs), "unsharded_shape": str(parameter.shape)}
        name = f"{parameter.leaf}_pp-rank-0-of-1_tp-rank-{rank}-of-{self.tp}.safetensors"
        return f"{parameter.folder}/{name}", metadata


def _slices(side: tuple[int, int], parameter: Parameter) -> str:
    cut = f"{side[0]},{side[1]},None"
    return "|".join(cut if dim == parameter.dim else "None,None,None" for dim in range(len(parameter.shape)))


def _create(
    path: Path, *, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]
) -> list[Fragment]:
    """Write a file's header and its full size; its tensor is those of `shapes`, one below the other."""
    first = next(iter(shapes.values()))
    shape = [sum(one[0] for one in shapes.values()), *first[1:]]
    size = math.prod(shape) * dtype.itemsize
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    header[DATA] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [0, size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    fragments, at = [], len(head)
    for name, one in shapes.items():
        fragments.append(Fragment(offset=at, tensor=name, slot="weight", dtype=dtype))
        at += math.prod(one) * dtype.itemsize
    return fragments


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
