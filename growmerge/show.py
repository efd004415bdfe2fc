"""How far a run is: a bar on a terminal, plain lines in a log, JSON lines always."""

import contextlib
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from growmerge.events import EventLog

EVERY = 15.0
"""Seconds between plain lines about one stage."""
SMALL = 2.0
"""Weight (seconds) of a stage whose cost nothing is known of."""


class Show:
    """Shows events; `error` holds the line of the first bad input, `stage` the stage at work."""

    def __init__(self, seconds: Mapping[str, float], log: EventLog, *, requeues: bool = False) -> None:
        """Begin to show what is to be done: estimated seconds of each stage.

        Args:
            requeues: whether what was asked to stop goes on by itself, which is then no error.
        """
        self._requeues = requeues
        self._weights = {name: max(SMALL, estimate) for name, estimate in seconds.items()}
        self._log = log
        self._done = 0.0
        self.stage = ""
        self._last_line = 0.0
        self.error: str | None = None
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._all = self._bar.add_task("starting", total=sum(self._weights.values()), facts="")

    def __enter__(self) -> "Show":
        if self._bar:
            self._bar.start()
        self._log.write({"event": "run", "stages": len(self._weights)})
        if len(self._weights) > 1:
            self.say(f"{len(self._weights)} stages to do")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        with contextlib.suppress(OSError):  # the disk may be full; that is said elsewhere
            self._log.write({"event": "end", "failed": error is not None or self.error is not None})

    def say(self, text: str) -> None:
        """Print a line; on a terminal it goes above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event in: log it, show it."""
        self._log.write(event)
        kind = event["event"]
        if kind == "start":
            self.stage = event["stage"]
            self._last_line = time.monotonic()
            self._update(0.0, "")
        elif kind == "step":
            share = event["step"] / event["steps"]
            facts = f"loss {event['loss']:.3f}  {event['tokens_per_second']:,.0f} tokens/s"
            self._update(share, facts)
            if self._bar is None and time.monotonic() - self._last_line > EVERY:
                self._last_line = time.monotonic()
                self.say(f"{event.get('stage', self.stage)}: step {event['step']}/{event['steps']}  {facts}")
        elif kind == "done":
            self._done += self._weights.get(event["stage"], 0.0)
            self._update(0.0, "")
            if self._bar is None or event["seconds"] >= 1:
                self.say(f"{event['stage']}: done in {event['seconds']:.1f} s")
        elif kind == "error" or (kind == "stopped" and not self._requeues):
            self.error = self.error or f"{event['stage']}: {event['text']}"
        elif kind in ("warning", "note", "stopped"):
            self.say(f"{event.get('stage', self.stage)}: {event['text']}")

    def _update(self, share: float, facts: str) -> None:
        if self._bar:
            at = self._done + share * self._weights.get(self.stage, 0.0)
            self._bar.update(self._all, completed=at, description=self.stage, facts=facts)

    def tick(self) -> None:
        """Keep the clock running between events."""
        if self._bar:
            self._bar.refresh()
