"""DeepSpeed's universal checkpoints: whole tensors, a file for each slot, cut for no number of ranks.

Layout (DeepSpeed 0.19, `ds_to_universal`), every file a pickle in a zip:

    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt      float32 master weight and Adam's moments
    zero/<parameter>/step.pt                           from runs of ZeRO stage 1 or 2 alone: optimizer steps taken
    zero/optimizer_state.pt                            the parameter groups; at stage 3 rank 0's optimizer file as well
    zero_pp_rank_0_mp_rank_00_model_states.pt          names and shapes by group, the run's counters (stage 3)
    mp_rank_00_model_states.pt                         the same (stage 1 or 2)

A tensor's file comes in two kinds. ZeRO-3 without tensor parallelism leaves a bare tensor, flattened; all other runs a
dict whose `param` has the tensor's full shape. What else the dict holds says how to cut it again, and is not needed.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.pickles import load_pickle
from checkpoint.shard import STATE_SLOTS, numel
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, row_major_tiles
from checkpoint.zero_files import FROZEN, config_of, groups_of, model_name, run_of
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family

FILES: dict[Slot, str] = {"master": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}
"""The file of each slot, in the folder of its tensor."""
STEP = "step.pt"
OPTIMIZER = "optimizer_state.pt"
PLAIN_MODEL = "mp_rank_00_model_states.pt"
"""What ZeRO stages 1 and 2 call the file that stage 3 calls `model_name(0)`."""


@dataclass(frozen=True, kw_only=True)
class UniversalSource:
    """A universal checkpoint; its tensors stay in their files until a box of them is read."""

    folder: Path
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group]
    infos: Mapping[str, Info]
    dtype: torch.dtype
    """What the run computed in; its weights are the masters rounded to it."""
    stored: Mapping[str, Mapping[Slot, torch.Tensor]]
    """name -> slot -> float32 tensor of the full shape, mapped from its file."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        for slot, target in out.items():
            # The running weight is the master rounded to the run's dtype: DeepSpeed stores no other copy.
            piece = self.stored[name]["master" if slot == "weight" else slot][box]
            target.copy_(piece.to(self.dtype) if slot == "weight" else piece)


def is_universal(folder: Path) -> bool:
    return (folder / "zero").is_dir()


def open_universal(folder: Path) -> UniversalSource:
    """Open a universal checkpoint (the folder that holds `zero/`): every file is opened and checked, no data is read.

    `config.json`, the model's Hugging Face config, has to lie in the folder or in the one above.

    Raises:
        InputError: a file is missing or damaged, or holds a tensor of another shape or one that the config's model does
            not have; the line names the file.
    """
    config = config_of(folder)
    tensors = family_of(config).tensors(config)
    owned = {name: tensor.shape for name, tensor in tensors.items() if tensor.tied_to is None}

    path = folder / model_name(0)
    if not path.is_file() and (folder / PLAIN_MODEL).is_file():
        path = folder / PLAIN_MODEL
    model = load_pickle(path)
    with _expected(path):
        shapes, known = list(model["param_shapes"]), {*tensors, *model["buffer_names"]}
        frozen = frozenset(model["frozen_param_shapes"] or ()) & owned.keys()
        dtype = _dtype(model["module"], owned)
        run = run_of(model, folder)
    for entry in sorted((folder / "zero").iterdir()):
        if entry.is_dir() and entry.name not in known:
            raise InputError(f"{entry}: the model of its config.json has no such tensor")

    path = folder / "zero" / OPTIMIZER
    optim = load_pickle(path)
    with _expected(path):
        # Of the two lists of groups this is the one that all stages have, and that holds all values in our own files.
        state = optim.get("optimizer_state_dict", {}).get("state", {})
        names, groups = groups_of({"param_groups": optim["param_groups"], "state": state})
        group_of = {name: group for group, entry in zip(names, shapes, strict=True) for name in entry}
        if frozen:
            group_of |= dict.fromkeys(frozen, FROZEN)
            groups.setdefault(FROZEN, Group())
        missing = next((name for name in owned if name not in group_of), None)
        if missing is not None:
            raise InputError(f"{path}: tensor {missing} belongs to no parameter group")
        alone = next((name for name in group_of if name in tensors and name not in owned), None)
        if alone is not None:
            owner = tensors[alone].tied_to
            raise InputError(f"{path}: {alone} was trained on its own, though config.json ties it to {owner}")

    stored = _stored(folder / "zero", owned, frozen)
    infos = {}
    for name, tensor in tensors.items():
        if tensor.tied_to is not None:
            infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
            continue
        trained = name not in frozen
        slots: dict[Slot, torch.dtype] = {"weight": dtype}
        if trained:
            slots |= dict.fromkeys(stored[name], torch.float32)
        infos[name] = Info(shape=tensor.shape, slots=slots, group=group_of[name], trainable=trained)
        step = folder / "zero" / name / STEP
        if step.is_file() and groups[group_of[name]].step == 0:
            # Stages 1 and 2 count here instead; a group's tensors are stepped together.
            groups[group_of[name]] = replace(groups[group_of[name]], step=_step(step))
    return UniversalSource(
        folder=folder, config=config, run=run, groups=groups, infos=infos, dtype=dtype, stored=stored
    )


