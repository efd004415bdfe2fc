"""Megatron-Core's indexed dataset: tokens as `<path>.bin`, and `<path>.idx`, which says where documents start in it.

`.idx` is little-endian and unpadded: `MMIDIDX\\0\\0`, version (u64, 1), a code of the tokens' dtype (u8), the number of
sequences S (u64) and of entries D (u64, documents + 1); then int32 [S], the length of each sequence in tokens; int64
[S], where it starts in `.bin` (bytes); int64 [D], the first sequence of each document, and S. We write a sequence a
document; others may cut a document into several.
"""

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash

from checkpoint.files import disk_errors, sync_folder
from checkpoint.manifest import BLOCK
from parallel.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
PIECE = 2**18
"""Bytes a call writes; see `checkpoint.writer`."""
CHUNK = 2**20
"""Index entries in memory at a time."""
LONGEST = 2**31 - 1
"""Tokens of a document: the format holds lengths in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """An `.idx`, memory-mapped: nothing of its arrays is read until asked for."""

    dtype: np.dtype
    """Of the tokens."""
    lengths: np.ndarray
    """Tokens of each sequence [S], int32."""
    pointers: np.ndarray
    """Where each sequence starts in `.bin` [S], bytes, int64. Not aligned: numpy copies all of it to search in it."""
    first: np.ndarray
    """The first sequence of each document, and S [documents + 1], int64."""

    @property
    def tokens(self) -> int:
        """How many tokens `.bin` has, by its last sequence."""
        if len(self.lengths) == 0:
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])


@dataclass(frozen=True)
class Offsets(Sequence[int]):
    """Where each document starts, and the end [documents + 1], in tokens, read when asked: it may be 100 million."""

    of: Index

    def __len__(self) -> int:
        return len(self.of.first)

    def __getitem__(self, at: Any) -> Any:
        """Return an offset, or for a slice an int64 array of them."""
        if isinstance(at, slice):
            first, size = self.of.first[at].astype(np.int64), len(self.of.pointers)
            found = np.full(len(first), self.of.tokens, dtype=np.int64)
            inner = first < size
            found[inner] = self.of.pointers[first[inner]] // self.of.dtype.itemsize
            return found
        sequence = int(self.of.first[at])
        whole = sequence == len(self.of.pointers)
        return self.of.tokens if whole else int(self.of.pointers[sequence]) // self.of.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def tolist(self) -> list[int]:
        return list(self[:].tolist())


def beside(path: Path, ending: str) -> Path:
    """Return a file of an indexed dataset: its path and an ending, whatever dots the path has."""
    return path.with_name(path.name + ending)


def open_index(path: Path) -> Index:
    """Open `<path>.idx`.

    Raises:
        InputError: it is missing, or not an index of tokens, or does not fit what its header says.
    """
    file = beside(path, ".idx")
    try:
        data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    magic, version, code, sequences, entries = HEADER.unpack(data[: HEADER.size].tobytes().ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != 1:
        raise InputError(f"{file}: not an index of a Megatron-Core dataset (version 1)")
    dtype = np.dtype(DTYPES.get(code, "V1"))
    if dtype.kind not in "iu":
        raise InputError(f"{file}: its dtype has the code {code}; tokens are integers")
    size = HEADER.size + 12 * sequences + 8 * entries
    if len(data) != size:
        modes = " (of a multimodal dataset, which is not read)" if len(data) == size + sequences else ""
        raise InputError(f"{file}: has {len(data)} bytes, its header says {size}{modes}")
    starts = HEADER.size + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * entries])
    parts = [data[start:stop] for start, stop in pairwise(starts.tolist())]
    index = Index(dtype=dtype, lengths=parts[0].view("<i4"), pointers=parts[1].view("<i8"), first=parts[2].view("<i8"))
    if entries == 0 or index.first[0] != 0 or index.first[-1] != sequences:
        raise InputError(f"{file}: damaged (its documents are not of its {sequences} sequences)")
    return index


def check_pointers(path: Path, index: Index) -> None:
    """Check that the sequences follow one another, so that `.bin` is one flat array of all tokens.

    Raises:
        InputError: they do not.
    """
    at = 0
    for start in range(0, len(index.lengths), CHUNK):
        lengths = index.lengths[start : start + CHUNK].astype(np.int64) * index.dtype.itemsize
        stops = at + np.cumsum(lengths)
        if (lengths < 0).any() or not np.array_equal(index.pointers[start : start + CHUNK], stops - lengths):
            raise InputError(f"{beside(path, '.idx')}: its sequences do not follow one another in the .bin")
        at = int(stops[-1])


class Writer:
    """Writes an indexed dataset, a sequence a document, as it comes; nothing but the last piece is in memory.

    Used with `with`: at its end both files are synced and renamed into place; after an error nothing is left.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path = path
        self._dtype = dtype
        self._code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
        self.documents = 0
        self.tokens = 0
        self.files: dict[str, dict[str, Any]] = {}
        """Size, time and checksums by block of each file, as in a manifest; there after the end."""

    def _beside(self, ending: str) -> Path:
        return self._path.with_name(f".{self._path.name}{ending}.{os.getpid()}.tmp")

    def __enter__(self) -> "Writer":
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._bin = Blocks(self._beside(".bin"))
            self._lengths = Blocks(self._beside(".lengths"))
        return self

    def add(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents: their tokens one after another, and how many each has."""
        if len(lengths) and max(lengths) > LONGEST:
            raise InputError(f"{self._path.name}: a document of {max(lengths)} tokens; the format holds {LONGEST}")
        with disk_errors(self._path):
            self._bin.write(np.ascontiguousarray(tokens, dtype=self._dtype))
            self._lengths.write(np.asarray(lengths, dtype="<i4"))
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with disk_errors(self._path):
                if error is None:
                    self._finish()
        finally:
            self._bin.abandon()
            self._lengths.abandon()
            for ending in (".bin", ".lengths", ".idx"):
                self._beside(ending).unlink(missing_ok=True)

    def _finish(self) -> None:
        self._lengths.close()
        index = Blocks(self._beside(".idx"))
        index.write(HEADER.pack(MAGIC, 1, self._code, self.documents, self.documents + 1))
        for lengths in self._all_lengths():
            index.write(lengths)
        at = 0
        for lengths in self._all_lengths():
            stops = at + np.cumsum(lengths.astype("<i8") * self._dtype.itemsize)
            index.write(np.concatenate([[at], stops[:-1]]).astype("<i8"))
            at = int(stops[-1])
        for start in range(0, self.documents + 1, CHUNK):
            index.write(np.arange(start, min(start + CHUNK, self.documents + 1), dtype="<i8"))
        for file, ending in ((self._bin, ".bin"), (index, ".idx")):
            file.close()
            path = beside(self._path, ending)
            self._beside(ending).replace(path)
            self.files[path.name] = {
                "size": file.size,
                "mtime_ns": path.stat().st_mtime_ns,
                "xxh3": file.hashes,
            }
        sync_folder(self._path.parent)

    def _all_lengths(self) -> Iterator[np.ndarray]:
        with self._beside(".lengths").open("rb") as file:
            while data := file.read(4 * CHUNK):
                yield np.frombuffer(data, dtype="<i4")


class Blocks:
    """A new file, written in small pieces, hashed by block as `checkpoint.manifest` does."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self.size = 0
        self.hashes: list[str] = []

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while view:
            piece = view[: min(PIECE, BLOCK - self.size % BLOCK)]
            self._file.write(piece)
            self._hash.update(piece)
            self.size += len(piece)
            if self.size % BLOCK == 0:
                self.hashes.append(self._hash.hexdigest())
                self._hash.reset()
            view = view[len(piece) :]

    def close(self) -> None:
        """Sync and close."""
        if self.size % BLOCK:
            self.hashes.append(self._hash.hexdigest())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close if it is open; a full disk does not matter any more."""
        with contextlib.suppress(OSError):
            self._file.close()
