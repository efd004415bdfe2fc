"""Readers: files of many kinds, in a folder or in a wheel, to documents made of passages."""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import InputError, one_of
from train.data.places import File, opened


@dataclass(frozen=True, kw_only=True)
class Document:
    """A piece of text with a name; the same name in two languages means the same content."""

    id: str
    passages: tuple[str, ...]
    """Paragraphs, verses or strings: what is deduplicated and left out as a whole; none holds a line break."""
    keys: tuple[str, ...] = ()
    """Names of the passages, if the source names them: of one name in two languages, they mean the same."""

    @property
    def text(self) -> str:
        return "\n".join(self.passages)


class Options(Protocol):
    """What readers need of a text source; `growmerge.schema.TextSource` says what each field means."""

    @property
    def files(self) -> str | None: ...
    @property
    def reader(self) -> str | None: ...
    @property
    def field(self) -> str: ...
    @property
    def min_words(self) -> int: ...
    @property
    def untranslated(self) -> str | None: ...


def read_documents(source: Options, place: Path) -> tuple[list[Document], str]:
    """Return a source's documents in the files' sorted order, and a SHA-256 over the files' names and bytes.

    Records of the same id are one document. A document may come without passages.

    Args:
        source: which files and how to read them.
        place: a wheel, or the folder that the glob is relative to.

    Raises:
        InputError: no glob, no match, an unknown reader, or a file that cannot be read, which is named.
    """
    if not source.files:
        raise InputError(f"a text source needs files: a glob, such as texts/swe/*.txt ({place})")
    suffix = Path(source.files).suffix.removeprefix(".")
    name = source.reader or (suffix if suffix in READERS else None)
    if name not in READERS:
        raise InputError(one_of(f"reader of {source.files}: it needs reader:, now", name, READERS))
    passages: dict[str, list[str]] = {}
    keys: dict[str, list[str]] = {}
    digest = hashlib.sha256()
    with opened(place) as find:
        originals = {file.key: file for file in find(source.untranslated)} if source.untranslated else {}
        for file in find(source.files):
            data = file.read()
            if not data:
                raise InputError(f"{file.where}: the file is empty")
            digest.update(f"{len(file.name)} {file.name} {len(data)} ".encode() + data)
            for document in READERS[name](data, file, source, originals.get(file.key)):
                for passage in document.passages:
                    _check_unicode(passage, file, document.id)
                passages.setdefault(document.id, []).extend(document.passages)
                keys.setdefault(document.id, []).extend(document.keys)
    found = [Document(id=name, passages=tuple(parts), keys=tuple(keys[name])) for name, parts in passages.items()]
    return found, digest.hexdigest()


def _check_unicode(passage: str, file: File, document: str) -> None:
    try:
        passage.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{file.where}: document {document!r} is not valid Unicode ({error.reason})") from error


