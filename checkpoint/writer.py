"""The writer: asks a layout which bytes go where and pulls them from a source, tile by tile, in parallel.

Memory is bounded by tile size x workers. The bytes do not depend on the number of workers.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import disk_errors, inside, read_json, write_bytes, write_json
from checkpoint.layout import Fragment, Layout
from checkpoint.manifest import NAME, block_hashes, write_manifest
from checkpoint.source import Slot, Source, box_shape, flat_boxes, row_major_tiles
from parallel.errors import InputError
from parallel.faults import point

PROGRESS = ".unfinished.json"
"""Which files an unfinished folder has whole; gone once the manifest is there."""


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
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for plan in plans:
            path = inside(folder, plan.name)
            if plan.name in hashes:
                continue
            with disk_errors(path):
                path.unlink(missing_ok=True)
                fragments = plan.create(path)
                handle = os.open(path, os.O_RDWR)
                try:
                    for tensor, group in groupby(fragments, key=lambda fragment: fragment.tensor):
                        _write_tensor(source, tensor, list(group), handle, pool, workers)
                    os.fsync(handle)
                except BaseException:
                    path.unlink()  # half-written; on a full disk its room is wanted
                    raise
                finally:
                    os.close(handle)
            hashes[plan.name] = block_hashes(path)
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


def _write_tensor(
    source: Source, name: str, fragments: list[Fragment], handle: int, pool: ThreadPoolExecutor, workers: int
) -> None:
    """Fill one tensor's fragments of one file; slots that share a range are read together."""
    info = source.infos[name]
    stats = source.collect(name, pool.map)
    count = 1
    for size in info.shape:
        count *= size
    ranges: dict[tuple[int, int], list[Fragment]] = {}
    for fragment in fragments:
        stop = count if fragment.stop is None else fragment.stop
        ranges.setdefault((fragment.start, stop), []).append(fragment)

    def fill(job: tuple[int, int, int, list[Fragment]]) -> None:
        begin, start, stop, targets = job
        at = start
        for box in flat_boxes(info.shape, start, stop):
            shape = box_shape(box)
            out: dict[Slot, torch.Tensor] = {part.slot: torch.empty(shape, dtype=part.dtype) for part in targets}
            source.read(name, box, out, stats)
            for part in targets:
                data: Any = out[part.slot].reshape(-1).view(torch.uint8).numpy()
                _write_all(handle, memoryview(data), part.offset + (at - begin) * part.dtype.itemsize)
            at += out[targets[0].slot].numel()

    def jobs() -> Iterator[tuple[int, int, int, list[Fragment]]]:
        for (start, stop), targets in ranges.items():
            for piece in row_major_tiles((stop - start,)):
                yield start, start + piece[0].start, start + piece[0].stop, targets

    # A window keeps the queue, and so the memory, bounded; errors of workers surface here.
    todo = jobs()
    while batch := [job for _, job in zip(range(4 * workers), todo, strict=False)]:
        list(pool.map(fill, batch))


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(handle, data, offset)
        if done == 0:
            raise InputError("a write to the checkpoint wrote nothing")
        data, offset = data[done:], offset + done
