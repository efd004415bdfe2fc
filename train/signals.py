"""Being asked to stop: by SIGTERM, or by the signal that SLURM (submitit) sends ahead of a time limit or a preemption.

A handler only notes it. The ranks agree at a step's end, save together and return: a collective save inside a handler
would wait for ranks that got no signal.
"""

import faulthandler
import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""submitit's is SIGUSR2 by default: NCCL keeps SIGUSR1 for itself."""


class StopRequest:
    """Whether this process was asked to stop, while the context lasts."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends this process, with the stacks of all its threads on stderr, when a run makes no progress for so long."""

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60

    def progress(self) -> None:
        """Begin to wait anew."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def time_left() -> float:
    """Return the seconds until SLURM ends this job; inf outside of one, or where it does not say."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdigit() else math.inf
