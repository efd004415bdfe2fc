"""How far a pass over text is: a bar on a terminal, plain lines in a log; JSON lines always."""

import time
from pathlib import Path
from typing import Self

from checkpoint.files import disk_errors
from growmerge.events import EventLog
from growmerge.show import Bar


class Show(Bar):
    """Shows the tokens that a pass has done of all that it is to do."""

    def __init__(self, what: str, log: Path, *, done: int, total: int) -> None:
        super().__init__(what, total, done)
        self._log, self._path = EventLog(log), log

    def __enter__(self) -> Self:
        super().__enter__()
        if self._start:
            self.say(f"{self._what}: goes on after {self._start:,} of {self._total:,} tokens")
        self._write(self._start, 0.0)
        return self

    def update(self, done: float, facts: str = "") -> None:
        """Say how many tokens are done."""
        rate = (done - self._start) / max(1e-9, time.monotonic() - self._began)
        self._write(done, rate)
        super().update(done, facts or f"{rate:,.0f} tokens/s")

    def _write(self, done: float, rate: float) -> None:
        event = {"event": "tokens", "stage": self._what, "done": done, "total": self._total}
        with disk_errors(self._path):
            self._log.write({**event, "tokens_per_second": round(rate, 1)})
