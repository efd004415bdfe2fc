"""What the scheduler says of jobs: one call of squeue for all of them, whatever their number."""

import getpass
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from parallel.errors import InputError
from slurm.executor import Job

GPUS = re.compile(r"\bgpu:(?:[^:,(]+:)?(\d+)")
"""How many of them a node's generic resources name: gpu:4, gpu:a100:4(S:0-1)."""
COLUMNS = {
    "ArrayJobID": 20,
    "ArrayTaskID": 20,
    "JobID": 20,
    "State": 20,
    "NodeList": 400,
    "Reason": 100,
    "RestartCnt": 8,
}
"""What squeue is asked, and the width of each answer; as the columns are read below."""
ASK_S = 60.0
"""Seconds that squeue has to answer in."""
REASONS = {
    "Dependency": "waits for other stages",
    "Priority": "others come first",
    "Resources": "waits for free nodes",
    "BeginTime": "requeued; starts again soon",
    "DependencyNeverSatisfied": "a stage that it needs has failed",
    "JobArrayTaskLimit": "waits for others of its array",
    "PartitionTimeLimit": "asks for more time than its partition gives",
    "ReqNodeNotAvail": "a node that it needs is not available",
}
"""squeue's words in plain ones."""


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job that has not ended."""

    id: str
    """As submitit has it: 12, or 12_3 of an array."""
    state: str
    """In SLURM's words: PENDING, RUNNING, ..."""
    nodes: str
    reason: str
    restarts: int

    @property
    def why(self) -> str:
        """Why it does not run, in plain words; empty if it does."""
        return "" if self.state == "RUNNING" else REASONS.get(self.reason, self.reason)


def refuse_what_no_node_has(job: Job) -> None:
    """Refuse a job that would wait for ever: some schedulers take what none of their nodes can give.

    Raises:
        InputError: in one line, with what is asked for and what the partition has.
    """
    command = ["sinfo", "--all", "--noheader", "--exact", "--format=%P|%D|%c|%G"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return  # the scheduler will say it, or not
    wanted = (os.environ.get("SBATCH_PARTITION") or str(job.slurm.get("partition", ""))).split(",")
    kinds = []
    for line in asked.stdout.splitlines():
        partition, _, rest = line.partition("|")
        if partition.rstrip("*") in wanted or (wanted == [""] and partition.endswith("*")):
            count, cpus, gres = rest.split("|", 2)
            kinds.append((int(count), int(cpus), sum(map(int, GPUS.findall(gres)))))
    cores = job.ranks // job.nodes * job.threads
    fit = sum(count for count, cpus, gpus in kinds if cpus >= cores and gpus >= job.gpus)
    if kinds and fit < job.nodes:
        each = f"{cores} cores" + (f" and {job.gpus} GPUs" if job.gpus else "")
        there = ", ".join(f"{count} nodes of {cpus} cores and {gpus} GPUs" for count, cpus, gpus in sorted({*kinds}))
        raise InputError(f"resources: {job.nodes} nodes of {each} are asked for; the partition has {there}")


def queued(ids: Iterable[str], user: str | None = None) -> dict[str, Queued]:
    """Return those of the jobs that have not ended, by id.

    Args:
        user: who submitted them; this process' by default.

    Raises:
        InputError: the scheduler does not answer.
    """
    wanted = {*ids}
    if not wanted:
        return {}
    form = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    command = ["squeue", "--all", "--noheader", "--array", f"--user={user or getpass.getuser()}", f"--Format={form}"]
    try:
        # What a user has set for his own squeue would hide jobs.
        own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S, env=own)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"squeue: {error}") from error
    if asked.returncode:
        raise InputError((asked.stderr.strip().splitlines() or ["squeue failed"])[-1])
    found = {}
    for line in asked.stdout.splitlines():
        parts, at = [], 0
        for width in COLUMNS.values():
            parts.append(line[at : at + width].strip())
            at += width
        array, task, job, state, nodes, reason, restarts = parts
        name = f"{array}_{task}" if task.isdigit() else job
        if name in wanted:
            found[name] = Queued(id=name, state=state, nodes=nodes, reason=reason, restarts=int(restarts or 0))
    return found
