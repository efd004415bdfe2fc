"""How much memory a process may still take, within the limit of its cgroup; and giving back what it no longer needs."""

import ctypes
from pathlib import Path

import psutil

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_freed() -> None:
    """Give the pages of freed tensors back to the system.

    glibc keeps them for later, in pieces that fit nothing: the heap of a writer grew by 54 MiB over 3.6 GB
    written, that of a model read a module at a time by half of the model's size in float32.
    """
    if _TRIM is not None:
        _TRIM(0)


def available_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return bytes: the least of what is free and of the limits of this process' cgroup and of those above it."""
    limits = [psutil.virtual_memory().available]
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            place = root / controllers / path.lstrip("/")
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            for folder in (place, *place.parents):
                if folder.is_relative_to(root) and (folder / name).is_file():
                    text = (folder / name).read_text().strip()
                    limits += [int(text)] if text.isdigit() else []
    return min(limits)
