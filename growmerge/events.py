"""What a run says while it works: events as JSON lines, written by the job and followed by whoever shows them."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if cut:  # by a kill or a full disk
            self._file.write("\n")

    def write(self, event: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False) + "\n")
        self._file.flush()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file; lines that were cut short are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


class Follower:
    """Reads the events that were appended since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def new(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # cut short by a kill, and ended by the next start
                found.append(json.loads(line))
        return found
