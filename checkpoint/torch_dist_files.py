"""The small files of Megatron-Core's distributed checkpoints, and how such a folder is told from others.

A run's folder has `latest_checkpointed_iteration.txt`, a number or `release`, and the folders of its checkpoints,
`iter_NNNNNNN/` or `release/`. Each is one of torch.distributed.checkpoint (`checkpoint.dcp_files`) with two files more:

- `metadata.json` names the backend, `torch_dist`, and is written last.
- `common.pt` is torch's file of all that is no shard of something: `args` (an argparse.Namespace), `iteration`,
  `optimizer` (parameter groups and steps), and `content_metadata`, which says in what form the optimizer's state is.

Facts of megatron_core 0.16.1: core/dist_checkpointing/core.py, serialization.py and strategies/common.py; of
NVIDIA/Megatron-LM: megatron/training/checkpointing.py (get_checkpoint_name, generate_state_dict).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.dcp_files import METADATA
from checkpoint.files import read_json
from checkpoint.megatron_files import RELEASE, newest_step
from checkpoint.pickles import Record, load_pickle
from parallel.errors import InputError, one_of

BACKEND = "metadata.json"
COMMON = "common.pt"
TORCH_DIST = "torch_dist"
OURS = "growmerge"
"""The entry of common.pt in which our own layout keeps the run and its groups."""


def step_name(iteration: int | None) -> str:
    """Return the name of a checkpoint's folder in its run's; without an iteration, of weights that belong to none."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def step_folder(folder: Path) -> Path | None:
    """Return the folder of a checkpoint that a folder is, or whose newest it is; None if it is neither.

    Raises:
        InputError: the newest checkpoint is not there.
    """
    return newest_step(folder, _is_one)


def is_torch_dist(folder: Path) -> bool:
    """Return whether a folder holds a distributed checkpoint of Megatron-Core, or the run whose newest is one."""
    return step_folder(folder) is not None


def _is_one(folder: Path) -> bool:
    """Return whether a folder is such a checkpoint, whatever its backend, whole or not."""
    if (folder / COMMON).is_file() and ((folder / METADATA).is_file() or any(folder.glob("__*_*.distcp"))):
        return True
    try:
        found = read_json(folder / BACKEND)
    except InputError:
        return False
    return isinstance(found, dict) and "sharded_backend" in found


def check_backend(folder: Path) -> None:
    """Check that a save was finished, and in the form that is read.

    Raises:
        InputError: it was not.
    """
    path = folder / BACKEND
    if not path.is_file():
        raise InputError(f"{path}: missing, so the save was not finished; another checkpoint is needed")
    found = read_json(path)
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend != TORCH_DIST:
        raise InputError(f"{path}: {one_of('sharded_backend', backend, [TORCH_DIST])}")
    if not (folder / METADATA).is_file():
        raise InputError(f"{folder / METADATA}: missing; another checkpoint is needed")


def read_common(folder: Path) -> dict[str, Any]:
    """Return what common.pt holds.

    Raises:
        InputError: it is missing, damaged or hostile.
    """
    found = load_pickle(folder / COMMON, "Megatron-Core file")
    if not isinstance(found, dict):
        raise InputError(f"{folder / COMMON}: holds no table of values by name")
    return found


def arguments_in(common: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of the run; none if it did not save them."""
    args = common.get("args")
    return args.state if isinstance(args, Record) and isinstance(args.state, dict) else {}
