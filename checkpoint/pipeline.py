"""DeepSpeed pipeline runs (PipelineModule with ZeRO-1), as our training writes them.

Layout (DeepSpeed 0.19): `layer_XX-model_states.pt` hold the weights of each layer of the pipeline; each stage p has
`mp_rank_{p:02d}_model_states.pt` (names and shapes) and, for each of its data-parallel ranks d,
`[bf16_]zero_pp_rank_{d}_mp_rank_{p:02d}_optim_states.pt`, laid out as `checkpoint.zero12` says. Parameters have the
pipeline's own names; our runs store the Hugging Face name of each. A tied embedding is in the first stage and the last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.source import Box, Group, Info, Map, RunState, Slot, row_major_tiles
from checkpoint.zero12 import MODEL, Zero12Source, open_ranks
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family


@dataclass(frozen=True, kw_only=True)
class PipelineSource:
    """A saved pipeline run."""

    folder: Path
    stages: tuple[Zero12Source, ...]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.stages[0].config

    @property
    def run(self) -> RunState:
        return self.stages[0].run

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        return {name: group for stage in reversed(self.stages) for name, group in stage.groups.items()}

    @cached_property
    def _stage_of(self) -> Mapping[str, Zero12Source]:
        return {name: stage for stage in reversed(self.stages) for name in stage.shapes}

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, tensor in self.family.tensors(self.config).items():
            if tensor.tied_to is not None:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
                continue
            if name not in self._stage_of:
                raise InputError(f"{self.folder}: tensor {name} is missing from all {len(self.stages)} stages")
            infos[name] = self._stage_of[name].info(name)
            if infos[name].shape != tensor.shape:
                raise InputError(f"{self.folder}: {name} has shape {infos[name].shape}, config.json: {tensor.shape}")
        return infos

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        self._stage_of[name].read(name, box, out)


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder holds a pipeline run."""
    return (folder / MODEL).is_file() and any(folder.glob("layer_*-model_states.pt"))


def open_pipeline(folder: Path) -> PipelineSource:
    """Open a pipeline checkpoint folder lazily.

    Raises:
        InputError: a file is missing or damaged, or the run was not one of ours; later, when a tensor is missing.
    """
    return PipelineSource(folder=folder, stages=open_ranks(folder, renamed=True))
