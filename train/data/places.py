"""Places that text is read from: a folder, or a wheel read as a zip; files are found by glob."""

import contextlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from glob import iglob
from pathlib import Path

from parallel.errors import InputError


@dataclass(frozen=True, kw_only=True)
class File:
    """A file on disk or in a wheel."""

    name: str
    """Its path inside the wheel, or on disk as the glob writes it."""
    key: str
    """What the glob's wildcards stand for, joined by `/`; the stem if there are none."""
    where: str
    """How messages call it."""
    read: Callable[[], bytes]


Find = Callable[[str], list[File]]
"""Glob (`*`, `?`, `[...]` inside a name, `**` over folders) -> files, sorted by name; none is an InputError."""


@contextlib.contextmanager
def opened(place: Path) -> Iterator[Find]:
    """Open a folder or a wheel to find files in; they can be read until it is closed.

    Raises:
        InputError: the wheel is missing or damaged.
    """
    if place.is_dir():
        yield partial(_find_in_folder, place)
        return
    try:
        archive = zipfile.ZipFile(place)
    except FileNotFoundError:
        raise InputError(f"{place}: no such file or folder") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{place}: not a readable wheel or zip file ({error})") from error
    with archive:
        yield partial(_find_in_wheel, archive, place)


def _find_in_folder(folder: Path, pattern: str) -> list[File]:
    found = iglob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    paths = {name: folder / name for name in found if (folder / name).is_file()}
    return _files(pattern, folder, paths, lambda name: (str(paths[name]), partial(_read_disk, paths[name])))


def _find_in_wheel(archive: zipfile.ZipFile, wheel: Path, pattern: str) -> list[File]:
    matches = re.compile(glob_to_regex(pattern)).fullmatch
    names = [name for name in archive.namelist() if not name.endswith("/") and matches(name)]
    return _files(pattern, wheel, names, lambda name: (f"{wheel}: {name}", partial(_read_zip, archive, wheel, name)))


def _files(
    pattern: str, place: Path, names: Iterable[str], about: Callable[[str], tuple[str, Callable[[], bytes]]]
) -> list[File]:
    matcher = re.compile(glob_to_regex(pattern))
    files = []
    for name in sorted(set(names)):
        match = matcher.fullmatch(name)
        key = "/".join(group.strip("/") for group in match.groups() if group) if match else ""
        where, read = about(name)
        files.append(File(name=name, key=key or Path(name).stem, where=where, read=read))
    if not files:
        raise InputError(f"no file matches {pattern!r} in {place}")
    return files


def glob_to_regex(pattern: str) -> str:
    """Translate a glob; every wildcard is a group."""
    out = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        if part == "**/":
            out += r"((?:[^/]+/)*)"
        elif part == "**":
            out += r"(.*)"
        elif part in ("*", "?"):
            out += f"([^/]{part.removeprefix('?')})"
        elif part.startswith("[") and part.endswith("]"):
            inside = re.escape(part[1:-1].removeprefix("!")).replace(r"\-", "-")
            out += f"([{'^/' if part[1] == '!' else ''}{inside}])"
        else:
            out += re.escape(part)
    return out


def _read_zip(archive: zipfile.ZipFile, wheel: Path, name: str) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise InputError(f"{wheel}: {name} is damaged ({error})") from error


def _read_disk(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
