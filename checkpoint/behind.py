"""Writing behind the computation: threads hash and write one piece of files while the next is computed.

What is more than memory can hold for later is written past the page cache (O_DIRECT): what follows would be thrown out
of it, and taking pages for a moment costs time: on a virtual machine 2 s a GB in the kernel, past it 0.3.
"""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash

from parallel.errors import InputError
from parallel.memory import available_memory

PIECE = 2**18
"""Bytes that a call writes into the page cache. For 16 MiB at once ext4 looks for huge pages, which took four times as
long on Linux 6.18."""
ALIGN = 4096
"""Bytes of which places in files and in memory are multiples where the page cache is passed by."""
THREADS = 2
"""Files that a process writes at once: a disk took 510 MB/s from one writer, 590 from two, 680 from four."""


def open_past_cache(path: Path, size: int) -> int | None:
    """Open a file for writing past the page cache; None if `size` bytes fit there, or the file system has no such."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None or size <= available_memory() // 2:
        return None
    try:
        return os.open(path, os.O_WRONLY | flag)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return None
        raise


def aligned(count: int, size: int) -> torch.Tensor:
    """Return bytes [count, size], values undefined, of which each row starts at a multiple of ALIGN in memory."""
    assert size % ALIGN == 0, size
    room = np.empty(count * size + ALIGN, dtype=np.uint8)
    start = -room.ctypes.data % ALIGN
    return torch.from_numpy(room[start : start + count * size].reshape(count, size))


class Behind:
    """Files that pieces are appended to, the same bytes of each; they are written when it is left."""

    def __init__(self, handles: Sequence[int], past: Sequence[int | None]) -> None:
        """Take the files' handles, and further ones past the page cache."""
        self._handles, self._past = handles, past
        self._digests = [xxhash.xxh3_128() for _ in handles]
        self._pool = ThreadPoolExecutor(max_workers=THREADS)
        self._last: list[Future[None]] = []

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()

    def append(self, rows: torch.Tensor, offset: int) -> None:
        """Write bytes [files, any], which must stay as they are until the next call returns, at an offset."""
        self._wait()
        self._last = [self._pool.submit(self._write, rows.numpy(), offset, start) for start in range(THREADS)]

    def hashes(self) -> list[str]:
        """Return the checksum of what was appended to each file."""
        self._wait()
        return [digest.hexdigest() for digest in self._digests]

    def _wait(self) -> None:
        last, self._last = self._last, []
        wait(last)
        for one in last:
            one.result()

    def _write(self, rows: np.ndarray[Any, Any], offset: int, start: int) -> None:
        each = [*zip(rows, self._handles, self._past, self._digests, strict=True)]
        for row, handle, past, digest in each[start::THREADS]:
            digest.update(row)
            data = memoryview(row)
            done = 0 if past is None else _write_past(past, data, offset)
            if done == len(data):
                continue
            _write_all(handle, data[done:], offset + done)
            # Linux starts to write what is advised so: the file's sync then finds little left to wait for.
            os.posix_fadvise(handle, offset, len(data), os.POSIX_FADV_DONTNEED)


def _write_past(handle: int, data: memoryview, offset: int) -> int:
    """Write whole multiples of ALIGN past the page cache, as far as that goes; return how many bytes."""
    start, done = 0, 0
    while whole := (len(data) - start) // ALIGN * ALIGN:
        try:
            done = os.pwrite(handle, data[start : start + whole], offset + start)
        except OSError as error:
            if error.errno == errno.EINVAL:  # the file system wants larger multiples
                break
            raise
        start += done
        if done % ALIGN or done == 0:
            break
    return start


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(handle, data[:PIECE], offset)
        if done == 0:
            raise InputError("a write to the checkpoint wrote nothing")
        data, offset = data[done:], offset + done