@contextlib.contextmanager
def _expected(path: Path) -> Iterator[None]:
    """Turn a key or a kind that a file should have and has not into one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: not what DeepSpeed 0.19 writes ({type(error).__name__}: {reason[:200]})") from error


def _dtype(module: Mapping[str, torch.Tensor], owned: Mapping[str, Any]) -> torch.dtype:
    """Return the run's dtype: that of the parameters' entries in `module`, which at stage 3 are empty but typed.

    Buffers do not count: rotary frequencies are float32 in any run.
    """
    found = {tensor.dtype for name, tensor in module.items() if name in owned}
    return next(iter(found - {torch.float32}), torch.float32)


def _stored(
    zero: Path, owned: Mapping[str, tuple[int, ...]], frozen: frozenset[str]
) -> dict[str, dict[Slot, torch.Tensor]]:
    """Map every tensor's files; one that is not trained has its weight where others have the master.

    Moments may be missing only where stages 1 and 2 leave them out: for a parameter that never had a gradient, known by
    its having no step.pt either while others have one. All may lack them: weights alone.
    """
    present = {name: [slot for slot in STATE_SLOTS if (zero / name / FILES[slot]).is_file()] for name in owned}
    stepped = {name for name in owned if (zero / name / STEP).is_file()}
    trained = any(len(slots) > 1 for slots in present.values())
    stored: dict[str, dict[Slot, torch.Tensor]] = {}
    for name, shape in owned.items():
        if name in frozen and not present[name]:
            raise InputError(
                f"{zero / name / FILES['master']}: missing, as DeepSpeed's tool leaves out what stage 3 did not train; "
                "convert the folder that it was made from"
            )
        untouched = present[name] == ["master"] and name not in stepped and (bool(stepped) or not trained)
        slots = STATE_SLOTS[:1] if untouched or name in frozen else STATE_SLOTS
        stored[name] = {slot: _tensor(zero / name / FILES[slot], shape) for slot in slots}
    return stored


def _tensor(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Map one file of either kind, and return it in the tensor's full shape."""
    payload = load_pickle(path)
    with _expected(path):
        whole = isinstance(payload, Mapping)
        tensor = payload["param"] if whole else payload
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(f"{path}: holds no plain tensor")
        if tensor.dtype != torch.float32:
            raise InputError(f"{path}: holds {tensor.dtype}, not torch.float32")
        expected = shape if whole else (numel(shape),)
        if tuple(tensor.shape) != expected:
            raise InputError(f"{path}: has shape {tuple(tensor.shape)}, not {expected} as config.json says")
        return tensor.view(shape)


def _step(path: Path) -> int:
    step = load_pickle(path)
    with _expected(path):
        return int(step)
