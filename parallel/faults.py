"""Named points at which a test may stop a process, so that kills land exactly where they hurt."""

import os
import time
from pathlib import Path

VARIABLE = "GROWMERGE_FAULT"


def point(name: str) -> None:
    """Stop here for good if the environment asks for it.

    `GROWMERGE_FAULT=<file>:<name>` makes the first process that gets to the point create the file and then wait to be
    killed. Without the variable this is one dictionary look-up.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    path, _, at = wanted.partition(":")
    if at == name and not Path(path).exists():
        Path(path).touch()
        while True:
            time.sleep(1)
