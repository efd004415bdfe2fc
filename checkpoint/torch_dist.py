"""Distributed checkpoints of Megatron-Core (`--ckpt-format torch_dist`), read lazily: weights, moments, groups.

The files: `checkpoint.torch_dist_files`; where a tensor's rows lie in them: `checkpoint.torch_dist_keys`; the
optimizer: `checkpoint.torch_dist_optim`. The folder of a run stands for its newest checkpoint.

The model's config is `config.json`, in the checkpoint's folder or in the one above, and else what the run's arguments
say of it (`checkpoint.megatron_arguments`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.dcp_files import DcpFiles, read_metadata
from checkpoint.files import read_json
from checkpoint.megatron_files import COMPUTED
from checkpoint.megatron_model import EMBEDDING, Parameter, config_of, parameters_of
from checkpoint.safetensors import CODES
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, row_major_tiles
from checkpoint.torch_dist_files import COMMON, OURS, arguments_in, check_backend, read_common, step_folder
from checkpoint.torch_dist_keys import Found, Rows, by_layer, find, flat_part, read_rows, rows_of
from checkpoint.torch_dist_optim import MOMENTS, Groups, groups_in, in_buckets, prefixes_in, refuse_unknown_state
from checkpoint.zero_files import FROZEN
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family


@dataclass(frozen=True, kw_only=True)
class TorchDistSource:
    """A checkpoint; its tensors stay in their files until a box of them is read."""

    files: DcpFiles
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group]
    infos: Mapping[str, Info]
    places: Mapping[str, Sequence[Rows]]
    """Where the rows of each tensor lie."""
    prefixes: Mapping[Slot, str]
    """What stands before the keys of each slot that is read."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        for slot, target in out.items():
            if slot not in self.prefixes:
                raise InputError(
                    f"{self.files.path}: the distributed optimizer's state is in buckets, which are not read; save "
                    "with --dist-ckpt-optim-fully-reshardable, or take the weights alone (--format safetensors)"
                )
            read_rows(self.files, self.prefixes[slot], self.places[name], box, target)


def open_torch_dist(folder: Path) -> TorchDistSource:
    """Open a checkpoint lazily: `.metadata` and common.pt are read, and the files' sizes checked.

    Raises:
        InputError: a file is missing, truncated, damaged or hostile; the backend is another one; it is of a model that
            is not read; a tensor is missing, unknown or of another shape than its model's.
    """
    step = step_folder(folder)
    assert step is not None, f"{folder} holds no distributed checkpoint"
    check_backend(step)
    common = read_common(step)
    config = _config(step, common)
    files = read_metadata(step)
    parameters = _parameters(files, config)
    found = {name: find(files, parameter, config["num_hidden_layers"]) for name, parameter in parameters.items()}
    known = {part.key for parts in found.values() for part in parts}
    _refuse_unknown(files, config, known)
    prefixes: dict[Slot, str] = {"weight": "", **prefixes_in(files)}
    if "exp_avg" in prefixes and files.tensors[EMBEDDING].dtype == torch.float32:
        prefixes.setdefault("master", "")  # of float32 weights there is no other
    places: dict[str, list[Rows]] = {}
    slots: dict[str, dict[Slot, torch.dtype]] = {}
    for name, parameter in parameters.items():
        own = _slots(files, found[name], prefixes)
        for tensor, rows in rows_of(parameter, found[name]):
            places.setdefault(tensor, []).append(rows)
            slots[tensor] = own
    infos, groups = _grouped(config, slots, common, step / COMMON)
    stacked = [part.key for parts in found.values() for part in parts if part.layer is not None]
    keys = {f"{prefix}{key}" for prefix in prefixes.values() for key in stacked} & files.tensors.keys()
    return TorchDistSource(
        files=by_layer(files, keys, config["num_hidden_layers"]),
        config=config,
        run=_run(common, step),
        groups=groups,
        infos=infos,
        places=places,
        prefixes=prefixes,
    )