def _decode(data: bytes, file: File, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        raise InputError(f"{file.where}:{line}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _lines(text: str) -> tuple[str, ...]:
    """Return a record's paragraphs: its lines that are not blank, indentation kept."""
    return tuple(line.rstrip() for line in re.split(r"\r\n|\r|\n", text) if line.strip())


def _records(file: File, field: str, records: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[Document]:
    """Turn numbered records into documents. A record without an `id` is called by its file and line."""
    for line, record in records:
        text, name = record[field], record.get("id")
        if not isinstance(text, str):
            raise InputError(f"{file.where}:{line}: {field!r} is {type(text).__name__}, not text")
        yield Document(id=str(name) if name is not None else f"{file.name}:{line}", passages=_lines(text))


def jsonl(data: bytes, file: File, source: Options, _: File | None) -> Iterator[Document]:
    """A document a line: an object whose `field` is the text; paragraphs are its lines."""

    def records() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                record = _json(line, file, number)
                if not isinstance(record, dict):
                    raise InputError(f"{file.where}:{number}: not a JSON object")
                if source.field not in record:
                    raise InputError(f"{file.where}:{number}: " + one_of("field", source.field, record))
                yield number, record

    return _records(file, source.field, records())


def parquet(data: bytes, file: File, source: Options, _: File | None) -> Iterator[Document]:
    """A document a row: column `field` is the text; paragraphs are its lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def records() -> Iterator[tuple[int, Mapping[str, Any]]]:
        try:
            table = pq.ParquetFile(pa.BufferReader(data))
            columns = list(table.schema_arrow.names)
            if source.field not in columns:
                raise InputError(f"{file.where}: " + one_of("column", source.field, columns))
            number = 0
            for batch in table.iter_batches(columns=[source.field] + ["id"] * ("id" in columns)):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file.where}: not a readable parquet file ({_tidy(str(error))})") from error

    return _records(file, source.field, records())


def txt(data: bytes, file: File, source: Options, _: File | None) -> Iterator[Document]:
    """A document a file; paragraphs are separated by blank lines, and the lines of one are joined by spaces."""
    parts = re.split(r"\n[^\S\n]*\n", _decode(data, file).replace("\r\n", "\n"))
    yield Document(id=file.key, passages=tuple(_tidy(part) for part in parts if part.strip()))


def json_strings(data: bytes, file: File, source: Options, original: File | None) -> Iterator[Document]:
    """A document a file of (nested) JSON; passages are its strings by sorted key, such as an interface's texts.

    Left out: strings with fewer than `min_words` words, references (`[%key:`), and what is still the original's.
    """
    known = {} if original is None else _strings(_json(original.read(), original))
    passages = {
        "/".join(key): value
        for key, value in sorted(_strings(_json(data, file)).items())
        if len(value.split()) >= max(1, source.min_words) and "[%key:" not in value and known.get(key) != value
    }
    yield Document(id=file.key, passages=tuple(passages.values()), keys=tuple(passages))


def _strings(value: Any, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if isinstance(value, str):
        return {key: _tidy(value)}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[tuple[str, ...], str] = {}
    for name, inner in items:
        found |= _strings(inner, (*key, f"{name:08d}" if isinstance(name, int) else name))
    return found


def pythonbible(data: bytes, file: File, source: Options, _: File | None) -> Iterator[Document]:
    """A chapter a document (`1.001`: book 1, chapter 1), a verse a passage, from a module of the pythonbible parser.

    The module holds `Bible(version, text, starts, ends, ...)`, with dicts from verse (BBCCCVVV) to offset in the text.
    It is parsed and never run. Its backticks are apostrophes and single quotes.
    """
    text, starts, ends = _bible_literals(data, file)
    chapters: dict[str, list[str]] = {}
    for verse, start in starts.items():
        end = ends.get(verse)
        if not (
            isinstance(verse, int)
            and isinstance(start, int)
            and isinstance(end, int)
            and 0 <= start <= end <= len(text)
        ):
            raise InputError(
                f"{file.where}: verse {verse!r} runs from {start!r} to {end!r} in a text of {len(text)} characters"
            )
        book, chapter = divmod(verse // 1000, 1000)
        passage = _tidy(text[start:end].replace("`", "'"))
        if passage:
            chapters.setdefault(f"{book}.{chapter:03d}", []).append(passage)
    for name, verses in chapters.items():
        yield Document(id=name, passages=tuple(verses))


def _bible_literals(data: bytes, file: File) -> tuple[str, dict[Any, Any], dict[Any, Any]]:
    try:
        tree = ast.parse(_decode(data, file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{file.where}: not a Python module ({error})") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Bible" and len(node.args) >= 4:
            try:
                text, starts, ends = (ast.literal_eval(part) for part in node.args[1:4])
            except (ValueError, TypeError, RecursionError):
                continue
            if isinstance(text, str) and isinstance(starts, dict) and isinstance(ends, dict):
                return text, starts, ends
    raise InputError(f"{file.where}: holds no Bible(version, text, starts, ends, ...) made of literals")


def _json(data: bytes, file: File, first_line: int = 1) -> Any:
    try:
        return json.loads(_decode(data, file, first_line))
    except (json.JSONDecodeError, RecursionError) as error:
        at = first_line + getattr(error, "lineno", 1) - 1
        raise InputError(f"{file.where}:{at}: not valid JSON ({getattr(error, 'msg', 'nested too deeply')})") from error


READERS: dict[str, Callable[[bytes, File, Options, File | None], Iterator[Document]]] = {
    "jsonl": jsonl,
    "parquet": parquet,
    "txt": txt,
    "json-strings": json_strings,
    "pythonbible": pythonbible,
}
