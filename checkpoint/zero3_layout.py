"""Writing DeepSpeed ZeRO-3 checkpoints: the per-rank files laid out first, then filled from any source.

The format: `checkpoint.zero3`, and `checkpoint.zero3_tp` with tensor parallelism, where each tensor-parallel rank's
files are those of a source of its own: what AutoTP leaves it of each tensor.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.layout import FilePlan, Fragment
from checkpoint.shard import STATE_SLOTS, SubGroup, Topology, numel, part_of, part_size
from checkpoint.source import Group, Slot, Source
from checkpoint.tensor_parallel import cuts_of, piece_of
from checkpoint.zero_files import model_name, optim_name
from checkpoint.zero_state import DEEPSPEED, model_state, param_groups, save_skeleton, tensor_parallel_state
from parallel.errors import InputError


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
    """A ZeRO-3 folder for data-parallel times tensor-parallel ranks, of a bfloat16 or a float32 run.

    A source without masters gives its weights as masters; one without moments gives none, as before the first step.
    """

    ranks: int
    """Data-parallel ranks."""
    tensor_ranks: int = 1
    vocab_parallel: bool = False
    """With tensor parallelism a tied embedding is cut too; see `checkpoint.tensor_parallel`."""
    bf16: bool = False
    sub_group_size: int = 10**9
    """Of the engine that will load it; see `topology_of`."""

    def files(self, source: Source) -> list[FilePlan]:
        """Return two files a rank: names, shapes and what is not trained; and the flat buffers.

        Raises:
            InputError: a number of ranks is below 1, or DeepSpeed could not train the model on so many.
        """
        for what, count in (("", self.ranks), ("tensor-parallel ", self.tensor_ranks)):
            if count < 1:
                raise InputError(f"a ZeRO-3 checkpoint of {count} {what}ranks cannot be written: at least 1 is needed")
        cuts = cuts_of(source, self.tensor_ranks, vocab_parallel=self.vocab_parallel)
        beside = tensor_parallel_state(source, cuts, self.tensor_ranks) if self.tensor_ranks > 1 else {}
        pieces = [piece_of(source, cuts, tensor_rank) for tensor_rank in range(self.tensor_ranks)]
        topologies = [topology_of(piece, self.ranks, self.sub_group_size) for piece in pieces]
        counts = [len(topology.sub_groups) for topology in topologies]
        if len(set(counts)) > 1:
            # It sums a norm over the tensor-parallel ranks once for each sub-group.
            raise InputError(
                f"of {self.sub_group_size} elements the tensor-parallel ranks have {counts} sub-groups, and DeepSpeed "
                "would wait for ever for those that some have not; a larger sub_group_size is needed"
            )
        plans = []
        for tensor_rank, (piece, topology) in enumerate(zip(pieces, topologies, strict=True)):
            names = tuple(name for sub_group in topology.sub_groups for name, _ in sub_group.tensors)
            frozen = tuple(name for name, _ in topology.frozen)
            for rank in range(self.ranks):
                model = functools.partial(
                    _create_model,
                    source=piece,
                    topology=topology,
                    rank=rank,
                    bf16=self.bf16,
                    first=rank == tensor_rank == 0,
                    beside=beside,
                )
                optim = functools.partial(_create_optim, source=piece, topology=topology, rank=rank)
                name = model_name(rank, tensor_rank)
                plans.append(FilePlan(name=name, tensors=frozen, create=model, source=piece))
                name = optim_name(rank, self.bf16, tensor_rank)
                plans.append(FilePlan(name=name, tensors=names, create=optim, source=piece))
        return plans

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        return {"config.json": (json.dumps(dict(source.config), indent=2, ensure_ascii=False) + "\n").encode()}


def _create_model(
    path: Path, *, source: Source, topology: Topology, rank: int, bf16: bool, first: bool, beside: Mapping[str, Any]
) -> list[Fragment]:
    """Write what DeepSpeed keeps beside the buffers, and return where its only weights go: those not trained."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    parts = {name: torch.empty(part_size(numel(shape), topology.ranks), dtype=dtype) for name, shape in topology.frozen}
    state = model_state(source, topology, dtype, first=first) | {"frozen_param_fragments": parts, **beside}
    offsets = save_skeleton(path, state, [*state["module"].values(), *parts.values()])
    fragments = []
    for name, shape in topology.frozen:
        start, stop = part_of(shape, topology.ranks, rank)
        if start < stop:
            at = offsets[id(parts[name])]
            fragments.append(Fragment(offset=at, tensor=name, slot="weight", dtype=dtype, start=start, stop=stop))
    return fragments


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
            "optimizer_state_dict": {"state": adam, "param_groups": param_groups(source, topology)},
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
