"""DeepSpeed ZeRO-1 and ZeRO-2 checkpoints: every tensor of every slot, from the model file and the ranks' files.

Layout (DeepSpeed 0.19): `mp_rank_00_model_states.pt` holds the weights whole, as the run computes with them, and each
data-parallel rank d has `[bf16_]zero_pp_rank_{d}_mp_rank_00_optim_states.pt` with its share of the float32 masters and
of Adam's moments. The trainable parameters of a parameter group, in the order of the model file's `param_shapes`, are
flattened row-major one after the other (with `parameter_alignment` there is padding between them, which the optimizer
files list). The whole is padded to a multiple of 2 x ranks elements and cut into equal parts, one a rank. So a part may
begin and end inside a parameter, and a rank may have padding alone. Whether files keep a part's padding at the end
depends on slot and settings. (The `param_slice_mappings` are not used: with `round_robin_gradients` they are wrong.)
A run with tensor parallelism has these files once a rank of it (`_mp_rank_{t:02d}_`, of its pieces), one with a
pipeline once a stage (of its layers, without weights: `checkpoint.pipeline`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.pickles import load_pickle
from checkpoint.shard import STATE_SLOTS, flat_runs, numel
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, Source, box_shape, row_major_tiles
from checkpoint.zero3_tp import TensorParallelSource
from checkpoint.zero_files import FROZEN, PARAMETER_NAMES, config_of, groups_of, load_model, optim_name, run_of
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family


def whole_name(rank: int = 0) -> str:
    """Return the name of the model file of a tensor-parallel rank, or of a pipeline's stage."""
    return f"mp_rank_{rank:02d}_model_states.pt"


MODEL = whole_name()
ALIGNMENT = 2
"""A group's flat buffer is padded to a multiple of this times the ranks (DeepSpeed: nccl_start_alignment_factor)."""


@dataclass(frozen=True, kw_only=True)
class FlatGroup:
    """The flat buffer of a parameter group, over all ranks."""

    group: str
    starts: Mapping[str, int]
    """Offset of each tensor in the whole buffer (elements), in its order."""
    total: int
    """Elements from the buffer's start to the end of its last tensor."""
    part: int
    """Elements of a rank."""


