"""Rows of files that hold evaluation data, as they are written: TSV, CSV, JSON lines, parquet, and plain text."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import InputError, one_of

Record = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its columns."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text and its name."""

    id: str
    text: str


def read_texts(paths: Iterable[Path], field: str = "text") -> list[Passage]:
    """Read documents to the letter: a row's column, a .txt file as a whole. Blank ones are left out.

    Raises:
        InputError: a file that cannot be read, lacks the column, or no text in any of them.
    """
    paths = [*paths]
    found: list[Passage] = []
    for path in paths:
        for place, record in records_of(path):
            if field not in record:
                raise InputError(f"{place}: {one_of('field', field, record)}")
            text = record[field]
            if not isinstance(text, str):
                raise InputError(f"{place}: {field} is no text ({text!r})")
            if text.strip():
                found.append(Passage(id=str(record.get("id", place.removeprefix(f"{path.parent}/"))), text=text))
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: holds no text")
    return found


def records_of(path: Path) -> Iterator[Record]:
    """Yield a file's rows, each with `file:line`.

    Raises:
        InputError: no such file, an unknown kind, one that is not what its name says, rows of different lengths.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix not in READERS:
        raise InputError(f"{path}: {one_of('kind of file', path.suffix, READERS)}")
    return READERS[path.suffix](path)


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{data.count(10, 0, error.start) + 1}: not UTF-8 ({error.reason})") from error


def _table(path: Path) -> Iterator[Record]:
    text = io.StringIO(_decoded(path), newline="")
    rows = csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        head = next(rows, [])
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if len(row) != len(head):
                raise InputError(f"{place}: {len(row)} columns; the first line names {len(head)}")
            yield place, dict(zip(head, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: {error}") from error


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: not a JSON object")
            yield f"{path}:{number}", record


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from error


def _plain(path: Path) -> Iterator[Record]:
    yield str(path), {"text": _decoded(path)}


READERS = {".tsv": _table, ".csv": _table, ".jsonl": _json_lines, ".parquet": _parquet, ".txt": _plain}
