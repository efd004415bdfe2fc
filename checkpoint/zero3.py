"""DeepSpeed ZeRO-3 checkpoints: every tensor of every slot, read from the per-rank files.

Layout (DeepSpeed 0.19): a folder holds, for each data-parallel rank d, `zero_pp_rank_{d}_mp_rank_00_model_states.pt`
(shapes, names, no weights) and `[bf16_]zero_pp_rank_{d}_mp_rank_00_optim_states.pt` (float32 master weights and Adam's
moments). Every parameter is flattened row-major and cut into n parts, one a rank, of ceil(numel / n) elements, the last
padded; a rank's flat buffer of a sub-group is its parts of the sub-group's parameters, one after the other, padding
included. Parameters that are not trained are cut in the same way; their parts, in the run's dtype, lie in the model
files.
Sub-groups depend on the number of ranks, so they are a matter of files alone: a tensor is known by its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.pickles import load_pickle
from checkpoint.shard import STATE_SLOTS, SubGroup, Topology, flat_runs, numel, part_size
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, box_shape, row_major_tiles
from checkpoint.zero_files import FROZEN, config_of, groups_of, load_model, model_name, optim_name, run_of
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family


@dataclass(frozen=True, kw_only=True)
class Zero3Source:
    """A saved ZeRO-3 run, or what one rank of a tensor-parallel run has of it."""

    folder: Path
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group]
    topology: Topology
    bf16: bool
    tensor_rank: int = 0

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return self.topology.ranks

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def _where(self) -> dict[str, tuple[int, int, int]]:
        """name -> (sub-group, offset of the tensor's part in the flat buffer, part size)"""
        where = {}
        for number, sub_group in enumerate(self.topology.sub_groups):
            at = 0
            for name, shape in sub_group.tensors:
                part = part_size(numel(shape), self.topology.ranks)
                where[name] = (number, at, part)
                at += part
        return where

    @cached_property
    def _flat(self) -> list[list[dict[Slot, torch.Tensor]]]:
        """[rank][sub-group][slot] -> flat float32 tensor, in the file until read."""
        ranks = []
        for rank in range(self.topology.ranks):
            path = self.folder / optim_name(rank, self.bf16, self.tensor_rank)
            state = load_pickle(path)["optimizer_state_dict"]
            adam = state["optimizer_state_dict"]["state"]
            groups: list[dict[Slot, torch.Tensor]] = []
            for number, master in enumerate(state["fp32_flat_groups"]):
                moments = adam.get(number, {})
                groups.append(
                    {"master": master, **{slot: moments[slot] for slot in STATE_SLOTS[1:] if slot in moments}}
                )
            for number, (sub_group, flat) in enumerate(zip(self.topology.sub_groups, groups, strict=True)):
                expected = sum(part_size(numel(shape), self.topology.ranks) for _, shape in sub_group.tensors)
                if any(tensor.numel() != expected for tensor in flat.values()):
                    raise InputError(
                        f"{path}: sub-group {number} has {flat['master'].numel()} elements, not {expected}"
                    )
            ranks.append(groups)
        return ranks

    @cached_property
    def _frozen(self) -> list[dict[str, torch.Tensor]]:
        """[rank][name] -> the rank's part of a tensor that is not trained, in the file until read."""
        ranks: list[dict[str, torch.Tensor]] = []
        for rank in range(self.topology.ranks if self.topology.frozen else 0):
            path = self.folder / model_name(rank, self.tensor_rank)
            parts = load_pickle(path)["frozen_param_fragments"]
            for name, shape in self.topology.frozen:
                expected = part_size(numel(shape), self.topology.ranks)
                if name not in parts or parts[name].numel() != expected:
                    found = f"{parts[name].numel()} elements" if name in parts else "nothing"
                    raise InputError(f"{path}: has {found} of the frozen {name}, not {expected} elements")
            ranks.append(parts)
        return ranks

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape in the files, of every tensor that lies there"""
        trained = {name: shape for sub_group in self.topology.sub_groups for name, shape in sub_group.tensors}
        return trained | dict(self.topology.frozen)

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, tensor in self.family.tensors(self.config).items():
            if tensor.tied_to is not None:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
                continue
            shape = self.shapes.get(name)
            if shape is None:
                raise InputError(f"{self.folder}: tensor {name} is missing")
            if shape != tensor.shape:
                raise InputError(f"{self.folder}: {name} has shape {shape}, config.json says {tensor.shape}")
            infos[name] = self.info(name)
        return infos

    def info(self, name: str) -> Info:
        """Return what the files say of a tensor, whatever config.json says."""
        if name not in self._where:
            dtype = self._frozen[0][name].dtype
            return Info(shape=self.shapes[name], slots={"weight": dtype}, group=FROZEN, trainable=False)
        number = self._where[name][0]
        slots: dict[Slot, torch.dtype] = {"weight": torch.bfloat16 if self.bf16 else torch.float32}
        slots |= dict.fromkeys(self._flat[0][number], torch.float32)
        return Info(shape=self.shapes[name], slots=slots, group=self.topology.sub_groups[number].group)

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        shape = box_shape(box)
        for slot, target in out.items():
            flat = torch.cat(
                [piece for run in flat_runs(self.shapes[name], box) for piece in self._run(name, slot, *run)]
            )
            if slot == "weight" and self.bf16:
                flat = flat.to(torch.bfloat16)
            target.copy_(flat.view(shape))

    def _run(self, name: str, slot: Slot, start: int, stop: int) -> list[torch.Tensor]:
        """Return the pieces, rank after rank, of elements [start, stop) of a flattened tensor."""
        part = part_size(numel(self.shapes[name]), self.topology.ranks)
        pieces = []
        while start < stop:
            rank, at = divmod(start, part)
            end = min(stop, (rank + 1) * part)
            pieces.append(self._part(rank, name, slot)[at : at + end - start])
            start = end
        return pieces

    def _part(self, rank: int, name: str, slot: Slot) -> torch.Tensor:
        """Return a rank's part of a flattened tensor, padding included."""
        if name not in self._where:
            return self._frozen[rank][name]
        number, offset, part = self._where[name]
        # The running weight is the master rounded to the run's dtype: DeepSpeed stores no other copy.
        stored: Slot = "master" if slot == "weight" else slot
        return self._flat[rank][number][stored][offset : offset + part]


def is_zero3(folder: Path) -> bool:
    """Return whether a folder holds a ZeRO-3 run without tensor parallelism."""
    # A universal checkpoint keeps a copy of the file; its tensors lie in zero/.
    return (folder / model_name(0)).is_file() and not (
        (folder / "zero").is_dir() or (folder / model_name(0, 1)).is_file()
    )


def open_zero3(folder: Path) -> Zero3Source:
    """Open a ZeRO-3 checkpoint folder (the one that holds the `*_states.pt` files) lazily.

    `config.json`, the model's Hugging Face config, has to lie in the folder or in the one above.

    Raises:
        InputError: a file is missing or damaged, or of a run with tensor parallelism; later, when a tensor is missing
            or of another shape than config.json says.
    """
    return open_rank(folder, 0, 1)


def open_rank(folder: Path, tensor_rank: int, tensor_ranks: int) -> Zero3Source:
    """Open the files of one rank of tensor parallelism; a tensor that is cut has the shape of the rank's piece.

    Raises:
        InputError: a file is missing or damaged, or of a run with another number of such ranks.
    """
    config = config_of(folder)
    path = folder / model_name(0, tensor_rank)
    model = load_model(path, "frozen_param_shapes")
    if model["mp_world_size"] != tensor_ranks:
        missing = folder / model_name(0, tensor_ranks)
        raise InputError(f"{missing}: missing (the checkpoint has tensor parallelism {model['mp_world_size']})")
    ranks = model["dp_world_size"]
    bf16 = (folder / optim_name(0, True, tensor_rank)).is_file()
    for rank in range(ranks):
        for name in (model_name(rank, tensor_rank), optim_name(rank, bf16, tensor_rank)):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: missing (the checkpoint was written by {ranks} ranks)")
    optim = load_pickle(folder / optim_name(0, bf16, tensor_rank))["optimizer_state_dict"]["optimizer_state_dict"]
    names, groups = groups_of(optim)
    sub_groups = tuple(
        SubGroup(group=group, tensors=tuple((name, tuple(shape)) for name, shape in shapes.items()))
        for group, shapes in zip(names, model["param_shapes"], strict=True)
    )
    # None from a run that saved with exclude_frozen_parameters: they are then missing.
    frozen = tuple((name, tuple(shape)) for name, shape in (model["frozen_param_shapes"] or {}).items())
    if frozen:
        groups.setdefault(FROZEN, Group())
    return Zero3Source(
        folder=folder,
        config=config,
        run=run_of(model, folder),
        groups=groups,
        topology=Topology(ranks=ranks, sub_groups=sub_groups, frozen=frozen),
        bf16=bf16,
        tensor_rank=tensor_rank,
    )
