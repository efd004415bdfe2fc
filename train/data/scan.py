"""Scanning a shard before any of the corpus is tokenised: all that `train.data.decide` needs, as numbers."""

import json
from dataclasses import asdict
from fnmatch import fnmatchcase
from heapq import heappop, heappush
from typing import Any

import numpy as np

from train.data.cleaned import Report
from train.data.duplicates import digests, signatures
from train.data.parts import Job, hashed, part_path, save_arrays, save_bytes, write_record
from train.data.shards import Shard
from train.data.tokenise import filtered, long_lines

SPARE = 8
"""Documents of a shard that may be held out though the share gives none: those of a small corpus."""
BATCH = 256
"""Documents hashed at a time."""


def scan(job: Job, number: int, shard: Shard) -> dict[str, Any]:
    """Scan a shard into a part: what `decide` judges its documents by, and the texts that may be held out.

    Arrays, by document that the filters let through: `rows`; `places` in the shuffle that says what is held out;
    `sizes` (bytes); `candidates`, whether it may be held out; and as asked for `digests`, `signatures`, and
    `paragraphs` with their `owners`.
    """
    clean = job.corpus.clean
    report, row = Report(), -1
    batch: list[str] = []
    held = _Candidates(job.corpus.heldout.share)
    rows: list[int] = []
    places: list[int] = []
    sizes: list[int] = []
    owners: list[int] = []
    found: dict[str, list[np.ndarray]] = {"digests": [], "signatures": [], "paragraphs": [digests([])]}

    def digest() -> None:
        found["digests"].append(digests(batch))
        if clean.near_duplicates is not None:
            marks = signatures(batch, shingle=clean.shingle, permutations=clean.permutations)
            found["signatures"].append(marks)
        batch.clear()

    for row, document, text in filtered(job, shard, report):
        if text is None:
            continue
        place = hashed(job.seed, "heldout", document.id)
        if not any(fnmatchcase(document.id, pattern) for pattern in shard.source.never_heldout):
            held.see(place, len(rows), document.id, text)
        if clean.repeated_paragraphs:
            lines = [line for _, line in long_lines(text, clean.repeated_paragraphs)]
            found["paragraphs"].append(digests(lines))
            owners += [len(rows)] * len(lines)
        rows.append(row)
        places.append(place)
        sizes.append(len(text.encode()))
        batch.append(text)
        if len(batch) == BATCH:
            digest()
    digest()
    texts = held.texts()
    candidates = np.zeros(len(rows), dtype=bool)
    candidates[[at for at, _, _ in texts]] = True
    arrays = {
        "rows": np.array(rows, dtype=np.int64),
        "places": np.array(places, dtype=np.uint64),
        "sizes": np.array(sizes, dtype=np.int64),
        "candidates": candidates,
        "owners": np.array(owners, dtype=np.int64),
        **{name: np.concatenate(parts) for name, parts in found.items() if parts},
    }
    lines = [json.dumps(text, ensure_ascii=False) + "\n" for text in texts]
    files = save_arrays(part_path(job.parts, number, "scan.npz"), arrays)
    files |= save_bytes(part_path(job.parts, number, "held.jsonl"), "".join(lines).encode())
    return write_record(job.parts, number, "scan", {"rows": row + 1, "report": asdict(report)}, files)


class _Candidates:
    """The documents of a shard that may be held out: those whose place is below the share, and a few to spare."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._below: list[tuple[int, str, str]] = []
        self._spare: list[tuple[int, int, str, str]] = []

    def see(self, place: int, at: int, name: str, text: str) -> None:
        if place < self._share * 2**64:
            self._below.append((at, name, text))
        elif self._share > 0:
            heappush(self._spare, (-place, -at, name, text))
            if len(self._spare) > SPARE:
                heappop(self._spare)  # the last in the shuffle

    def texts(self) -> list[tuple[int, str, str]]:
        """Return number, id and text of each, in the shard's order."""
        return sorted([*self._below, *((-at, name, text) for _, at, name, text in self._spare)])
