"""The smallest stage: what a job of an array does."""

import time
from pathlib import Path


def merge(path: Path) -> None:
    time.sleep(1)
    path.touch()
