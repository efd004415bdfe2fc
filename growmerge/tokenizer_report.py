"""`growmerge tokenizer report`: what tokenizers make of texts, side by side."""

import glob
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from growmerge.schema_text import Reader, TextSource
from parallel.errors import InputError
from train.data.readers import Document, read_documents
from train.data.spelling import read_vocabulary, single_bytes
from train.data.tokenizer import TextTokenizer, load_tokenizer

PIECE = 2**20
"""Characters that are encoded at once; a longer document is cut between paragraphs."""
BATCH = 64
"""Pieces that all threads share."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a tokenizer makes of a text."""

    text: str
    """Its name."""
    documents: int
    broken: int
    """Documents that do not come back from decode(encode(document))."""
    words: int
    """Pieces between white space: no measure where a language writes none."""
    characters: int
    bytes: int
    """UTF-8."""
    tokens: int
    single_bytes: int | None
    """Tokens that are one byte of a longer character, or a byte in place of a character that has no token; None where
    the tokenizer is of an unknown kind."""
    used: tuple[int, ...]
    """The ids that occur."""

    def shares(self, vocab_size: int) -> dict[str, float | int | None]:
        """Return the numbers of the report; of an empty text NaN."""
        tokens = self.tokens or float("nan")
        return {
            "documents": self.documents,
            "broken": self.broken,
            "tokens": self.tokens,
            "tokens_per_word": self.tokens / (self.words or float("nan")),
            "bytes_per_token": self.bytes / tokens,
            "characters_per_token": self.characters / tokens,
            "single_byte_share": None if self.single_bytes is None else self.single_bytes / tokens,
            "unused_share": 1 - len(self.used) / vocab_size,
        }


def read_text(path: Path) -> list[Document]:
    """Read a file's documents as corpora are read: .jsonl and .parquet by their field `text`, all else as plain text.

    Raises:
        InputError: no such file, one without text, or one that cannot be read; the line names it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    reader: Reader = "txt"
    if path.suffix in (".jsonl", ".parquet"):
        reader = "jsonl" if path.suffix == ".jsonl" else "parquet"
    source = TextSource(files=glob.escape(path.name), reader=reader)
    documents, _ = read_documents(source, path.absolute().parent)
    if not any(document.passages for document in documents):
        raise InputError(f"{path}: holds no text")
    return documents


def measure(
    tokenizer: TextTokenizer, name: str, documents: Sequence[Document], single: frozenset[int] | None
) -> Measure:
    """Encode a text's documents and decode them again.

    Args:
        single: the tokens that count as single bytes, if that is known.
    """
    used = np.zeros(0, dtype=np.int64)
    tokens, singles = 0, 0
    broken: set[str] = set()
    pieces = [(document.id, piece) for document in documents for piece in _pieces(document)]
    for start in range(0, len(pieces), BATCH):
        part = pieces[start : start + BATCH]
        encoded = tokenizer.encode_batch([piece for _, piece in part])
        for (document, piece), ids in zip(part, encoded, strict=True):
            if tokenizer.decode(ids) != piece:
                broken.add(document)
        found, counts = np.unique(np.fromiter((i for ids in encoded for i in ids), dtype=np.int64), return_counts=True)
        tokens += int(counts.sum())
        singles += int(counts[np.isin(found, list(single or ()))].sum())
        used = np.union1d(used, found)
    text = [document.text for document in documents]
    return Measure(
        text=name,
        documents=len(documents),
        broken=len(broken),
        words=sum(len(one.split()) for one in text),
        characters=sum(map(len, text)),
        bytes=sum(len(one.encode()) for one in text),
        tokens=tokens,
        single_bytes=None if single is None else singles,
        used=tuple(used.tolist()),
    )


def _pieces(document: Document) -> Iterator[str]:
    """Cut a document's text between passages, so that its pieces joined are the text."""
    held: list[str] = []
    size = 0
    for number, passage in enumerate(document.passages):
        if size > PIECE:
            yield "".join(held)
            held, size = [], 0
        held.append(("\n" if number else "") + passage)
        size += len(held[-1])
    if held:
        yield "".join(held)


def total(measures: Sequence[Measure]) -> Measure:
    """Return what a tokenizer makes of all texts."""

    def added(field: str) -> int:
        return sum(getattr(one, field) or 0 for one in measures)

    known = all(one.single_bytes is not None for one in measures)
    return Measure(
        text="all",
        **{field: added(field) for field in ("documents", "broken", "words", "characters", "bytes", "tokens")},
        single_bytes=added("single_bytes") if known else None,
        used=tuple(sorted({number for one in measures for number in one.used})),
    )


def print_report(tokenizers: Sequence[Path], texts: Sequence[str], *, as_json: bool) -> None:
    """Measure every tokenizer on every text and print a table, or JSON.

    Args:
        tokenizers: folders with a tokenizer.json.
        texts: files, each with a name before it, as `swe=text.txt`, or called by its stem.

    Raises:
        InputError: a tokenizer or a text cannot be read, or is given twice.
    """
    files = _named([text.partition("=")[::2] if "=" in text else ("", text) for text in texts])
    folders = _named([("", str(folder)) for folder in tokenizers])
    documents = {name: read_text(path) for name, path in files.items()}
    found: dict[str, dict[str, dict[str, float | int | None]]] = {}
    about = {}
    for name, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        single = known_single_bytes(folder)
        measures = [measure(tokenizer, text, part, single) for text, part in documents.items()]
        measures += [total(measures)] if len(measures) > 1 else []
        found[name] = {one.text: one.shares(tokenizer.vocab_size) for one in measures}
        about[name] = {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    if as_json:
        print(json.dumps({name: {**about[name], "texts": rows} for name, rows in found.items()}, ensure_ascii=False))
    else:
        _print(found, {name: f"{name} ({facts['vocab_size']:,})" for name, facts in about.items()})


def known_single_bytes(folder: Path) -> frozenset[int] | None:
    """Return a tokenizer's tokens for single bytes, or None if it is of a kind that has none that we know."""
    try:
        return single_bytes(read_vocabulary((folder / "tokenizer.json").read_text(encoding="utf-8")))
    except InputError:
        return None


def _named(given: Sequence[tuple[str, str]]) -> dict[str, Path]:
    """Return paths by their names; one without is called by its last part without suffix, or as given if two share it.

    Raises:
        InputError: two have one name.
    """
    stems = Counter(name or Path(path).stem for name, path in given)
    found: dict[str, Path] = {}
    for name, path in given:
        stem = Path(path).stem
        called = name or (stem if stems[stem] == 1 else path)
        if called in found:
            raise InputError(f"{called} is given twice")
        found[called] = Path(path)
    return found


def _print(found: Mapping[str, Mapping[str, Mapping[str, float | int | None]]], titles: Mapping[str, str]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    heads = ("tokens/word", "bytes/token", "chars/token", "single bytes", "not reversible", "unused")
    for column in ("text", "tokenizer", *heads):
        table.add_column(column, justify="right" if column in heads else "left", no_wrap=True)
    for text in next(iter(found.values())):
        for name, rows in found.items():
            row = rows[text]
            single = "–" if row["single_byte_share"] is None else f"{100 * row['single_byte_share']:.1f} %"
            table.add_row(
                text,
                titles[name],
                f"{row['tokens_per_word']:.2f}",
                f"{row['bytes_per_token']:.2f}",
                f"{row['characters_per_token']:.2f}",
                single,
                f"{row['broken']} of {row['documents']}",
                f"{100 * (row['unused_share'] or 0):.1f} %",
            )
        table.add_section()
    Console(highlight=False, width=max(160, Console().width)).print(table)
