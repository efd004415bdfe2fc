"""What SLURM is told of a job: its options, and the lines around its command."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.errors import InputError
from slurm.executor import Job

WIDTH = 50
"""Tasks of an array that run at once."""
WOULD_FAIL_AGAIN, OUT_OF_TIME, STOPPED = 3, 74, 75
"""Exit codes of a rank, as in job.sh: bad input, which no second try mends; told to stop by its time limit with nothing
to save; asked to stop and saved, to be requeued."""
OPTION = re.compile(r"[A-Za-z][\w-]*")
"""The name of an option of sbatch."""
HERE = Path(__file__).resolve().parent.parent


def parameters(job: Job, folder: Path, dependencies: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """Return submitit's parameters of a job.

    Args:
        folder: of submitit's scripts and logs.
        dependencies: ids of jobs by the kind of dependency, such as afterok.

    Raises:
        InputError: ranks cannot be shared by nodes.
    """
    if job.ranks % job.nodes:
        raise InputError(f"resources: {job.ranks} ranks do not divide by {job.nodes} nodes")
    for name, value in job.slurm.items():
        # A line break would end the option, and begin a command.
        if not OPTION.fullmatch(name) or not str(value).isprintable():
            raise InputError(f"slurm: {name!r}: {value!r} is no option of sbatch")
    if not job.name.isprintable():
        raise InputError(f"{job.name!r}: a name has to be one line")
    found: dict[str, Any] = {
        "job_name": job.name,
        "time": job.minutes,
        "nodes": job.nodes,
        "ntasks_per_node": job.ranks // job.nodes,
        "cpus_per_task": job.threads,
        "array_parallelism": WIDTH,
        "signal_delay_s": job.lead_s,
        # What a step inherits of these differs from one version of SLURM to the next.
        "srun_args": ["--kill-on-bad-exit=1", "--export=ALL", f"--cpus-per-task={job.threads}", *job.srun],
        "setup": [*head(job, folder), *job.setup],
        "teardown": ["finish $?"],
    }
    extra: dict[str, Any] = {"requeue" if job.requeue else "no-requeue": True, "kill-on-invalid-dep": "yes"}
    extra |= job.slurm
    if given := [":".join((kind, *ids)) for kind, ids in (dependencies or {}).items() if ids]:
        extra["dependency"] = ",".join(given)
    if job.memory_gb is not None:
        found["mem"] = f"{job.memory_gb}GB"
    if job.gpus and job.gres is not None:
        extra["gres"] = job.gres.replace("{gpus}", str(job.gpus))
    elif job.gpus:
        found["gpus_per_node"] = job.gpus
    return {**found, "additional_parameters": extra}


def head(job: Job, folder: Path) -> list[str]:
    """Return the first lines of a job's script; what they mean is in job.sh."""
    values = {
        "gm_logs": str(folder),
        "gm_failures": str(job.failures),
        "gm_restarts": str(job.restarts),
        "gm_requeue": "yes" if job.requeue else "no",
        "gm_name": _slug(job) if job.successors else "",
    }
    shell = (job.code or HERE) / "slurm" / "job.sh"
    lead = f"export GROWMERGE_LEAD_S={job.lead_s}"
    return [
        *(f"{name}={shlex.quote(value)}" for name, value in values.items()),
        f"source {shlex.quote(str(shell))}",
        lead,
    ]


def _slug(job: Job) -> str:
    return re.sub(r"[^\w.+-]", "_", job.name)
