"""A real SLURM of virtual nodes on one machine, for tests and for a person who wants to try the tool.

In Python: `with Cluster() as cluster: cluster.run(["sbatch", ...])`. As a command:

    python tests/cluster/cluster.py start|run|stop|status [--nodes 4] [--folder DIR] [--accounting]

What has to be known (tried with SLURM 22.05 of Debian 12):

- It needs no service, no systemd, no cgroup and, once the packages are there, no root: a munged with a key of its own,
  all daemons under the user who starts it, jobs tracked through /proc. Only that user can submit; root's cluster is
  open to all.
- All nodes are this machine: `hostname` is the same on all and SLURMD_NODENAME differs. "n1" does not resolve; a job
  whose ranks meet at MASTER_ADDR needs MASTER_ADDR=127.0.0.1.
- A requeued job starts again after 6 seconds (`cred_expire` in slurm.conf).
- A job of `main` that `urgent` preempts gets its --signal and SIGTERM together, is killed after KillWait and is
  requeued whatever it does. A job of `grace` gets its --signal, then GraceTime; one that ends by itself in that time is
  not requeued, unless it asks for it, as submitit does.
- A killed node is down, and its jobs are requeued, 15 to 30 seconds later (`SlurmdTimeout`).
"""

import argparse
import contextlib
import itertools
import json
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from daemons import Daemons, install, until

from slurm.lease import alive, this_process

PREFIX = "growmerge-slurm-"
"""The default place: fresh folders of this name among the temporary files."""
COLUMNS = {"JobArrayID": 40, "Name": 200, "State": 20, "NodeList": 200, "Reason": 200, "RestartCnt": 8}
"""What squeue is asked, and the width of each answer; in the order of `Job`'s fields."""
UP = ("idle", "mixed", "allocated", "completing")
"""States of a node that works."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as squeue shows it."""

    id: str
    name: str
    state: str
    nodes: tuple[str, ...]
    reason: str
    restarts: int


