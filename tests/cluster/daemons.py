"""The processes below a cluster: their packages and configuration, starting them, and finding every one to end it."""

import contextlib
import getpass
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PACKAGES = {"slurmctld": "slurm-wlm", "munged": "munge"}
"""The programs that are needed, and the Debian packages that bring them."""
ACCOUNTING_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
ACCOUNTING_CONF = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={ports[3]}
AccountingStoragePass={folder}/munge/socket
JobAcctGatherType=jobacct_gather/linux
"""
TEMPLATES = Path(__file__).parent


class Unavailable(RuntimeError):
    """SLURM cannot be had on this machine; the line says what is missing."""


def which(program: str) -> str | None:
    """Return where a program is; daemons lie in sbin, which is not on every user's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def install(accounting: bool = False) -> None:
    """Install the packages that are missing.

    Raises:
        Unavailable: this user cannot, or it failed.
    """
    wanted = PACKAGES | (ACCOUNTING_PACKAGES if accounting else {})
    missing = [package for program, package in wanted.items() if which(program) is None]
    if not missing:
        return
    if os.geteuid() != 0 or which("apt-get") is None:
        raise Unavailable(f"no SLURM on this machine; as root, with Debian: apt-get install {' '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "--quiet", *arguments], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"apt-get {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")


def free_ports(count: int) -> list[int]:
    """Return consecutive free ports, below those that the system gives to connections by itself."""
    while True:
        first = random.randrange(10000, 30000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return list(range(first, first + count))


def until(what: str, condition: Callable[[], Any], timeout: float) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"after {timeout:.0f} s still waiting for {what}")
        time.sleep(0.1)


class Daemons:
    """The daemons of a cluster, in a folder.

    They and all that they start carry two variables: SLURM_CONF, and SLURMD_NODENAME, which slurmd sets for the tasks
    of a node and `start` for the daemons. A user's shell and the tests have the first one only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def configure(self, nodes: int, accounting: bool) -> None:
        """Make the folder anew, except the logs."""
        for name in ("state", "spool", "munge", "database"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("log", "state", "munge", "database", *(f"spool/n{node + 1}" for node in range(nodes))):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "database").chmod(0o700)  # whoever reaches its socket is let in
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        controller, *ports, accounts = free_ports(nodes + 2)
        values = {"ports": (controller, ports[0], ports[-1], accounts), "nodes": nodes, "user": getpass.getuser()}
        added = {"slurm.conf": ACCOUNTING_CONF if accounting else "", "slurmdbd.conf": ""}
        for name, lines in added.items():
            text = (TEMPLATES / name).read_text() + lines
            (self.folder / name).write_text(text.format(folder=self.folder, **values))
        (self.folder / "slurmdbd.conf").chmod(0o600)

    def start(self, program: str, *arguments: str, name: str | None = None, **variables: str) -> None:
        """Start a daemon in a session of its own: neither ctrl-C nor the end of this process reaches it."""
        name = name or program
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            subprocess.run(
                ["setsid", "--fork", which(program) or program, *arguments],
                env=inherited | self.environment | {"SLURMD_NODENAME": name} | variables,
                cwd=self.folder / "log",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
            )

    def start_munged(self) -> None:
        folder = self.folder / "munge"
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        paths = [f"--{option}={folder / name}" for option, name in files.items()]
        self.start("munged", "--foreground", "--force", "--num-threads=2", *paths)
        until("munged", (folder / "socket").is_socket, 30)

    def start_accounting(self) -> None:
        """Start a database that only its socket's folder protects, and slurmdbd on it."""
        folder = self.folder / "database"
        paths = [f"--datadir={folder}", f"--socket={folder / 'socket'}", f"--user={getpass.getuser()}"]
        self.start("mariadbd", "--no-defaults", *paths, "--skip-networking", "--skip-grant-tables")
        until("mariadbd", (folder / "socket").is_socket, 60)
        self.start("slurmdbd", "-D", MYSQL_UNIX_PORT=str(folder / "socket"))
        until("slurmdbd", lambda: self.run(["sacctmgr", "show", "cluster"]).returncode == 0, 60)
        self.run(["sacctmgr", "--immediate", "add", "cluster", "growmerge"])

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to this cluster."""
        return subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)

    def processes(self, name: str | None = None) -> list[psutil.Process]:
        """Return all processes, those of the jobs too, or those of one node or daemon."""
        conf = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        mark = f"SLURMD_NODENAME={name or ''}"
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                # Not process.environ(): it stops at a gap, and slurmstepd makes one when it changes its title.
                variables = Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace").split("\0")
                if conf in variables and any(
                    each == mark or (not name and each.startswith(mark)) for each in variables
                ):
                    found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        return list(found.values())

    def kill(self, name: str | None = None) -> None:
        """Kill all processes, or those of one node or daemon, and wait until they have ended.

        They are frozen before the first is killed: slurmstepd would report a task's end, which a power cut does not.
        """
        for pause in (0, 0.2):  # one that is between fork and exec escapes the first look
            time.sleep(pause)
            while found := self.processes(name):
                for action in (psutil.Process.suspend, psutil.Process.kill):
                    for process in found:
                        with contextlib.suppress(psutil.Error):
                            action(process)
                time.sleep(0.05)

    def last_lines(self) -> str:
        """Return the end of every log."""
        return "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in sorted(self.folder.glob("log/*.out")))
