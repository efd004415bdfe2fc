"""What `growmerge doctor` learns of compute nodes, from one job over some of them."""

import math
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from checkpoint.files import write_json
from growmerge.clusters import profile_of
from growmerge.doctor_job import CLOCK, TOKEN, Order, look
from growmerge.doctor_login import Finding, answer
from growmerge.doctor_report import Seen, told
from growmerge.on_cluster import CODE, Submission, Unit, copy_code, planned_jobs
from growmerge.schema import Resources
from parallel.errors import InputError
from slurm.graph import Planned, Taken, cancel, scripts, submit_all
from slurm.profile import Profile
from slurm.queue import queued

NAME = "doctor"
MINUTES = 10
"""Time limit of the job."""
LATE_S = 40.0
"""How long what the job wrote may be unseen after its end: network file systems remember what was not there."""
ENDS_S = 60.0
"""Seconds that a cancelled job has to end in."""
POLL_S = 1.0


def plan(work: Path, workdir: Path, name: str | None, nodes: int) -> Planned:
    """Return the job, as a stage of a run would be submitted.

    Raises:
        InputError: the cluster has no nodes of what is asked for.
    """
    profile = profile_of(name)
    gpus = profile.gpus_per_node or 0
    # All of a node's cores with its GPUs: options such as --cpu-bind=mask_cpu need them.
    threads = max(1, (profile.cores_per_node or 1) // gpus) if gpus else 1
    order = Order(folder=work, threads=threads, network=profile.network)
    submission = Submission(
        name="growmerge",
        workdir=workdir,
        units={NAME: Unit(verb=NAME, together=True, after=(), result=work / "result", key="")},
        resources=Resources(
            ranks=nodes * max(1, gpus),
            nodes=nodes,
            gpus=gpus,
            threads=threads,
            minutes=min(MINUTES, profile.minutes_at_most or MINUTES),
            restarts=0,
            profile=name,
        ),
        function=look,
        order=lambda names, folder: order,
        verb=NAME,
        file=work,
    )
    return planned_jobs(submission, {(NAME,): work / "0000"}, work)[NAME]


def rehearse(planned: Planned, work: Path) -> Finding:
    """Ask the scheduler whether it would take the job: partition, account, qos, GPUs, time."""
    ((_, script),) = scripts({NAME: planned}, work / "logs")
    path = work / "job.sh"
    path.write_text(script)
    # Not as a part of the job that this process may be in.
    environment = {key: value for key, value in os.environ.items() if key[:6] != "SLURM_" or key == "SLURM_CONF"}
    code, _, words = answer(["sbatch", "--test-only", str(path)], environment)
    if code:
        return Finding(name="submission", state="failed", seen=words, do="mend `slurm` in the profile")
    return Finding(name="submission", seen=words)


def findings(planned: Planned, work: Path, profile: Profile, wait: float, say: Callable[[str], None]) -> list[Finding]:
    """Submit the job, wait for it (at most so many seconds) and return what it has seen."""
    token = secrets.token_hex(16)
    (work / TOKEN).write_text(token)
    write_json(work / CLOCK, time.time())
    copy_code(work / CODE)
    try:
        taken = submit_all({NAME: planned}, work / "logs")[NAME]
    except InputError as error:
        return [Finding(name="job", state="failed", seen=str(error), do="mend `slurm` in the profile")]
    seen = Seen(ranks=planned.job.ranks)
    try:
        _watch(taken.ids[0], seen, work, wait, say)
    finally:
        _end(taken, seen, say)
    return list(told(seen, token, work, planned.job.gpus, profile))


def _watch(job: str, seen: Seen, work: Path, wait: float, say: Callable[[str], None]) -> None:
    began, gone, said = time.monotonic(), math.inf, ""
    while True:
        write_json(work / CLOCK, time.time())
        state = None
        with suppress(InputError):  # a scheduler may be silent for a while
            state = queued([job]).get(job)
            seen.ended = state is None
        seen.update(work)
        now = time.monotonic()
        if seen.ended and not seen.whole and gone > now:
            say(f"job {job}: has ended; a while for what it may have written to show")
        gone = min(gone, now) if seen.ended else math.inf
        # The file of each rank is there: only what is in it may be late.
        late = LATE_S / 10 if len(seen.reports) == seen.ranks else LATE_S
        if seen.ended and (seen.whole or now - gone > late):
            return
        if state is not None and said != (said := state.why.removeprefix("None") or state.state.lower()):
            say(f"job {job}: {said}")
        if not seen.ended and now - began > wait:
            seen.why = f"job {job} has not ended after {wait:.0f} s: {said or 'squeue does not answer'}"
            return
        time.sleep(POLL_S)


def _end(taken: Taken, seen: Seen, say: Callable[[str], None]) -> None:
    """Cancel a job that has not ended, and wait: what it writes at its end goes into a folder that is to be removed."""
    if seen.ended:
        return
    cancel([taken])
    say(f"job {taken.ids[0]}: cancelled")
    until = time.monotonic() + ENDS_S
    while time.monotonic() < until:
        with suppress(InputError):
            if not queued(taken.ids):
                return
        time.sleep(POLL_S)
