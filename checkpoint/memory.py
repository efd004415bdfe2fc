"""Sources that live in memory: tensors at hand, and the tensors of a model that starts from scratch."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from checkpoint.source import Box, Group, Info, Map, RunState, Slot, row_major_tiles
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family
from parallel.rows import NORMS


def infos_of(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Info]:
    """Return the Info of every tensor that a config's family says the model has, weights alone, in one dtype."""
    return {
        name: Info(shape=tensor.shape, slots={} if tensor.tied_to else {"weight": dtype}, tied_to=tensor.tied_to)
        for name, tensor in family_of(config).tensors(config).items()
    }


@dataclass(frozen=True, kw_only=True)
class MemorySource:
    """Tensors in memory, by on-disk name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    run: RunState = field(default_factory=RunState)
    groups: Mapping[str, Group] = field(default_factory=lambda: {"default": Group()})

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        """Raises InputError if a tensor is missing or has another shape than the config says."""
        infos = {}
        for name, info in infos_of(self.config, torch.float32).items():
            if info.tied_to is None:
                if name not in self.tensors:
                    raise InputError(f"tensor {name} is missing")
                tensor = self.tensors[name]
                if tuple(tensor.shape) != info.shape:
                    raise InputError(f"tensor {name} has shape {tuple(tensor.shape)}, the config says {info.shape}")
                info = Info(shape=info.shape, slots={"weight": tensor.dtype})
            infos[name] = info
        return infos

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        for tensor in out.values():
            tensor.copy_(self.tensors[name][box])


@dataclass(frozen=True, kw_only=True)
class ScratchSource:
    """A model from scratch: normal weights, norms that multiply by 1, the same whatever box is read by whom.

    Matrices and embeddings have standard deviation 1/sqrt(hidden); o_proj and down_proj, which write into the
    residual stream, are divided by sqrt(2 * layers) (GPT-2, section 2.3; the paper's nanotron does the same). Experts
    that one tensor holds have the rows of their matrices one below the other.
    """

    config: Mapping[str, Any]
    seed: int
    dtype: torch.dtype = torch.float32
    groups: Mapping[str, Group] = field(default_factory=lambda: {"default": Group()})

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        return infos_of(self.config, self.dtype)

    @property
    def run(self) -> RunState:
        return RunState(seed=self.seed)

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        tensor = self.family.tensors(self.config)[name]
        for target in out.values():
            if tensor.kind in NORMS:
                target.fill_(1.0 - self.family.norm_offset)
            elif tensor.kind in ("bias", "norm_bias"):
                target.zero_()
            else:
                std = 1.0 / math.sqrt(self.config["hidden_size"])
                if tensor.kind == "matrix" and tensor.makes == "hidden":
                    std /= math.sqrt(2 * self.config["num_hidden_layers"])
                *experts, rows, columns = box
                for number, expert in enumerate(range(experts[0].start, experts[0].stop) if experts else (0,)):
                    first = expert * tensor.shape[-2]
                    values = self._rows(name, range(first + rows.start, first + rows.stop))
                    values *= np.float32(std)
                    part = target[number] if experts else target
                    part.copy_(torch.from_numpy(values)[:, columns])

    def _rows(self, name: str, rows: range) -> np.ndarray:
        """Rows of standard normals, each a function of (seed, tensor, row) alone."""
        key = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=16).digest()
        stream = np.random.Philox(key=int.from_bytes(key, "little"), counter=[0, 0, 0, 0])
        draw, state = np.random.Generator(stream), stream.state  # as nothing has been drawn
        values = np.empty((len(rows), self.infos[name].shape[-1]), np.float32)
        for at, row in enumerate(rows):
            state["state"]["counter"][3] = row
            stream.state = state  # faster than another stream for each row
            draw.standard_normal(dtype=np.float32, out=values[at])
        return values
