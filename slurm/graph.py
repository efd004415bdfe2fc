"""A graph of jobs on a SLURM cluster, all submitted at once: each starts when those that it needs have ended well.

submitit submits. Jobs that wait for the same ones and ask for the same become one array, so that hundreds of merges are
one call of sbatch. Then nobody is needed any more: the login shell may close.
"""

import contextlib
import os
import re
import shlex
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import InputError
from slurm.executor import Job, prepare

WIDTH = 50
"""Tasks of an array that run at once."""
LARGEST = 500
"""Tasks of an array at most; sites allow 1000 and more."""
WOULD_FAIL_AGAIN, STOPPED = 3, 75
"""Exit codes of a rank: bad input, which no second try mends; asked to stop and saved, to be requeued."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A job, and the jobs that have to end well before it starts."""

    job: Job
    after: tuple[str, ...] = ()
    """Names in the graph, or ids of jobs that were submitted before."""


def submit_all(
    jobs: Mapping[str, Planned],
    folder: Path,
    *,
    running: Mapping[str, str] | None = None,
    note: Callable[[Mapping[str, str]], None] = lambda ids: None,
) -> dict[str, str]:
    """Submit a graph and return the id of each job by name.

    Args:
        jobs: by name, each after those that it names.
        folder: of submitit's scripts, pickles and logs.
        running: ids of jobs by name that were submitted before and are still to end.
        note: told of the ids so far after each call of sbatch.

    Raises:
        InputError: the scheduler rejects a job, or ranks cannot be shared by nodes. Whatever ends this early, jobs that
            the scheduler had taken are cancelled.
    """
    import submitit

    for planned in jobs.values():
        parameters(planned.job)
    prepare(folder)
    known, found = dict(running or {}), dict[str, str]()
    group: tuple[str, ...] = ()
    try:
        for group in groups(jobs, known):
            ids = sorted({known[name] for name in jobs[group[0]].after})
            executor = submitit.SlurmExecutor(folder=folder)
            executor.update_parameters(**parameters(jobs[group[0]].job, ids))
            with _outside_of_a_job(), executor.batch():
                handles = [executor.submit(jobs[name].job.function, *jobs[name].job.arguments) for name in group]
            for name, handle in zip(group, handles, strict=True):
                known[name] = found[name] = str(handle.job_id)
            note(found)
    except BaseException as error:
        cancel(found.values())
        if isinstance(error, subprocess.CalledProcessError | RuntimeError):
            raise InputError(f"the scheduler rejects {group[0]}: {_last_words(error)}") from error
        raise
    return found


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide the variables of the job that this process is in, if it is: jobs that it submits would take them over.

    submitit's own `clean_env` hides SLURM_CONF as well, without which some sites' commands find no cluster.
    """
    hidden = {
        name: os.environ.pop(name) for name in [*os.environ] if name.startswith("SLURM_") and name != "SLURM_CONF"
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def groups(jobs: Mapping[str, Planned], known: Iterable[str] = ()) -> list[tuple[str, ...]]:
    """Return the names in groups that are submitted together: what waits for the same and asks for the same."""
    left, there, found = dict(jobs), {*known}, list[tuple[str, ...]]()
    while left:
        ready: dict[Any, list[str]] = defaultdict(list)
        for name, planned in left.items():
            if there.issuperset(planned.after):
                ready[frozenset(planned.after), _asked(planned.job)].append(name)
        assert ready, f"{sorted(left)} wait for one another, or for what is not there"
        for names in ready.values():
            found.extend(tuple(names[at : at + LARGEST]) for at in range(0, len(names), LARGEST))
            there.update(names)
            for name in names:
                del left[name]
    return found


def _asked(job: Job) -> Any:
    """Return what jobs of one array have in common."""
    kept = (job.function, job.ranks, job.nodes, job.threads, job.minutes, job.memory_gb, job.gpus)
    return (*kept, *sorted(job.slurm.items()))


def parameters(job: Job, after: Sequence[str] = ()) -> dict[str, Any]:
    """Return submitit's parameters of a job."""
    if job.ranks % job.nodes:
        raise InputError(f"resources: {job.ranks} ranks do not divide by {job.nodes} nodes")
    found: dict[str, Any] = {
        "job_name": job.name,
        "time": job.minutes,
        "nodes": job.nodes,
        "ntasks_per_node": job.ranks // job.nodes,
        "cpus_per_task": job.threads,
        "array_parallelism": WIDTH,
        "signal_delay_s": job.lead_s,
        # What a step inherits of these differs from one version of SLURM to the next.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={job.threads}"],
        "teardown": teardown(job),
        "setup": list(job.setup),
    }
    extra: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", **job.slurm}
    if after:
        extra["dependency"] = "afterok:" + ":".join(after)
    if job.memory_gb is not None:
        found["mem"] = f"{job.memory_gb}GB"
    if job.gpus:
        found["gpus_per_node"] = job.gpus
    return {**found, "additional_parameters": extra}


def teardown(job: Job) -> list[str]:
    """Return the last lines of a job's script: what failed is tried again, `job.restarts` times, where that may help.

    Being stopped does not count, nor does it when the script's own node dies: SLURM requeues that job.
    """
    failures = f'{shlex.quote(str(job.failures))}/"$job"'
    return [
        "code=$?",
        # A bare id of an array's task may stand for the whole array.
        'job="$SLURM_JOB_ID"',
        '[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        f'if [ "$code" -ne 0 ] && [ "$code" -ne {WOULD_FAIL_AGAIN} ] && [ "$code" -ne {STOPPED} ]; then',
        f"  mkdir -p {shlex.quote(str(job.failures))}",
        f'  echo "$code $SLURM_JOB_NODELIST" >> {failures}',
        f'  [ "$(wc -l < {failures})" -gt {job.restarts} ] || code={STOPPED}',
        "fi",
        # Not what was cancelled meanwhile, nor what SLURM requeues itself.
        'case "$(squeue --noheader --jobs="$job" --format=%T)" in COMPLETING|CANCELLED|PREEMPTED) exit "$code";; esac',
        f'if [ "$code" -eq {STOPPED} ]; then',
        "  for try in 1 2 3 4 5 6; do",
        '    scontrol requeue "$job" && sleep 120 && break',
        "    sleep 10",
        "  done",
        "fi",
        'exit "$code"',
    ]


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended are passed over."""
    if given := list(ids):
        subprocess.run(["scancel", "--quiet", *given], capture_output=True, check=False)


def _last_words(error: BaseException) -> str:
    """Return what sbatch said."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
        text = f"{text}\n{getattr(error, 'stderr', None) or ''}"
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*sbatch: ", line)]
    return lines[-1] if lines else " ".join(str(error).split())[:300]
