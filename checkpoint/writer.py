"""The writer: asks a layout which bytes go where and pulls them from a source, block by block, in parallel.

A worker fills a block of a file (16 MiB, as the manifest hashes them) tile by tile, hashes it and writes it, so that no
byte is read again. Memory is bounded by block size x workers. The bytes do not depend on the number of workers.
"""

import hashlib
import json
import math
import os
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import disk_errors, inside, read_json, write_bytes, write_json
from checkpoint.layout import Fragment, Layout
from checkpoint.manifest import BLOCK, NAME, block_hash, write_manifest
from checkpoint.source import Source, box_shape, flat_tiles
from parallel.errors import InputError
from parallel.faults import point
from parallel.memory import give_back_freed, keep_freed

PROGRESS = ".unfinished.json"
"""Which files an unfinished folder has whole; gone once the manifest is there."""

PIECE = 2**18
"""Bytes a call writes. For 16 MiB at once ext4 looks for huge pages, which took four times as long on Linux 6.18."""


def write_checkpoint(
    source: Source,
    folder: Path,
    layout: Layout,
    *,
    workers: int = 1,
    about: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> str:
    """Write a source into a folder in a layout, the manifest last, and return the hash of its data.

    After a kill the same call goes on with the files that are missing: `PROGRESS` says which are whole, and of what.

    Args:
        workers: threads that read, compute and write tiles.
        about: provenance, stored in growmerge.json with that hash, by which descendants name this checkpoint. It has to
            tell sources apart for an interrupted call to be gone on with; without it all is written anew.
        extra_files: further files (a tokenizer, say) by relative name.

    Raises:
        InputError: a full disk, a place that cannot be written, or a source that cannot be read.
    """
    plans = layout.files(source)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).unlink(missing_ok=True)
    key = hashlib.sha256(json.dumps([about, repr(layout)], sort_keys=True).encode()).hexdigest()
    hashes = _written(folder, key) if about is not None else {}
    _record(folder, key, hashes)
    buffers = threading.local()
    keep_freed()
    with ThreadPoolExecutor(max_workers=workers, initializer=_alone) as pool:
        for plan in plans:
            path = inside(folder, plan.name)
            if plan.name in hashes:
                continue
            with disk_errors(path):
                path.unlink(missing_ok=True)
                fragments = plan.create(path)
                handle = os.open(path, os.O_RDWR)
                try:
                    written = _fill(plan.source or source, fragments, handle, pool, workers, buffers)
                    os.fsync(handle)
                except BaseException:
                    path.unlink()  # half-written; on a full disk its room is wanted
                    raise
                finally:
                    os.close(handle)
            hashes[plan.name] = written
            _record(folder, key, hashes)
            point(f"write/{plan.name}")
    hashes = {plan.name: hashes[plan.name] for plan in plans}
    content = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    extras = {**layout.extras(source, plans), **(extra_files or {})}
    if about is not None:
        record = {**about, "hash": content}
        extras["growmerge.json"] = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    assert not hashes.keys() & extras.keys(), f"{folder}: a small file has a data file's name"
    for name, data in extras.items():
        write_bytes(inside(folder, name), data)
    point("write/manifest")
    write_manifest(folder, known=hashes)
    (folder / PROGRESS).unlink(missing_ok=True)
    return content


def _record(folder: Path, key: str, hashes: Mapping[str, list[str]]) -> None:
    write_json(folder / PROGRESS, {"key": key, "files": dict(hashes), "sizes": _sizes(folder, hashes)})


def _written(folder: Path, key: str) -> dict[str, list[str]]:
    """Return the files, with their hashes, that an interrupted call for the same thing has left whole."""
    path = folder / PROGRESS
    if not path.is_file():
        return {}
    found = read_json(path)
    if found.get("key") != key:
        return {}
    sizes = _sizes(folder, found["files"])
    return {name: hashes for name, hashes in found["files"].items() if sizes[name] == found["sizes"][name]}


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    paths = {name: folder / name for name in names}
    return {name: path.stat().st_size if path.is_file() else -1 for name, path in paths.items()}


def _alone() -> None:
    """Workers are the parallelism: torch's own threads would wait for one another at every small operation."""
    torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class _Span:
    """A fragment with its place in the file: bytes [start, stop)."""

    fragment: Fragment
    first: int
    """First element of the flattened tensor."""
    start: int
    stop: int


def _fill(
    source: Source,
    fragments: Sequence[Fragment],
    handle: int,
    pool: ThreadPoolExecutor,
    workers: int,
    buffers: threading.local,
) -> list[str]:
    """Fill a created file with its fragments and return the checksum of each of its blocks."""
    spans = sorted((_span(source, fragment) for fragment in fragments), key=lambda span: span.start)
    starts = [span.start for span in spans]
    size = os.fstat(handle).st_size
    stats: dict[str, Any] = {}
    pending: deque[Future[str]] = deque()
    hashes = []
    at = 0
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        while at < len(spans) and spans[at].stop <= begin:
            at += 1
        behind = bisect_left(starts, end)
        part = spans[at:behind]
        # Known before the block is handed out: a worker that waited for the pool would wait for itself.
        names = dict.fromkeys(span.fragment.tensor for span in part)
        stats = {name: stats[name] if name in stats else source.collect(name, pool.map) for name in names}
        pending.append(pool.submit(_block, source, part, stats, handle, begin, end, buffers))
        if len(pending) > workers:
            hashes.append(pending.popleft().result())
    return hashes + [one.result() for one in pending]


def _span(source: Source, fragment: Fragment) -> _Span:
    stop = math.prod(source.infos[fragment.tensor].shape) if fragment.stop is None else fragment.stop
    end = fragment.offset + (stop - fragment.start) * fragment.dtype.itemsize
    return _Span(fragment=fragment, first=fragment.start, start=fragment.offset, stop=end)


def _block(
    source: Source,
    spans: Sequence[_Span],
    stats: Mapping[str, Any],
    handle: int,
    begin: int,
    end: int,
    buffers: threading.local,
) -> str:
    """Fill bytes [begin, end) of a file, write them, and return their checksum."""
    if not hasattr(buffers, "own"):
        buffers.own = torch.empty(BLOCK, dtype=torch.uint8)
    block: torch.Tensor = buffers.own[: end - begin]
    data: Any = block.numpy()
    if sum(min(span.stop, end) - max(span.start, begin) for span in spans) < end - begin:
        os.preadv(handle, [data], begin)  # headers, and gaps between records
    for span in spans:
        low, high = max(span.start, begin), min(span.stop, end)
        dtype, name = span.fragment.dtype, span.fragment.tensor
        out = block[low - begin : high - begin].view(dtype)
        first = span.first + (low - span.start) // dtype.itemsize
        at = 0
        for box in flat_tiles(source.infos[name].shape, first, first + len(out)):
            shape = box_shape(box)
            count = math.prod(shape)
            source.read(name, box, {span.fragment.slot: out[at : at + count].view(shape)}, stats[name])
            at += count
    digest = block_hash(data)
    _write_all(handle, memoryview(data), begin)
    # Linux starts to write what is advised so: the file's sync then finds little left to wait for.
    os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_DONTNEED)
    if begin % (16 * BLOCK) == 0:
        give_back_freed()
    return digest


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(handle, data[:PIECE], offset)
        if done == 0:
            raise InputError("a write to the checkpoint wrote nothing")
        data, offset = data[done:], offset + done
