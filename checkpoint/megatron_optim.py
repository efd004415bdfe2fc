"""The optimizer's state in a Megatron-LM checkpoint of `--ckpt-format torch`: Adam's moments and float32 weights.

Which number or place is which parameter no file says. The order is that of the model's modules, as the weights beside
have it, and there are at most two groups: what decays, and what does not (`wd_mult` 0), which is what has one dim.

- Without the distributed optimizer `optimizer` has `optimizer`, torch's state by number (the first group's parameters,
  then the second's), and `fp32_from_fp16_params`, the float32 weights of each group; a run in float32 has torch's state
  alone.
- The distributed optimizer's is `distrib_optim.pt`: of each virtual stage the flat buffers `param`, `exp_avg` and
  `exp_avg_sq`, which have the parameters from the last to the first, each from a multiple of 64 on. A buffer may have
  been cut into buckets, whose places are not recorded; that makes no difference if sizes are multiples of 64, and else
  the buffer's size tells.

Facts of megatron_core 0.16.1: core/optimizer/__init__.py (_get_param_groups, get_standard_config_overrides),
core/optimizer/optimizer.py (Float16OptimizerWithFloat16Params, FP32Optimizer), core/optimizer/distrib_optimizer.py
(get_parameter_state_dp_zero) and core/distributed/param_and_grad_buffer.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoint.megatron_files import Part
from checkpoint.pickles import load_pickle
from checkpoint.source import Group, Slot
from parallel.errors import InputError

DISTRIBUTED = "distrib_optim.pt"
MOMENTS: tuple[Slot, ...] = ("exp_avg", "exp_avg_sq")
FLAT: dict[Slot, str] = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""What the distributed optimizer calls a slot."""
ALIGN = 64
"""Elements: a parameter begins at a multiple of so many in its bucket."""
WITHOUT = "save with --no-save-optim to read the weights alone"
Tensors = dict[str, dict[Slot, torch.Tensor]]
"""Parameter -> slot -> its shard."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What the optimizer has of one rank's parameters."""

    tensors: Mapping[str, Mapping[Slot, torch.Tensor]] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    group_of: Mapping[str, str] = field(default_factory=dict)
    """Group of each parameter."""


def state_of(part: Part) -> State:
    """Return the state that a file has, or `distrib_optim.pt` beside it; nothing if there is none.

    Raises:
        InputError: it is damaged, of another optimizer than Adam, or does not fit the parameters.
    """
    held = part.state.get("optimizer")
    if held is None:
        return State()
    inner = held if isinstance(held, dict) and "param_groups" in held else _entry(held, "optimizer")
    groups = _entry(inner, "param_groups")
    if not isinstance(groups, list):
        raise InputError(f"{part.path}: its optimizer has no param_groups: the state of one Adam is read; {WITHOUT}")
    flat, state = part.path.parent / DISTRIBUTED, _entry(inner, "state")
    if not state and not flat.is_file():  # not saved, or taken away
        return State()
    kinds = _kinds(groups, part.path)
    group_of = {name: _kind_of(name, weight, part, kinds) for name, weight in _weights(part).items()}
    if state:
        tensors = _numbered_tensors(part, state, kinds, group_of, _entry(held, "fp32_from_fp16_params"))
    else:
        tensors = _flat_tensors(part, flat)
    values = {kind: _group(group, _step(group, state)) for kind, (_, group) in kinds.items()}
    return State(tensors=tensors, groups=values, group_of=group_of)


def _entry(held: object, key: str | int) -> Any:
    return held.get(key) if isinstance(held, dict) else None


def _weights(part: Part) -> dict[str, torch.Tensor]:
    return {name: weight for chunk in part.chunks for name, weight in chunk.items()}


