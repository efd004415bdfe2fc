"""The rows of a task that are scored, as they are kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.files import disk_errors
from growmerge.events import EventLog, read_events
from parallel.ranks import ALONE, Ranks


class Kept:
    """The rows of a task that are scored, in a file that grows by a line a part; the first of several ranks has it."""

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self._path = path
        self._writes = ranks.first
        rows: list[list[Any]] = []
        for event in read_events(path) if ranks.first else []:
            if event.get("from") == len(rows):  # of a part that was written twice the first counts
                rows += event["rows"]
        self.rows: list[list[Any]] = ranks.broadcast(rows)
        """Of the first items, in order."""
        self._log: EventLog | None = None

    def add(self, rows: Sequence[list[Any]]) -> None:
        """Keep the rows of the next items."""
        if self._writes:
            with disk_errors(self._path):
                self._log = self._log or EventLog(self._path)
                self._log.write({"from": len(self.rows), "rows": rows})
        self.rows += rows
