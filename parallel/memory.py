"""How much memory a process may still take: what the machine has free, within the limit of its cgroup."""

from pathlib import Path

import psutil


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
