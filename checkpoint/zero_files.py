"""What the files of a ZeRO checkpoint are called, and what they tell beside tensors: the run, and parameter groups."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from checkpoint.pickles import load_pickle
from checkpoint.source import FACTORS, Group, RunState
from parallel.errors import InputError

FROZEN = "frozen"
"""The group that tensors have which no optimizer has."""
PARAMETER_NAMES = "parameter_names"
"""Where our own runs of a pipeline say, in their client state, which Hugging Face tensor each parameter is."""
COUNTERS = ("param_shapes", "dp_world_size", "mp_world_size", "global_steps", "global_samples")
"""What every model file has, beside what its stage adds."""


def model_name(rank: int, tensor_rank: int = 0) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_{tensor_rank:02d}_model_states.pt"


def optim_name(rank: int, bf16: bool, tensor_rank: int = 0) -> str:
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"


def load_model(path: Path, *keys: str) -> Mapping[str, Any]:
    """Load a model file, which has to have some keys beside COUNTERS.

    Raises:
        InputError: the file is missing or damaged, or not of a run with ZeRO.
    """
    model = load_pickle(path)
    for key in (*COUNTERS, *keys):
        if not isinstance(model, dict) or key not in model or (key in COUNTERS and model[key] is None):
            raise InputError(f"{path}: no {key}, so not the model file of a ZeRO run")
    return model


def config_of(folder: Path) -> Mapping[str, Any]:
    """Return the model's Hugging Face config, `config.json` in a checkpoint's folder or in the one above.

    Raises:
        InputError: there is none, or it is not JSON.
    """
    for path in (folder / "config.json", folder.parent / "config.json"):
        if path.is_file():
            return read_json(path)
    raise InputError(f"{folder}: no config.json here or above; copy the model's Hugging Face config there")


def run_of(model: Mapping[str, Any], folder: Path) -> RunState:
    """Return the plain data of the run that a model file of the folder, and growmerge.json beside it, tell of."""
    ours = model.get("growmerge", {})
    return RunState(
        step=model["global_steps"],
        tokens=ours.get("tokens", 0),
        samples=ours.get("samples", model["global_samples"]),
        seed=ours.get("seed"),
        extra=ours.get("extra", {}),
        provenance=read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {},
    )


def groups_of(optim: Mapping[str, Any]) -> tuple[list[str], dict[str, Group]]:
    """Return the group's name of every sub-group, in order, and the groups.

    A group lists its sub-groups; one whose tensors are all frozen has none. (Files of earlier versions of ours repeat a
    group for each sub-group.)
    """
    names: list[str] = []
    groups: dict[str, Group] = {}
    for number, entry in enumerate(optim["param_groups"]):
        name = entry.get("name", f"group{number}")
        names += [name] * len(entry["params"])
        # Some optimizers count their steps in the group.
        steps = [optim["state"].get(index, {}).get("step", entry.get("step", 0)) for index in entry["params"]]
        factors = {key: float(entry.get(key, 1.0)) for key in FACTORS}
        groups[name] = Group(
            lr=entry.get("lr", 0.0) / factors["lr_factor"],
            weight_decay=entry.get("weight_decay", 0.0) / factors["weight_decay_factor"],
            betas=tuple(entry.get("betas", Group.betas)),
            eps=entry.get("eps", Group.eps) / factors["eps_factor"],
            step=int(steps[-1]) if steps else 0,
            **factors,
        )
    return names, groups


def values_of(group: Group) -> dict[str, Any]:
    """Return a group's settings as torch's optimizer keeps them, the factors of growth beside; see `groups_of`."""
    return {
        "lr": group.lr * group.lr_factor,
        "weight_decay": group.weight_decay * group.weight_decay_factor,
        "eps": group.eps * group.eps_factor,
        "betas": group.betas,
        **{key: getattr(group, key) for key in FACTORS},
    }
