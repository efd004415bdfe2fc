"""Filling files that are laid out alike, block by block: one for a checkpoint, or one for each of many merges.

Blocks (16 MiB, as the manifest hashes them) are dealt out to the members of a team. One takes a block of all files at
once and goes through it piece by piece, so that a source that many files read from is read once. What it fills it
hashes and writes: no byte is read again.
"""

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from checkpoint.layout import Fragment
from checkpoint.manifest import BLOCK
from checkpoint.source import Source, box_shape, flat_tiles
from checkpoint.team import Member, go_through
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


def fill(
    sources: Sequence[Source],
    fragments: Sequence[Fragment],
    handles: Sequence[int],
    *,
    workers: int,
    together: bool,
    first: int,
    done: Callable[[Sequence[str]], None],
) -> None:
    """Fill created files of one layout, each from a source of its own.

    Args:
        handles: of the files, one a source.
        workers: processes; threads of this one if the sources want to share memory (`together`).
        first: number of the block to begin with.
        done: called with each block's checksums, one a file, in the order of the blocks.
    """
    spans = sorted((_span(sources[0], fragment) for fragment in fragments), key=lambda span: span.start)
    starts = [span.start for span in spans]
    size = os.fstat(handles[0]).st_size
    blocks = [(begin, min(begin + BLOCK, size)) for begin in range(first * BLOCK, size, BLOCK)]

    def work(member: Member) -> None:
        known: list[dict[str, Any]] = [{} for _ in sources]
        buffers = torch.empty(len(sources), max(2 * PIECE, BLOCK // len(sources) // PIECE * PIECE), dtype=torch.uint8)
        at = 0
        for number, (begin, end) in enumerate(blocks):
            while at < len(spans) and spans[at].stop <= begin:
                at += 1
            part = spans[at : bisect_left(starts, end)]
            names = dict.fromkeys(span.fragment.tensor for span in part)
            fresh: list[dict[str, Any]] = [{} for _ in sources]
            for name in names:  # of one tensor all sources ask for much the same, one after the other
                for source, stats, own in zip(sources, known, fresh, strict=True):
                    own[name] = stats[name] if name in stats else source.collect(name, member.spread)
            known = fresh
            if number % member.count == member.number:
                member.tell((number, _block(sources, part, known, handles, begin, end, buffers)))

    ready: dict[int, list[str]] = {}
    told = 0

    def tell(what: tuple[int, list[str]]) -> None:
        nonlocal told
        ready[what[0]] = what[1]
        while told in ready:
            done(ready.pop(told))
            told += 1

    members = 1 if together else min(workers, max(1, len(blocks)))
    go_through(work, tell, members=members, threads=workers if together else 1)


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
    buffers: torch.Tensor,
) -> list[str]:
    """Fill bytes [begin, end) of all files, write them, and return their checksums."""
    piece = buffers.shape[1]
    digests = [xxhash.xxh3_128() for _ in sources]
    for low in range(begin, end, piece):
        high = min(low + piece, end)
        filled = buffers[:, : high - low]
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
