"""Megatron-LM checkpoints of `--ckpt-format torch`, read lazily: any tensor and pipeline parallelism.

The files: `checkpoint.megatron_files`; what a parameter is: `checkpoint.megatron_model`; the model's config from the
run's arguments: `checkpoint.megatron_arguments`; Adam's state: `checkpoint.megatron_optim`. A run's folder stands for
its newest step, as `--load` takes it. A Hugging Face config.json in either folder says what arguments do not (tokens'
numbers, a vocabulary without padding) and goes before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import read_json
from checkpoint.megatron_files import Part, load_parts, step_folder
from checkpoint.megatron_model import FUSED, HEAD, Parameter, arguments_of, config_of, parameters_of
from checkpoint.megatron_optim import state_of
from checkpoint.megatron_shards import Shards, local_shape
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, Source, row_major_tiles
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family

Held = list[dict[str, dict[Slot, torch.Tensor]]]
"""By tensor-parallel rank: parameter -> slot -> shard."""


@dataclass(frozen=True, kw_only=True)
class MegatronSource:
    """A saved step of a Megatron-LM run."""

    folder: Path
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group]
    group_of: Mapping[str, str]
    """Group of each parameter; empty without the optimizer's state."""
    shards: Mapping[str, Shards]
    """By parameter."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def _parameter_of(self) -> Mapping[str, str]:
        """Tensor -> the parameter that it is in."""
        return {piece.tensor: name for name, shards in self.shards.items() for piece in shards.parameter.pieces}

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, tensor in self.family.tensors(self.config).items():
            if tensor.tied_to is not None:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
                continue
            parameter = self._parameter_of[name]
            group = self.group_of.get(parameter, "default")
            infos[name] = Info(shape=tensor.shape, slots=self.shards[parameter].slots, group=group)
        return infos

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        shards = self.shards[self._parameter_of[name]]
        for slot, target in out.items():
            shards.fill(name, box, slot, target)


def is_megatron(folder: Path) -> bool:
    """Return whether a folder holds a step of a Megatron-LM run in torch's files, or the steps of one.

    Raises:
        InputError: the newest step is not there.
    """
    return step_folder(folder) is not None


def open_megatron(folder: Path) -> Source:
    """Open a step of a Megatron-LM run lazily, or the newest of a run.

    Raises:
        InputError: a file is missing, damaged, of another run, or of a model that is not read; a tensor is missing,
            unknown, or of another shape than the arguments say; the optimizer's state does not fit the parameters.
    """
    step = step_folder(folder)
    if step is None:
        raise InputError(f"{folder}: no mp_rank_* folders here, so no checkpoint of --ckpt-format torch")
    parts = load_parts(step)
    config = _config(folder, step, parts[0][0])
    parameters = _parameters(config, parts)
    held, groups, group_of = _held(parts)
    shards = {}
    for name, parameter in parameters.items():
        shards[name] = Shards(parameter=parameter, ranks=[rank[name] for rank in held])
        if any(_dtypes(rank[name]) != _dtypes(held[0][name]) for rank in held) or (group_of and name not in group_of):
            raise InputError(f"{step}: some ranks have {name} in another dtype, or no state of it")
    return MegatronSource(
        folder=folder,
        config=config,
        run=_run_of(folder, parts[0][0]),
        groups=groups or {"default": Group()},
        group_of=group_of,
        shards=shards,
    )


def _dtypes(slots: Mapping[Slot, torch.Tensor]) -> dict[Slot, torch.dtype]:
    return {slot: tensor.dtype for slot, tensor in slots.items()}


def _config(folder: Path, step: Path, part: Part) -> dict[str, Any]:
    """Return the Hugging Face config: config.json, if there is one and it is of the same model, or the arguments'."""
    said = config_of(part.arguments, part.path)
    path = next((place / "config.json" for place in (step, folder) if (place / "config.json").is_file()), None)
    if path is None:
        return said
    config = read_json(path)
    try:
        family = family_of(config)
        arguments_of(family, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    padded = part.arguments["padded_vocab_size"]
    if config["vocab_size"] > padded:
        raise InputError(f"{path}: vocab_size is {config['vocab_size']}, but {part.path} has {padded} rows of tokens")
    ours, theirs = _shapes({**config, "vocab_size": said["vocab_size"]}), _shapes(said)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            here, there = (shapes.get(name, "not there") for shapes in (ours, theirs))
            raise InputError(f"{path}: {name} is {here}, and {there} by the arguments of {part.path}")
    return config


def _shapes(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the shape of every tensor of a model, or what it is tied to."""
    tensors = family_of(config).tensors(config)
    return {name: tensor.tied_to or tensor.shape for name, tensor in tensors.items()}


def _parameters(config: Mapping[str, Any], parts: Sequence[Sequence[Part]]) -> dict[str, Parameter]:
    """Return the model's parameters, all of which all ranks have, in the shapes that they have there."""
    family, ranks = family_of(config), len(parts[0])
    fused = any(name.endswith(tuple(FUSED.values())) for stage in parts for name, _ in _weights(stage[0]))
    padded = parts[0][0].arguments["padded_vocab_size"]
    parameters = parameters_of(family, config, padded_vocab=padded, fused_norms=fused)
    # Of a tied embedding the last stage has a copy, if that is not the first one.
    copied = {HEAD} if family.is_tied(config) and len(parts) > 1 else set()
    for rank in range(ranks):
        left = dict(parameters)
        for part in (stage[rank] for stage in parts):
            for name, weight in _weights(part):
                if name in copied:
                    continue
                if name not in parameters:
                    raise InputError(f"{part.path}: holds {name}, which the {family.name} model of its args has not")
                found, expected = tuple(weight.shape), local_shape(parameters[name], ranks)
                if found != expected:
                    raise InputError(f"{part.path}: {name} has shape {found}, its args say {expected}")
                left.pop(name, None)
        if left:
            path = parts[0][rank].path
            beside = "" if len(parts) == 1 else f" here, and in the files of the {len(parts) - 1} stages behind it"
            raise InputError(f"{path}: {next(iter(left))} is missing{beside}")
    return parameters


def _weights(part: Part) -> Iterator[tuple[str, torch.Tensor]]:
    for chunk in part.chunks:
        yield from chunk.items()


def _held(parts: Sequence[Sequence[Part]]) -> tuple[Held, dict[str, Group], dict[str, str]]:
    """Return all slots that the ranks have of each parameter, and the optimizer's groups."""
    held: Held = [{} for _ in parts[0]]
    groups: dict[str, Group] = {}
    group_of: dict[str, str] = {}
    for stage in parts:
        for rank, part in enumerate(stage):
            state = state_of(part)
            groups, group_of = {**state.groups, **groups}, {**state.group_of, **group_of}
            for name, weight in _weights(part):
                held[rank].setdefault(name, {"weight": weight, **state.tensors.get(name, {})})
    return held, groups, group_of


def _run_of(folder: Path, part: Part) -> RunState:
    """Return how far the run was."""
    samples, length = (part.arguments.get(name) or 0 for name in ("consumed_train_samples", "seq_length"))
    return RunState(
        step=int(part.state.get("iteration") or 0),
        tokens=samples * length,
        samples=samples,
        seed=part.arguments.get("seed"),
        provenance=read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {},
    )