def flat_group(group: str, shapes: Mapping[str, Sequence[int]], paddings: Sequence[int], ranks: int) -> FlatGroup:
    """Return where a group's tensors lie in its buffer; `paddings` are the elements after each tensor."""
    starts, at, end = {}, 0, 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        starts[name] = at
        end = at + numel(shape)
        at = end + padding
    block = ALIGNMENT * ranks
    return FlatGroup(group=group, starts=starts, total=end, part=-(-end // block) * ALIGNMENT)


@dataclass(frozen=True, kw_only=True)
class Zero12Source:
    """A saved ZeRO-1 or ZeRO-2 run, or what one tensor-parallel rank or one pipeline stage has of it."""

    folder: Path
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group]
    ranks: int
    flats: tuple[FlatGroup, ...]
    trained: Mapping[str, tuple[int, ...]]
    """Shape of each tensor that the optimizer has."""
    bf16: bool
    tensor_rank: int = 0
    """Which of the model-parallel ranks' files."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def _weights(self) -> Mapping[str, torch.Tensor]:
        """Weights as the run computes with them; a pipeline's lie elsewhere, and are its masters rounded."""
        return load_pickle(self.folder / whole_name(self.tensor_rank))["module"] or {}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """name -> shape in the files, of every tensor that lies there"""
        return {name: tuple(weight.shape) for name, weight in self._weights.items()} or self.trained

    @cached_property
    def _where(self) -> dict[str, int]:
        """name -> its group's number, for every tensor that the optimizer has"""
        return {name: number for number, flat in enumerate(self.flats) for name in flat.starts}

    @cached_property
    def _parts(self) -> list[list[dict[Slot, torch.Tensor]]]:
        """[rank][group][slot] -> flat tensor, in the file until read; of a length that the group's cut explains"""
        ranks: list[list[dict[Slot, torch.Tensor]]] = []
        for rank in range(self.ranks):
            path = self.folder / optim_name(rank, self.bf16, self.tensor_rank)
            state = load_optimizer(path)
            masters, moments = state["single_partition_of_fp32_groups"], base_state(state)["state"]
            if len(masters) != len(self.flats):
                raise InputError(f"{path}: has {len(masters)} parameter groups, not {len(self.flats)}")
            parts: list[dict[Slot, torch.Tensor]] = []
            for number, (flat, master) in enumerate(zip(self.flats, masters, strict=True)):
                found = {"master": master, **moments.get(number, {})}
                slots = {slot: found[slot] for slot in STATE_SLOTS if slot in found}
                if ranks and slots.keys() != ranks[0][number].keys():
                    raise InputError(f"{path}: group {flat.group} has {', '.join(slots)}; rank 0 has other slots")
                least = min(flat.part, max(0, flat.total - rank * flat.part))
                for slot, tensor in slots.items():
                    if not least <= tensor.numel() <= flat.part:
                        held = f"{slot} of group {flat.group} has {tensor.numel()} elements"
                        raise InputError(f"{path}: {held}; {flat.total} over {self.ranks} ranks are {flat.part} each")
                parts.append(slots)
            ranks.append(parts)
        return ranks

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        path, tensors = self.folder / whole_name(self.tensor_rank), self.family.tensors(self.config)
        for name in self._where:
            if name not in tensors:
                raise InputError(f"{path}: trains {name}, which the model of config.json has not")
        infos = {}
        for name, tensor in tensors.items():
            if tensor.tied_to is not None:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
                continue
            if name not in self.shapes:
                raise InputError(f"{path}: tensor {name} is missing")
            if self.shapes[name] != tensor.shape:
                raise InputError(f"{path}: {name} has shape {self.shapes[name]}, config.json says {tensor.shape}")
            infos[name] = self.info(name)
        return infos

    def info(self, name: str) -> Info:
        """Return what is known of a tensor; its shape is that of this rank's piece."""
        run = torch.bfloat16 if self.bf16 else torch.float32
        slots: dict[Slot, torch.dtype] = {"weight": self._weights[name].dtype if name in self._weights else run}
        number = self._where.get(name)
        if number is not None:
            slots |= {slot: part.dtype for slot, part in self._parts[0][number].items()}
        group = FROZEN if number is None else self.flats[number].group
        return Info(shape=self.shapes[name], slots=slots, group=group, trainable=number is not None)

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        for slot, target in out.items():
            if slot == "weight" and name in self._weights:
                target.copy_(self._weights[name][box])
            else:
                stored: Slot = "master" if slot == "weight" else slot
                runs = flat_runs(self.shapes[name], box)
                flat = torch.cat([piece for run in runs for piece in self._run(name, stored, *run)])
                if slot == "weight" and self.bf16:
                    flat = flat.to(torch.bfloat16)
                target.copy_(flat.view(box_shape(box)))

    def _run(self, name: str, slot: Slot, start: int, stop: int) -> list[torch.Tensor]:
        """Return the pieces, rank after rank, of elements [start, stop) of a flattened tensor."""
        number = self._where[name]
        flat = self.flats[number]
        start, stop = start + flat.starts[name], stop + flat.starts[name]
        pieces = []
        while start < stop:
            rank, at = divmod(start, flat.part)
            end = min(stop, (rank + 1) * flat.part)
            pieces.append(self._parts[rank][number][slot][at : at + end - start])
            start = end
        return pieces


def load_optimizer(path: Path) -> Mapping[str, Any]:
    """Return the state of a rank's optimizer.

    Raises:
        InputError: the file is missing or damaged, or of another kind.
    """
    state = load_pickle(path)
    state = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    needed = {"single_partition_of_fp32_groups", "base_optimizer_state", "partition_count"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise InputError(f"{path}: not the optimizer file of a ZeRO-1 or ZeRO-2 run")
    return state


def base_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return torch's optimizer state {state, param_groups}; `elastic_checkpoint` saves no settings of the groups."""
    base = state["base_optimizer_state"]
    if isinstance(base, list):
        groups = [{"params": [number]} for number in range(len(base))]
        return {"state": dict(enumerate(base)), "param_groups": groups}
    return base


def is_zero12(folder: Path) -> bool:
    """Return whether a folder holds a ZeRO-1 or ZeRO-2 run; ZeRO-3 has a model file for each rank instead."""
    return (
        (folder / MODEL).is_file()
        and any((folder / optim_name(0, bf16)).is_file() for bf16 in (True, False))
        and not any(folder.glob("layer_*-model_states.pt"))
    )


def open_zero12(folder: Path) -> Source:
    """Open a ZeRO-1 or ZeRO-2 checkpoint folder (the one that holds the `*_states.pt` files) lazily.

    `config.json`, the model's Hugging Face config, has to lie in the folder or in the one above.

    Raises:
        InputError: a file is missing, damaged or of another kind, or the run was expert parallel; later, when a tensor
            is missing, unknown, or of another shape than config.json says.
    """
    pieces = open_ranks(folder)
    return pieces[0] if len(pieces) == 1 else TensorParallelSource(folder=folder, pieces=pieces)


def open_ranks(folder: Path, renamed: bool = False) -> tuple[Zero12Source, ...]:
    """Open the files of each model-parallel rank (of tensor parallelism, or a pipeline's stage).

    Args:
        renamed: whether tensors have names of the run's own, for which each model file gives the Hugging Face name.
    """
    config = config_of(folder)
    count = load_model(folder / MODEL, "module")["mp_world_size"]
    for rank in range(count):
        if not (folder / whole_name(rank)).is_file():
            raise InputError(f"{folder / whole_name(rank)}: missing (the run had {count} model-parallel ranks)")
    return tuple(_open_rank(folder, config, rank, renamed) for rank in range(count))


def _open_rank(folder: Path, config: Mapping[str, Any], tensor_rank: int, renamed: bool) -> Zero12Source:
    model = load_model(folder / whole_name(tensor_rank), "module")
    ranks = model["dp_world_size"]
    bf16 = (folder / optim_name(0, True, tensor_rank)).is_file()
    for path in (folder / optim_name(rank, bf16, tensor_rank) for rank in range(ranks)):
        if not path.is_file():
            raise InputError(f"{path}: missing (the checkpoint was written by {ranks} ranks)")
    first = optim_name(0, bf16, tensor_rank)
    state = load_optimizer(folder / first)
    counts = state["partition_count"]
    if any(count != ranks for count in (counts if isinstance(counts, list) else [counts])):
        raise InputError(f"{folder}: cut over {counts} ranks by group (expert parallel); not read")
    names, groups = groups_of(base_state(state))
    shapes = model["param_shapes"]
    paddings = state.get("param_alignment_paddings") or [[0] * len(entry) for entry in shapes]
    if [len(entry) for entry in shapes] != [len(entry) for entry in paddings] or len(names) != len(shapes):
        raise InputError(f"{folder / whole_name(tensor_rank)}: its parameter groups are not those of {first}")
    if renamed:
        known = model.get("growmerge", {}).get(PARAMETER_NAMES, {})
        for name in (name for entry in shapes for name in entry if name not in known):
            raise InputError(f"{folder / whole_name(tensor_rank)}: no Hugging Face name for {name}")
        shapes = [{known[name]: shape for name, shape in entry.items()} for entry in shapes]
    flats = tuple(flat_group(*parts, ranks) for parts in zip(names, shapes, paddings, strict=True))
    owned = {name for name, tensor in family_of(config).tensors(config).items() if tensor.tied_to is None}
    if not renamed and owned - {name for flat in flats for name in flat.starts}:
        groups.setdefault(FROZEN, Group())
    return Zero12Source(
        folder=folder,
        config=config,
        run=run_of(model, folder),
        groups=groups,
        ranks=ranks,
        flats=flats,
        trained={name: tuple(shape) for entry in shapes for name, shape in entry.items()},
        bf16=bf16,
        tensor_rank=tensor_rank,
    )
