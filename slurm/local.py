"""Jobs of this machine, run as a cluster runs them: each starts when those that it needs have ended well and there is
room for it. One that has lost a rank is ended, and no other.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parallel.errors import InputError
from slurm.executor import Job, dead_ranks, stop, submit
from slurm.graph import Planned

PATIENCE = 5.0
"""Seconds between two looks for dead ranks; one that is dead at both ends its job."""
POLL_S = 0.2
"""Seconds between two looks at the jobs."""


def takes(job: Job) -> tuple[int, int, int]:
    """Return the cores and the memory (GB) that a job takes, and 1 if it takes the GPUs: all jobs get the same ones."""
    return job.ranks * job.threads, job.memory_gb or 0, min(1, job.gpus)


class Queue:
    """Which jobs may start. It knows of names and numbers alone, not of processes."""

    def __init__(self, jobs: Mapping[str, Planned], *, cores: float = math.inf, memory_gb: float = math.inf) -> None:
        """Take jobs in.

        Args:
            jobs: by name, each after those that it names.
            cores: that the jobs at work take at most, ranks times threads of each.
            memory_gb: likewise; a job that does not say counts as none.

        Raises:
            InputError: a job alone asks for more than that.
        """
        self.jobs = jobs
        self.waiting: list[str] = []
        self.running: list[str] = []
        self.dropped: list[str] = []
        """Those that never start, as one that they need has failed."""
        self._limits = cores, memory_gb, 1
        for name, planned in jobs.items():
            assert {*planned.after} <= {*self.waiting}, f"{name} comes before what it needs: {planned.after}"
            self.waiting.append(name)
            job = planned.job
            taken, memory, _ = takes(job)
            if taken > cores:
                raise InputError(
                    f"resources: {name} takes {taken} cores ({job.ranks} ranks x {job.threads} threads), "
                    f"and there are {cores}: lower ranks or threads, or raise cores"
                )
            if memory > memory_gb:
                raise InputError(
                    f"resources: {name} takes {memory} GB of memory, and there are {memory_gb}: "
                    "lower memory_gb, or raise total_memory_gb"
                )

    def start(self) -> list[str]:
        """Return the jobs that start now; they count as running."""
        before = len(self.running)
        for name in [*self.waiting]:
            if not {*self.jobs[name].after} & {*self.waiting, *self.running} and self._room(name):
                self.waiting.remove(name)
                self.running.append(name)
        return self.running[before:]

    def _room(self, name: str) -> bool:
        taken = zip(*(takes(self.jobs[other].job) for other in (*self.running, name)), strict=True)
        return all(sum(each) <= limit for each, limit in zip(taken, self._limits, strict=True))

    def end(self, name: str, *, well: bool) -> None:
        """Take note that a job has ended; what needs one that failed never starts."""
        self.running.remove(name)
        lost = set() if well else {name}
        for other in [*self.waiting]:
            if lost & {*self.jobs[other].after}:
                lost.add(other)
                self.waiting.remove(other)
                self.dropped.append(other)


class Running:
    """A job that was submitted."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.dead: list[int] = []
        """Ranks that had ended at the last look while others went on."""
        self._looked = -math.inf

    def done(self) -> bool:
        """Return whether it has ended; where a rank has died, it is."""
        now = time.monotonic()
        if now - self._looked > PATIENCE and not self.handle.done():
            before, self.dead, self._looked = self.dead, dead_ranks(self.handle), now
            if self.dead and self.dead == before:
                stop(self.handle)
        return bool(self.handle.done())

    def failed(self) -> list[int]:
        """Return the ranks that failed or died, once it has ended."""
        tasks = [self.handle.task(rank) for rank in range(self.handle.num_tasks)]
        # A dead rank has no result, which submitit would wait for.
        return [at for at, task in enumerate(tasks) if not task.paths.result_pickle.exists() or task.exception()]


def run_all(
    queue: Queue,
    folders: Mapping[str, Path],
    *,
    look: Callable[[Mapping[str, Running]], None],
    well: Callable[[str, Running], bool],
) -> None:
    """Run the jobs of a queue until all have ended; whatever ends this early ends them, and all that they started.

    Args:
        folders: of each job's scripts, pickles and logs.
        look: called again and again with the jobs at work.
        well: says of a job that has ended whether it ended well.
    """
    running: dict[str, Running] = {}
    try:
        while queue.waiting or running:
            for name in queue.start():
                running[name] = Running(submit(queue.jobs[name].job, folders[name]))
            look(running)
            ended = [name for name, job in running.items() if job.done()]
            for name in ended:
                queue.end(name, well=well(name, running.pop(name)))
            time.sleep(0 if ended else POLL_S)
    except BaseException:
        for job in running.values():
            stop(job.handle)
        raise
