"""DeepSpeed runs without ZeRO (stage 0) in float32: one file with weights and torch's own optimizer state.

Layout (DeepSpeed 0.19): `mp_rank_00_model_states.pt` holds the weights (`module`) and the optimizer's state by number
of the parameter, in the order of its groups. Our runs store the names in that order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.pickles import load_pickle
from checkpoint.shard import STATE_SLOTS
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, row_major_tiles
from checkpoint.zero12 import MODEL
from checkpoint.zero_files import PARAMETER_NAMES, config_of, groups_of, run_of
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family


@dataclass(frozen=True, kw_only=True)
class Zero0Source:
    """A saved run of plain data parallelism."""

    folder: Path
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group]
    group_of: Mapping[str, str]
    """Group of each tensor."""
    state: Mapping[str, Mapping[str, Any]]
    """Adam's state of each tensor."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def _weights(self) -> Mapping[str, torch.Tensor]:
        return load_pickle(self.folder / MODEL)["module"]

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, tensor in self.family.tensors(self.config).items():
            if tensor.tied_to is not None:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
                continue
            if name not in self._weights or name not in self.group_of:
                raise InputError(f"{self.folder / MODEL}: tensor {name} is missing")
            found = tuple(self._weights[name].shape)
            if found != tensor.shape:
                raise InputError(f"{self.folder / MODEL}: {name} has shape {found}, config.json says {tensor.shape}")
            slots: dict[Slot, torch.dtype] = {"weight": self._weights[name].dtype, "master": self._weights[name].dtype}
            slots |= {slot: self.state[name][slot].dtype for slot in STATE_SLOTS[1:] if slot in self.state[name]}
            infos[name] = Info(shape=found, slots=slots, group=self.group_of[name])
        return infos

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        for slot, target in out.items():
            stored = self._weights[name] if slot in ("weight", "master") else self.state[name][slot]
            target.copy_(stored[box])


def is_zero0(folder: Path) -> bool:
    """Return whether a folder holds a run without ZeRO: a model file, and no optimizer files."""
    return (folder / MODEL).is_file() and not any(folder.glob("*_optim_states.pt")) and not (folder / "zero").is_dir()


def open_zero0(folder: Path) -> Zero0Source:
    """Open the folder of one of our runs without ZeRO.

    Raises:
        InputError: the file is damaged, or of another kind of run; later, when a tensor is missing.
    """
    path = folder / MODEL
    model = load_pickle(path)
    names = model.get("growmerge", {}).get(PARAMETER_NAMES) if isinstance(model, dict) else None
    optimizer = model.get("optimizer") if isinstance(model, dict) else None
    if not isinstance(names, list) or not isinstance(optimizer, dict):
        raise InputError(f"{path}: not of a run without ZeRO that growmerge wrote (no names of its optimizer's state)")
    _, groups = groups_of(optimizer)
    numbers = {number: group["name"] for group in optimizer["param_groups"] for number in group["params"]}
    return Zero0Source(
        folder=folder,
        config=config_of(folder),
        run=run_of(model, folder),
        groups=groups,
        group_of={names[number]: group for number, group in numbers.items()},
        state={names[number]: state for number, state in optimizer["state"].items()},
    )
