"""What a rank writes of a checkpoint, and how the ranks agree that all of it is there: by part files.

A part file is a small JSON that a rank writes when its own files are on disk and synced: their sizes and block
checksums, or what went wrong. Rank 0 waits for all of them and needs to read no shard again for the manifest. No
collective is needed, which off the main thread could deadlock with the training's own.
"""

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from checkpoint import manifest
from checkpoint.behind import PIECE
from checkpoint.files import disk_errors, read_json, write_bytes, write_json
from checkpoint.manifest import BLOCK
from parallel.errors import InputError
from parallel.faults import point

POINTER = "latest"


@dataclass(kw_only=True)
class Part:
    """What one rank has written of a checkpoint."""

    save: str
    """Which attempt to save it belongs to."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file, by name."""
    hashes: dict[str, list[str]] = field(default_factory=dict)
    """Checksums of each file's blocks, as the manifest has them."""
    error: str | None = None
    """One line that says what went wrong."""

    def add(self, path: Path, size: int, hashes: list[str]) -> None:
        self.sizes[path.name], self.hashes[path.name] = size, hashes


class HashedFile:
    """A new file that is written front to back, in small pieces, each block's checksum taken on the way."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.hashes: list[str] = []
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._block = xxhash.xxh3_128()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        count = len(view)
        try:
            while view and self._error is None:
                view = view[self._piece(view[: min(PIECE, BLOCK - self.size % BLOCK)]) :]
        except OSError as error:
            self._error = error  # torch.save would hide it behind one of its own; close raises it
        return count

    def _piece(self, piece: memoryview) -> int:
        done = os.write(self._handle, piece)
        self._block.update(piece[:done])
        self.size += done
        if self.size % BLOCK == 0:
            self._end_block()
            # Linux starts to write what is advised so: the file's sync then finds little left to wait for.
            os.posix_fadvise(self._handle, self.size - BLOCK, BLOCK, os.POSIX_FADV_DONTNEED)
        return done

    def _end_block(self) -> None:
        self.hashes.append(self._block.hexdigest())
        self._block.reset()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """Sync the file and close it; an error of any write is raised here."""
        try:
            if self._error is not None:
                raise self._error
            os.fsync(self._handle)
            if self.size % BLOCK:
                self._end_block()
        finally:
            os.close(self._handle)


def write_shard(state: Any, path: Path, part: Part) -> None:
    """Write what DeepSpeed would have saved, as it would have saved it, and note it in the part.

    Raises:
        InputError: the disk is full or fails; nothing of the file is left then.
    """
    try:
        with disk_errors(path):
            file = HashedFile(path)
            try:
                torch.save(state, file)  # type: ignore[arg-type]
            finally:
                file.close()
    except BaseException as error:
        path.unlink(missing_ok=True)  # on a full disk its room is wanted
        if isinstance(error, OSError):
            raise InputError(f"{path}: not written ({error.strerror})") from error
        raise
    part.add(path, file.size, file.hashes)


def write_small(data: bytes, path: Path, part: Part) -> None:
    """Write a small file of this rank and note it in the part."""
    write_bytes(path, data)
    part.add(path, len(data), [manifest.block_hash(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)])


def write_part(folder: Path, rank: int, part: Part) -> None:
    write_json(_path(folder, rank), asdict(part))


def wait_for_parts(folder: Path, world_size: int, save: str, patience_s: float) -> list[Part]:
    """Return every rank's part, in rank order, once all are there.

    Raises:
        InputError: some are not there after so many seconds, or the folder is gone.
    """
    deadline = time.monotonic() + patience_s
    pause = 0.005
    parts: dict[int, Part] = {}
    while True:
        with disk_errors(folder):
            present = {path.name for path in folder.iterdir()}
        for rank in range(world_size):
            if rank not in parts and _path(folder, rank).name in present:
                found = Part(**read_json(_path(folder, rank)))
                if found.save == save:
                    parts[rank] = found
        if len(parts) == world_size:
            return [parts[rank] for rank in range(world_size)]
        if time.monotonic() > deadline:
            missing = [rank for rank in range(world_size) if rank not in parts]
            raise InputError(f"{folder}: {_ranks(missing)} not written after {patience_s:g} s, which rank 0 waited")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"the shard of rank {shown} is" if len(ranks) == 1 else f"the shards of ranks {shown} are"


def publish(folder: Path, parts: Iterable[Part], files: Mapping[str, bytes]) -> None:
    """Declare a checkpoint complete: small files, then the manifest, then the pointer.

    Raises:
        InputError: a rank's part tells of an error, a file is not as its part says, or the disk fails.
    """
    sizes: dict[str, int] = {}
    hashes: dict[str, list[str]] = {}
    for part in parts:
        if part.error is not None:
            raise InputError(part.error)
        sizes |= part.sizes
        hashes |= part.hashes
    for name, data in files.items():
        write_bytes(folder / name, data)
    for name, size in sizes.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise InputError(f"{folder / name}: has {found} bytes, its rank wrote {size}")
    point("save/manifest")
    manifest.write_manifest(folder, known=hashes)
    for path in folder.glob(".part-*.json"):
        path.unlink()
    point("save/pointer")
    write_bytes(folder.parent / POINTER, folder.name.encode())


def _path(folder: Path, rank: int) -> Path:
    """Hidden, so that no manifest covers it."""
    return folder / f".part-{rank:05d}.json"


def no_room(folder: Path, size: int, files: int) -> str | None:
    """Return the line that says that a place has no room for so many bytes and files, or None if it has.

    A quota of a user is seen by no file system's own count: it is met when it is exceeded, as a full disk is.
    """
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < size:
        what = f"{size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
    elif found.f_files > 0 and found.f_favail < files:
        what = f"{files} files, {found.f_favail} are free"
    else:
        return None
    return f"{folder}: no space left for a checkpoint ({what}); nothing that was complete is lost"


def delete(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that it never looks complete half-deleted."""
    (folder / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # on NFS a file that is still mapped stays for a while
