"""Writing DeepSpeed's universal checkpoints: a file for each slot of each tensor, laid out first, then filled.

The files are those that a tensor-parallel run leaves (`checkpoint.universal`), with all that an engine of any ZeRO
stage asks for. DeepSpeed loads them with `{"checkpoint": {"load_universal": true}}` in its config and
`engine.load_checkpoint(folder.parent, tag=folder.name)`, at any number of ranks, tensor-parallel or not.

What bites in that loader (0.19.8), whoever wrote the files: at stage 3 all sub-groups of a torch.optim optimizer get
the same step tensor, which each then counts up (give each a clone after loading, or Adam's bias correction is off); and
at no stage does it restore tensors that are not trained. Our engine reads the source and never calls that loader.
"""

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.layout import FilePlan, Fragment
from checkpoint.shard import STATE_SLOTS, SubGroup
from checkpoint.source import Group, Slot, Source
from checkpoint.universal import FILES, OPTIMIZER, PLAIN_MODEL, STEP
from checkpoint.zero3_layout import topology_of
from checkpoint.zero_files import model_name, values_of
from checkpoint.zero_state import DEEPSPEED, UNIVERSAL_VERSION, model_state, save_skeleton


@dataclass(frozen=True, kw_only=True)
class UniversalLayout:
    """A universal folder of a bfloat16 or a float32 run.

    A source without masters gives its weights as masters. One without moments gives zeros, as a fresh Adam has them:
    DeepSpeed loads nothing without.
    """

    bf16: bool = False

    def files(self, source: Source) -> list[FilePlan]:
        """Return a file for each slot of each tensor, one for its step, and those for the whole."""
        # Of one rank and never cut: the groups, each with its tensors.
        topology = topology_of(source, 1, sys.maxsize)
        plans = []
        for sub_group in topology.sub_groups:
            step = source.groups.get(sub_group.group, Group()).step
            for name, _ in sub_group.tensors:
                plans += [_tensor_plan(source, name, slot) for slot in STATE_SLOTS]
                plans.append(_plain(f"zero/{name}/{STEP}", torch.tensor(float(step))))
        plans += [_tensor_plan(source, name, "master") for name, _ in topology.frozen]
        plans.append(_plain(f"zero/{OPTIMIZER}", _optimizer_state(source, topology.sub_groups)))
        model = model_state(source, topology, torch.bfloat16 if self.bf16 else torch.float32)
        model["universal_checkpoint_info"] = UNIVERSAL_VERSION
        # Stage 3 looks for the one name, stages 1 and 2 for the other.
        plans += [_plain(name, model) for name in (model_name(0), PLAIN_MODEL)]
        return plans

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        return {"config.json": (json.dumps(dict(source.config), indent=2, ensure_ascii=False) + "\n").encode()}


def _plain(name: str, value: Any) -> FilePlan:
    """Return the plan of a small file that is whole once it is created."""

    def create(path: Path) -> list[Fragment]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            torch.save(value, file)
        return []

    return FilePlan(name=name, tensors=(), create=create)


def _tensor_plan(source: Source, name: str, slot: Slot) -> FilePlan:
    create = functools.partial(_create_tensor, source=source, name=name, slot=slot)
    return FilePlan(name=f"zero/{name}/{FILES[slot]}", tensors=(name,), create=create)


def _create_tensor(path: Path, *, source: Source, name: str, slot: Slot) -> list[Fragment]:
    """Write the skeleton of one file and return where its tensor goes; the data is zero until then."""
    info = source.infos[name]
    # Virtual memory alone: nothing is ever written to it.
    tensor = torch.empty(info.shape)
    row = source.family.tensors(source.config)[name].split == "row"
    path.parent.mkdir(parents=True, exist_ok=True)
    # cat_dim: along which dim an engine of stage 1 or 2 cuts it for tensor parallelism; stage 3 knows itself.
    offsets = save_skeleton(path, {"param": tensor, "cat_dim": 1 if row else 0}, [tensor])
    stored: Slot = "weight" if slot == "master" and slot not in info.slots else slot
    if stored not in info.slots:
        return []
    return [Fragment(offset=offsets[id(tensor)], tensor=name, slot=stored, dtype=torch.float32)]


def _optimizer_state(source: Source, groups: Sequence[SubGroup]) -> dict[str, Any]:
    """Return the parameter groups, in the two places where DeepSpeed looks.

    Stages 1 and 2 read the outer list, each group's own values. Stage 3 takes the first entry of the inner one and
    overwrites with it what EVERY group of the engine has, weight decay and all (DeepSpeed 0.19.8, stage3.py): there
    only what the groups have in common is written, so that an engine keeps what its own config gave each group.
    """
    entries = []
    for sub_group in groups:
        group = source.groups.get(sub_group.group, Group())
        entries.append(({"name": sub_group.group, **values_of(group)}, group.step))
    shared = {key: value for key, value in entries[0][0].items() if all(value == other[key] for other, _ in entries)}
    return {
        "zero_stage": 3,
        "ds_version": DEEPSPEED,
        "param_groups": [{**values, "params": [index]} for index, (values, _) in enumerate(entries)],
        "optimizer_state_dict": {
            "state": {index: {"step": torch.tensor(float(step))} for index, (_, step) in enumerate(entries)},
            "param_groups": [{**shared, "params": [index]} for index in range(len(entries))],
        },
    }
