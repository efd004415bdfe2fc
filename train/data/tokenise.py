"""Tokenising a shard: what may be trained on of it, without the lines that must not be, an indexed dataset a split."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from parallel.errors import InputError
from train.data.clean import build_filters, reason_to_drop
from train.data.cleaned import Report
from train.data.contamination import Contaminants, contaminated
from train.data.indexed import Writer
from train.data.parts import Job, hashed, load_arrays, part_path, write_record
from train.data.rows import Text, read_shard
from train.data.shards import Shard
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.data.tokens import BATCH, BATCH_CHARACTERS, encode_documents, token_dtype

CONTAMINANTS = "contaminants.npz"
TRAIN, HELD, EXACT, NEAR, FILTERED = range(5)
"""What becomes of a row."""
REASONS = {EXACT: "exact duplicate", NEAR: "near duplicate"}


def filtered(job: Job, shard: Shard, report: Report) -> Iterator[tuple[int, Text, str | None]]:
    """Yield row, document and text of all rows of a shard; no text if a filter drops it, which is counted."""
    filters = build_filters(job.corpus.clean)
    for row, document in enumerate(read_shard(shard, job.base, job.cache)):
        text = document.text or ""
        report.see(text)
        reason = _unusable(text) or reason_to_drop(text, filters)
        if reason is not None:
            report.drop(reason, text.encode(errors="replace").decode())
        yield row, document, text if reason is None else None


def _unusable(text: str) -> str | None:
    if not text or text.isspace():
        return "no text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not valid Unicode"
    return None


def long_lines(text: str, words: int) -> list[tuple[int, str]]:
    """Return the lines of a text that have so many words, by number."""
    return [(at, line) for at, line in enumerate(text.split("\n")) if len(line.split(None, words)) >= words]


def tokenise(job: Job, number: int, shard: Shard) -> dict[str, Any]:
    """Tokenise a shard into a part; return its record: `counts` by name of the token file, `report` of what went."""
    tokenizer = _tokenizer(job.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    report = Report()
    counts = {name: {"documents": 0, "tokens": 0, "bytes": 0, "characters": 0} for name in job.names}
    waiting: dict[str, list[str]] = {name: [] for name in job.names}
    characters = 0
    with ExitStack() as stack:
        paths = {name: part_path(job.parts, number, name) for name in job.names}
        writers = {name: stack.enter_context(Writer(path, dtype)) for name, path in paths.items()}

        def write() -> None:
            for name, texts in waiting.items():
                for batch in encode_documents(texts, tokenizer, job.ends, name=name):
                    writers[name].add(batch.tokens, batch.lengths)
                    counts[name]["bytes"] += batch.bytes
                    counts[name]["characters"] += batch.characters
                texts.clear()

        for document, text in _training(job, number, shard, report):
            waiting[job.names[_split(job, document)]].append(text)
            characters += len(text)
            if sum(map(len, waiting.values())) >= BATCH or characters >= BATCH_CHARACTERS:
                write()
                characters = 0
        write()
    files: dict[str, Any] = {}
    for name, writer in writers.items():
        counts[name] |= {"documents": writer.documents, "tokens": writer.tokens}
        files |= writer.files
    return write_record(job.parts, number, "done", {"counts": counts, "report": asdict(report)}, files)


def _split(job: Job, document: str) -> int:
    """Return the number of a document's split: its place in a shuffle, cut at the cumulative shares."""
    place, total = hashed(job.seed, "split", document) / 2**64, 0.0
    shares = list(job.corpus.splits.values())
    for number, share in enumerate(shares[:-1]):
        total += share
        if place < total:
            return number
    return max(0, len(shares) - 1)


def _training(job: Job, number: int, shard: Shard, report: Report) -> Iterator[tuple[str, str]]:
    """Yield id and text of what is trained on, without what repeats held-out or evaluation text."""
    table = _contaminants(job.parts / CONTAMINANTS)
    for document, text in _judged(job, number, shard, report):
        lines = text.split("\n")
        gone = {} if table is None else contaminated(lines, table)
        for line, reason in sorted(gone.items()):
            report.drop(reason.replace("_", " "), lines[line], passage=True)
        if rest := _without(lines, gone):
            yield document, rest


def _judged(job: Job, number: int, shard: Shard, report: Report) -> Iterator[tuple[str, str]]:
    """Yield id and text of what filters, duplicates and the held-out part have left."""
    if not job.scans:
        for _, document, text in filtered(job, shard, report):
            if text is not None:
                yield document.id, text
        return
    found = load_arrays(part_path(job.parts, number, "verdicts.npz"))
    verdicts, repeated = found["verdicts"].tolist(), found["repeated"]
    row = at = 0
    for row, document in enumerate(read_shard(shard, job.base, job.cache), start=1):
        verdict = verdicts[row - 1] if row <= len(verdicts) else FILTERED
        text = document.text or ""
        if verdict in REASONS:
            report.drop(REASONS[verdict], text)
        if verdict != TRAIN:
            continue
        gone: set[int] = set()
        if job.corpus.clean.repeated_paragraphs:
            places = long_lines(text, job.corpus.clean.repeated_paragraphs)
            marks = repeated[at : at + len(places)]
            gone = {line for (line, _), again in zip(places, marks, strict=False) if again}
            at += len(places)
        lines = text.split("\n")
        for line in sorted(gone):
            report.drop("repeated paragraph", lines[line], passage=True)
        if rest := _without(lines, gone):
            yield document.id, rest
    if (row, at) != (len(verdicts), len(repeated)):
        raise InputError(f"{shard.name}: changed while it was read; run again")


def _without(lines: list[str], gone: Collection[int]) -> str:
    """Return a text without some of its lines; empty if nothing is left."""
    kept = "\n".join(line for number, line in enumerate(lines) if number not in gone) if gone else "\n".join(lines)
    return "" if gone and not kept.strip() else kept


@lru_cache(maxsize=2)
def _tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(folder)


@lru_cache(maxsize=1)
def _contaminants(path: Path) -> Contaminants | None:
    if not path.is_file():
        return None
    found = load_arrays(path)
    return Contaminants(whole=found.pop("whole"), grams={int(size): table for size, table in found.items()})
