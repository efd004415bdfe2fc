"""Leases: who works in a folder. A file made with O_EXCL, as shared file systems want, kept alive by a heartbeat.

A lease is stale when its process is gone (same host) or its heartbeat is old (another host); a stale one is taken over.
"""

import getpass
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from checkpoint.files import disk_errors
from parallel.errors import InputError

BEAT = 10.0
"""Seconds between heartbeats."""
STALE = 60.0
"""Age of the last heartbeat (seconds) at which a lease of another host counts as abandoned."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lease."""

    host: str
    user: str
    pid: int
    started: float
    """Creation time of the process (seconds since the epoch): a pid alone may be another process by now."""
    doing: str

    def __str__(self) -> str:
        return f"{self.doing} (pid {self.pid} of {self.user} on {self.host})"


def this_process(doing: str) -> Owner:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    pid = os.getpid()
    return Owner(host=socket.gethostname(), user=user, pid=pid, started=psutil.Process(pid).create_time(), doing=doing)


def alive(pid: int, started: float) -> bool:
    """Return whether a process of this host still runs and is the one that was meant."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def holder(path: Path) -> Owner | None:
    """Return who holds the lease, or None if nobody does."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**record["owner"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # absent, or cut short by a kill in the middle of writing it
    if owner.host == socket.gethostname():
        return owner if alive(owner.pid, owner.started) else None
    return owner if time.time() - record["beat"] < STALE else None


class Lease:
    """A lease held from `with` to its end.

    Raises:
        InputError: somebody else holds it; the line names who.
    """

    def __init__(self, path: Path, doing: str) -> None:
        self._path = path
        self._owner = this_process(doing)
        self._stop = threading.Event()

    def _record(self) -> bytes:
        return json.dumps({"owner": asdict(self._owner), "beat": time.time()}).encode()

    def __enter__(self) -> "Lease":
        for _ in range(3):
            try:
                with disk_errors(self._path):
                    handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                owner = holder(self._path)
                if owner is not None:
                    raise InputError(f"{self._path.parent} is in use: {owner}") from None
                self._clear()
                continue
            with os.fdopen(handle, "wb") as file:
                file.write(self._record())
            threading.Thread(target=self._beat, daemon=True).start()
            return self
        raise InputError(f"{self._path}: another process took this lease at the same moment; try again")

    def _clear(self) -> None:
        """Move a stale lease out of the way; of two that try at once one wins and the other finds nothing."""
        aside: Any = self._path.with_name(f".{self._path.name}.{os.getpid()}.stale")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        aside.unlink()

    def _beat(self) -> None:
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}.beat")
        while not self._stop.wait(BEAT):
            try:
                beside.write_bytes(self._record())
                beside.replace(self._path)
            except OSError:
                continue  # a full disk must not end the run; the next beat may get through

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._path.unlink(missing_ok=True)
