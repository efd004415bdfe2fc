"""How far a pass over text is: a bar on a terminal, plain lines in a log; JSON lines always."""

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from checkpoint.files import disk_errors
from growmerge.events import EventLog

EVERY = 15.0
"""Seconds between plain lines."""


class Show:
    """Shows the tokens that a pass has done of all that it is to do."""

    def __init__(self, what: str, log: Path, *, done: int, total: int) -> None:
        self._what, self._log, self._path = what, EventLog(log), log
        self._start, self._total = done, total
        self._began = self._told = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total, completed=done, rate="")

    def __enter__(self) -> "Show":
        if self._bar:
            self._bar.start()
        if self._start:
            self.say(f"{self._what}: goes on after {self._start:,} of {self._total:,} tokens")
        self._write(self._start, 0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Say how many tokens are done."""
        now = time.monotonic()
        rate = (done - self._start) / max(1e-9, now - self._began)
        self._write(done, rate)
        if self._bar:
            self._bar.update(self._task, completed=done, rate=f"{rate:,.0f} tokens/s")
        elif now - self._told > EVERY:
            self._told = now
            left = (self._total - done) / max(1e-9, rate)
            share = f"{100 * done / self._total:.0f} %, {rate:,.0f} tokens/s"
            self.say(f"{self._what}: {share}, about {left / 60:.0f} minutes left")

    def say(self, text: str) -> None:
        """Print a line; on a terminal it goes above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write(self, done: int, rate: float) -> None:
        event = {"event": "tokens", "stage": self._what, "done": done, "total": self._total}
        with disk_errors(self._path):
            self._log.write({**event, "tokens_per_second": round(rate, 1)})
