"""Filling a live engine from a Source: each rank reads the elements that it keeps, and no more.

ZeRO-3 is filled through DeepSpeed's own load, which our checkpoint engine serves (`train.checkpointing`). Here is what
has no such way: the flat partitions of ZeRO-1 and 2 (of a pipeline, too), and plain optimizers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from checkpoint.shard import numel, read_range
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


def fill_partitions(optimizer: Any, names: Mapping[torch.nn.Parameter, str], source: Source) -> None:
    """Fill the partitions of a ZeRO-1 or 2 optimizer (or a BF16_Optimizer), then the weights that are made of them.

    Args:
        names: Hugging Face name of each parameter of this rank.
    """
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for parameters, flat in zip(groups, flats, strict=True):
        filled: dict[Slot, torch.Tensor] = {slot: torch.zeros(flat.shape) for slot in ("master", *MOMENTS)}
        for parameter in parameters:
            fragment = parameter._hp_mapping
            if fragment is not None:
                start, count = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
                at = fragment.hp_fragment_address.start
                out = {slot: tensor[at : at + count] for slot, tensor in filled.items()}
                read_range(source, names[parameter], start, start + count, out)
        flat.data.copy_(filled["master"])
        step = steps_taken(source, [names[parameter] for parameter in parameters])
        moments = {str(slot): filled[slot].to(flat.device) for slot in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": torch.tensor(float(step)), **moments}
    optimizer.update_lp_params()


def fill_plain(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], source: Source) -> None:
    """Fill whole parameters and their state: ZeRO-0 in float32."""
    for parameter, name in names.items():
        filled: dict[Slot, torch.Tensor] = {slot: torch.zeros(numel(parameter.shape)) for slot in ("master", *MOMENTS)}
        read_range(source, name, 0, numel(parameter.shape), filled)
        parameter.data.copy_(filled["master"].view(parameter.shape))
        moments = {str(slot): filled[slot].view(parameter.shape).to(parameter.device) for slot in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(steps_taken(source, [name]))), **moments}
