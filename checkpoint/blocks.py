"""Filling files that are laid out alike, block by block: one for a checkpoint, or one for each of many merges.

Blocks (16 MiB, as the manifest hashes them) are dealt out to the members of a team. One takes a block of all files at
once and goes through it piece by piece, so that a source that many files read from is read once. What it fills is
hashed and written behind it: no byte is read again.
"""

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from checkpoint.behind import ALIGN, PIECE, Behind, aligned
from checkpoint.layout import Fragment
from checkpoint.manifest import BLOCK
from checkpoint.source import TILE, Source, box_shape, flat_tiles, read_together
from checkpoint.team import Member, go_through

SMALL_TILE = 1 << 17
"""Elements in a tile of many sources: they keep boxes of their inputs and sums of these, to be near at hand."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A fragment with its place in the file: bytes [start, stop)."""

    fragment: Fragment
    first: int
    """First element of the flattened tensor."""
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """Bytes [begin, end) of the files, and the spans that have something of them."""

    number: int
    begin: int
    end: int
    spans: Sequence[Span]


def fill(
    sources: Sequence[Source],
    fragments: Sequence[Fragment],
    handles: Sequence[int],
    past: Sequence[int | None],
    *,
    workers: int,
    together: bool,
    first: int,
    done: Callable[[Sequence[str]], None],
) -> None:
    """Fill created files of one layout, each from a source of its own.

    Args:
        handles: of the files, one a source.
        past: further ones, past the page cache (`checkpoint.behind`).
        workers: processes; threads of this one if the sources want to share memory (`together`).
        first: number of the block to begin with.
        done: called with each block's checksums, one a file, in the order of the blocks.
    """
    spans = sorted((_span(sources[0], fragment) for fragment in fragments), key=lambda span: span.start)
    starts = [span.start for span in spans]
    size = os.fstat(handles[0]).st_size
    blocks = []
    for number, begin in enumerate(range(first * BLOCK, size, BLOCK)):
        end = min(begin + BLOCK, size)
        blocks.append(Block(number=number, begin=begin, end=end, spans=_within(spans, starts, begin, end)))

    def work(member: Member) -> None:
        known: list[dict[str, Any]] = [{} for _ in sources]
        for start in range(0, len(blocks), member.width):
            part = blocks[start : start + member.width]  # one for each, once all that these need is known
            fresh: list[dict[str, Any]] = [{} for _ in sources]
            for name in dict.fromkeys(span.fragment.tensor for block in part for span in block.spans):
                for source, stats, own in zip(sources, known, fresh, strict=True):  # they ask for much the same
                    own[name] = stats[name] if name in stats else source.collect(name, member.spread)
            known = fresh
            for found in member.share(partial(_fill_block, sources, known, handles, past), part):
                member.tell(found)

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


def _within(spans: Sequence[Span], starts: Sequence[int], begin: int, end: int) -> list[Span]:
    """Return the spans, sorted by where they start, that have something of bytes [begin, end)."""
    first = bisect_right(starts, begin) - 1
    found = spans[max(0, first) : bisect_left(starts, end)]
    return [span for span in found if span.stop > begin]


def _span(source: Source, fragment: Fragment) -> Span:
    stop = math.prod(source.infos[fragment.tensor].shape) if fragment.stop is None else fragment.stop
    end = fragment.offset + (stop - fragment.start) * fragment.dtype.itemsize
    return Span(fragment=fragment, first=fragment.start, start=fragment.offset, stop=end)


def _fill_block(
    sources: Sequence[Source],
    stats: Sequence[Mapping[str, Any]],
    handles: Sequence[int],
    past: Sequence[int | None],
    block: Block,
) -> tuple[int, list[str]]:
    """Fill a block of all files, write it, and return its number and checksums."""
    piece = max(2 * PIECE, BLOCK // len(sources) // PIECE * PIECE)
    room, other = (aligned(len(sources), piece + ALIGN) for _ in range(2))  # one is filled, the other one written
    start = block.begin
    """Where in the files the room begins."""
    with Behind(handles, past) as behind:
        for low, high in _pieces(sources[0], block, piece):
            filled = room[:, low - start : high - start]
            within = [span for span in block.spans if span.start < high and span.stop > low]
            if sum(min(span.stop, high) - max(span.start, low) for span in within) < high - low:
                for data, handle in zip(filled, handles, strict=True):
                    os.preadv(handle, [data.numpy()], low)  # headers, and gaps between records
            for span in within:
                _fill_span(sources, span, stats, filled, low, high)
            until = high if high == block.end else high - high % ALIGN
            behind.append(room[:, : until - start], start)
            other[:, : high - until] = room[:, until - start : high - start]
            room, other, start = other, room, until
        return block.number, behind.hashes()


def _pieces(source: Source, block: Block, piece: int) -> Iterator[tuple[int, int]]:
    """Cut a block into pieces of so many bytes at most that end where a row does: parts of rows are tiles of their own.

    Each tile costs the same however small it is.
    """
    low = block.begin
    while low < block.end:
        high = min(low + piece, block.end)
        span = next((span for span in block.spans if span.start < high < span.stop), None)
        if span is not None and high < block.end:
            size = span.fragment.dtype.itemsize
            shape = source.infos[span.fragment.tensor].shape
            over = (span.first + (high - span.start) // size) % max(1, *shape[-1:]) * size
            if over < min(high - low, high - span.start):
                high -= over
        yield low, high
        low = high


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
    rows = filled[:, low - begin : high - begin].view(dtype)
    first = span.first + (low - span.start) // dtype.itemsize
    shape, known = sources[0].infos[name].shape, [one[name] for one in stats]
    at = 0
    for box in flat_tiles(shape, first, first + rows.shape[1], TILE if len(sources) == 1 else SMALL_TILE):
        sizes = box_shape(box)
        count = math.prod(sizes)
        outs = {span.fragment.slot: rows[:, at : at + count].view(-1, *sizes)}
        read_together(sources, name, box, outs, known)
        at += count
