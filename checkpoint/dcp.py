"""torch.distributed.checkpoint (DCP) folders of FSDP2 and other sharded runs, read lazily: weights, moments, groups.

The state dict is one that holds a model and an optimizer, as torch's get_model_state_dict and get_optimizer_state_dict
return them, under any names (`checkpoint.dcp_names`), or a model alone. The files: `checkpoint.dcp_files`. With FSDP2
and float32 parameters the weights are the masters, whatever the run computes in: it is not said in the folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.dcp_files import METADATA, DcpFiles, read_metadata
from checkpoint.dcp_groups import Optimizer, optimizer_of
from checkpoint.dcp_names import Part, naming
from checkpoint.files import read_json
from checkpoint.safetensors import CODES
from checkpoint.shard import STATE_SLOTS
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, row_major_tiles
from checkpoint.torch_bin import COMPUTED
from checkpoint.torch_dist_files import is_torch_dist
from checkpoint.zero_files import FROZEN, config_of
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family

BUFFERS = (*COMPUTED, "freqs_cis")
"""Endings of entries that are no weights: the config gives them."""
STEPS = ("train_state.step", "step", "app.step", "global_step")
"""Where trainers keep their step."""
TOKENS = ("train_state.ntokens_seen",)
OURS = "growmerge"
"""The value that `checkpoint.dcp_layout` keeps the run in."""


@dataclass(frozen=True, kw_only=True)
class DcpSource:
    """A saved state dict; its tensors stay in their files until a box of them is read."""

    files: DcpFiles
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group]
    infos: Mapping[str, Info]
    keys: Mapping[str, Mapping[Slot, str]]
    """Key of each slot of each tensor."""
    parts: Mapping[str, Part]

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        rows = self.parts[name].rows
        for slot, target in out.items():
            key = self.keys[name][slot]
            if rows is None:
                self.files.read(key, box, target)
            else:
                self.files.read_rows(key, rows[box[0]], box[1], target)


def is_dcp(folder: Path) -> bool:
    return ((folder / METADATA).is_file() or any(folder.glob("__*_*.distcp"))) and not is_torch_dist(folder)


def open_dcp(folder: Path) -> DcpSource:
    """Open a folder lazily: `.metadata` and the small values are read, and the files' sizes checked.

    `config.json`, the model's Hugging Face config, has to lie in the folder or in the one above.

    Raises:
        InputError: a file is missing, truncated, damaged or hostile; a tensor is missing, unknown or of another shape
            than config.json says.
    """
    if not (folder / METADATA).is_file():
        raise InputError(f"{folder / METADATA}: missing, so the save was not finished; another checkpoint is needed")
    config = config_of(folder)
    tensors = family_of(config).tensors(config)
    files = read_metadata(folder)
    model, parts = naming(files.path, config, files.tensors)
    _refuse_unknown(files, model, {part.name for part in parts.values()}, family_of(config))
    optimizer = optimizer_of(files, {part.name for part in parts.values()})
    infos: dict[str, Info] = {}
    keys: dict[str, dict[Slot, str]] = {}
    for name, tensor in tensors.items():
        if tensor.tied_to is not None:
            infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
            continue
        names = [parts[name].name, *(parts[alias].name for alias, other in tensors.items() if other.tied_to == name)]
        keys[name] = _keys(files, model, optimizer, names)
        for key in keys[name].values():
            _check(files, key, parts[name].shape)
        rest = FROZEN if optimizer.groups else "default"
        group = next((optimizer.group_of[other] for other in names if other in optimizer.group_of), rest)
        slots = {slot: files.tensors[key].dtype for slot, key in keys[name].items()}
        infos[name] = Info(shape=tensor.shape, slots=slots, group=group, trainable=group != FROZEN)
    groups = dict(optimizer.groups) or {"default": Group()}
    if any(info.group == FROZEN for info in infos.values()):
        groups.setdefault(FROZEN, Group())
    run = _run(files, folder, groups)
    return DcpSource(files=files, config=config, run=run, groups=groups, infos=infos, keys=keys, parts=parts)


def _refuse_unknown(files: DcpFiles, model: str, names: set[str], family: Family) -> None:
    """Refuse a tensor among the model's keys that the model has not."""
    roots = {name.partition(".")[0] for name in names}  # without a prefix other things lie beside
    for key in files.tensors:
        name = key.removeprefix(model)
        among = key.startswith(model) if model else name.partition(".")[0] in roots
        if among and name not in names and not name.endswith(BUFFERS):
            raise InputError(f"{files.path}: holds {key}, which the {family.name} model of config.json has not")


def _keys(files: DcpFiles, model: str, optimizer: Optimizer, names: Sequence[str]) -> dict[Slot, str]:
    """Return the keys of a tensor's slots, by its names in the running model: of tied ones one may be there alone."""
    weight = next((f"{model}{name}" for name in names if f"{model}{name}" in files.tensors), None)
    if weight is None:
        raise InputError(f"{files.path}: tensor {model}{names[0]} is missing")
    keys: dict[Slot, str] = {"weight": weight}
    if any(name in optimizer.group_of for name in names) and files.tensors[weight].dtype == torch.float32:
        keys["master"] = weight
    for slot in STATE_SLOTS[1:]:
        found = [key for key in (f"{optimizer.prefix}{name}.{slot}" for name in names) if key in files.tensors]
        if len(found) > 1:
            raise InputError(f"{files.path}: {' and '.join(found)} are there, but config.json ties the tensors")
        if found:
            keys[slot] = found[0]
    if ("exp_avg" in keys) != ("exp_avg_sq" in keys):
        raise InputError(f"{files.path}: {names[0]} has one of Adam's two moments alone")
    return keys


def _check(files: DcpFiles, key: str, shape: tuple[int, ...]) -> None:
    entry = files.tensors[key]
    if entry.shape != shape:
        raise InputError(f"{files.path}: {key} has shape {entry.shape}, config.json says {shape}")
    if entry.dtype not in CODES:
        raise InputError(f"{files.path}: {key} is {entry.dtype}; plain floating point is read")


def _run(files: DcpFiles, folder: Path, groups: Mapping[str, Group]) -> RunState:
    """Return what the folder tells of the run: what we wrote, or what trainers call step and tokens."""
    provenance = read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {}
    ours = files.value(OURS) if OURS in files.values else {}
    if isinstance(ours, dict) and ours:
        known = {key: ours[key] for key in ("step", "tokens", "samples", "seed") if key in ours}
        return RunState(**known, provenance=provenance)
    step, tokens = (
        next((files.value(key) for key in candidates if key in files.tensors or key in files.values), None)
        for candidates in (STEPS, TOKENS)
    )
    if not isinstance(step, int):
        step = max(group.step for group in groups.values())
    return RunState(step=step, tokens=tokens if isinstance(tokens, int) else 0, provenance=provenance)
