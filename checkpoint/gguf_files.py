"""GGUF files, of llama.cpp and what is built on it: what they say of the model, and where each tensor lies.

Layout of a file (version 2 or 3, little-endian): the magic "GGUF", the version, the number of tensors and of metadata
entries; the entries (a key, a type, a value; strings are a length and UTF-8); for each tensor its name, its dims with
the innermost first, its type and its offset; then the tensors' data, which begins at a multiple of
`general.alignment`. A model may be split into files `NAME-00001-of-0000N.gguf`: the first has the metadata, all have
tensors. How a tensor's numbers are stored: `checkpoint.gguf_types`.

Facts of ggml-org/llama.cpp: docs/gguf.md of ggml, and gguf-py 0.19 (constants.py, gguf_reader.py, gguf_writer.py).
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.gguf_types import Packed, type_of
from checkpoint.safetensors import map_file
from parallel.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata values, as `struct` calls them."""
FLOAT, STRING, ARRAY = 6, 8, 9
ALIGNMENT = 32
"""Of data, where a file says nothing."""
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies, and how."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    kind: torch.dtype | Packed

    @property
    def row(self) -> int:
        """Bytes of a row."""
        columns = self.shape[-1] if self.shape else 1
        if isinstance(self.kind, Packed):
            return columns // self.kind.block * self.kind.size
        return columns * self.kind.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the files of a model say."""

    path: Path
    """The first of them."""
    metadata: Mapping[str, Any]
    entries: Mapping[str, Entry]
    """By llama.cpp's names."""


def files_of(path: Path) -> list[Path]:
    """Return the files of the model that a folder holds, or that a file is of, in order.

    Raises:
        InputError: there are several models, or a file of a split one is missing.
    """
    names = [path.name] if path.is_file() else sorted(file.name for file in path.glob("*.gguf"))
    models: dict[str, str] = {}
    for name in names:
        split = SPLIT.fullmatch(name)
        models.setdefault(f"{split[1]}-of-{split[3]}" if split else name, name)
    if len(models) != 1:
        held = ", ".join(models.values())
        raise InputError(f"{path}: holds {len(models)} GGUF models ({held}); name the file of one")
    folder = path.parent if path.is_file() else path
    split = SPLIT.fullmatch(names[0])
    if not split:
        return [folder / names[0]]
    files = [folder / f"{split[1]}-{number:05d}-of-{split[3]}.gguf" for number in range(1, int(split[3]) + 1)]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing (the model is split into {len(files)} files)")
    return files


def read_model(path: Path) -> Model:
    """Read what the files of a model say, no data.

    Raises:
        InputError: as `files_of` and `read_file`.
    """
    files = files_of(path)
    metadata, entries = read_file(files[0])
    for file in files[1:]:
        entries |= read_file(file)[1]
    return Model(path=files[0], metadata=metadata, entries=entries)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Read a file's metadata and where its tensors lie.

    Raises:
        InputError: the file cannot be read, is truncated or damaged, no GGUF file or of another byte order, or has a
            tensor of a type that is not read.
    """
    cursor = _Cursor(path)
    if cursor.take(4) != MAGIC:
        raise InputError(f"{path}: not a GGUF file")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise InputError(f"{path}: is big-endian; only little-endian GGUF files are read")
    if version not in VERSIONS:
        raise InputError(f"{path}: is of GGUF version {version}: allowed are {' and '.join(map(str, VERSIONS))}")
    tensors, values = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    headers = [cursor.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise InputError(f"{path}: general.alignment is {alignment!r}: allowed are whole numbers above 0")
    begin = -(-cursor.at // alignment) * alignment
    found = {}
    for name, shape, number, offset in headers:
        entry = Entry(path=path, offset=begin + offset, shape=shape, kind=type_of(path, name, shape, number))
        end = entry.offset + entry.nbytes
        if end > cursor.size:
            raise InputError(f"{path}: truncated ({cursor.size} bytes; {name} would end at {end})")
        found[name] = entry
    return metadata, found


class _Cursor:
    """Goes through a file's header."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        try:
            self.size = path.stat().st_size
            self._bytes = map_file(path) if self.size else np.empty(0, dtype=np.uint8)  # nothing cannot be mapped
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error

    def take(self, count: int) -> bytes:
        if self.at + count > self.size:
            raise InputError(f"{self.path}: truncated, or not a GGUF file ({self.size} bytes, and its header goes on)")
        found = self._bytes[self.at : self.at + count].tobytes()
        self.at += count
        return found

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        """Return a metadata value; of an array of strings (a tokenizer's) how many there are."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner != STRING:
                return self.numbers(self._code(inner), count)
            for _ in range(count):
                self.text()
            return count
        found = self.number(self._code(kind))
        # The shortest number that is the same in float32: 1e-06, not 9.99999997e-07.
        return float(str(np.float32(found))) if kind == FLOAT else found

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise InputError(f"{self.path}: damaged (a metadata value has the type {kind})")
        return SCALARS[kind]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return a tensor's name, shape with the outermost dim first, type and offset."""
        name = self.text()
        dims = self.numbers("Q", self.number("I"))
        return name, tuple(reversed(dims)), self.number("I"), self.number("Q")
