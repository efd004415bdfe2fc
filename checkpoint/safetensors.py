"""Hugging Face safetensors folders: single or sharded with an index, read lazily, written in place.

Layout of a file: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then data.
Names are Hugging Face's, also where the running model has others (`checkpoint.experts`).
"""

import functools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.experts import Entry, entries_of, overlaps, spelled_in, unknown_expert
from checkpoint.files import inside, read_json
from checkpoint.layout import FilePlan, Fragment
from checkpoint.memory import infos_of
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, Source, row_major_tiles
from parallel.errors import InputError, one_of
from parallel.families import family_of
from parallel.family import Family

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(path: Path) -> dict[str, Stored]:
    """Read one file's header: what it holds and where, no data.

    Raises:
        InputError: the file is missing, not readable, truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length + 8 > size:
                raise InputError(f"{path}: truncated, or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, UnicodeDecodeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a safetensors file (its header is not JSON)") from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path}: {name}: {one_of('dtype', entry['dtype'], DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
            raise InputError(f"{path}: {name}: shape {shape} does not match its {stop - start} bytes")
        if 8 + length + stop > size:
            raise InputError(f"{path}: truncated ({size} bytes; {name} would end at {8 + length + stop})")
        found[name] = Stored(path=path, offset=8 + length + start, shape=shape, dtype=dtype)
    return found


@dataclass(frozen=True, kw_only=True)
class SafetensorsSource:
    """A Hugging Face folder with `config.json` and safetensors weights."""

    folder: Path
    config: Mapping[str, Any]
    run: RunState
    groups: Mapping[str, Group] = field(default_factory=lambda: {"default": Group()})
    _maps: dict[Path, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Files as mappings: they read just the pages that are asked for."""
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map", {})
            names = sorted(set(weight_map.values()))
        elif (self.folder / SINGLE).is_file():
            names = [SINGLE]
        else:
            raise InputError(f"{self.folder}: neither {SINGLE} nor {INDEX}")
        found: dict[str, Stored] = {}
        for name in names:
            found.update(read_header(inside(self.folder, name)))
        return found

    @cached_property
    def spelled(self) -> Mapping[str, Sequence[Entry]]:
        """The entries of tensors that the files spell otherwise than the running model."""
        infos = infos_of(self.config, torch.float32)
        found = spelled_in(self.family, {name: info.shape for name, info in infos.items()}, self.stored)
        strange = unknown_expert(self.family, found.values(), self.stored)
        if strange is not None:
            model = f"the {self.family.name} model of config.json"
            raise InputError(f"{self.stored[strange].path}: holds {strange}, which {model} has not")
        return found

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, info in infos_of(self.config, torch.float32).items():
            if info.tied_to is None:
                wanted = {entry.name: entry.shape for entry in self.spelled.get(name, ())} or {name: info.shape}
                dtypes = [self._dtype_of(entry, shape) for entry, shape in wanted.items()]
                info = Info(shape=info.shape, slots={"weight": functools.reduce(torch.promote_types, dtypes)})
            infos[name] = info
        return infos

    def _dtype_of(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        if name not in self.stored:
            raise InputError(f"{self.folder}: tensor {name} is missing")
        stored = self.stored[name]
        if stored.shape != shape:
            raise InputError(f"{stored.path}: {name} has shape {stored.shape}, config.json says {shape}")
        return stored.dtype

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        if name not in self.spelled:
            piece = self._mapped(name)[box]
            for tensor in out.values():
                tensor.copy_(piece)
            return
        for entry, inside_it, at in overlaps(self.spelled[name], box):
            piece = self._mapped(entry)[inside_it]
            for tensor in out.values():
                tensor[at].copy_(piece)

    def _mapped(self, name: str) -> torch.Tensor:
        """Return a tensor that lies in the file."""
        if name not in self._tensors:
            stored = self.stored[name]
            if stored.path not in self._maps:
                self._maps[stored.path] = map_file(stored.path)
            self._tensors[name] = tensor_in(self._maps[stored.path], stored)
        return self._tensors[name]


def map_file(path: Path) -> np.ndarray:
    """Return a file's bytes as a mapping: copy-on-write, since torch wants to be able to write; nobody does."""
    return np.memmap(path, dtype=np.uint8, mode="c")


def tensor_in(mapping: np.ndarray, stored: Stored) -> torch.Tensor:
    """Return a tensor that lies in a mapped file, wherever it begins."""
    size = math.prod(stored.shape) * stored.dtype.itemsize
    # Integers of the element's size: numpy has no bfloat16.
    raw = np.frombuffer(mapping[stored.offset : stored.offset + size], dtype=f"u{stored.dtype.itemsize}")
    return torch.from_numpy(raw.reshape(stored.shape)).view(stored.dtype)


def open_safetensors(folder: Path) -> SafetensorsSource:
    """Open a Hugging Face folder lazily.

    Raises:
        InputError: config.json is missing or of no known family; later, when a tensor is missing or has another shape.
    """
    config = read_json(folder / "config.json")
    try:
        family_of(config)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    about = read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {}
    return SafetensorsSource(folder=folder, config=config, run=RunState(provenance=about))


@dataclass(frozen=True, kw_only=True)
class SafetensorsLayout:
    """A Hugging Face folder: tensors in the family's order, no aliases, in shards of at most `shard_size` bytes."""

    dtype: torch.dtype | None = None
    """Output dtype; each tensor's own by default."""
    shard_size: int = 5 * 10**9

    def _dtype(self, source: Source, name: str) -> torch.dtype:
        return self.dtype or source.infos[name].slots["weight"]

    def files(self, source: Source) -> list[FilePlan]:
        """Return the plan of each file; a tensor larger than a shard has a shard of its own."""
        shards: list[dict[str, torch.dtype]] = [{}]
        room = self.shard_size
        for name, info in source.infos.items():
            if info.tied_to is not None:
                continue
            dtype = self._dtype(source, name)
            size = math.prod(info.shape) * dtype.itemsize
            if shards[-1] and size > room:
                shards.append({})
                room = self.shard_size
            shards[-1][name] = dtype
            room -= size
        count = len(shards)
        entries = _entries(source)
        plans = []
        for number, tensors in enumerate(shards, 1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            plans.append(_file(name, tensors, entries))
        return plans

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        """Return the small files that stand beside the data: config.json and, if sharded, the index."""
        dtypes = {name: self._dtype(source, name) for plan in plans for name in plan.tensors}
        config = dict(source.config)
        if len(set(dtypes.values())) == 1:
            config.pop("torch_dtype", None)  # its former name: the dtype before
            config["dtype"] = str(next(iter(dtypes.values()))).removeprefix("torch.")
        extras = {"config.json": _json(config)}
        if len(plans) > 1:
            total = sum(math.prod(source.infos[name].shape) * dtype.itemsize for name, dtype in dtypes.items())
            entries = _entries(source)
            weight_map = {entry.name: plan.name for plan in plans for name in plan.tensors for entry in entries[name]}
            extras[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
        return extras


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _entries(source: Source) -> dict[str, list[Entry]]:
    """Return the entries of each tensor."""
    return {name: entries_of(source.family, name, info.shape) for name, info in source.infos.items()}


def _file(name: str, tensors: Mapping[str, torch.dtype], entries: Mapping[str, Sequence[Entry]]) -> FilePlan:
    create = functools.partial(_create, tensors=dict(tensors), entries={tensor: entries[tensor] for tensor in tensors})
    return FilePlan(name=name, tensors=tuple(tensors), create=create)


def _create(
    path: Path, *, tensors: Mapping[str, torch.dtype], entries: Mapping[str, Sequence[Entry]]
) -> list[Fragment]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    fragments: list[Fragment] = []
    at = 0
    for tensor, dtype in tensors.items():
        first = 0
        for entry in entries[tensor]:
            stop = first + math.prod(entry.shape)
            end = at + (stop - first) * dtype.itemsize
            header[entry.name] = {"dtype": CODES[dtype], "shape": list(entry.shape), "data_offsets": [at, end]}
            piece = Fragment(offset=at, tensor=tensor, slot="weight", dtype=dtype, start=first, stop=stop)
            fragments.append(piece)
            at, first = end, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    with path.open("xb") as file:
        file.write(head)
        file.truncate(len(head) + at)
    return [replace(fragment, offset=len(head) + fragment.offset) for fragment in fragments]
