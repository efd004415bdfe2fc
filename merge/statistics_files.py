"""What passes over text keep on disk: which model they are of, tensors in a file, and how far an unfinished pass is."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.files import disk_errors, sync_folder
from checkpoint.manifest import block_hash
from checkpoint.safetensors import CODES, read_header
from checkpoint.source import Source, empty_box, flat_boxes
from parallel.errors import InputError
from parallel.faults import point

STATE = ".statistics.safetensors"
"""The sums of an unfinished pass; its header's metadata holds the counts."""
PROBE, PROBES = 1 << 9, 8
"""Elements that are looked at together, and at how many places of each tensor: its beginning and end among them."""


@dataclass(kw_only=True)
class Sums:
    """What a pass has added up so far. It changes: a second copy of a model's size is what memory has no room for."""

    tensors: dict[str, torch.Tensor]
    """fisher: float32 by parameter; gram: float64 [I, I] by matrix."""
    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    """Tokens scored."""


def digest(source: Source) -> str:
    """Return what a model is known by, whatever format and folder it is in: a hash of parts of each tensor.

    Weights count as float32. Two models that training, growth or a merge has set apart differ in every tensor that it
    has touched, so a part of each is enough.
    """
    found = hashlib.sha256()
    for name, info in source.infos.items():
        if info.tied_to is None:
            found.update(f"{name} {tuple(info.shape)}\n".encode())
            stats = source.collect(name, map)
            size = math.prod(info.shape)
            for start in sorted({max(0, size - PROBE) * place // (PROBES - 1) for place in range(PROBES)}):
                for box in flat_boxes(info.shape, start, min(start + PROBE, size)):
                    values = empty_box(box)
                    source.read(name, box, {"weight": values}, stats)
                    found.update(values.numpy().tobytes())
    return found.hexdigest()


def check_model(folder: Path, said: object, source: Source) -> None:
    """Check that statistics in a folder are of a model.

    Args:
        said: the digest that the folder gives: `Gram.model`, or `["statistic"]["model"]` of a Fisher's provenance.

    Raises:
        InputError: it is another model's.
    """
    if said != digest(source):
        where = getattr(source, "folder", None) or source.run.provenance.get("name") or "the model given"
        raise InputError(f"{folder}: its statistics are of another model than {where}")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write tensors into a safetensors file, in their order, atomically: the old file is there until the new one is.

    Raises:
        InputError: a full disk, or a place that cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    at = 0
    for name, tensor in tensors.items():
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Hidden: a folder's manifest does not cover what a kill has left, and the next call writes over it.
    beside = path.with_name(f".{path.name.removeprefix('.')}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for tensor in tensors.values():
                    file.write(_bytes(tensor))
                file.flush()
                os.fsync(file.fileno())
            point(f"write/{path.name}")
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _bytes(tensor: torch.Tensor) -> memoryview:
    values: Any = tensor.detach().cpu().contiguous().numpy().reshape(-1)
    return memoryview(values).cast("B")


def save_sums(folder: Path, key: str, sums: Sums) -> None:
    """Save how far a pass is.

    Args:
        key: what the pass is of; only a pass with the same one goes on from here.

    Raises:
        InputError: a full disk, or a place that cannot be written; what was saved before is still there.
    """
    hashes = [block_hash(_bytes(tensor)) for tensor in sums.tensors.values()]
    record = {"key": key, "xxh3": hashes, "counts": [sums.batches, sums.sequences, sums.tokens]}
    write_tensors(folder / STATE, sums.tensors, {"growmerge": json.dumps(record)})


def load_sums(folder: Path, key: str) -> Sums | None:
    """Return how far a pass was, on the CPU; None if nothing is saved.

    Raises:
        InputError: what is saved is damaged, or of another pass.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    stored = read_header(path)
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        record = json.loads(json.loads(file.read(length))["__metadata__"]["growmerge"])
    if record["key"] != key:
        raise InputError(f"{folder}: holds an unfinished pass of another model, text or options; choose another folder")
    tensors = {}
    for (name, at), said in zip(stored.items(), record["xxh3"], strict=True):
        kind = {torch.float32: "<f4", torch.float64: "<f8"}[at.dtype]
        values = np.fromfile(path, dtype=kind, count=int(np.prod(at.shape)), offset=at.offset)
        tensors[name] = torch.from_numpy(values).view(at.shape)
        if block_hash(_bytes(tensors[name])) != said:
            raise InputError(f"{path}: damaged (checksum of {name}); delete it to begin anew")
    batches, sequences, tokens = record["counts"]
    return Sums(tensors=tensors, batches=batches, sequences=sequences, tokens=tokens)
