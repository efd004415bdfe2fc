"""Shards: pieces of a text source that are read one by one, in any process, whatever the size of the whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import InputError, one_of
from train.data.corpus import SourceOptions
from train.data.hub import HubOptions, hub_shards, hub_stamps
from train.data.places import File, opened
from train.data.readers import READERS

COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
END = 2**63 - 1


class Source(SourceOptions, HubOptions, Protocol):
    """A text source; `growmerge.schema_data.DataSource` says what each field means."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A piece of a source."""

    kind: str
    """How it is read; a key of `train.data.rows.READ`."""
    source: Source
    files: tuple[tuple[str, str], ...] = ()
    """Name and key (what the glob's wildcards stand for) of each file, as `train.data.places.File` has them."""
    start: int = 0
    stop: int = END
    """lines: bytes of the file; rows: row groups of it; hub: number of the shard, and how many there are."""
    first: int = 0
    """rows: rows of the file before this shard."""
    size: int = 0
    """Bytes to read, about; for showing how far it is."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.files[0][0] if self.files else self.source.hub or self.source.package or str(self.source.files)


def stamp_source(source: Source, base: Path) -> list[Any]:
    """Return what a source's text is known by without reading it: names, sizes and times of its files.

    Raises:
        InputError: no file matches.
    """
    if source.hub is not None:
        return hub_stamps(source, base)
    if source.package is not None:
        return []  # it is pinned by its checksum
    return stamp_files([pattern for pattern in (source.files, source.untranslated) if pattern], base)


def stamp_files(patterns: Sequence[str], base: Path) -> list[Any]:
    """Return name, size and time of the files that globs match.

    Raises:
        InputError: no file matches one of them.
    """
    found = []
    with opened(base) as find:
        for file in (file for pattern in patterns for file in find(pattern)):
            stat = (base / file.name).stat()
            found.append([file.name, stat.st_size, stat.st_mtime_ns])
    return found


def cut_source(source: Source, base: Path, shard_bytes: int) -> list[Shard]:
    """Cut a source into shards of about `shard_bytes`; their order is that of its text.

    Raises:
        InputError: no glob, no match, an unknown reader, a file that cannot be read.
    """
    if source.hub is not None:
        count = hub_shards(source, base)
        return [Shard(kind="hub", source=source, start=number, stop=count, size=1) for number in range(count)]
    if source.package is not None or source.untranslated:
        return [Shard(kind="whole", source=source, size=1)]
    assert source.files is not None
    with opened(base) as find:
        files = find(source.files)
    reader = reader_of(source)
    if reader in CUT:
        return [shard for file in files for shard in CUT[reader](source, file, base, shard_bytes)]
    groups: list[list[File]] = [[]]
    filled = 0
    for file in files:
        if filled >= shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += (base / file.name).stat().st_size
    return [
        Shard(
            kind="files",
            source=source,
            files=tuple((file.name, file.key) for file in group),
            size=sum((base / file.name).stat().st_size for file in group),
        )
        for group in groups
    ]


def reader_of(source: Source) -> str:
    """Return the reader's name; a further suffix such as .zst is passed over.

    Raises:
        InputError: there is none for the files' suffix.
    """
    pattern = Path(source.files or "")
    plain = pattern.with_suffix("") if pattern.suffix in COMPRESSED else pattern
    name = source.reader or plain.suffix.removeprefix(".")
    if name not in READERS:
        raise InputError(one_of(f"reader of {source.files}: it needs reader:, now", source.reader, READERS))
    return name


def _cut_lines(source: Source, file: File, base: Path, shard_bytes: int) -> list[Shard]:
    size = (base / file.name).stat().st_size
    files = ((file.name, file.key),)
    if Path(file.name).suffix in COMPRESSED:
        return [Shard(kind="lines", source=source, files=files, size=size)]
    return [
        Shard(kind="lines", source=source, files=files, start=start, stop=stop, size=stop - start)
        for start in range(0, size, shard_bytes)
        for stop in (min(start + shard_bytes, size),)
    ]


def _cut_rows(source: Source, file: File, base: Path, shard_bytes: int) -> list[Shard]:
    with open_parquet(base / file.name) as table:
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
    shards, start, first, size, rows = [], 0, 0, 0, 0
    for number, group in enumerate(groups, start=1):
        size += group.total_byte_size
        rows += group.num_rows
        if size >= shard_bytes or number == len(groups):
            files = ((file.name, file.key),)
            shards.append(
                Shard(kind="rows", source=source, files=files, start=start, stop=number, first=first, size=size)
            )
            start, first, size, rows = number, first + rows, 0, 0
    return shards


CUT: dict[str, Callable[[Source, File, Path, int], list[Shard]]] = {"jsonl": _cut_lines, "parquet": _cut_rows}
"""By reader: files that are read in pieces. Others are small, and read as a whole, several to a shard."""


def open_parquet(path: Path) -> Any:
    """Open a parquet file.

    Raises:
        InputError: it is none, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from error
