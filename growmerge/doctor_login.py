"""What `growmerge doctor` looks at where it is started: folders, their space, quota, packages."""

import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from checkpoint.files import disk_errors, write_bytes
from growmerge.doctor_job import OPTIONAL, PACKAGES, versions
from slurm.profile import Profile

ANSWER_S = 60.0
"""Seconds that a command has to answer in."""
LOW_BYTES, LOW_FILES = 10e9, 10_000
"""Less than that free is a warning: a checkpoint of a small model, and a snapshot of the code with some stages."""
NEARLY = 0.9
"""Share of a quota from which on it is a warning."""
COUNTS = r"\s+\[?(\d+)\]?\*?\s+(\d+)\s+(\d+)\s+(\S+)"
QUOTA = re.compile(rf"(\S*[/:]\S*){COUNTS}{COUNTS}(?=\s|$)")
"""A row of `quota -w -p` or `lfs quota`: file system, then used (* where too much), quota, limit and grace of blocks of
1024 bytes, then of files. `lfs quota` breaks a row after a long name."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check has found."""

    name: str
    state: Literal["ok", "warning", "failed"] = "ok"
    seen: str
    do: str = ""
    """What mends it."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Numbers behind it, for programs."""


def answer(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a command and return its exit code, what it printed, and the last line of what it had to say.

    A command that cannot be run, or does not answer, has exit code -1.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=ANSWER_S, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, "", str(error)
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return done.returncode, done.stdout, lines[-1] if lines else f"{command[0]}: exit code {done.returncode}"


def packages() -> Finding:
    """Return the versions of Python and of the packages here."""
    found = versions()
    missing = [name for name in PACKAGES if found[name] is None]
    seen = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    seen += "".join(f", no {name} (optional)" for name in OPTIONAL if found[name] is None)
    values = {"python": platform.python_version(), **found}
    if missing:
        text = f"missing: {', '.join(missing)}; there are {seen}"
        return Finding(name="packages", state="failed", seen=text, do="install growmerge anew", values=values)
    return Finding(name="packages", seen=f"Python {platform.python_version()}, {seen}", values=values)


def writable(folder: Path) -> Finding:
    """Do in a folder what runs do: create, sync, rename, link, delete; an exception says what cannot be done."""
    first, second = folder / "first", folder / "second"
    with disk_errors(folder):
        write_bytes(first, b"growmerge")
        try:
            os.link(first, second)
        except OSError as error:
            seen = f"{folder.parent}: no hard links ({error.strerror}), and leases need them"
            return Finding(name="workdir", state="failed", seen=seen, do="choose a --workdir on another file system")
        finally:
            first.unlink()
        second.unlink()
    return Finding(name="workdir", seen=f"{folder.parent}: files are created, synced, renamed, linked, deleted")


def group(folder: Path) -> Finding:
    """Say whose group new folders have, for a profile that lets the group write."""
    import grp

    found = folder.stat()
    try:
        name = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        name = str(found.st_gid)
    if found.st_mode & stat.S_ISGID:
        return Finding(name="group", seen=f"{folder.parent}: new files are of the group {name} (setgid)")
    seen = f"{folder.parent}: no setgid bit: new files are of the group of whoever writes them, here {name}"
    return Finding(name="group", state="warning", seen=seen, do=f"chgrp PROJECT {folder.parent}; chmod g+s it")


def spaces(workdir: Path, profile: Profile) -> Iterator[Finding]:
    """Say how much is free where runs write."""
    places = {"workdir": str(workdir), "home": "~", "cache": profile.cache, "temporary": profile.temporary}
    for what, given in places.items():
        filled = os.path.expandvars(given or "$")
        if "$" in filled:
            continue  # known on a node only, as a job's id is
        folder = Path(filled).expanduser().absolute()
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        try:
            found = os.statvfs(there)
        except OSError as error:
            yield Finding(name=f"{what} space", state="failed", seen=f"{folder}: {error.strerror}", do="ask the site")
            continue
        free, files = found.f_bavail * found.f_frsize, found.f_favail
        counted = found.f_files > 0  # some file systems make inodes as they need them
        seen = f"{folder}: {size(free)} free" + (f", {files} files more" if counted else ", files are not counted")
        values = {"folder": str(folder), "free_bytes": free, "free_files": files if counted else None}
        low = (free < LOW_BYTES and what == "workdir") or free < LOW_BYTES / 10 or (counted and files < LOW_FILES)
        if low:
            do = "delete what is not needed, or choose another folder"
            yield Finding(name=f"{what} space", state="warning", seen=seen, do=do, values=values)
        else:
            yield Finding(name=f"{what} space", seen=seen, values=values)


def quotas(workdir: Path) -> Iterator[Finding]:
    """Say how much of each quota is used, where a command knows."""
    there = next(path for path in (workdir, *workdir.parents) if path.is_dir())
    if shutil.which("quota"):
        yield from _quota(["quota", "-u", "-g", "-w", "-p"])
    if shutil.which("lfs"):
        yield from _quota(["lfs", "quota", "-q", "-u", str(os.getuid()), str(there)])
        yield from _quota(["lfs", "quota", "-q", "-g", str(there.stat().st_gid), str(there)])


def _quota(command: Sequence[str]) -> Iterator[Finding]:
    code, text, words = answer(command)  # the exit code is bad where a quota is exceeded
    rows = QUOTA.findall(text)
    if not rows and (code or not re.search(r": none\s*$", text)):
        seen = f"`{' '.join(command)}` cannot be read: {words[:200]}"
        yield Finding(name="quota", state="warning", seen=seen, do="look by hand what the quota is")
    elif not rows:
        yield Finding(name="quota", seen=f"{command[0]}: none")
    for place, *cells in rows:
        parts, share, full = [], 0.0, False
        for what, (used, soft, hard) in (("", map(int, cells[:3])), (" files", map(int, cells[4:7]))):
            limit = min((each for each in (soft, hard) if each), default=0)
            if limit:
                share, full = max(share, used / limit), full or used >= hard > 0
                parts.append(f"{used} of {limit}{what}" if what else f"{size(used * 1024)} of {size(limit * 1024)}")
        seen = f"{place}: {', '.join(parts) or 'no limit'}"
        values = {"file_system": place, "share": round(share, 4)}
        if share < NEARLY:
            yield Finding(name="quota", seen=seen, values=values)
        else:
            do = "delete what is not needed, or ask the site for more"
            yield Finding(name="quota", state="failed" if full else "warning", seen=seen, do=do, values=values)


def size(count: float) -> str:
    """Return a number of bytes in GB."""
    return f"{count / 1e9:,.1f} GB"
