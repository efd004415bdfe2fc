"""What a user is told when an input is wrong: one line, with the allowed values and the nearest match."""

import difflib
from collections.abc import Iterable

MOST_NAMES = 250
"""Allowed names that a line lists."""


class InputError(ValueError):
    """Bad input from a user: the message is one complete line; no traceback is shown for it."""

    def __init__(self, line: str = "", *, shared: bool = False) -> None:
        """Take the line, and whether all ranks are known to have met it."""
        super().__init__(line)
        self.shared = shared


def one_of(what: str, given: object, allowed: Iterable[object]) -> str:
    """Return the line that says `given` is not an allowed `what`, with the nearest match if there is one.

    Of many allowed names the line has the first ones alone.
    """
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = names if len(names) <= MOST_NAMES else [*names[:MOST_NAMES], f"and {len(names) - MOST_NAMES} more"]
    return f"unknown {what} {given!r}: allowed are {', '.join(shown) or '(none)'}{hint}"


class Stopped(InputError):
    """Work was asked to stop, and has saved: it goes on from there when it is started again."""
