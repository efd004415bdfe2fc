"""How far something is: a bar on a terminal, plain lines in a log; of a run's stages JSON lines, too."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from growmerge.events import EventLog

EVERY = 15.0
"""Seconds between plain lines about one thing."""
SMALL = 2.0
"""Weight (seconds) of a stage whose cost nothing is known of."""


class Bar:
    """Shows how much is done of something: a bar on a terminal, a line every so often elsewhere."""

    def __init__(self, what: str = "starting", total: float | None = None, done: int = 0) -> None:
        """Begin with something, of which so much is done already."""
        self._console = Console(stderr=True)
        self._told: dict[str, float] = {}
        """When something was last printed of each thing."""
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
            self._task = self._bar.add_task(what, facts="")
        self.begin(what, total, done)

    def begin(self, what: str, total: float | None, done: int = 0) -> None:
        """Go over to something else."""
        self._what, self._total, self._start = what, total, done
        self._began = self._told[what] = time.monotonic()
        if self._bar:
            self._bar.reset(self._task, description=what, total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line; on a terminal it goes above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, done: float, facts: str = "") -> None:
        """Show how much is done."""
        if self._bar:
            self._bar.update(self._task, completed=done, facts=facts)
        elif self._total and self._is_due(self._what):
            left = (time.monotonic() - self._began) * (self._total - done) / max(1, done - self._start)
            share = f"{100 * done / self._total:.0f} %"
            self.say(f"{self._what}: {', '.join(filter(None, (share, facts)))}, about {left / 60:.0f} minutes left")

    def _is_due(self, about: str) -> bool:
        """Whether a line about something is to be printed: there is no bar, and the last one is a while ago."""
        now = time.monotonic()
        if self._bar or now - self._told.get(about, 0.0) <= EVERY:
            return False
        self._told[about] = now
        return True


class Show(Bar):
    """Shows events; `error` holds the line of the first bad input, `stage` the stage that was last heard of."""

    def __init__(self, seconds: Mapping[str, float], log: EventLog, *, requeues: bool = False) -> None:
        """Begin to show what is to be done: estimated seconds of each stage.

        Args:
            requeues: whether what was asked to stop goes on by itself, which is then no error.
        """
        self._requeues = requeues
        self._weights = {name: max(SMALL, estimate) for name, estimate in seconds.items()}
        super().__init__(total=sum(self._weights.values()))
        self._log = log
        self._done = 0.0
        self.stage = ""
        self._shares: dict[str, float] = {}
        """How much of each stage at work is done, 0 to 1."""
        self.error: str | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        self._log.write({"event": "run", "stages": len(self._weights)})
        if len(self._weights) > 1:
            self.say(f"{len(self._weights)} stages to do")
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        super().__exit__(kind, error, trace)
        with contextlib.suppress(OSError):  # the disk may be full; that is said elsewhere
            self._log.write({"event": "end", "failed": error is not None or self.error is not None})

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event in: log it, show it."""
        self._log.write(event)
        kind, stage = event["event"], event.get("stage", self.stage)
        if kind == "start":
            self._told[stage] = time.monotonic()
            self._update(stage, 0.0)
        elif kind == "step":
            share = event["step"] / event["steps"]
            facts = event.get("facts") or f"loss {event['loss']:.3f}  {event['tokens_per_second']:,.0f} tokens/s"
            self._update(stage, share, facts)
            if self._is_due(stage):
                self.say(f"{stage}: step {event['step']}/{event['steps']}  {facts}")
        elif kind == "done":
            self._done += self._weights.get(stage, 0.0)
            self._update(stage, None)
            if self._bar is None or event["seconds"] >= 1:
                self.say(f"{stage}: done in {event['seconds']:.1f} s")
        elif kind == "error" or (kind == "stopped" and not self._requeues):
            self._update(stage, None)
            self.error = self.error or f"{stage}: {event['text']}"
        elif kind in ("warning", "note", "outcome", "stopped"):
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
            self._bar.update(self._task, completed=at, description=shown, facts=facts)

    def tick(self) -> None:
        """Keep the clock running between events."""
        if self._bar:
            self._bar.refresh()
