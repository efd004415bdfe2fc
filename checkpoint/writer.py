"""The writer: asks a layout which bytes go where and pulls them from a source, block by block, in parallel.

Many checkpoints of one layout can be written side by side, so that what their sources share is read once. Memory is
bounded by some blocks and tiles a worker; these are processes (`checkpoint.team`). The bytes do not depend on their
number.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.behind import open_past_cache
from checkpoint.blocks import fill
from checkpoint.files import disk_errors, inside, read_json, write_bytes, write_json
from checkpoint.layout import FilePlan, Fragment, Layout
from checkpoint.manifest import NAME, write_manifest
from checkpoint.source import Source
from checkpoint.team import Killed
from parallel.faults import point
from parallel.memory import keep_freed

PROGRESS = ".unfinished.json"
"""What an unfinished folder has of its files, and of what they are; gone once the manifest is there."""
EVERY_S = 15.0
"""Seconds between two notes of how far files are, at least."""
SHARE = 20
"""So many times as long as a note took: of hundreds of files, each has to be on disk first."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """A checkpoint to write."""

    source: Source
    folder: Path
    about: Mapping[str, Any] | None = None
    """Provenance, stored in growmerge.json with the hash of the data, by which descendants name this checkpoint. It has
    to tell sources apart for an interrupted call to be gone on with; without it all is written anew."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files (a tokenizer, say) by relative name."""


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

    After a kill the same call goes on with what is missing: `PROGRESS` says what is there, and of what.

    Args:
        workers: processes that read, compute and write tiles.
        about: as in Output.
        extra_files: as `files` in Output.

    Raises:
        InputError: a full disk, a place that cannot be written, or a source that cannot be read.
    """
    output = Output(source=source, folder=folder, about=about, files=extra_files or {})
    return write_checkpoints([output], layout, workers=workers)[0]


def write_checkpoints(outputs: Sequence[Output], layout: Layout, *, workers: int = 1) -> list[str]:
    """Write checkpoints of one layout side by side, each as `write_checkpoint` does; return their hashes.

    Raises:
        InputError: as `write_checkpoint`.
    """
    jobs = [_Job(output, layout) for output in outputs]
    assert len({tuple((plan.name, plan.tensors) for plan in job.plans) for job in jobs}) == 1, "layouts differ"
    keep_freed()
    for number, plan in enumerate(jobs[0].plans):
        left = [job for job in jobs if plan.name not in job.hashes]
        if left:
            _write_file(left, number, workers)
            for job in left:
                job.end_file(plan.name)
            point(f"write/{plan.name}")
    return [job.end(layout) for job in jobs]


class _Job:
    """A checkpoint while it is written."""

    def __init__(self, output: Output, layout: Layout) -> None:
        self.output = output
        self.plans: Sequence[FilePlan] = layout.files(output.source)
        with disk_errors(output.folder):
            output.folder.mkdir(parents=True, exist_ok=True)
        (output.folder / NAME).unlink(missing_ok=True)
        self._key = hashlib.sha256(json.dumps([output.about, repr(layout)], sort_keys=True).encode()).hexdigest()
        self.hashes: dict[str, list[str]] = {}
        """Of the blocks of whole files, by name."""
        self.part: list[str] = []
        """Of those of the file that is being written."""
        self._part_of = ""
        self._remove_others()
        if output.about is not None:
            self._go_on()
        self.note()

    def path(self, name: str) -> Path:
        return inside(self.output.folder, name)

    def _remove_others(self) -> None:
        """Remove what an interrupted call for something else has left: a manifest would declare it whole."""
        path = self.output.folder / PROGRESS
        found = read_json(path) if path.is_file() else {}
        if found and found.get("key") != self._key:
            for name in found.get("planned", ()):
                self.path(name).unlink(missing_ok=True)
            path.unlink()

    def _go_on(self) -> None:
        """Take over what an interrupted call for the same thing has left."""
        path = self.output.folder / PROGRESS
        found = read_json(path) if path.is_file() else {}
        if found.get("key") != self._key:
            return
        sizes = {name: size for name, size in found["sizes"].items() if self._size(name) == size}
        self.hashes = {name: hashes for name, hashes in found["files"].items() if name in sizes}
        if found.get("part_of") in sizes:
            self._part_of, self.part = found["part_of"], found["part"]

    def _size(self, name: str) -> int:
        path = self.path(name)
        return path.stat().st_size if path.is_file() else -1

    def note(self) -> None:
        """Write down how far this is; what is claimed has to be on disk."""
        names = [*self.hashes, *([self._part_of] if self.part else [])]
        sizes = {name: self._size(name) for name in names}
        about: dict[str, Any] = {"part_of": self._part_of, "part": self.part}
        about |= {"planned": [plan.name for plan in self.plans], "files": self.hashes, "sizes": sizes}
        write_json(self.output.folder / PROGRESS, {"key": self._key, **about})

    def begin_file(self, plan: FilePlan, blocks: int) -> Sequence[Fragment]:
        """Create a file, or go on with one of which so many blocks are written; return where its data goes."""
        path = self.path(plan.name)
        if len(self.part) > blocks:  # claims go before what they are about
            self.part = self.part[:blocks]
            self.note()
        if blocks == 0:
            path.unlink(missing_ok=True)
            fragments = plan.create(path)
        else:  # where data goes is known to who creates such a file, of the same name: torch writes it into the file
            beside = path.parent / f".{os.getpid()}.tmp" / path.name
            shutil.rmtree(beside.parent, ignore_errors=True)
            beside.parent.mkdir()
            fragments = plan.create(beside)
            shutil.rmtree(beside.parent)
        self._part_of, self.part = plan.name, self.part[:blocks]
        return fragments

    def blocks_of(self, name: str) -> int:
        """Return how many blocks of a file are there from before."""
        return len(self.part) if self._part_of == name else 0

    def end_file(self, name: str) -> None:
        self.hashes[name], self.part, self._part_of = self.part, [], ""
        self.note()

    def end(self, layout: Layout) -> str:
        """Write the small files and the manifest; return the hash of the data."""
        folder, about = self.output.folder, self.output.about
        hashes = {plan.name: self.hashes[plan.name] for plan in self.plans}
        content = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
        extras = {**layout.extras(self.output.source, self.plans), **self.output.files}
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


def _write_file(jobs: Sequence[_Job], number: int, workers: int) -> None:
    """Write the file of this number of each job."""
    name = jobs[0].plans[number].name
    first = min(job.blocks_of(name) for job in jobs)
    with disk_errors(jobs[0].path(name)), _handles([job.path(name) for job in jobs]) as opened:
        fragments = [job.begin_file(job.plans[number], first) for job in jobs]
        assert all(one == fragments[0] for one in fragments), f"{name}: layouts differ"
        handles, past = opened()
        due = time.monotonic() + EVERY_S

        def note(job: _Job, handle: int) -> None:
            os.fdatasync(handle)
            job.note()

        def done(digests: Sequence[str]) -> None:
            nonlocal due
            for job, digest in zip(jobs, digests, strict=True):
                job.part.append(digest)
            point(f"write/{name}/{len(jobs[0].part)}")
            begun = time.monotonic()
            if begun > due:
                _at_once(note, jobs, handles)
                ended = time.monotonic()
                due = ended + max(EVERY_S, SHARE * (ended - begun))

        sources = [job.plans[number].source or job.output.source for job in jobs]
        # On a GPU, or with whole tensors in memory, once for all: workers are threads then.
        together = any(getattr(job.output.source, "one_process", False) for job in jobs)
        fill(sources, fragments[0], handles, past, workers=workers, together=together, first=first, done=done)
        _at_once(os.fsync, handles)


def _at_once(what: Callable[..., None], *each: Sequence[Any]) -> None:
    """Have files on disk: a file system has one journal, and writes it for each file that asks alone."""
    with ThreadPoolExecutor(max_workers=min(len(each[0]), 32)) as pool:
        for _ in pool.map(what, *each):
            pass


@contextmanager
def _handles(paths: Sequence[Path]) -> Iterator[Any]:
    """Give a function that opens the files, and once more past the page cache if they are too much for it.

    They are removed if writing fails: on a full disk their room is wanted.
    """
    with ExitStack() as stack:

        def opened() -> tuple[list[int], list[int | None]]:
            handles: list[int] = []
            past: list[int | None] = []
            for path in paths:
                handles.append(os.open(path, os.O_RDWR))
                stack.callback(os.close, handles[-1])
            size = sum(os.fstat(handle).st_size for handle in handles)
            for path in paths:
                past.append(open_past_cache(path, size))
                if past[-1] is not None:
                    stack.callback(os.close, past[-1])
            return handles, past

        try:
            yield opened
        except Killed:
            raise
        except Exception:  # an interrupt, or a killed worker, leaves them: the same call goes on from there
            for path in paths:
                path.unlink(missing_ok=True)
            raise
