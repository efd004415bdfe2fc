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
from checkpoint.shard import STATE_SLOTS, SubGroup, Topology, numel, part_of, part_size
from checkpoint.source import Group, Slot, Source
from checkpoint.zero_files import model_name, optim_name, values_of
from parallel.errors import InputError

DEEPSPEED = "0.19.8"
"""The version whose format this is; DeepSpeed compares it with its own to know old files."""


def topology_of(source: Source, ranks: int, sub_group_size: int = 10**9) -> Topology:
    """Return how a fresh engine cuts a source: its groups in order, each cut into sub-groups of whole parameters.

    Tensors that are not trained are in no sub-group.

    DeepSpeed closes a sub-group once its partitioned elements reach `sub_group_size` (its default is 1e9).
    """
    sub_groups = []
    for group in source.groups:
        tensors: list[tuple[str, tuple[int, ...]]] = []
        held = 0
        for name, info in source.infos.items():
            if info.tied_to is not None or not info.trainable or info.group != group:
                continue
            tensors.append((name, info.shape))
            held += part_size(numel(info.shape), ranks)
            if held >= sub_group_size:
                sub_groups.append(SubGroup(group=group, tensors=tuple(tensors)))
                tensors, held = [], 0
        if tensors:
            sub_groups.append(SubGroup(group=group, tensors=tuple(tensors)))
    owned = ((name, info) for name, info in source.infos.items() if info.tied_to is None)
    frozen = tuple((name, info.shape) for name, info in owned if not info.trainable)
    return Topology(ranks=ranks, sub_groups=tuple(sub_groups), frozen=frozen)


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
        """Return two files a rank: names, shapes and what is not trained; and the flat buffers.

        Raises:
            InputError: ranks is below 1.
        """
        if self.ranks < 1:
            raise InputError(f"a ZeRO-3 checkpoint of {self.ranks} ranks cannot be written: at least 1 is needed")
        topology = self.topology or topology_of(source, self.ranks)
        names = tuple(name for sub_group in topology.sub_groups for name, _ in sub_group.tensors)
        frozen = tuple(name for name, _ in topology.frozen)
        plans = []
        for rank in range(self.ranks):
            model = functools.partial(_create_model, source=source, topology=topology, rank=rank, bf16=self.bf16)
            optim = functools.partial(_create_optim, source=source, topology=topology, rank=rank)
            plans.append(FilePlan(name=model_name(rank), tensors=frozen, create=model))
            plans.append(FilePlan(name=optim_name(rank, self.bf16), tensors=names, create=optim))
        return plans

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        return {"config.json": (json.dumps(dict(source.config), indent=2, ensure_ascii=False) + "\n").encode()}


def _create_model(path: Path, *, source: Source, topology: Topology, rank: int, bf16: bool) -> list[Fragment]:
    """Write what DeepSpeed keeps beside the buffers, and return where its only weights go: those not trained."""
    run = source.run
    dtype = torch.bfloat16 if bf16 else torch.float32
    module = OrderedDict((name, torch.empty(0)) for name in source.infos)
    parts = {name: torch.empty(part_size(numel(shape), topology.ranks), dtype=dtype) for name, shape in topology.frozen}
    aliases = {name: info.tied_to for name, info in source.infos.items() if info.tied_to is not None}
    state = {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [
            OrderedDict((name, torch.Size(shape)) for name, shape in sub_group.tensors)
            for sub_group in topology.sub_groups
        ],
        "frozen_param_shapes": {name: torch.Size(shape) for name, shape in topology.frozen},
        "frozen_param_fragments": parts,
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
    offsets = save_skeleton(path, state, [*module.values(), *parts.values()])
    fragments = []
    for name, shape in topology.frozen:
        start, stop = part_of(shape, topology.ranks, rank)
        if start < stop:
            at = offsets[id(parts[name])]
            fragments.append(Fragment(offset=at, tensor=name, slot="weight", dtype=dtype, start=start, stop=stop))
    return fragments


def save_skeleton(path: Path, state: object, tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Write a `.pt` file at its full size, data zero, and return the byte offset of each tensor's data, by `id`.

    `tensors` are all that the state holds, in the order in which the pickler meets them: so it numbers their storages.
    """
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # a checksum of data that is not there yet
    try:
        with torch.serialization.skip_data():
            torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(checked)
    reader: Any = torch._C.PyTorchFileReader(str(path))
    return {id(tensor): reader.get_record_offset(f"data/{number}") for number, tensor in enumerate(tensors)}


def _create_optim(path: Path, *, source: Source, topology: Topology, rank: int) -> list[Fragment]:
    """Write the skeleton of a rank's optimizer file and return where each tensor's part goes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    adam: dict[int, dict[str, torch.Tensor]] = {}
    flat_of: list[dict[Slot, torch.Tensor]] = []
    steps: list[tuple[torch.Tensor, float]] = []
    for index, sub_group in enumerate(topology.sub_groups):
        count = sum(part_size(numel(shape), topology.ranks) for _, shape in sub_group.tensors)
        # Virtual memory alone: nothing is ever written to these tensors.
        flat: dict[Slot, torch.Tensor] = {"master": torch.empty(count)}
        if all("exp_avg" in source.infos[name].slots for name, _ in sub_group.tensors):
            step = torch.empty(())
            flat |= {"exp_avg": torch.empty(count), "exp_avg_sq": torch.empty(count)}
            adam[index] = {"step": step, "exp_avg": flat["exp_avg"], "exp_avg_sq": flat["exp_avg_sq"]}
            steps.append((step, float(source.groups.get(sub_group.group, Group()).step)))
        flat_of.append(flat)
    state: dict[str, Any] = {
        "optimizer_state_dict": {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": topology.ranks,
            "optimizer_state_dict": {"state": adam, "param_groups": _param_groups(source, topology)},
            "fp32_flat_groups": [flat["master"] for flat in flat_of],
        },
        "ds_config": {},
        "ds_version": DEEPSPEED,
    }
    order = [tensor for moments in adam.values() for tensor in moments.values()]
    offsets = save_skeleton(path, state, [*order, *(flat["master"] for flat in flat_of)])
    with path.open("r+b") as file:
        for step, value in steps:
            file.seek(offsets[id(step)])
            file.write(torch.tensor(value, dtype=torch.float32).numpy().tobytes())
    return _fragments(source, topology, rank, flat_of, offsets)


def _param_groups(source: Source, topology: Topology) -> list[dict[str, Any]]:
    """Return torch's parameter groups, each with its sub-groups' numbers; one whose tensors are all frozen has none."""
    held = {sub_group.group for sub_group in topology.sub_groups}
    # Groups of frozen tensors alone are ours, not the optimizer's.
    apart = {info.group for info in source.infos.values() if not info.trainable} - held
    known = held <= source.groups.keys()
    numbers: dict[str, list[int]] = {name: [] for name in source.groups if known and name not in apart}
    for index, sub_group in enumerate(topology.sub_groups):
        numbers.setdefault(sub_group.group, []).append(index)
    return [
        {"name": name, **values_of(source.groups.get(name, Group())), "params": params}
        for name, params in numbers.items()
    ]


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
            start, stop = part_of(shape, topology.ranks, rank)
            slots = source.infos[name].slots
            for slot in STATE_SLOTS:
                if slot in flat and start < stop:
                    stored: Slot = "weight" if slot == "master" and slot not in slots else slot
                    offset = offsets[id(flat[slot])] + at * 4
                    fragments.append(
                        Fragment(offset=offset, tensor=name, slot=stored, dtype=torch.float32, start=start, stop=stop)
                    )
            at += part_size(numel(shape), topology.ranks)
    return fragments
