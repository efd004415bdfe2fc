"""Joining a corpus' parts, in order, into its token files; what they are is written last."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.files import inside, read_json, write_json
from parallel.errors import InputError
from train.data.cleaned import combine, read_report
from train.data.decide import Held
from train.data.indexed import Writer, beside, open_index
from train.data.parts import Job, check_part, part_path, save_bytes
from train.data.tokenizer import load_tokenizer
from train.data.tokens import describe_tokens, token_dtype

Record = Mapping[str, Any]
ORIGIN = ("hub", "config", "revision", "package", "sha256", "files")
COUNTS = ("documents", "tokens", "bytes", "characters")


def join(
    job: Job,
    sources: Sequence[int],
    scans: Sequence[Record],
    done: Sequence[Record],
    heldout: Sequence[Held],
    folder: Path,
    key: str,
) -> dict[str, Any]:
    """Write a corpus' files; return what its `.json` says.

    Args:
        sources: number of each part's source.
        scans, done: records of the parts' two passes, in order; no scans if none were needed.
        key: what the result is known by.

    Raises:
        InputError: a part is damaged, the corpus or a split has no text, the disk is full.
    """
    tokenizer = load_tokenizer(job.tokenizer)
    report = combine([read_report(record["report"]) for record in (*scans, *done)])
    totals = {name: _sum(record["counts"][name] for record in done) for name in job.names}
    _check_text(job, totals, report.documents, sum(found.documents for found in report.dropped.values()))
    files: dict[str, Any] = {}
    dtype = token_dtype(tokenizer.vocab_size)
    for number, record in enumerate(done):
        check_part(job.parts, number, "done", record)
    for name in job.names:
        with Writer(folder / name, dtype) as writer:
            for number in range(len(done)):
                part = part_path(job.parts, number, name)
                lengths = open_index(part).lengths
                if len(lengths):
                    writer.add(np.memmap(beside(part, ".bin"), dtype=dtype, mode="r"), lengths)
        files |= writer.files
    if heldout:
        lines = [json.dumps(text._asdict(), ensure_ascii=False) + "\n" for text in heldout]
        files |= save_bytes(folder / f"{job.language}.heldout.jsonl", "".join(lines).encode())
    known = {"language": job.language, "name": job.corpus.name, "key": key}
    for name in job.names if job.corpus.splits else ():
        about = describe_tokens(tokenizer, job.ends, totals[name]) | known
        files |= save_bytes(folder / f"{name}.json", (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
    made = {
        **describe_tokens(tokenizer, job.ends, _sum(totals.values())),
        **known,
        "sources": _sources(job, sources, done),
        "splits": {name: totals[name] for name in job.names} if job.corpus.splits else {},
        "heldout": {"documents": len(heldout), "bytes": sum(len(text.text.encode()) for text in heldout)},
        "cleaned": asdict(report),
        "files": files,
    }
    _remove_old(folder, job.language, made)
    write_json(folder / f"{job.language}.json", made)
    return made


def _sum(counts: Any) -> dict[str, int]:
    total = dict.fromkeys(COUNTS, 0)
    for found in counts:
        total = {name: total[name] + found[name] for name in COUNTS}
    return total


def _check_text(job: Job, totals: Mapping[str, Record], documents: int, dropped: int) -> None:
    if not documents:
        raise InputError(f"language {job.language} has no text: its sources hold no document")
    if dropped == documents:
        raise InputError(f"language {job.language} has no text: all {documents} documents were dropped (see `clean`)")
    known = sum(total["documents"] for total in totals.values())
    if not known:
        raise InputError(
            f"language {job.language} has no text to train on: all of it is held out or repeats held-out text"
        )
    for name, total in totals.items():
        if not total["documents"]:
            raise InputError(f"split {name} has no text: {known} documents are too few for its share")


def _sources(job: Job, sources: Sequence[int], done: Sequence[Record]) -> list[dict[str, Any]]:
    """Return where each source's text is from, its rights, and what is trained on of it."""
    found: list[dict[str, Any]] = []
    for number, source in enumerate(job.corpus.sources):
        parts = [part for part, of in zip(done, sources, strict=True) if of == number]
        origin = {name: getattr(source, name) for name in ORIGIN if getattr(source, name) is not None}
        rights = {name: getattr(source, name) for name in ("edition", "rights_holder", "licence")}
        found.append({**origin, **rights, **_sum(counts for part in parts for counts in part["counts"].values())})
    return found


def _remove_old(folder: Path, language: str, made: Mapping[str, Any]) -> None:
    """Remove files of an earlier result that the new one has not, such as those of a split."""
    with suppress(InputError, OSError, KeyError, TypeError, AttributeError):
        for name in read_json(folder / f"{language}.json")["files"]:
            if name not in made["files"]:
                inside(folder, name).unlink(missing_ok=True)
