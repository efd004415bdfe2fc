"""The optimizer's files of a nanotron checkpoint: Adam's moments and the float32 weights, by parameter.

`optimizer/optimizer_pp-P-of-N[_dp-D-of-K]_tp-T-of-M_exp-E-of-X.pt`, with `dp` from ZeRO-1 alone, is torch's state of
the parameters of a pipeline stage and tensor-parallel rank: `names` (number -> name), `state` (number -> `exp_avg`,
`exp_avg_sq`, `step`), `param_groups`, and `gradient_accumulator` (name -> float32 weight) of runs that accumulate
gradients in float32. ZeRO-1 cuts a rank's flattened shard of each parameter over the data-parallel ranks, in their
order, without padding; a rank may have nothing of a small one. The stages of tied embeddings each have them.

Facts of huggingface/nanotron: src/nanotron/serialize/optimizer.py, optim/zero.py, optim/named_optimizer.py,
optim/optimizer_from_gradient_accumulator.py and helpers.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from checkpoint.nanotron_shards import Shards
from checkpoint.pickles import load_pickle
from checkpoint.source import Group, Slot
from parallel.errors import InputError

FILE = re.compile(r"optimizer_pp-(\d+)-of-(\d+)(?:_dp-(\d+)-of-(\d+))?_tp-(\d+)-of-(\d+)(?:_exp-\d+-of-(\d+))?\.pt")
MOMENTS: tuple[Slot, ...] = ("exp_avg", "exp_avg_sq")
Parts = Mapping[tuple[str, Slot], Sequence[torch.Tensor]]
"""Parameter and slot -> the data-parallel ranks' parts of a shard, in order; they stay in the file until read."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer's state of all ranks."""

    folder: Path
    parts: Sequence[Parts]
    """By tensor-parallel rank."""
    group_of: Mapping[str, str]
    """Group of each parameter that has state."""
    groups: Mapping[str, Group]

    def slots(self, shards: Shards) -> dict[Slot, torch.dtype]:
        """Return the slots that a parameter has here, with their dtypes.

        Raises:
            InputError: a rank has too little of it, or none where others have some.
        """
        found: dict[Slot, torch.dtype] = {}
        for slot in ("master", *MOMENTS):
            key = shards.parameter.name, slot
            if all(key not in parts for parts in self.parts):
                continue
            for rank, stored in enumerate(shards.stored):
                parts = self.parts[rank].get(key, []) if rank < len(self.parts) else []
                count, expected = sum(part.numel() for part in parts), stored.shape
                if count != torch.Size(expected).numel():
                    raise InputError(
                        f"{self.folder}: {slot} of {key[0]} has {count} elements for tensor-parallel rank {rank}, "
                        f"its shard of the weight has shape {expected}"
                    )
                found[slot] = parts[0].dtype
        return found

    def take(self, shards: Shards, slot: Slot, rank: int, rows: slice, columns: slice) -> torch.Tensor:
        """Return rows and columns of a slot of a rank's shard."""
        shape = shards.stored[rank].shape
        width = shape[1] if len(shape) == 2 else 1
        parts = self.parts[rank][shards.parameter.name, slot]
        start, stop, step = rows.indices(shape[0])
        if len(parts) == 1:
            return parts[0].view(-1, width)[rows, columns]
        pieces, at = [], 0
        for part in parts:
            low, high = max(start * width - at, 0), min(stop * width - at, part.numel())
            if low < high:
                pieces.append(part[low:high])
            at += part.numel()
        return torch.cat(pieces).view(-1, width)[::step, columns]