def _config(step: Path, common: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model's Hugging Face config."""
    for path in (step / "config.json", step.parent / "config.json"):
        if path.is_file():
            return read_json(path)
    arguments = arguments_in(common)
    if not arguments:
        raise InputError(
            f"{step / COMMON}: has no args, and there is no config.json here or above; "
            "copy the model's Hugging Face config there"
        )
    return config_of(arguments, step / COMMON)


def _parameters(files: DcpFiles, config: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the model's parameters, with as large a vocabulary as the embedding has."""
    if EMBEDDING not in files.tensors:
        raise InputError(f"{files.path}: tensor {EMBEDDING} is missing")
    shape = files.tensors[EMBEDDING].shape
    if not shape or shape[0] < config["vocab_size"]:
        vocab = config["vocab_size"]
        raise InputError(f"{files.path}: {EMBEDDING} has shape {shape}, fewer rows than vocab_size {vocab}")
    return parameters_of(family_of(config), config, padded_vocab=shape[0], fused_norms=True)


def _refuse_unknown(files: DcpFiles, config: Mapping[str, Any], known: set[str]) -> None:
    """Refuse tensors that the model has not."""
    for key in files.tensors:
        if key not in known and not key.startswith("optimizer.") and not key.endswith(COMPUTED):
            raise InputError(f"{files.path}: holds {key}, which the {family_of(config).name} model has not")
    refuse_unknown_state(files, known)


def _slots(files: DcpFiles, parts: Sequence[Found], prefixes: Mapping[Slot, str]) -> dict[Slot, torch.dtype]:
    """Return the slots of a parameter, those included that cannot be read."""
    slots: dict[Slot, torch.dtype] = {}
    for slot, prefix in prefixes.items():
        keys = [f"{prefix}{part.key}" for part in parts if f"{prefix}{part.key}" in files.tensors]
        if not keys:
            continue
        if len(keys) < len(parts):
            raise InputError(f"{files.path}: {keys[0]} is there without its other half")
        for key, part in zip(keys, parts, strict=True):
            entry, weight = files.tensors[key], files.tensors[part.key]
            if entry.shape != weight.shape and flat_part(entry, weight.shape) is None:
                raise InputError(f"{files.path}: {key} has shape {entry.shape}, its weight has {weight.shape}")
            if entry.dtype not in CODES:
                raise InputError(f"{files.path}: {key} is {entry.dtype}; plain floating point is read")
            slots[slot] = entry.dtype
    if ("exp_avg" in slots) != ("exp_avg_sq" in slots):
        raise InputError(f"{files.path}: {parts[0].key} has one of Adam's two moments alone")
    return {**slots, **dict.fromkeys(MOMENTS, torch.float32)} if in_buckets(files) else slots


def _grouped(
    config: Mapping[str, Any], slots: Mapping[str, Mapping[Slot, torch.dtype]], common: Mapping[str, Any], path: Path
) -> tuple[dict[str, Info], dict[str, Group]]:
    """Return what is known of each tensor, and the parameter groups."""
    tensors = family_of(config).tensors(config)
    # Without any state nothing says what is trained.
    moved = [name for name, own in slots.items() if "exp_avg" in own] or list(slots)
    found: Groups = groups_in(common, path, {name: tensors[name].shape for name in moved})
    groups = dict(found.groups)
    infos = {}
    for name, tensor in tensors.items():
        if tensor.tied_to is not None:
            infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
            continue
        group = found.group_of.get(name, FROZEN)
        groups.setdefault(group, Group())
        infos[name] = Info(shape=tensor.shape, slots=slots[name], group=group, trainable=group != FROZEN)
    return infos, groups


def _run(common: Mapping[str, Any], step: Path) -> RunState:
    """Return how far the run was."""
    about = next((path for path in (step / "growmerge.json", step.parent / "growmerge.json") if path.is_file()), None)
    provenance = read_json(about) if about else {}
    if OURS in common:
        known = {key: common[OURS][key] for key in ("step", "tokens", "samples", "seed") if key in common[OURS]}
        return RunState(**known, provenance=provenance)
    arguments = arguments_in(common)
    iteration, samples, length, seed = (
        value if isinstance(value, int) else None
        for value in (
            common.get("iteration"),
            *(arguments.get(key) for key in ("consumed_train_samples", "seq_length", "seed")),
        )
    )
    tokens = (samples or 0) * (length or 0)
    return RunState(step=iteration or 0, tokens=tokens, samples=samples or 0, seed=seed, provenance=provenance)
