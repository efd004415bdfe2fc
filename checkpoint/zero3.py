"""DeepSpeed ZeRO-3 checkpoints: every tensor of every slot, read from the per-rank files, and one rank's share of it.

Layout (DeepSpeed 0.19): a folder holds, for each data-parallel rank d, `zero_pp_rank_{d}_mp_rank_00_model_states.pt`
(shapes, names, no weights) and `[bf16_]zero_pp_rank_{d}_mp_rank_00_optim_states.pt` (float32 master weights and Adam's
moments). Every parameter is flattened row-major and cut into n parts, one a rank, of ceil(numel / n) elements, the last
padded; a rank's flat buffer of a sub-group is its parts of the sub-group's parameters, one after the other, padding
included.
Sub-groups depend on the number of ranks, so they are a matter of files alone: a tensor is known by its name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import read_json
from checkpoint.source import (
    FACTORS,
    Box,
    Group,
    Info,
    Map,
    RunState,
    Slot,
    Source,
    box_shape,
    flat_boxes,
    row_major_tiles,
)
from parallel.errors import InputError
from parallel.families import Family, family_of

STATE_SLOTS: tuple[Slot, ...] = ("master", "exp_avg", "exp_avg_sq")


class _Stub:
    """Stands for the two DeepSpeed classes that an optimizer file names; it keeps their state and does nothing."""

    def __new__(cls, *args: object) -> "_Stub":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Stub, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Stub, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Stub, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def load_pickle(path: Path) -> Any:
    """Load a `.pt` file without running anything that it says: plain data, tensors and the classes in ALLOWED.

    Tensors stay in the file until they are read (mmap).

    Raises:
        InputError: the file is missing, truncated, or names anything else.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: damaged, or not a plain DeepSpeed file ({reason[:200]})") from error


@dataclass(frozen=True, kw_only=True)
class SubGroup:
    """Parameters that one flat buffer holds, in its order."""

    group: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How a ZeRO-3 engine, running or saved, cuts a model."""

    ranks: int
    sub_groups: tuple[SubGroup, ...]


def numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def part_size(count: int, ranks: int) -> int:
    """Return the elements of a tensor of `count` elements that each rank holds, padding included."""
    return -(-count // ranks)


def read_shard(
    source: Source, topology: Topology, rank: int, slots: Sequence[Slot] = STATE_SLOTS
) -> list[dict[Slot, torch.Tensor]]:
    """Read one rank's partition of a source: for each sub-group, one flat float32 tensor a slot, padding zero.

    A source without masters gives its weights; one without optimizer state gives zeros, as a fresh Adam has them.
    No more than this rank's share is ever in memory.
    """
    shard = []
    for sub_group in topology.sub_groups:
        total = sum(part_size(numel(shape), topology.ranks) for _, shape in sub_group.tensors)
        flat: dict[Slot, torch.Tensor] = {slot: torch.zeros(total, dtype=torch.float32) for slot in slots}
        at = 0
        for name, shape in sub_group.tensors:
            count = numel(shape)
            part = part_size(count, topology.ranks)
            start, stop = min(rank * part, count), min((rank + 1) * part, count)
            _fill(source, name, start, stop, {slot: flat[slot][at : at + stop - start] for slot in slots})
            at += part
        shard.append(flat)
    return shard


def _fill(source: Source, name: str, start: int, stop: int, out: Mapping[Slot, torch.Tensor]) -> None:
    """Fill flat float32 tensors with elements [start, stop) of a tensor's slots, tile by tile."""
    info = source.infos[name]
    wanted: dict[Slot, torch.Tensor] = {}
    for slot, target in out.items():
        stored: Slot = "weight" if slot == "master" and slot not in info.slots else slot
        if stored in info.slots:
            wanted[stored] = target
    stats = source.collect(name, map)
    for (piece,) in row_major_tiles((stop - start,)):
        at = piece.start
        for box in flat_boxes(info.shape, start + piece.start, start + piece.stop):
            shape = box_shape(box)
            count = numel(shape)
            source.read(name, box, {slot: flat[at : at + count].view(shape) for slot, flat in wanted.items()}, stats)
            at += count


def flat_runs(shape: Sequence[int], box: Box) -> list[tuple[int, int]]:
    """Return the runs [start, stop) of the row-major flattened tensor that make up a box, in the box's order."""
    whole = len(shape)
    while whole and (box[whole - 1].start, box[whole - 1].stop) == (0, shape[whole - 1]):
        whole -= 1
    if whole == 0:
        return [(0, numel(shape))]
    inner = numel(shape[whole:])
    strides = [numel(shape[dim + 1 :]) for dim in range(whole)]
    last = box[whole - 1]
    runs = []
    for index in product(*(range(part.start, part.stop) for part in box[: whole - 1])):
        base = sum(i * stride for i, stride in zip(index, strides, strict=False))
        runs.append((base + last.start * inner, base + last.stop * inner))
    return runs


