"""`growmerge` in this process, the ranks of its jobs forked off a server that has imported all that they need.

Ranks that are started anew import for ten seconds of CPU each. What runs in them and what waits for them is the same,
but for submitit: tests of how ranks begin, are told to stop and die start processes of their own (`toy.growmerge`).
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from click.testing import CliRunner
from tiny import PRELOADED

from growmerge import jobs
from growmerge.cli import main
from slurm import local
from slurm.executor import Job

FORKS = multiprocessing.get_context("forkserver")


class Handle:
    """A job at work, as `slurm.local` and `growmerge.jobs` know one of submitit's."""

    def __init__(self, job: Job, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.num_tasks, self._folder = job.ranks, folder
        about = {"EXECUTOR": "local", "LOCAL_NTASKS": job.ranks, "LOCAL_JOB_NUM_NODES": 1, "LOCAL_NODEID": 0}
        self.ranks = []
        FORKS.set_forkserver_preload(PRELOADED)
        for rank in range(job.ranks):
            own = {**about, "LOCAL_JOB_ID": 1, "LOCAL_GLOBALID": rank, "LOCAL_LOCALID": rank}
            environment = {**os.environ, **{f"SUBMITIT_{name}": str(value) for name, value in own.items()}}
            given = (job.function, job.arguments, environment, Path.cwd(), self._paths(rank))
            self.ranks.append(FORKS.Process(target=_rank, args=given, daemon=True))
            self.ranks[-1].start()

    def _paths(self, rank: int) -> SimpleNamespace:
        begin = f"{self._folder}/1_{rank}"  # as submitit names them
        return SimpleNamespace(result_pickle=Path(f"{begin}_result.pkl"), stderr=Path(f"{begin}_log.err"))

    def done(self) -> bool:
        return not any(rank.is_alive() for rank in self.ranks)

    def dead(self) -> list[int]:
        """Return the ranks that have ended."""
        return [number for number, rank in enumerate(self.ranks) if not rank.is_alive()]

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def task(self, rank: int) -> SimpleNamespace:
        paths = self._paths(rank)
        return SimpleNamespace(
            paths=paths,
            result=lambda: paths.result_pickle.read_text() or None,
            exception=lambda: None if self.ranks[rank].exitcode == 0 else self.ranks[rank].exitcode,
        )


def _rank(
    function: Callable[..., Any], given: tuple[Any, ...], environment: dict[str, str], cwd: Path, paths: SimpleNamespace
) -> None:
    os.environ.clear()  # of the moment when the server began
    os.environ.update(environment)
    os.chdir(cwd)
    log = os.open(paths.stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        paths.result_pickle.write_text(function(*given) or "")
        code = 0
    except BaseException:
        traceback.print_exc()
        paths.result_pickle.touch()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without an interpreter's end: threads of torch and DeepSpeed that still run then may abort the process.
    os._exit(code)


def growmerge(*arguments: str, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line and return what it printed, as `toy.growmerge` does."""
    with (
        mock.patch.multiple(local, submit=Handle, dead_ranks=Handle.dead, stop=Handle.kill),
        mock.patch.object(jobs, "tell", _refuse),
        mock.patch.dict(os.environ, environment),  # what the command sets goes with it
        contextlib.chdir(cwd or Path.cwd()),
    ):
        found = CliRunner().invoke(main, arguments)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return subprocess.CompletedProcess(arguments, found.exit_code, found.stdout, found.stderr)


def _refuse(*_: Any) -> None:
    raise AssertionError("ranks that are told to stop have to be processes of their own: see toy.command")