def _kinds(groups: list[Any], path: Path) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Return number and values of the group that decays and of the one that does not."""
    kinds: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or group.get("params") == []:
            continue  # all ranks have all groups, be they empty
        kind = "decay" if group.get("wd_mult", group.get("weight_decay", 1.0)) else "no_decay"
        if kind in kinds or group.get("is_expert_parallel") or group.get("is_decoupled_lr"):
            raise InputError(f"{path}: parameter groups other than one that decays and one that does not; {WITHOUT}")
        kinds[kind] = number, group
    return kinds


def _kind_of(name: str, weight: torch.Tensor, part: Part, kinds: Mapping[str, object]) -> str:
    """Return which group a parameter is in."""
    if len(kinds) == 1:
        return next(iter(kinds))
    if part.arguments.get("apply_wd_to_qk_layernorm") and ("q_layernorm." in name or "k_layernorm." in name):
        return "decay"
    return "no_decay" if weight.dim() == 1 else "decay"


def _numbered_tensors(
    part: Part,
    state: Mapping[int, Mapping[str, Any]],
    kinds: Mapping[str, tuple[int, Mapping[str, Any]]],
    group_of: Mapping[str, str],
    masters: Any,
) -> Tensors:
    """Return the slots of each parameter from torch's state by number."""
    weights, found = _weights(part), Tensors()
    for kind, (place, group) in kinds.items():
        names = [name for name in weights if group_of[name] == kind]
        if len(group["params"]) != len(names):
            raise InputError(
                f"{part.path}: a group of its optimizer has {len(group['params'])} parameters, "
                f"the model has {len(names)} of the kind ({kind}); {WITHOUT}"
            )
        # Those of parameters in float32 are not among them.
        halves = [name for name in names if weights[name].dtype != torch.float32]
        own = masters[place] if isinstance(masters, list) and place < len(masters) else []
        if len(own) != len(halves):
            raise InputError(f"{part.path}: fp32_from_fp16_params has {len(own)} of {len(halves)} weights; {WITHOUT}")
        master_of = dict(zip(halves, own, strict=True))
        for number, name in zip(group["params"], names, strict=True):
            slots: dict[Slot, Any] = {"master": master_of.get(name, weights[name])}
            slots |= {slot: _entry(state.get(number), slot) for slot in MOMENTS}
            for slot, tensor in slots.items():
                if not torch.is_tensor(tensor) or tensor.shape != weights[name].shape:
                    raise InputError(
                        f"{part.path}: its optimizer has no {slot} of {name} of shape {tuple(weights[name].shape)}: "
                        f"the state of Adam alone is read; {WITHOUT}"
                    )
            found[name] = {slot: tensor.detach() for slot, tensor in slots.items()}
    return found


def _flat_tensors(part: Part, path: Path) -> Tensors:
    """Return the slots of each parameter from the distributed optimizer's buffers."""
    stored = load_pickle(path, "Megatron-LM file")
    buffers = [_entry(stored, number) for number in range(len(part.chunks))]
    if not _entry(stored, "buckets_coalesced") or any(not isinstance(one, dict) or len(one) != 1 for one in buffers):
        raise InputError(f"{path}: does not have one buffer for each of {len(buffers)} virtual stages of {part.path}")
    found = Tensors()
    for chunk, buffer in zip(part.chunks, buffers, strict=True):
        (tensors,) = buffer.values()
        places, size = _places(chunk)
        for slot, key in FLAT.items():
            flat = _entry(tensors, key)
            if not torch.is_tensor(flat) or tuple(flat.shape) != (size,):
                raise InputError(
                    f"{path}: {key} is not {size} numbers, as the parameters beside it make in one bucket: of another "
                    "run, or in buckets, of which no file says where they begin; save with --ckpt-format torch_dist, "
                    "or take the file away to read the weights alone"
                )
            for name, weight in chunk.items():
                at = places[name]
                found.setdefault(name, {})[slot] = flat[at : at + weight.numel()].view(weight.shape)
    return found


def _places(chunk: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], int]:
    """Return where each parameter begins in a buffer of one bucket, and the buffer's size."""
    places, at = {}, 0
    for name, weight in reversed(list(chunk.items())):
        places[name] = -(-at // ALIGN) * ALIGN
        at = places[name] + weight.numel()
    return places, at


def _step(group: Mapping[str, Any], state: Any) -> int:
    """Return a group's step: torch's Adam counts for each parameter, Apex's and Transformer Engine's for the group."""
    steps = [_entry(_entry(state, number), "step") for number in group.get("params", [])]
    found = next((step for step in [*steps, group.get("step")] if step is not None), 0)
    return int(found)


def _group(group: Mapping[str, Any], step: int) -> Group:
    return Group(
        lr=float(group.get("lr", 0.0)),
        weight_decay=float(group.get("weight_decay", 0.0)),
        betas=tuple(group.get("betas", Group.betas)),
        eps=float(group.get("eps", Group.eps)),
        step=step,
    )