@dataclass(frozen=True, kw_only=True)
class Zero3Source:
    """A saved ZeRO-3 run without tensor parallelism."""

    folder: Path
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group]
    topology: Topology
    bf16: bool

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
            path = self.folder / optim_name(rank, self.bf16)
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
    def infos(self) -> Mapping[str, Info]:
        by_name = {
            name: (sub_group.group, shape)
            for sub_group in self.topology.sub_groups
            for name, shape in sub_group.tensors
        }
        infos = {}
        for name, tensor in self.family.tensors(self.config).items():
            if tensor.tied_to is not None:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
                continue
            if name not in by_name:
                raise InputError(f"{self.folder}: tensor {name} is missing")
            group, shape = by_name[name]
            if shape != tensor.shape:
                raise InputError(f"{self.folder}: {name} has shape {shape}, config.json says {tensor.shape}")
            slots: dict[Slot, torch.dtype] = {"weight": torch.bfloat16 if self.bf16 else torch.float32}
            slots |= dict.fromkeys(self._flat[0][self._where[name][0]], torch.float32)
            infos[name] = Info(shape=shape, slots=slots, group=group)
        return infos

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        shape = box_shape(box)
        for slot, target in out.items():
            # The running weight is the master rounded to the run's dtype: DeepSpeed stores no other copy.
            stored: Slot = "master" if slot == "weight" else slot
            flat = torch.cat([self._run(name, stored, *run) for run in flat_runs(self.infos[name].shape, box)])
            if slot == "weight" and self.bf16:
                flat = flat.to(torch.bfloat16)
            target.copy_(flat.view(shape))

    def _run(self, name: str, slot: Slot, start: int, stop: int) -> torch.Tensor:
        number, offset, part = self._where[name]
        pieces = []
        while start < stop:
            rank, at = divmod(start, part)
            end = min(stop, (rank + 1) * part)
            pieces.append(self._flat[rank][number][slot][offset + at : offset + at + end - start])
            start = end
        return torch.cat(pieces) if pieces else torch.empty(0)


def model_name(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def optim_name(rank: int, bf16: bool) -> str:
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def is_zero3(folder: Path) -> bool:
    return (folder / model_name(0)).is_file()


def open_zero3(folder: Path) -> Zero3Source:
    """Open a ZeRO-3 checkpoint folder (the one that holds the `*_states.pt` files) lazily.

    `config.json`, the model's Hugging Face config, has to lie in the folder or in the one above.

    Raises:
        InputError: a file is missing or damaged, the run was tensor parallel or had frozen parameters.
    """
    config_path = next(
        (path for path in (folder / "config.json", folder.parent / "config.json") if path.is_file()), None
    )
    if config_path is None:
        raise InputError(f"{folder}: no config.json here or above; copy the model's Hugging Face config there")
    model = load_pickle(folder / model_name(0))
    if model["mp_world_size"] != 1:
        raise InputError(f"{folder}: written with tensor parallelism {model['mp_world_size']}; merge it to 1 first")
    if model["frozen_param_shapes"]:
        raise InputError(f"{folder}: has frozen parameters ({next(iter(model['frozen_param_shapes']))}); not read")
    ranks = model["dp_world_size"]
    bf16 = (folder / optim_name(0, True)).is_file()
    for rank in range(ranks):
        for name in (model_name(rank), optim_name(rank, bf16)):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: missing (the checkpoint was written by {ranks} ranks)")
    optim = load_pickle(folder / optim_name(0, bf16))["optimizer_state_dict"]["optimizer_state_dict"]
    about = read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {}
    names, groups = _groups(optim)
    sub_groups = tuple(
        SubGroup(group=group, tensors=tuple((name, tuple(shape)) for name, shape in shapes.items()))
        for group, shapes in zip(names, model["param_shapes"], strict=True)
    )
    ours = model.get("growmerge", {})
    run = RunState(
        step=model["global_steps"],
        tokens=ours.get("tokens", 0),
        samples=ours.get("samples", model["global_samples"]),
        seed=ours.get("seed"),
        provenance=about,
    )
    return Zero3Source(
        folder=folder,
        config=read_json(config_path),
        run=run,
        groups=groups,
        topology=Topology(ranks=ranks, sub_groups=sub_groups),
        bf16=bf16,
    )


def _groups(optim: Mapping[str, Any]) -> tuple[list[str], dict[str, Group]]:
    """Return the group's name of every sub-group, in order, and the groups.

    DeepSpeed repeats a parameter group's settings, its name included, for each of its sub-groups.
    """
    names: list[str] = []
    groups: dict[str, Group] = {}
    for number, entry in enumerate(optim["param_groups"]):
        name = entry.get("name", f"group{number}")
        for index in entry["params"]:
            names.append(name)
            step = optim["state"].get(index, {}).get("step", 0)
            factors = {key: float(entry.get(key, 1.0)) for key in FACTORS}
            groups[name] = Group(
                lr=entry["lr"] / factors["lr_factor"],
                weight_decay=entry["weight_decay"] / factors["weight_decay_factor"],
                betas=tuple(entry["betas"]),
                eps=entry["eps"] / factors["eps_factor"],
                step=int(step),
                **factors,
            )
    return names, groups
