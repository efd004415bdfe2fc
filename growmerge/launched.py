"""Processes that torchrun or srun has started as ranks of one thing."""

import os
from typing import TYPE_CHECKING

from parallel.errors import InputError

if TYPE_CHECKING:
    from parallel.ranks import Ranks

SET_BY_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


def launched() -> tuple[int, int, int] | None:
    """Return (rank, ranks, rank on its node) if a launcher has started this process as one of several."""
    for rank, world in SET_BY_LAUNCHERS:
        if rank in os.environ and world in os.environ:
            local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
            return int(os.environ[rank]), int(os.environ[world]), int(local)
    return None


def join(rank: int, world: int, local: int) -> "Ranks":
    """Join the others.

    Raises:
        InputError: nothing says where they meet, or they do not.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local))
    from parallel.ranks import connect

    if "MASTER_ADDR" not in os.environ:
        raise InputError("MASTER_ADDR and MASTER_PORT are not set: srun alone does not; see docs/training.md")
    return connect(rank, world)
