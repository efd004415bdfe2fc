"""The files of a Megatron-LM checkpoint of `--ckpt-format torch`, and what each says of itself.

Layout of a run's folder: `latest_checkpointed_iteration.txt`, a number or `release`; `iter_NNNNNNN/` or `release/`, a
step's folder; in it `mp_rank_TT/` of each tensor-parallel rank, or `mp_rank_TT_PPP/` of each and each pipeline stage,
with `model_optim_rng.pt` and, of the distributed optimizer, `distrib_optim.pt` (`checkpoint.megatron_optim`).

`model_optim_rng.pt` is torch's file of `model` (name -> tensor; `model0`, `model1`, ... of virtual stages), `args` (an
argparse.Namespace), `iteration`, `checkpoint_version`, and of a run that trained `optimizer`, `opt_param_scheduler` and
`rng_state`. Names count a stage's own layers from 0. Layers follow each other through the first virtual stage of all
stages, then through the second, however many each has.

Facts of NVIDIA/Megatron-LM: megatron/training/checkpointing.py (get_checkpoint_name, generate_state_dict); of
megatron_core 0.16.1: core/transformer/transformer_block.py and transformer_layer.py (get_transformer_layer_offset).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoint.pickles import attributes_of, load_pickle
from parallel.errors import InputError

FILE = "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPUTED = ("._extra_state", "rotary_pos_emb.inv_freq")
"""Endings of entries that are not weights: Transformer Engine's scales of float8, and frequencies."""
SAME = ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size")
"""Arguments that all files of a checkpoint have alike."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The file of a tensor-parallel rank and pipeline stage."""

    path: Path
    state: Mapping[str, Any]
    arguments: Mapping[str, Any]
    chunks: list[Mapping[str, torch.Tensor]]
    """Name in the whole model -> tensor, of each virtual stage, in the order of its modules; weights alone."""


def step_folder(folder: Path) -> Path | None:
    """Return the folder of a step that a folder is, or whose newest it is; None if it is neither.

    Raises:
        InputError: the newest step is not there.
    """
    return newest_step(folder, _has_ranks)


def newest_step(folder: Path, is_step: Callable[[Path], bool]) -> Path | None:
    """Return a folder if it is a step's, or that of the newest step if it is a run's; None if it is neither.

    Raises:
        InputError: the newest step is not there.
    """
    if is_step(folder):
        return folder
    try:
        text = (folder / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    name = RELEASE if text == RELEASE else f"iter_{int(text):07d}" if re.fullmatch("[0-9]{1,18}", text) else None
    if name is None:
        return None
    if (folder / name).is_dir():
        return folder / name if is_step(folder / name) else None
    others = sorted(path.name for path in folder.glob("iter_*") if is_step(path))
    if not others:
        return None
    raise InputError(f"{folder / TRACKER}: names {name}, which is not there; open one of {', '.join(others)}")


def _has_ranks(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.glob("mp_rank_*"))


def load_parts(folder: Path) -> list[list[Part]]:
    """Load the files of a step's folder, by pipeline stage and tensor-parallel rank; tensors stay in them.

    Raises:
        InputError: a file is missing, damaged, of another kind, or of another run than the others.
    """
    parts = [[_load(path) for path in stage] for stage in _paths(folder)]
    first = parts[0][0]
    sizes = {"tensor_model_parallel_size": len(parts[0]), "pipeline_model_parallel_size": len(parts)}
    for part in (part for stage in parts for part in stage):
        for name, size in sizes.items():
            if part.arguments.get(name, size) != size:
                raise InputError(
                    f"{part.path}: of a run with {name} {part.arguments[name]}, but {folder} has the files of {size}"
                )
        for name in SAME:
            if part.arguments.get(name) != first.arguments.get(name):
                raise InputError(
                    f"{part.path}: {name} is {part.arguments.get(name)!r}, "
                    f"and {first.arguments.get(name)!r} in {first.path}: files of several runs"
                )
        if part.state.get("iteration") != first.state.get("iteration"):
            raise InputError(
                f"{part.path}: of iteration {part.state.get('iteration')}, "
                f"but {first.path} is of {first.state.get('iteration')}"
            )
    return _in_model(parts)


def _paths(folder: Path) -> list[list[Path]]:
    """Return the files by pipeline stage and tensor-parallel rank."""
    names = sorted(path.name for path in folder.glob("mp_rank_*") if path.is_dir())
    matches = []
    for name in names:
        match = RANK.fullmatch(name)
        if match is None:
            raise InputError(f"{folder / name}: allowed are mp_rank_TT and mp_rank_TT_PPP; no experts are read")
        matches.append(match)
    if len({match[2] is None for match in matches}) > 1:
        raise InputError(f"{folder}: ranks of several runs ({names[0]}, {names[-1]}); keep those of one")
    places = {(int(match[2] or 0), int(match[1])): folder / match[0] / FILE for match in matches}
    stages, ranks = (1 + max(place[number] for place in places) for number in (0, 1))
    for stage in range(stages):
        for rank in range(ranks):
            tail = "" if matches[0][2] is None else f"_{stage:03d}"
            path = places.get((stage, rank), folder / f"mp_rank_{rank:02d}{tail}" / FILE)
            if not path.is_file():
                raise InputError(f"{path}: missing (the checkpoint is of {ranks} x {stages} ranks, tensor x pipeline)")
    return [[places[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _load(path: Path) -> Part:
    state = load_pickle(path, "Megatron-LM file")
    arguments = attributes_of(state.get("args")) if isinstance(state, dict) else None
    if arguments is None:
        raise InputError(f"{path}: no args, so it does not say which model it is of")
    version = state.get("checkpoint_version", 0)
    if version != 3.0:
        raise InputError(f"{path}: checkpoint_version is {version!r}: only 3.0 is read")
    keys = sorted((key for key in state if re.fullmatch(r"model\d*", str(key))), key=lambda key: (len(key), key))
    if not keys:
        raise InputError(f"{path}: no model, so it holds no weights")
    return Part(path=path, state=state, arguments=arguments, chunks=[_weights(state[key], path) for key in keys])


def _weights(entries: object, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(entries, dict):
        raise InputError(f"{path}: its model is no table of tensors by name")
    found = {str(name): entry for name, entry in entries.items() if not str(name).endswith(COMPUTED)}
    for name, entry in found.items():
        if not torch.is_tensor(entry) or entry.dtype not in DTYPES:
            raise InputError(f"{path}: {name} is no tensor of float32, float16 or bfloat16")
    return {name: tensor.detach() for name, tensor in found.items()}


def _in_model(parts: Sequence[Sequence[Part]]) -> list[list[Part]]:
    """Return the parts with layers counted through the whole model."""
    found = [[replace(part, chunks=[]) for part in stage] for stage in parts]
    first = 0
    for chunk in range(max(len(stage[0].chunks) for stage in parts)):
        for stage, renamed in zip(parts, found, strict=True):
            layers = 0
            for part, new in zip(stage, renamed, strict=True):
                if chunk < len(part.chunks):
                    weights = {_moved(name, first): tensor for name, tensor in part.chunks[chunk].items()}
                    new.chunks.append(weights)
                    layers = max(layers, len({match[2] for name in weights if (match := LAYER.match(name))}))
            first += layers
    return found


def _moved(name: str, first: int) -> str:
    return LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + first}.", name, count=1)