class Cluster:
    """A cluster in a folder: up from `with` to its end, or from `start` to `stop`.

    Without a folder it takes a fresh temporary one, which `stop` removes; one that is given stays, with the logs.
    """

    def __init__(self, folder: Path | None = None, nodes: int = 4, accounting: bool = False) -> None:
        self.folder = (folder or Path(tempfile.gettempdir(), PREFIX + secrets.token_hex(4))).resolve()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.daemons = Daemons(self.folder)
        self.environment = self.daemons.environment
        """What a process needs, beside its own environment, to talk to this cluster."""
        self._accounting = accounting

    def __enter__(self) -> "Cluster":
        self.start(owned=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, owned: bool = False) -> None:
        """Bring the cluster up. One that is owned is stopped by the next start of any when this process has ended.

        Raises:
            Unavailable: SLURM cannot be had here.
            RuntimeError: a cluster runs in this folder, or the daemons did not come up; their last lines are shown.
        """
        install(self._accounting)
        for other in clusters():
            if other.owner() == "gone":
                other.stop()
        if self.owner() != "gone" and self.daemons.processes():
            raise RuntimeError(f"{self.folder}: a cluster runs here; stop it first")
        self.daemons.kill()
        self.folder.mkdir(parents=True, exist_ok=not self._temporary())
        owner = this_process("a cluster")
        (self.folder / "owner.json").write_text(json.dumps([owner.pid, owner.started] if owned else None))
        try:
            self._launch()
        except TimeoutError as error:
            logs = self.daemons.last_lines()
            self.stop()
            raise RuntimeError(f"SLURM did not come up: {error}\n{logs}") from error
        except BaseException:
            self.stop()
            raise

    def _launch(self) -> None:
        self.daemons.configure(len(self.nodes), self._accounting)
        self.daemons.start_munged()
        if self._accounting:
            self.daemons.start_accounting()
        self.daemons.start("slurmctld", "-D")
        for node in self.nodes:
            self.daemons.start("slurmd", "-D", "-N", node, name=node)
        until("idle nodes", lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), 60)

    def stop(self) -> None:
        """End every process of the cluster, its jobs included."""
        self.daemons.kill()
        if self._temporary():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _temporary(self) -> bool:
        return self.folder.name.startswith(PREFIX)

    def owner(self) -> Literal["none", "running", "gone"]:
        """Return what has become of the process whose `with` brought the cluster up."""
        try:
            owner = json.loads((self.folder / "owner.json").read_text())
        except (OSError, ValueError):
            owner = None
        if owner is None:
            return "none"
        return "running" if alive(*owner) else "gone"

    def run(self, command: Sequence[str], check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to this cluster, and return what it printed.

        Raises:
            RuntimeError: it failed, and `check` is set.
        """
        done = self.daemons.run(list(command))
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
        return done

    def jobs(self) -> list[Job]:
        """Return the jobs, ended ones too for some minutes, each task of an array by itself."""
        columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
        bounds = list(itertools.pairwise(itertools.accumulate(COLUMNS.values(), initial=0)))
        found = []
        for line in self.run(["squeue", "-h", "-r", "-t", "all", "-O", columns]).stdout.splitlines():
            job, name, state, nodes, reason, restarts = (line[start:end].strip() for start, end in bounds)
            found.append(Job(job, name, state, node_names(nodes), reason, int(restarts)))
        return found

    def wait(self, job_id: str | int, states: str | Collection[str], timeout: float = 60, restarts: int = 0) -> Job:
        """Wait until a job is in one of some states, after at least so many restarts, and return it.

        Raises:
            TimeoutError: it is not after `timeout` seconds; the message has all jobs.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + timeout
        while True:
            jobs = self.jobs()
            for job in jobs:
                if job.id == str(job_id) and job.state in wanted and job.restarts >= restarts:
                    return job
            if time.monotonic() > end:
                shown = "\n".join(map(str, jobs))
                raise TimeoutError(f"job {job_id} is not {' or '.join(wanted)} after {timeout} s:\n{shown}")
            time.sleep(0.1)

    def node_states(self) -> dict[str, str]:
        """Return the state of every node: idle, mixed, allocated, down; a * after it says that it does not answer."""
        lines = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"], check=False).stdout.splitlines()
        return dict(map(str.split, lines))

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd and all that runs on the node, as a power cut would."""
        self.daemons.kill(node)

    def start_node(self, node: str) -> None:
        """Start a killed node and wait until it takes jobs again."""
        self.daemons.start("slurmd", "-D", "-N", node, name=node)
        until(node, lambda: self.node_states().get(node) in UP, 30)

    def restart_controller(self) -> None:
        """Shut slurmctld down and start it again."""
        self.run(["scontrol", "shutdown", "slurmctld"])
        until("the end of slurmctld", lambda: not self.daemons.processes("slurmctld"), 30)
        self.daemons.start("slurmctld", "-D")
        until("slurmctld", self.node_states, 30)


def node_names(nodes: str) -> tuple[str, ...]:
    """Return the nodes that SLURM's short form names: n[1-2,4] is n1, n2 and n4."""
    spans = [(int(first), int(last or first)) for first, last in re.findall(r"(\d+)(?:-(\d+))?", nodes)]
    return tuple(f"n{number}" for first, last in spans for number in range(first, last + 1))


def clusters() -> Iterator[Cluster]:
    """Yield the clusters in the default place."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        yield Cluster(folder)


def _start(cluster: Cluster) -> None:
    cluster.start()
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")


def _run(cluster: Cluster) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}\n# ctrl-C stops the cluster", flush=True)
        signal.pause()


def _stop(cluster: Cluster) -> None:
    cluster.stop()
    print(f"stopped: {cluster.folder}")


def _status(cluster: Cluster) -> None:
    print(f"{cluster.folder}: {len(cluster.daemons.processes())} processes, nodes {cluster.node_states()}")


ACTIONS = {"start": _start, "run": _run, "stop": _stop, "status": _status}


def main() -> None:
    """The command; `run` is `start` and, at ctrl-C, `stop`."""
    parser = argparse.ArgumentParser(description="A real SLURM of virtual nodes on this machine.")
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="a fresh temporary one; for stop and status: all of those")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and a database, so that sacct works")
    options = parser.parse_args()
    chosen = [Cluster(options.folder, options.nodes, options.accounting)]
    if options.folder is None and options.action in ("stop", "status"):
        chosen = [each for each in clusters() if options.action == "status" or each.owner() != "running"]
    try:
        for cluster in chosen:
            ACTIONS[options.action](cluster)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
