"""The optimizer of a DCP folder: where its state lies, and its parameter groups, in each of the forms that torch has.

{prefix}param_groups.{number}.{field}     get_optimizer_state_dict; `params` lists the names of the parameters
{prefix}param_groups.{name}.{field}       the same with flatten_optimizer_state_dict, for each parameter
{prefix}param_groups                      one value: a list of dicts, saved by torch before 2.4
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint.dcp_files import DcpFiles
from checkpoint.dcp_names import prefixes, tails
from checkpoint.source import FACTORS, Group
from checkpoint.zero_files import groups_of
from parallel.errors import InputError

GROUPS = "param_groups"
FIELDS = ("name", "lr", "weight_decay", "betas", "eps", "step", *FACTORS)
"""What is read of a group."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Where an optimizer's state lies, and its groups; both empty without one."""

    prefix: str = ""
    """Of the keys of its state, before the parameter's name in the running model."""
    groups: Mapping[str, Group] = field(default_factory=dict)
    group_of: Mapping[str, str] = field(default_factory=dict)
    """Group of each parameter, by its name in the running model."""


def optimizer_of(files: DcpFiles, names: set[str]) -> Optimizer:
    """Return the optimizer of a model whose parameters have those names.

    Raises:
        InputError: there are several, or a group's values are damaged.
    """
    found = prefixes(files.tensors, names, (".exp_avg", ".exp_avg_sq"))
    if len(found) > 1:
        raise InputError(f"{files.path}: holds several optimizers ({', '.join(sorted(found))}), where one is expected")
    prefix = next(iter(found), "")
    entries = _entries(files, names)
    if not entries:
        moved = [name for name in sorted(names) if f"{prefix}{name}.exp_avg" in files.tensors]
        entries = [{"params": moved}] if moved else []
    state = {number: {"step": _step(files, prefix, entry)} for number, entry in enumerate(entries)}
    counted = [{**entry, "params": [number]} for number, entry in enumerate(entries)]
    labels, groups = groups_of(
        {"param_groups": counted, "state": {key: one for key, one in state.items() if one["step"]}}
    )
    group_of = {name: label for label, entry in zip(labels, entries, strict=True) for name in entry["params"]}
    return Optimizer(prefix=prefix, groups=groups, group_of=group_of)


def _entries(files: DcpFiles, names: set[str]) -> list[dict[str, Any]]:
    """Return the groups as torch's optimizers keep them, with the names of their parameters."""
    keys = [key for key in (*files.values, *files.tensors) if GROUPS in key.split(".")]
    whole = next((key for key in keys if key.endswith(GROUPS)), None)
    if whole is not None:
        listed = files.value(whole)
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise InputError(f"{files.path}: {whole} is no list of parameter groups")
        return [_checked(files, whole, entry, names) for entry in listed]
    fields: dict[str, dict[str, str]] = {}
    for key in keys:
        parts = key.split(".")
        middle = ".".join(parts[parts.index(GROUPS) + 1 : -1])
        fields.setdefault(middle, {})[parts[-1]] = key
    if all(middle.isdigit() for middle in fields):
        entries = []
        for middle in sorted(fields, key=int):
            read = {name: files.value(key) for name, key in fields[middle].items() if name in (*FIELDS, "params")}
            entries.append(_checked(files, f"{GROUPS}.{middle}", read, names))
        return entries
    # Parameters of a group have the same values, and those of two groups that have are told apart by nothing.
    alike: dict[str, dict[str, Any]] = {}
    for middle, members in fields.items():
        read = {name: files.value(key) for name, key in sorted(members.items()) if name in FIELDS}
        entry = _checked(files, f"{GROUPS}.{middle}", {**read, "params": [middle]}, names)
        alike.setdefault(repr(read), {**entry, "params": []})["params"] += entry["params"]
    return list(alike.values())


def _checked(files: DcpFiles, where: str, entry: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Return a group with plain numbers, and its parameters' names as in the running model."""
    try:
        plain = {
            key: value if key == "name" else tuple(map(float, value)) if key == "betas" else float(value)
            for key, value in entry.items()
            if key in FIELDS
        }
        params = [next((rest for _, rest in tails(name) if rest in names), name) for name in entry["params"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{files.path}: {where} is no parameter group of torch.optim ({error})") from error
    return {**plain, "params": params}


def _step(files: DcpFiles, prefix: str, entry: Mapping[str, Any]) -> int:
    """Return how often a group was stepped; its parameters are stepped together."""
    for name in entry["params"]:
        key = f"{prefix}{name}.step"
        if key in files.tensors or key in files.values:
            return int(files.value(key))
    return 0
