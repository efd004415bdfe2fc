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
    """Shows events; `error` holds the line of the first bad input, `stage` the stage that was last heard of."""

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
        self._shares: dict[str, float] = {}
        """How much of each stage at work is done, 0 to 1."""
        self._last_lines: dict[str, float] = {}
        """When something was last printed of each."""
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
        kind, stage = event["event"], event.get("stage", self.stage)
        if kind == "start":
            self._last_lines[stage] = time.monotonic()
            self._update(stage, 0.0)
        elif kind == "step":
            share = event["step"] / event["steps"]
            facts = f"loss {event['loss']:.3f}  {event['tokens_per_second']:,.0f} tokens/s"
            self._update(stage, share, facts)
            if self._bar is None and time.monotonic() - self._last_lines.get(stage, 0.0) > EVERY:
                self._last_lines[stage] = time.monotonic()
                self.say(f"{stage}: step {event['step']}/{event['steps']}  {facts}")
        elif kind == "done":
            self._done += self._weights.get(stage, 0.0)
            self._update(stage, None)
            if self._bar is None or event["seconds"] >= 1:
                self.say(f"{stage}: done in {event['seconds']:.1f} s")
        elif kind == "error" or (kind == "stopped" and not self._requeues):
            self._update(stage, None)
            self.error = self.error or f"{stage}: {event['text']}"
        elif kind in ("warning", "note", "stopped"):
            self.say(f"{stage}: {event['text']}")

    def _update(self, stage: str, share: float | None, facts: str = "") -> None:
        """Note how much of a stage is done, None once it is no longer at work."""
        self._shares.pop(stage, None)
        if share is not None:
            self._shares[stage] = share
        self.stage = stage if share is not None else next(reversed(self._shares), stage)
        if self._bar:
            at = self._done + sum(part * self._weights.get(name, 0.0) for name, part in self._shares.items())
            others = len({*self._shares} - {self.stage})
            shown = f"{self.stage} and {others} more" if others else self.stage
            self._bar.update(self._all, completed=at, description=shown, facts=facts)

    def tick(self) -> None:
        """Keep the clock running between events."""
        if self._bar:
            self._bar.refresh()
