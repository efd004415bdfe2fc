"""What `growmerge doctor` runs on nodes, once a rank: it looks around, then measures how fast ranks reach one another.

Each rank writes what it has seen into a file of its own, more with each step: what is missing in it
shows how far it got.
"""

import os
import platform
import shutil
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "submitit")
OPTIONAL = ("wandb",)
TOKEN, CLOCK, REPORTS = "token", "clock.json", "reports"
"""In the folder of the check: random text and the time, from the node that submits; what ranks write."""
LARGE = {"cuda": 64 * 2**20, "cpu": 16 * 2**20}
"""Bytes that are added up, for the bandwidth."""
REACH_S = 10.0
"""Seconds that the hub has to answer in."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the job is told; plain data, pickled by submitit."""

    folder: Path
    threads: int
    network: bool
    """Whether nodes should reach the network."""


def look(order: Order) -> None:
    """Look around as one rank, and write down what there is to see."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit would requeue what has nothing to save
    from checkpoint.files import read_json, write_json
    from slurm.executor import task_environment

    rank, world = task_environment()
    facts = {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "token": _text(order.folder / TOKEN),
        "python": platform.python_version(),
        "packages": versions(),
        "temporary": _temporary(),
        "network": _network(order.network),
    }

    def write(**more: Any) -> None:
        facts.update(more)
        # The time here and, as it was last seen, there.
        login, now = read_json(order.folder / CLOCK), time.time()
        write_json(order.folder / REPORTS / f"{rank}.json", {**facts, "time": now, "login_time": login})

    write()
    os.environ["OMP_NUM_THREADS"] = str(order.threads)
    import torch

    from parallel.ranks import connect, device

    torch.set_num_threads(order.threads)
    write(devices=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())])
    ranks = connect(rank, world)
    write(speed=_speed(device(), ranks.gather))
    torch.distributed.destroy_process_group()


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter, None of what is not there."""
    found: dict[str, str | None] = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        return str(error)


def _temporary() -> dict[str, Any]:
    # gettempdir alone would pass over a TMPDIR that cannot be written to.
    folder = os.environ.get("TMPDIR") or tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
        return {"folder": folder, "free_bytes": shutil.disk_usage(folder).free, "problem": None}
    except OSError as error:
        return {"folder": folder, "free_bytes": None, "problem": error.strerror or str(error)}


def _network(wanted: bool) -> dict[str, Any]:
    """Return which variables tell jobs to stay offline and, where they need not, why the hub is not reached."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from slurm.profile import OFFLINE

    hub, problem = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), None
    if wanted:
        try:
            urlopen(Request(hub, method="HEAD"), timeout=REACH_S).close()
        except HTTPError:
            pass  # an answer
        except (OSError, ValueError) as error:
            problem = str(error)
    offline = [name for name, value in OFFLINE.items() if os.environ.get(name) == value]
    return {"hub": hub, "problem": problem, "offline": offline}


def _speed(device: Any, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """Return how long an all-reduce of all ranks takes (seconds; the slowest rank's median), of much and of little."""
    import torch
    import torch.distributed as dist

    world, size = dist.get_world_size(), LARGE[device.type]
    large, small = torch.ones(size // 4, device=device), torch.zeros(1, device=device)
    dist.all_reduce(large)
    if not bool((large == world).all()):
        raise RuntimeError(f"an all-reduce of ones over {world} ranks is not {world} everywhere")
    large.zero_()

    def median(tensor: torch.Tensor, times: int) -> float:
        taken = []
        for _ in range(times + 2):
            _synchronize(device)
            began = time.perf_counter()
            dist.all_reduce(tensor)
            _synchronize(device)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[2:])  # the first ones set connections up

    seconds, latency = (max(gather(median(tensor, times))) for tensor, times in ((large, 10), (small, 100)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    return {"ranks": world, "backend": backend, "bytes": size, "seconds": seconds, "latency_s": latency}


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
