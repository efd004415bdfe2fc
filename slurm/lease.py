"""Leases: who works in a folder. A file made by a hard link, as shared file systems want, kept alive by a heartbeat.

A lease is stale when its process is gone (same host) or its heartbeat is old (another host); a stale one is taken over.
"""

import getpass
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

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
    started: int
    """When the process started (clock ticks since boot): a pid alone may be another process by now."""
    doing: str

    def __str__(self) -> str:
        return f"{self.doing} (pid {self.pid} of {self.user} on {self.host})"


def this_process(doing: str) -> Owner:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    pid = os.getpid()
    return Owner(host=socket.gethostname(), user=user, pid=pid, started=_started(pid) or 0, doing=doing)


def _started(pid: int) -> int | None:
    """Return when a process started (clock ticks since boot, which no change of the clock moves), None if it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def alive(pid: int, started: int) -> bool:
    """Return whether a process of this host still runs and is the one that was meant."""
    return _started(pid) == started


def holder(path: Path) -> Owner | None:
    """Return who holds the lease, or None if nobody does."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**record["owner"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # absent, or cut short by a kill in the middle of writing it
    if owner.host == socket.gethostname():
        return owner if alive(owner.pid, owner.started) else None
    return owner if abs(time.time() - record["beat"]) < STALE else None


class Lease:
    """A lease held from `with` to its end.

    Raises:
        InputError: somebody else holds it; the line names who.
    """

    def __init__(self, path: Path, doing: str, *, patience: float = 0.0) -> None:
        """Name the lease.

        Args:
            patience: how long to wait for whoever holds it (seconds); one that was killed on another host a moment ago
                counts as alive for STALE seconds.
        """
        self._path = path
        self._patience = patience
        self._owner = this_process(doing)
        self._stop = threading.Event()

    def _record(self) -> bytes:
        return json.dumps({"owner": asdict(self._owner), "beat": time.time()}).encode()

    def __enter__(self) -> "Lease":
        until = time.monotonic() + self._patience
        while holder(self._path) is not None and time.monotonic() < until:
            time.sleep(1)
        fresh = self._beside("new")
        for _ in range(3):
            with disk_errors(self._path):
                fresh.write_bytes(self._record())
            try:
                os.link(fresh, self._path)  # whole, or not at all if one is there
            except FileExistsError:
                self._refuse(holder(self._path))
                self._clear()
                continue
            finally:
                fresh.unlink()
            self._beats = threading.Thread(target=self._beat, daemon=True)
            self._beats.start()
            return self
        raise InputError(f"{self._path}: another process took this lease at the same moment; try again")

    def _beside(self, what: str) -> Path:
        return self._path.with_name(f".{self._path.name}.{socket.gethostname()}.{os.getpid()}.{what}")

    def _refuse(self, owner: Owner | None) -> None:
        if owner is not None:
            raise InputError(f"{self._path.parent} is in use: {owner}")

    def _clear(self) -> None:
        """Move a stale lease out of the way; of two that try at once one wins and the other finds nothing."""
        aside = self._beside("stale")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        try:
            if (owner := holder(aside)) is not None:  # somebody took the stale one over just before
                os.link(aside, self._path)
                self._refuse(owner)
        finally:
            aside.unlink()

    def _beat(self) -> None:
        beside = self._beside("beat")
        while not self._stop.wait(BEAT):
            if holder(self._path) not in (self._owner, None):
                print(f"growmerge: {self._path} was taken over: {holder(self._path)}", file=sys.stderr)
                os._exit(1)
            try:
                beside.write_bytes(self._record())
                beside.replace(self._path)
            except OSError:
                continue  # a full disk must not end the run; the next beat may get through

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._beats.join(BEAT)  # or its last beat might bring back what is removed here
        if holder(self._path) == self._owner:
            self._path.unlink(missing_ok=True)
