"""Filling a live engine from a Source: each rank reads the elements that it keeps straight into where it keeps them.

DeepSpeed's own loads are never called: they go by position, unpickle, and hold a second copy of the state.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from checkpoint.shard import Topology, numel, read_range, read_shard
from checkpoint.source import Slot, Source
from parallel.errors import InputError

MOMENTS: tuple[Slot, ...] = ("exp_avg", "exp_avg_sq")


def check_names(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what a rank's model has with what a source has: DeepSpeed's own load goes by position.

    Args:
        shapes: of this rank's parameters (its pieces), by Hugging Face name.

    Raises:
        InputError: a tensor is missing or of another shape.
    """
    for name, shape in shapes.items():
        info = source.infos.get(name)
        if info is None or tuple(info.shape) != tuple(shape):
            found = "missing" if info is None else f"of shape {info.shape}"
            raise InputError(f"tensor {name} is {found} in the checkpoint; the model needs {tuple(shape)}")


def steps_taken(source: Source, names: Iterable[str]) -> int:
    """Return Adam's step count for tensors that share one.

    By the tensors' own groups: a checkpoint of another tool may call its groups otherwise, and one that was not trained
    there has taken no steps.
    """
    groups = {source.infos[name].group for name in names}
    return max((source.groups[name].step for name in groups if name in source.groups), default=0)


def fill_zero3(optimizer: Any, topology: Topology, source: Source, rank: int) -> None:
    """Fill the parts of a ZeRO-3 optimizer, then the weights that are made of them.

    Args:
        topology: how it cuts what this rank's data-parallel group has.
        rank: this rank's place in that group.
    """
    optimizer.checkpoint_event_prologue()  # parameters that are gathered are given back first
    for index, sub_group in enumerate(topology.sub_groups):
        flat = optimizer.fp32_partitioned_groups_flat[index]
        filled = _emptied(flat)
        read_shard(source, sub_group, topology.ranks, rank, filled)
        _adopt(optimizer.optimizer, flat, filled, steps_taken(source, [name for name, _ in sub_group.tensors]))
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        optimizer._unflatten_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()


def _emptied(flat: torch.Tensor) -> dict[Slot, torch.Tensor]:
    """Return zeros on the CPU for a flat partition's slots; its own memory for the master where that is on the CPU."""
    shape, where = flat.shape, flat.device.type
    master = flat.data.zero_() if where == "cpu" and flat.dtype == torch.float32 else torch.zeros(shape)
    return {"master": master, **{slot: torch.zeros(shape) for slot in MOMENTS}}


def _adopt(
    optimizer: torch.optim.Optimizer, flat: torch.Tensor, filled: Mapping[Slot, torch.Tensor], step: int
) -> None:
    """Set a flat partition and its state of Adam."""
    if filled["master"].data_ptr() != flat.data.data_ptr():
        flat.data.copy_(filled["master"])
    moments = {str(slot): filled[slot].to(flat.device) for slot in MOMENTS}
    # The fused kernel wants the count beside the numbers.
    optimizer.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **moments}


def fill_partitions(optimizer: Any, names: Mapping[torch.nn.Parameter, str], source: Source) -> None:
    """Fill the partitions of a ZeRO-1 or 2 optimizer (or a BF16_Optimizer), then the weights that are made of them.

    Args:
        names: Hugging Face name of each parameter of this rank.
    """
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for parameters, flat in zip(groups, flats, strict=True):
        filled = _emptied(flat)
        for parameter in parameters:
            fragment = parameter._hp_mapping
            if fragment is not None:
                start, count = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
                at = fragment.hp_fragment_address.start
                out = {slot: tensor[at : at + count] for slot, tensor in filled.items()}
                read_range(source, names[parameter], start, start + count, out)
        _adopt(optimizer.optimizer, flat, filled, steps_taken(source, [names[parameter] for parameter in parameters]))
    optimizer.update_lp_params()


def fill_plain(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], source: Source) -> None:
    """Fill whole parameters and their state: ZeRO-0 in float32."""
    for parameter, name in names.items():
        filled: dict[Slot, torch.Tensor] = {slot: torch.zeros(numel(parameter.shape)) for slot in ("master", *MOMENTS)}
        read_range(source, name, 0, numel(parameter.shape), filled)
        parameter.data.copy_(filled["master"].view(parameter.shape))
        moments = {str(slot): filled[slot].view(parameter.shape).to(parameter.device) for slot in MOMENTS}
        step = torch.tensor(float(steps_taken(source, [name])), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **moments}
