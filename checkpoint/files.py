"""Files that are whole or not there: write beside, sync, rename; a full disk is one clear line."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.errors import InputError

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file too large"}
_CLOSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, an exceeded quota or a read-only place into one line that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save hides what the file said behind an error of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        code = cause.errno if isinstance(cause, OSError) else None
        if code in _FULL:
            raise InputError(f"{path}: {_FULL[code]} while writing; nothing that was complete is lost") from error
        if code in _CLOSED:
            raise InputError(f"{path}: cannot be written ({os.strerror(code)})") from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically: a reader sees the old bytes or the new ones, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given, so that the same value gives the same bytes."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: the file is missing, not readable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def inside(folder: Path, name: str) -> Path:
    """Return `folder/name` for a name read from a file.

    Raises:
        InputError: the name would leave the folder.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{folder}: the file name {name!r} leaves its folder")
    return path
