"""The files of a torch.distributed.checkpoint (DCP) folder: which tensors and values lie where, and reading boxes.

Layout (torch 2.13): `.metadata` is a pickle that names every entry of the saved state dict, the keys on the way
to it joined by dots. A tensor has a shape, a dtype and chunks (offsets and sizes in it); everything else is a value.
For each chunk and value it names a file, `__{rank}_{number}.distcp`, an offset and a length: there lies what torch.save
made of it, a zip archive of its own, whose record `data/0` is the chunk's storage.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.files import inside
from checkpoint.pickles import load_part, load_records
from checkpoint.safetensors import Stored, map_file, tensor_in
from checkpoint.source import Box, box_shape
from parallel.errors import InputError

METADATA = ".metadata"
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What torch.compile and others put into a module's path, and torch's own get_model_state_dict takes out."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Bytes [offset, offset + length) of a file."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor, cut into chunks that cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Sequence[tuple[Box, Place]]


@dataclass(frozen=True, kw_only=True)
class DcpFiles:
    """The entries of a folder by key."""

    path: Path
    """Of `.metadata`."""
    tensors: Mapping[str, Entry]
    values: Mapping[str, Place]
    _maps: dict[Path, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Files as mappings: they read just the pages that are asked for."""
    _chunks: dict[Place, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def read(self, key: str, box: Box, out: torch.Tensor) -> None:
        """Fill a tensor of the box's shape.

        Raises:
            InputError: a chunk is damaged, or is not what `.metadata` says.
        """
        for number, (where, _) in enumerate(self.tensors[key].chunks):
            common = [
                slice(max(one.start, other.start), min(one.stop, other.stop))
                for one, other in zip(box, where, strict=True)
            ]
            if all(part.start < part.stop for part in common):
                out[_within(common, box)].copy_(self._chunk(key, number)[_within(common, where)])

    def read_rows(self, key: str, rows: torch.Tensor, columns: slice, out: torch.Tensor) -> None:
        """Fill a tensor [rows, columns] with rows of a matrix in any order.

        Raises:
            InputError: as `read`.
        """
        for number, ((there, across), _) in enumerate(self.tensors[key].chunks):
            wanted = ((rows >= there.start) & (rows < there.stop)).nonzero()[:, 0]
            first, last = max(columns.start, across.start), min(columns.stop, across.stop)
            if len(wanted) and first < last:
                part = self._chunk(key, number)[:, first - across.start : last - across.start]
                out[wanted, first - columns.start : last - columns.start] = part[rows[wanted] - there.start].to(
                    out.dtype
                )

    def value(self, key: str) -> Any:
        """Return a value, or a tensor of one element as a number.

        Raises:
            InputError: it is damaged, or no plain data.
        """
        if key in self.tensors:
            entry = self.tensors[key]
            if math.prod(entry.shape) != 1:
                raise InputError(f"{self.path}: {key} has shape {entry.shape}, where one number is expected")
            out = torch.empty(entry.shape, dtype=entry.dtype)
            self.read(key, tuple(slice(0, 1) for _ in entry.shape), out)
            return out.item()
        place = self.values[key]
        return load_part(self._opened(place), f"{place.path}: {key}", "DCP file")

    def _opened(self, place: Place) -> io.BufferedReader:
        return io.BufferedReader(_Part(self._bytes(place.path)[place.offset : place.offset + place.length]))

    def _bytes(self, path: Path) -> np.ndarray:
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return self._maps[path]

    def _chunk(self, key: str, number: int) -> torch.Tensor:
        """Return a chunk, which stays in its file until it is read."""
        entry = self.tensors[key]
        box, place = entry.chunks[number]
        if place not in self._chunks:
            where = f"{place.path}: {key}"
            saved = load_part(self._opened(place), where, "DCP file", device="meta")
            if not isinstance(saved, torch.Tensor) or saved.layout != torch.strided:
                raise InputError(f"{where} holds no plain tensor")
            if (tuple(saved.shape), saved.dtype) != (box_shape(box), entry.dtype):
                found = f"{tuple(saved.shape)} of {saved.dtype}"
                raise InputError(f"{where} is {found}, {METADATA} says {box_shape(box)} of {entry.dtype}")
            with _expected(place.path):
                reader: Any = torch._C.PyTorchFileReader(self._opened(place))
                offset = place.offset + reader.get_record_offset("data/0")
                count = saved.untyped_storage().nbytes() // entry.dtype.itemsize
                stored = Stored(path=place.path, offset=offset, shape=(count,), dtype=entry.dtype)
                whole = tensor_in(self._bytes(place.path), stored)
                self._chunks[place] = whole.as_strided(saved.shape, saved.stride(), saved.storage_offset())
        return self._chunks[place]


class _Part(io.RawIOBase):
    """Bytes at hand as a file of their own."""

    def __init__(self, data: np.ndarray) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, len(self._data))[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece.tobytes()
        self._at += len(piece)
        return len(piece)


def _within(common: Sequence[slice], box: Box) -> Box:
    """Return where in a box a part of it is."""
    return tuple(slice(p.start - outer.start, p.stop - outer.start) for p, outer in zip(common, box, strict=True))


def read_metadata(folder: Path) -> DcpFiles:
    """Read what a folder holds; no data, but every file has to be there in its full length.

    Raises:
        InputError: `.metadata` is missing, damaged or names a class that has no business there, or a file outside; a
            file is missing or truncated; a tensor's chunks do not cover it; entries are compressed.
    """
    path = folder / METADATA
    record = load_records(path, "DCP metadata")
    tensors: dict[str, Entry] = {}
    values: dict[str, Place] = {}
    with _expected(path):
        places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
        for index, info in record.state["storage_data"].items():
            offset = index.state.get("offset")
            places[index.state["fqn"], None if offset is None else tuple(offset)] = _place(path, info.state)
        for key, entry in record.state["state_dict_metadata"].items():
            if type(entry).__name__ == "BytesStorageMetadata":
                values[_unwrapped(key)] = places[key, None]
                continue
            shape = tuple(entry.state["size"])
            chunks = []
            for chunk in entry.state["chunks"]:
                begin, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
                box = tuple(slice(at, at + size) for at, size in zip(begin, sizes, strict=True))
                if not all(0 <= part.start <= part.stop <= size for part, size in zip(box, shape, strict=True)):
                    raise InputError(f"{path}: a chunk of {key} lies outside of its shape {shape}")
                if math.prod(sizes):  # a rank may have no rows of a small tensor
                    chunks.append((box, places[key, begin]))
            covered = sum(math.prod(box_shape(box)) for box, _ in chunks)
            if covered != math.prod(shape):
                raise InputError(f"{path}: the chunks of {key} have {covered} of its {math.prod(shape)} elements")
            tensors[_unwrapped(key)] = Entry(shape=shape, dtype=entry.state["properties"].state[0], chunks=chunks)
    _check_sizes(places.values())
    return DcpFiles(path=path, tensors=tensors, values=values)


def _unwrapped(key: str) -> str:
    for part in WRAPPERS:
        key = key.replace(part, "")
    return key


def _place(path: Path, info: Mapping[str, Any]) -> Place:
    if info.get("transform_descriptors"):
        how = ", ".join(info["transform_descriptors"])
        raise InputError(f"{path}: entries are stored with {how}, and plain ones alone are read")
    offset, length = int(info["offset"]), int(info["length"])
    if offset < 0 or length < 0:
        raise InputError(f"{path}: bytes {offset} to {offset + length} of {info['relative_path']} make no sense")
    return Place(path=inside(path.parent, info["relative_path"]), offset=offset, length=length)


def _check_sizes(places: Iterable[Place]) -> None:
    """Refuse files that are missing or end before their last entry does."""
    ends: dict[Path, int] = {}
    for place in places:
        ends[place.path] = max(ends.get(place.path, 0), place.offset + place.length)
    for path, end in sorted(ends.items()):
        if not path.is_file():
            raise InputError(f"{path}: missing")
        size = path.stat().st_size
        if size < end:
            raise InputError(f"{path}: truncated ({size} bytes; an entry would end at {end})")


@contextmanager
def _expected(path: Path) -> Iterator[None]:
    """Turn what should be there and is not into one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: not what torch.distributed.checkpoint writes ({reason[:200]})") from error
