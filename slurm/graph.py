"""A graph of jobs on a SLURM cluster, all submitted at once: each starts when those that it needs have ended well.

submitit submits. Jobs that wait for the same ones and ask for the same become one array, so that hundreds of merges are
one call of sbatch. Then nobody is needed any more: the login shell may close.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import InputError
from slurm.executor import Job, prepare
from slurm.script import parameters

LARGEST = 500
"""Tasks of an array at most; sites allow 1000 and more."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A job, and the jobs that have to end well before it starts."""

    job: Job
    after: tuple[str, ...] = ()
    """Names in the graph, or of jobs that were submitted before."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A job that the scheduler has taken."""

    ids: tuple[str, ...]
    """Its own, as submitit has it (12, or 12_3 of an array), and those of its successors, which start if it fails."""
    soft: bool = False
    """Whether what needs it starts however it ended, and looks by itself whether its input is there."""


def submit_all(
    jobs: Mapping[str, Planned],
    folder: Path,
    *,
    running: Mapping[str, Taken] | None = None,
    note: Callable[[Mapping[str, Taken]], None] = lambda taken: None,
) -> dict[str, Taken]:
    """Submit a graph and return what the scheduler has taken, by name.

    Args:
        jobs: by name, each after those that it names.
        folder: of submitit's scripts, pickles and logs.
        running: jobs by name that were submitted before and are still to end.
        note: told of the jobs so far after each call of sbatch.

    Raises:
        InputError: the scheduler rejects a job, or ranks cannot be shared by nodes. Whatever ends this early, jobs that
            the scheduler had taken are cancelled.
    """
    for planned in jobs.values():
        parameters(planned.job, folder)
    prepare(folder)
    known, found = dict(running or {}), dict[str, Taken]()
    group: tuple[str, ...] = ()
    try:
        for group in groups(jobs, known):
            job = jobs[group[0]].job
            handles = _submit([jobs[name].job for name in group], folder, needs(jobs[group[0]], known))
            for name, handle in zip(group, handles, strict=True):
                known[name] = found[name] = Taken(ids=(handle,), soft=job.soft or job.successors > 0)
            note(found)
            for _ in range(job.successors):  # such a job is a group of its own
                ids = found[group[0]].ids
                # They need what it needs: without that it is cancelled, which they would take for a failure.
                before = needs(jobs[group[0]], known)
                ids += tuple(_submit([job], folder, {**before, "afternotok": ids[-1:]}))
                known[group[0]] = found[group[0]] = Taken(ids=ids, soft=True)
                note(found)
    except BaseException as error:
        with contextlib.suppress(InputError):
            cancel(found.values())
        if isinstance(error, subprocess.CalledProcessError | RuntimeError):
            raise InputError(f"the scheduler rejects {group[0]}: {_last_words(error)}") from error
        raise
    return found


def _submit(jobs: Sequence[Job], folder: Path, dependencies: Mapping[str, Sequence[str]]) -> list[str]:
    """Submit jobs that ask for the same, as an array where they are several, and return their ids."""
    import submitit

    executor = submitit.SlurmExecutor(folder=folder, python=jobs[0].python)
    executor.update_parameters(**parameters(jobs[0], folder, dependencies))
    with _outside_of_a_job(), executor.batch():
        handles = [executor.submit(job.function, *job.arguments) for job in jobs]
    return [str(handle.job_id) for handle in handles]


def needs(planned: Planned, known: Mapping[str, Taken]) -> dict[str, list[str]]:
    """Return the ids of the jobs that a job waits for, by kind of dependency."""
    found: dict[str, list[str]] = {"afterok": [], "afterany": []}
    for name in planned.after:
        found["afterany" if known[name].soft or planned.job.soft else "afterok"] += known[name].ids
    return {kind: list(dict.fromkeys(ids)) for kind, ids in found.items()}


def scripts(jobs: Mapping[str, Planned], folder: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Return what would be submitted: names of jobs, more than one of an array, and the script of them.

    Where the scheduler would give ids, `@name` stands for the job of that name.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    known: dict[str, Taken] = {}
    for group in groups(jobs):
        job = jobs[group[0]].job
        python = job.python or shlex.quote(sys.executable)
        script = _make_sbatch_string(
            command=f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}",
            folder=folder,
            map_count=len(group) if len(group) > 1 else None,
            **parameters(job, folder, needs(jobs[group[0]], known)),
        )
        for name in group:
            successors = tuple(f"@{name}+{number}" for number in range(1, job.successors + 1))
            known[name] = Taken(ids=(f"@{name}", *successors), soft=job.soft or job.successors > 0)
        yield group, script


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
                alone = name if planned.job.successors else ""
                ready[frozenset(planned.after), alone, _asked(planned.job)].append(name)
        assert ready, f"{sorted(left)} wait for one another, or for what is not there"
        for names in ready.values():
            found.extend(tuple(names[at : at + LARGEST]) for at in range(0, len(names), LARGEST))
            there.update(names)
            for name in names:
                del left[name]
    return found


def _asked(job: Job) -> Any:
    """Return what jobs of one array have in common."""
    kept = (job.function, job.ranks, job.nodes, job.threads, job.minutes, job.memory_gb, job.gpus, job.setup, job.soft)
    return (*kept, *sorted(job.slurm.items()))


def cancel(jobs: Iterable[Taken]) -> None:
    """Cancel jobs; those that have ended are passed over.

    Raises:
        InputError: the scheduler's own words, such as that they are somebody else's.
    """
    # Successors first, or one would start when its job is gone.
    given = [one for job in jobs for one in reversed(job.ids)]
    if not given:
        return
    done = subprocess.run(["scancel", "--quiet", *given], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError((done.stderr.strip().splitlines() or ["scancel failed"])[-1])


def _last_words(error: BaseException) -> str:
    """Return what sbatch said."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
        text = f"{text}\n{getattr(error, 'stderr', None) or ''}"
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*sbatch: ", line)]
    return lines[-1] if lines else " ".join(str(error).split())[:300]
