"""A group of ranks: the few collectives that the rooms need, passed as an argument and never a global."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process' place among the processes that work on one thing."""

    rank: int
    world_size: int

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            import torch.distributed as dist  # who is alone needs no torch, which takes seconds to import

            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank (plain data; small)."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank (plain data; small)."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, value: "torch.Tensor") -> "torch.Tensor":
        """Add up a tensor over the ranks, in place."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(value)
        return value


@dataclass(frozen=True, kw_only=True)
class Readers(Ranks):
    """Ranks among which text is shared where several have to score the same at once: a place for each group of them."""

    group: Ranks
    """All ranks."""
    places: tuple[int, ...]
    """The first rank of each place."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each place, in order, on every rank."""
        values = self.group.gather(value)
        return [values[rank] for rank in self.places]


def readers(ranks: Ranks, place_of: Callable[[int], int]) -> Readers:
    """Return how a mesh shares text: ranks of the same place score the same."""
    first: dict[int, int] = {}
    for rank in range(ranks.world_size):
        first.setdefault(place_of(rank), rank)
    places = tuple(first[place] for place in sorted(first))
    return Readers(rank=place_of(ranks.rank), world_size=len(places), group=ranks, places=places)


def device() -> "torch.device":
    """Return where this process computes."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


PATIENCE = timedelta(days=7)
"""How long ranks wait for one that merges or checks a large model alone; a dead one shows by its closed connection."""
MEETING = timedelta(minutes=10)
"""How long they wait for one another at their start: a name or a network that does not work would hold all nodes."""
ALONE = Ranks(rank=0, world_size=1)


def connect(rank: int, world_size: int, *, rendezvous: Path | None = None) -> Ranks:
    """Join the group of ranks: gloo for plain data and CPU tensors and, with CUDA, NCCL for the rest.

    Args:
        rendezvous: a file that does not exist yet, on which processes of one machine meet (no port to collide on);
            without it MASTER_ADDR and MASTER_PORT are used, as a cluster's launcher sets them.

    Raises:
        InputError: the ranks do not meet within MEETING.
    """
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    if rendezvous is not None:
        # Without a name server entry for this host gloo finds no interface; one machine needs only the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(str(rendezvous), world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    else:
        try:
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=MEETING))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise InputError(f"rank {rank} of {world_size} meets nobody at {place}: {_first_line(error)}") from error
        store.set_timeout(PATIENCE)
    return Ranks(rank=rank, world_size=world_size)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
