"""mergekit in a virtual environment of its own, which borrows torch and all else that it can from this one.

    python tests/merge/parity/environment.py

makes it in .parity at the root (seconds, few MB) and prints its interpreter. MERGEKIT_VENV names another one to use.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[3]
CACHE = ROOT / ".parity"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


class NoMergekit(Exception):
    """mergekit cannot be installed."""


def mergekit_python() -> Path:
    """Return the interpreter of an environment that has mergekit; make it if there is none.

    Raises:
        NoMergekit: pip cannot install: its last line.
    """
    if given := os.environ.get("MERGEKIT_VENV"):
        return Path(given) / "bin" / "python"
    ours = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    key = hashlib.sha256("\n".join([REQUIREMENTS.read_text(), sys.version, *ours]).encode()).hexdigest()[:12]
    folder = CACHE / f"mergekit-{key}"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n")
        unfinished = CACHE / f"{folder.name}.{os.getpid()}"
        try:
            _make(unfinished, ours)
            with contextlib.suppress(OSError):  # another process was faster
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder / "bin" / "python"


def _make(folder: Path, borrowed: list[str]) -> None:
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *_missing()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoMergekit(f"mergekit cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    paths = {"base": str(folder), "platbase": str(folder)}
    # Behind its own packages, and without the .pth files there: nothing of this project is seen.
    Path(sysconfig.get_path("purelib", "venv", vars=paths), "borrowed.pth").write_text("\n".join(borrowed) + "\n")


def _missing() -> list[str]:
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#") and not _installed(line.partition("==")[0])]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print(mergekit_python())
