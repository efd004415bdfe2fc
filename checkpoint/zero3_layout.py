"""Writing DeepSpeed ZeRO-3 checkpoints: the per-rank files laid out first, then filled from any source.

A `.pt` file is a zip whose records are the tensors' storages. It is written once without data, at its full size, and
the fragments then go straight to the records' offsets: no tensor is ever held whole. The format: `checkpoint.zero3`.
"""

import functools
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.layout import FilePlan, Fragment
from checkpoint.source import FACTORS, Group, Slot, Source
from checkpoint.zero3 import STATE_SLOTS, SubGroup, Topology, model_name, numel, optim_name, part_size
from parallel.errors import InputError

DEEPSPEED = "0.19.8"
"""The version whose format this is; DeepSpeed compares it with its own to know old files."""


def topology_of(source: Source, ranks: int, sub_group_size: int = 10**9) -> Topology:
    """Return how a fresh engine cuts a source: its groups in order, each cut into sub-groups of whole parameters.

    DeepSpeed closes a sub-group once its partitioned elements reach `sub_group_size` (its default is 1e9).
    """
    sub_groups = []
    for group in source.groups:
        tensors: list[tuple[str, tuple[int, ...]]] = []
        held = 0
        for name, info in source.infos.items():
            if info.tied_to is not None or info.group != group:
                continue
            tensors.append((name, info.shape))
            held += part_size(numel(info.shape), ranks)
            if held >= sub_group_size:
                sub_groups.append(SubGroup(group=group, tensors=tuple(tensors)))
                tensors, held = [], 0
        if tensors:
            sub_groups.append(SubGroup(group=group, tensors=tuple(tensors)))
    return Topology(ranks=ranks, sub_groups=tuple(sub_groups))


@dataclass(frozen=True, kw_only=True)
class Zero3Layout:
    """A ZeRO-3 folder for a number of ranks, of a bfloat16 or a float32 run.

    A source without masters gives its weights as masters; one without moments gives none, as before the first step.
    """

    ranks: int
    bf16: bool = False
    topology: Topology | None = None
    """How the engine that will load it cuts the model; `topology_of` by default."""

    def files(self, source: Source) -> list[FilePlan]:
        """Return two files a rank: names and shapes, and the flat buffers.

        Raises:
            InputError: ranks is below 1.
        """
        if self.ranks < 1:
            raise InputError(f"a ZeRO-3 checkpoint of {self.ranks} ranks cannot be written: at least 1 is needed")
        topology = self.topology or topology_of(source, self.ranks)
        names = tuple(name for sub_group in topology.sub_groups for name, _ in sub_group.tensors)
        plans = []
        for rank in range(self.ranks):
            model = functools.partial(_create_model, source=source, topology=topology, rank=rank)
            optim = functools.partial(_create_optim, source=source, topology=topology, rank=rank)
            plans.append(FilePlan(name=model_name(rank), tensors=(), create=model))
            plans.append(FilePlan(name=optim_name(rank, self.bf16), tensors=names, create=optim))
        return plans

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        return {"config.json": (json.dumps(dict(source.config), indent=2, ensure_ascii=False) + "\n").encode()}


def _create_model(path: Path, *, source: Source, topology: Topology, rank: int) -> list[Fragment]:
    """Write what DeepSpeed keeps beside the buffers; it holds no weights."""
    run = source.run
    aliases = {name: info.tied_to for name, info in source.infos.items() if info.tied_to is not None}
    state = {
        "module": OrderedDict((name, torch.empty(0)) for name in source.infos),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [
            OrderedDict((name, torch.Size(shape)) for name, shape in sub_group.tensors)
            for sub_group in topology.sub_groups
        ],
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": aliases if rank == 0 else {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": run.step,
        "global_samples": run.samples,
        "dp_world_size": topology.ranks,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": DEEPSPEED,
        "growmerge": {"tokens": run.tokens, "samples": run.samples, "seed": run.seed},
    }
    with path.open("wb") as file:
        torch.save(state, file)
    return []


def _create_optim(path: Path, *, source: Source, topology: Topology, rank: int) -> list[Fragment]:
    """Write the skeleton of a rank's optimizer file and return where each tensor's part goes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    adam: dict[int, dict[str, torch.Tensor]] = {}
    param_groups = []
    flat_of: list[dict[Slot, torch.Tensor]] = []
    steps: list[tuple[torch.Tensor, float]] = []
    for index, sub_group in enumerate(topology.sub_groups):
        group = source.groups.get(sub_group.group, Group())
        count = sum(part_size(numel(shape), topology.ranks) for _, shape in sub_group.tensors)
        # Virtual memory alone: nothing is ever written to these tensors.
        flat: dict[Slot, torch.Tensor] = {"master": torch.empty(count)}
        if all("exp_avg" in source.infos[name].slots for name, _ in sub_group.tensors):
            step = torch.empty(())
            flat |= {"exp_avg": torch.empty(count), "exp_avg_sq": torch.empty(count)}
            adam[index] = {"step": step, "exp_avg": flat["exp_avg"], "exp_avg_sq": flat["exp_avg_sq"]}
            steps.append((step, float(group.step)))
        flat_of.append(flat)
        values = {
            "lr": group.lr * group.lr_factor,
            "weight_decay": group.weight_decay * group.weight_decay_factor,
            "eps": group.eps * group.eps_factor,
            "betas": group.betas,
            **{key: getattr(group, key) for key in FACTORS},
        }
        param_groups.append({"name": sub_group.group, **values, "params": [index]})
    state: dict[str, Any] = {
        "optimizer_state_dict": {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": topology.ranks,
            "optimizer_state_dict": {"state": adam, "param_groups": param_groups},
            "fp32_flat_groups": [flat["master"] for flat in flat_of],
        },
        "ds_config": {},
        "ds_version": DEEPSPEED,
    }
    # Storages get their numbers in the order in which the pickler meets them.
    order = [tensor for moments in adam.values() for tensor in moments.values()]
    order += [flat["master"] for flat in flat_of]
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # a checksum of data that is not there yet
    try:
        with torch.serialization.skip_data():
            torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(checked)
    reader: Any = torch._C.PyTorchFileReader(str(path))
    offsets = {id(tensor): reader.get_record_offset(f"data/{number}") for number, tensor in enumerate(order)}
    with path.open("r+b") as file:
        for step, value in steps:
            file.seek(offsets[id(step)])
            file.write(torch.tensor(value, dtype=torch.float32).numpy().tobytes())
    return _fragments(source, topology, rank, flat_of, offsets)


def _fragments(
    source: Source,
    topology: Topology,
    rank: int,
    flat_of: Sequence[dict[Slot, torch.Tensor]],
    offsets: dict[int, int],
) -> list[Fragment]:
    fragments = []
    for sub_group, flat in zip(topology.sub_groups, flat_of, strict=True):
        at = 0
        for name, shape in sub_group.tensors:
            count, part = numel(shape), part_size(numel(shape), topology.ranks)
            start, stop = min(rank * part, count), min((rank + 1) * part, count)
            slots = source.infos[name].slots
            for slot in STATE_SLOTS:
                if slot in flat and start < stop:
                    stored: Slot = "weight" if slot == "master" and slot not in slots else slot
                    offset = offsets[id(flat[slot])] + at * 4
                    fragments.append(
                        Fragment(offset=offset, tensor=name, slot=stored, dtype=torch.float32, start=start, stop=stop)
                    )
            at += part
    return fragments
