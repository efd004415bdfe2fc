"""The optimizer of a distributed checkpoint of Megatron-Core: where its state lies, and its parameter groups.

Keys of its tensors, where NAME is the key of a weight (`checkpoint.torch_dist_keys`):

optimizer.state.{exp_avg,exp_avg_sq}.NAME     Adam's moments, of every optimizer below
optimizer.state.fp32_param.NAME               masters: without the distributed optimizer, and of it until core 0.13
optimizer.state.param.NAME                    masters: the distributed optimizer's form `fully_reshardable`
optimizer.distributed.dp_group_idx_N.*        its other forms, in buckets: `dp_reshardable`, `dp_zero_gather_scatter`,
                                              `fully_sharded_bucket_space`

In buckets no key says what is where: that state is refused when it is asked for, and the weights are read.

common.pt has the groups, without their parameters, in `optimizer` or in `optimizer` of that: one that decays, and one
that does not (`wd_mult` 0), of what has one dim. The step is in them, or it is `common_step` in `state` beside.

Facts of megatron_core 0.16.1: core/optimizer/optimizer.py and distrib_optimizer.py (sharded_state_dict), __init__.py
(get_standard_config_overrides) and core/dist_checkpointing/optimizer.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.dcp_files import DcpFiles
from checkpoint.source import Group, Slot
from checkpoint.torch_dist_files import OURS, arguments_in
from parallel.errors import InputError

STATE = "optimizer.state."
MASTERS = ("fp32_param", "param")
"""What masters are called."""
PREFIXES: Mapping[Slot, tuple[str, ...]] = {
    "master": tuple(f"{STATE}{name}." for name in MASTERS),
    "exp_avg": (f"{STATE}exp_avg.",),
    "exp_avg_sq": (f"{STATE}exp_avg_sq.",),
}
"""What may stand before the keys of each slot."""
BUCKETS = "optimizer.distributed."
"""Before the keys of what is in buckets."""
GROUPS = "param_groups"
MOMENTS: tuple[Slot, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Parameter groups, and the one that each tensor is in; a tensor in none is not trained."""

    groups: Mapping[str, Group]
    group_of: Mapping[str, str]


def in_buckets(files: DcpFiles) -> bool:
    """Return whether the optimizer's state is in buckets."""
    return any(key.startswith(BUCKETS) for key in (*files.tensors, *files.values))


def prefixes_in(files: DcpFiles) -> dict[Slot, str]:
    """Return what stands before the keys of each slot that there is."""
    found: dict[Slot, str] = {}
    for slot, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if slot not in found and any(key.startswith(prefix) for key in files.tensors):
                found[slot] = prefix
    return found


def refuse_unknown_state(files: DcpFiles, weights: set[str]) -> None:
    """Refuse tensors of an optimizer that are no slots of the tensors with these keys.

    Raises:
        InputError: there is one.
    """
    prefixes = [prefix for slot in PREFIXES.values() for prefix in slot]
    for key in files.tensors:
        if key.startswith(STATE) and not any(
            key.startswith(prefix) and key.removeprefix(prefix) in weights for prefix in prefixes
        ):
            raise InputError(f"{files.path}: holds {key}, which is no state of Adam of a weight beside it")


def groups_in(common: Mapping[str, Any], path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Groups:
    """Return the groups that common.pt tells of; one without values if it tells of none.

    Args:
        path: of common.pt, for errors.
        shapes: of all tensors that may be trained, by Hugging Face name.

    Raises:
        InputError: it is damaged, or has other groups than are known.
    """
    try:
        if OURS in common:
            ours = common[OURS]
            groups = {name: Group(**values) for name, values in ours["groups"].items()}
            return Groups(groups=groups, group_of=dict(ours["group_of"]))
        held = common.get("optimizer") or {}
        inner = held if GROUPS in held else held.get("optimizer") or {}
        kinds = _kinds(inner.get(GROUPS, []), path)
        step = (inner.get("state") or {}).get("common_step")
        groups = {name: _group(values, step) for name, values in kinds.items()} or {"default": Group()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: its optimizer is none of Megatron-Core ({error})") from error
    of_norms = bool(arguments_in(common).get("apply_wd_to_qk_layernorm"))
    return Groups(groups=groups, group_of={name: _kind_of(name, shapes[name], groups, of_norms) for name in shapes})


def _kinds(entries: Any, path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the values of the group that decays and of the one that does not."""
    kinds: dict[str, Mapping[str, Any]] = {}
    for values in entries:
        kind = "decay" if values.get("wd_mult", values.get("weight_decay", 1.0)) else "no_decay"
        if kind in kinds or values.get("is_expert_parallel") or values.get("is_decoupled_lr"):
            raise InputError(
                f"{path}: its optimizer has other parameter groups than one that decays and one that does not, "
                "and it does not say which parameters they have"
            )
        kinds[kind] = values
    return kinds


def _kind_of(name: str, shape: tuple[int, ...], groups: Mapping[str, Group], of_norms: bool) -> str:
    """Return the group that Megatron-LM has a tensor in.

    Args:
        of_norms: whether norms of queries and keys decay.
    """
    decays = len(shape) > 1 or (of_norms and name.endswith(("q_norm.weight", "k_norm.weight")))
    kind = "decay" if decays else "no_decay"
    return kind if kind in groups else next(iter(groups))


def _group(values: Mapping[str, Any], step: Any) -> Group:
    first, second = values.get("betas", Group.betas)
    return Group(
        lr=float(values.get("lr") or 0.0),
        weight_decay=float(values.get("weight_decay", 0.0)),
        betas=(float(first), float(second)),
        eps=float(values.get("eps", Group.eps)),
        step=int(values.get("step", 0) if step is None else step),
    )