def open_optimizer(folder: Path) -> Optimizer | None:
    """Open the optimizer's files of a checkpoint; None if it has none.

    Raises:
        InputError: a file is missing or damaged, or is not of AdamW.
    """
    inside = folder / "optimizer"
    names = sorted(path.name for path in inside.iterdir()) if inside.is_dir() else []
    matches = [match for name in names if (match := FILE.fullmatch(name))]
    if not matches:
        return None
    sizes = {(match[2], match[4], match[6], match[7]) for match in matches}
    if len(sizes) > 1:
        raise InputError(f"{inside}: files of several runs ({matches[0][0]}, {matches[-1][0]}); keep those of one")
    if matches[0][7] not in (None, "1"):
        raise InputError(f"{inside / matches[0][0]}: of expert parallelism, which is not read")
    by_ranks = {(int(match[1]), int(match[5]), int(match[3] or 0)): inside / match[0] for match in matches}
    stages, tensor_ranks, ranks = int(matches[0][2]), int(matches[0][6]), int(matches[0][4] or 1)
    for place in product(range(stages), range(tensor_ranks), range(ranks)):
        if place not in by_ranks:
            what = "stage {}, tensor-parallel rank {}, data-parallel rank {}".format(*place)
            raise InputError(f"{inside}: the file of pipeline {what} is missing (there are {matches[0][0]} and others)")
    parts: list[dict[tuple[str, Slot], list[torch.Tensor]]] = [{} for _ in range(tensor_ranks)]
    values: dict[str, dict[str, Any]] = {}
    for stage in range(stages):
        known = [set(found) for found in parts]  # of tied embeddings the first stage's are taken
        for rank, dp_rank in product(range(tensor_ranks), range(ranks)):
            path = by_ranks[stage, rank, dp_rank]
            state = _load(path)
            for key, part in _tensors(state, path).items():
                if key not in known[rank]:
                    parts[rank].setdefault(key, []).append(part)
            values |= {name: value for name, value in _values(state).items() if name not in values}
    group_of, groups = _groups(values)
    return Optimizer(folder=inside, parts=parts, group_of=group_of, groups=groups)


def _load(path: Path) -> Mapping[str, Any]:
    state = load_pickle(path, "nanotron file")
    for key in ("state", "names", "param_groups"):
        if not isinstance(state, dict) or key not in state:
            raise InputError(f"{path}: no {key}, so not the optimizer's file of nanotron")
    return state


def _tensors(state: Mapping[str, Any], path: Path) -> dict[tuple[str, Slot], torch.Tensor]:
    """Return a file's tensors, flattened."""
    found: dict[tuple[str, Slot], torch.Tensor] = {}
    for name, weight in state.get("gradient_accumulator", {}).items():
        found[_plain(name), "master"] = weight
    for number, name in state["names"].items():
        for slot in MOMENTS:
            if slot not in state["state"][number]:
                raise InputError(f"{path}: {name} has no {slot}: the state of Adam alone is read")
            found[_plain(name), slot] = state["state"][number][slot]
    # Masters want a gradient, and so would what is copied from them.
    return {key: tensor.detach().reshape(-1) for key, tensor in found.items()}


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _values(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the values of the group of each parameter that has state, its step with them."""
    found = {}
    for group in state["param_groups"]:
        for number in group["params"]:
            if number in state["names"]:
                found[_plain(state["names"][number])] = {**group, "step": state["state"][number].get("step", 0)}
    return found


def _groups(values: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, Group]]:
    """Return the group's name of each parameter, and the groups: nanotron's have no names, but what they do differs."""
    groups: dict[str, Group] = {}
    group_of = {}
    for parameter, value in values.items():
        group = Group(
            lr=float(value.get("lr", 0.0)),
            weight_decay=float(value.get("weight_decay", 0.0)),
            betas=tuple(value.get("betas", Group.betas)),
            eps=float(value.get("eps", Group.eps)),
            step=int(value["step"]),
        )
        kind = "decay" if group.weight_decay else "no_decay"
        name = kind
        if name in groups and groups[name] != group:
            name = f"{kind}-lr{group.lr:g}-wd{group.weight_decay:g}-step{group.step}"
        groups.setdefault(name, group)
        group_of[parameter] = name
    return group_of, groups
