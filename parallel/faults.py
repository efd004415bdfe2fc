"""Named points at which a test may stop a process, or slow it down, so that blows land exactly where they hurt."""

import os
import time
from pathlib import Path

VARIABLE, SLOW = "GROWMERGE_FAULT", "GROWMERGE_SLOW"


def point(name: str) -> None:
    """Stop here for good if the environment asks for it.

    `GROWMERGE_FAULT=<file>:<name>` makes the first process that gets to the point create the file and then wait to be
    killed. `GROWMERGE_SLOW=<beginning of names>:<seconds>` makes all wait so long at each point that is called so.
    Without the variables this is two dictionary look-ups.
    """
    slow = os.environ.get(SLOW)
    if slow is not None and name.startswith(slow.partition(":")[0]):
        time.sleep(float(slow.partition(":")[2]))
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    path, _, at = wanted.partition(":")
    if at == name and not Path(path).exists():
        Path(path).touch()
        while True:
            time.sleep(1)
