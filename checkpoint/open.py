"""Open a checkpoint of any known format as a Source."""

from collections.abc import Callable
from pathlib import Path

from checkpoint.safetensors import INDEX, SINGLE, open_safetensors
from checkpoint.source import Source
from checkpoint.zero3 import is_zero3, open_zero3
from parallel.errors import InputError


def is_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Source]]] = {
    "safetensors": (is_safetensors, open_safetensors),
    "zero3": (is_zero3, open_zero3),
}


def format_of(folder: Path) -> str:
    """Return the format of a checkpoint folder, a key of FORMATS.

    Raises:
        InputError: no such folder, no known format, or several formats in one folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    kinds = [name for name, (matches, _) in FORMATS.items() if matches(folder)]
    if not kinds:
        raise InputError(f"{folder}: not a checkpoint of a known format ({', '.join(FORMATS)})")
    if len(kinds) > 1:
        raise InputError(f"{folder}: files of several formats ({', '.join(kinds)}); separate them")
    return kinds[0]


def open_checkpoint(folder: Path | str) -> Source:
    """Open a checkpoint folder lazily, whatever its format.

    Raises:
        InputError: see `format_of`; the folder is damaged.
    """
    folder = Path(folder)
    return FORMATS[format_of(folder)][1](folder)
