"""The rows of a task that are scored, as they are kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.files import disk_errors
from growmerge.events import EventLog, read_events


class Kept:
    """The rows of a task that are scored, in a file that grows by a line a part."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[list[Any]] = []
        """Of the first items, in order."""
        for event in read_events(path):
            if event.get("from") == len(self.rows):  # of a part that was written twice the first counts
                self.rows += event["rows"]
        self._log: EventLog | None = None

    def add(self, rows: Sequence[list[Any]]) -> None:
        """Keep the rows of the next items."""
        with disk_errors(self._path):
            self._log = self._log or EventLog(self._path)
            self._log.write({"from": len(self.rows), "rows": rows})
        self.rows += rows
