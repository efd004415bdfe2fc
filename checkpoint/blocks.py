"""Filling files that are laid out alike, block by block: one for a checkpoint, or one for each of many merges.

A worker takes a block (16 MiB, as the manifest hashes them) of all files at once and goes through it piece by piece, so
that a source that many files read from is read once. What it fills it hashes and writes: no byte is read again.
"""

import math
import os
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from checkpoint.layout import Fragment
from checkpoint.manifest import BLOCK
from checkpoint.source import Source, box_shape, flat_tiles
from parallel.errors import InputError
from parallel.memory import give_back_freed

PIECE = 2**18
"""Bytes a call writes. For 16 MiB at once ext4 looks for huge pages, which took four times as long on Linux 6.18."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A fragment with its place in the file: bytes [start, stop)."""

    fragment: Fragment
    first: int
    """First element of the flattened tensor."""
    start: int
    stop: int


def alone() -> None:
    """Workers are the parallelism: torch's own threads would wait for one another at every small operation."""
    torch.set_num_threads(1)


def fill(
    sources: Sequence[Source],
    fragments: Sequence[Fragment],
    handles: Sequence[int],
    *,
    pool: ThreadPoolExecutor,
    workers: int,
    first: int,
    done: Callable[[Sequence[str]], None],
) -> None:
    """Fill created files of one layout, each from a source of its own.

    Args:
        handles: of the files, one a source.
        first: number of the block to begin with.
        done: called with each block's checksums, one a file, in the order of the blocks.
    """
    spans = sorted((_span(sources[0], fragment) for fragment in fragments), key=lambda span: span.start)
    starts = [span.start for span in spans]
    size = os.fstat(handles[0]).st_size
    known: list[dict[str, Any]] = [{} for _ in sources]
    pending: deque[Future[list[str]]] = deque()
    buffers = threading.local()
    at = 0
    for begin in range(first * BLOCK, size, BLOCK):
        end = min(begin + BLOCK, size)
        while at < len(spans) and spans[at].stop <= begin:
            at += 1
        part = spans[at : bisect_left(starts, end)]
        # Known before the block is handed out: a worker that waited for the pool would wait for itself.
        names = dict.fromkeys(span.fragment.tensor for span in part)
        fresh: list[dict[str, Any]] = [{} for _ in sources]
        for name in names:  # of one tensor all sources ask for much the same, one after the other
            for source, stats, own in zip(sources, known, fresh, strict=True):
                own[name] = stats[name] if name in stats else source.collect(name, pool.map)
        known = fresh
        pending.append(pool.submit(_block, sources, part, known, handles, begin, end, buffers))
        if len(pending) > workers:
            done(pending.popleft().result())
    for one in pending:
        done(one.result())


def _span(source: Source, fragment: Fragment) -> Span:
    stop = math.prod(source.infos[fragment.tensor].shape) if fragment.stop is None else fragment.stop
    end = fragment.offset + (stop - fragment.start) * fragment.dtype.itemsize
    return Span(fragment=fragment, first=fragment.start, start=fragment.offset, stop=end)


def _block(
    sources: Sequence[Source],
    spans: Sequence[Span],
    stats: Sequence[Mapping[str, Any]],
    handles: Sequence[int],
    begin: int,
    end: int,
    buffers: threading.local,
) -> list[str]:
    """Fill bytes [begin, end) of all files, write them, and return their checksums."""
    piece = max(2 * PIECE, BLOCK // len(sources) // PIECE * PIECE)
    if not hasattr(buffers, "own") or buffers.own.shape != (len(sources), piece):
        buffers.own = torch.empty(len(sources), piece, dtype=torch.uint8)
    digests = [xxhash.xxh3_128() for _ in sources]
    for low in range(begin, end, piece):
        high = min(low + piece, end)
        filled = buffers.own[:, : high - low]
        within = [span for span in spans if span.start < high and span.stop > low]
        if sum(min(span.stop, high) - max(span.start, low) for span in within) < high - low:
            for data, handle in zip(filled, handles, strict=True):
                os.preadv(handle, [data.numpy()], low)  # headers, and gaps between records
        for span in within:
            _fill_span(sources, span, stats, filled, low, high)
        for data, handle, digest in zip(filled, handles, digests, strict=True):
            digest.update(data.numpy())
            _write_all(handle, memoryview(data.numpy()), low)
            # Linux starts to write what is advised so: the file's sync then finds little left to wait for.
            os.posix_fadvise(handle, low, high - low, os.POSIX_FADV_DONTNEED)
    if begin % (16 * BLOCK) == 0:
        give_back_freed()
    return [digest.hexdigest() for digest in digests]


def _fill_span(
    sources: Sequence[Source],
    span: Span,
    stats: Sequence[Mapping[str, Any]],
    filled: torch.Tensor,
    begin: int,
    end: int,
) -> None:
    """Fill what a span has of bytes [begin, end) of each file, tile by tile: all files, and then the next tile."""
    low, high = max(span.start, begin), min(span.stop, end)
    dtype, name = span.fragment.dtype, span.fragment.tensor
    outs = [data[low - begin : high - begin].view(dtype) for data in filled]
    first = span.first + (low - span.start) // dtype.itemsize
    at = 0
    for box in flat_tiles(sources[0].infos[name].shape, first, first + len(outs[0])):
        shape = box_shape(box)
        count = math.prod(shape)
        for source, known, out in zip(sources, stats, outs, strict=True):
            source.read(name, box, {span.fragment.slot: out[at : at + count].view(shape)}, known[name])
        at += count


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(handle, data[:PIECE], offset)
        if done == 0:
            raise InputError("a write to the checkpoint wrote nothing")
        data, offset = data[done:], offset + done
