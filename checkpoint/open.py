"""Open a checkpoint of any known format as a Source."""

from collections.abc import Callable
from pathlib import Path

from checkpoint.dcp import is_dcp, open_dcp
from checkpoint.gguf import is_gguf, open_gguf
from checkpoint.hyperllama import is_hyperllama, open_hyperllama
from checkpoint.megatron import is_megatron, open_megatron
from checkpoint.nanotron import is_nanotron, open_nanotron
from checkpoint.pipeline import is_pipeline, open_pipeline
from checkpoint.safetensors import INDEX, SINGLE, open_safetensors
from checkpoint.source import Source
from checkpoint.torch_bin import is_torch_bin, open_torch_bin
from checkpoint.torch_dist import open_torch_dist
from checkpoint.torch_dist_files import is_torch_dist
from checkpoint.universal import is_universal, open_universal
from checkpoint.zero0 import is_zero0, open_zero0
from checkpoint.zero3 import is_zero3, open_zero3
from checkpoint.zero3_tp import is_zero3_tp, open_zero3_tp
from checkpoint.zero12 import is_zero12, open_zero12
from parallel.errors import InputError


def is_safetensors(folder: Path) -> bool:
    return ((folder / SINGLE).is_file() or (folder / INDEX).is_file()) and not is_hyperllama(folder)


FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Source]]] = {
    "safetensors": (is_safetensors, open_safetensors),
    "hyperllama": (is_hyperllama, open_hyperllama),
    "torch_bin": (is_torch_bin, open_torch_bin),
    "zero0": (is_zero0, open_zero0),
    "zero12": (is_zero12, open_zero12),
    "zero3": (is_zero3, open_zero3),
    "zero3_tp": (is_zero3_tp, open_zero3_tp),
    "pipeline": (is_pipeline, open_pipeline),
    "universal": (is_universal, open_universal),
    "dcp": (is_dcp, open_dcp),
    "nanotron": (is_nanotron, open_nanotron),
    "gguf": (is_gguf, open_gguf),
    "megatron": (is_megatron, open_megatron),
    "torch_dist": (is_torch_dist, open_torch_dist),
}


def format_of(folder: Path) -> str:
    """Return the format of a checkpoint folder, or of a GGUF file, a key of FORMATS.

    Raises:
        InputError: no such folder, no known format, or several formats in one folder.
    """
    if folder.is_file() and is_gguf(folder):
        return "gguf"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    kinds = [name for name, (matches, _) in FORMATS.items() if matches(folder)]
    if not kinds:
        raise InputError(f"{folder}: not a checkpoint of a known format ({', '.join(FORMATS)})")
    if len(kinds) > 1:
        raise InputError(f"{folder}: files of several formats ({', '.join(kinds)}); separate them")
    return kinds[0]


def open_checkpoint(folder: Path | str) -> Source:
    """Open a checkpoint folder, or a GGUF file, lazily, whatever its format.

    Raises:
        InputError: see `format_of`; the folder is damaged.
    """
    folder = Path(folder)
    return FORMATS[format_of(folder)][1](folder)
