"""The executor: hand a function and its resources to submitit, which runs it here or on a SLURM cluster.

What runs is `function(*arguments)`, once a rank; RANK, WORLD_SIZE and LOCAL_RANK are set by `task_environment`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from parallel.errors import InputError

Kind = Literal["local", "slurm"]
NO_CLUSTER = "Could not establish a configuration source"
"""What SLURM's commands say where they are installed alone, as with a package of the distribution."""
ANSWER_S = 60.0
"""Seconds that a scheduler has to answer in."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is submitted."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    ranks: int
    threads: int
    """Threads a rank."""
    minutes: int
    memory_gb: int | None = None
    gpus: int = 0
    """GPUs a node; one a rank where there are any."""
    slurm: Mapping[str, str | int] = field(default_factory=dict)
    """Further sbatch options by name."""
    nodes: int = 1
    """Nodes that share the ranks evenly."""
    setup: tuple[str, ...] = ()
    """Lines of the job's script before it starts."""
    lead_s: int = 120
    """Seconds before its time limit or a preemption at which a job is told."""
    restarts: int = 3
    """How often a job that failed is tried again; being preempted or out of time does not count."""
    failures: Path = Path()
    """Folder of the notes on failed tries."""
    code: Path | None = None
    """Folder of the packages that it runs, if that is a copy."""
    python: str | None = None
    """Command that runs Python on a cluster; the Python that submits by default."""
    gres: str | None = None
    """How GPUs are asked for, instead of --gpus-per-node."""
    srun: tuple[str, ...] = ()
    """Further options of srun."""
    requeue: bool = True
    """Whether the site lets jobs be requeued."""
    successors: int = 0
    """Jobs that are queued behind this one where it may not be requeued."""
    soft: bool = False
    """Whether it does several things: it starts however what it needs has ended, and so does what needs it."""


def choose(wanted: str) -> Kind:
    """Return the executor that `auto`, `local` or `slurm` means on this machine.

    Raises:
        InputError: slurm is wanted and there is no sbatch, or a cluster whose scheduler does not answer.
    """
    if wanted == "local":
        return "local"
    if shutil.which("sbatch") is None:
        problem: str | None = "no sbatch on PATH"
    else:
        problem = _unanswered()
        if problem is not None and NO_CLUSTER not in problem:
            # A scheduler that is down for a minute is no reason to train on its login node.
            raise InputError(f"SLURM does not answer ({problem}): try again, or use --executor local")
    if problem is not None and wanted == "slurm":
        raise InputError(f"--executor slurm: {problem}; run on a login node of the cluster, or use local")
    return "slurm" if problem is None else "local"


def _unanswered() -> str | None:
    """Return the scheduler's last words if it cannot be asked, else None."""
    try:
        asked = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"sinfo: {error}"
    return None if asked.returncode == 0 else (asked.stderr.strip().splitlines() or ["sinfo failed"])[-1]


def prepare(folder: Path) -> None:
    """Make a folder for submitit's files.

    Raises:
        InputError: submitit would fill in a part of its path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "%" in str(folder):
        raise InputError(f"{folder}: submitit and SLURM fill in what follows a % in paths; choose one without it")
    # Ranks must not find a user's own `train.py` or `eval/` in the current folder before this project's rooms.
    os.environ["PYTHONSAFEPATH"] = "1"


def submit(job: Job, folder: Path) -> Any:
    """Start a job on this machine and return submitit's handle; its pickles and logs go into the folder."""
    import submitit

    prepare(folder)
    executor = submitit.LocalExecutor(folder=folder)
    # Nobody waits for the place: a run takes the time it takes.
    executor.update_parameters(timeout_min=60 * 24 * 365, tasks_per_node=job.ranks, gpus_per_node=job.gpus)
    # A terminal's ctrl-C goes to all processes; this job's end is the submitter's to decide (`stop`).
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(job.function, *job.arguments)
    finally:
        signal.signal(signal.SIGINT, before)


def tell(handle: Any, number: signal.Signals) -> None:
    """Send a signal to all ranks of a job of this machine."""
    for rank in _ranks(handle).values():
        with contextlib.suppress(psutil.Error):
            rank.send_signal(number)


def stop(handle: Any) -> None:
    """End a job of this machine, with all that its ranks have started, and wait until it has ended."""
    while not handle.done():  # more than once, as it may be starting ranks just now
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SUBMITIT_LOCAL_JOB_ID") == handle.job_id:  # a dead rank's children too
                    process.kill()
        time.sleep(0.05)


def _ranks(handle: Any) -> dict[int, psutil.Process]:
    """Return the processes of a job of this machine that still run, by rank."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):  # the whole job has ended
        for child in psutil.Process(int(handle.job_id)).children():
            with contextlib.suppress(psutil.Error, KeyError):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found[int(child.environ()["SUBMITIT_LOCAL_LOCALID"])] = child
    return found


def dead_ranks(handle: Any) -> list[int]:
    """Return the ranks of a job of this machine that have ended while others go on.

    submitit waits until every rank has ended, and the others may wait for the dead one in a collective for ever.
    """
    running = _ranks(handle)
    # None at all: not started yet, or at its end.
    return [rank for rank in range(handle.num_tasks) if rank not in running] if running else []


def task_environment() -> tuple[int, int]:
    """Inside a job: return (rank, ranks) and set the variables that torch and DeepSpeed look for."""
    import submitit

    place = submitit.JobEnvironment()
    variables = {
        "RANK": place.global_rank,
        "WORLD_SIZE": place.num_tasks,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.num_tasks // place.num_nodes,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    # Used where the ranks have no common file to meet on: the same for all of them; jobs that share a node differ, and
    # so do a job's starts. Below the ports that systems give out by themselves.
    os.environ.setdefault("MASTER_ADDR", place.hostnames[0])
    start = f"{place.job_id}/{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ["MASTER_PORT"] = str(10000 + zlib.crc32(start.encode()) % 22000)
    return place.global_rank, place.num_tasks
