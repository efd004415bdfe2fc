"""Judging all documents of a corpus at once: what is held out, and what repeats something earlier.

Processes have scanned the shards; here numbers are compared, so the result does not depend on how many they were.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from checkpoint.files import disk_errors
from parallel.errors import InputError
from train.data.contamination import FEWEST, find_contaminants, read_sentences
from train.data.duplicates import near_duplicates, repeated
from train.data.heldout import normalise
from train.data.parts import Job, check_part, load_arrays, part_path, save_arrays
from train.data.readers import Document
from train.data.tokenise import CONTAMINANTS, EXACT, FILTERED, HELD, NEAR, TRAIN


class Held(NamedTuple):
    """A held-out document."""

    id: str
    text: str


def decide(job: Job, scans: Sequence[Mapping[str, Any]]) -> list[Held]:
    """Judge every row and write each shard's `verdicts.npz`; return the held-out documents in the corpus' order.

    `verdicts` says what becomes of each row; `repeated` which long lines of the rows that are trained on, in their
    order, an earlier one equals.

    Args:
        scans: records of all shards, in order.

    Raises:
        InputError: a part is damaged; nothing may be held out.
    """
    clean = job.corpus.clean
    found = [_load(job, number, record) for number, record in enumerate(scans)]
    ends = [0, *accumulate(len(part["rows"]) for part in found)]

    def whole(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in found])

    verdicts = np.full(ends[-1], TRAIN, dtype=np.uint8)
    if clean.exact_duplicates:
        verdicts[repeated(whole("digests"))] = EXACT
    if clean.near_duplicates is not None:
        alive = np.flatnonzero(verdicts == TRAIN)
        verdicts[alive[near_duplicates(_signatures(job, found, verdicts), clean.near_duplicates)]] = NEAR
    share = job.corpus.heldout.share
    if share > 0 and (verdicts == TRAIN).any():
        free = (verdicts == TRAIN) & whole("candidates")
        verdicts[_held(whole("places"), whole("sizes"), free, share, job.corpus.heldout.max_bytes)] = HELD
        if not (verdicts == HELD).any():
            raise InputError(f"language {job.language} has no held-out text: no document may be held out")
    again = np.zeros(0, dtype=bool)
    trained = again
    if clean.repeated_paragraphs:
        owners = np.concatenate([part["owners"] + start for part, start in zip(found, ends, strict=False)])
        trained = verdicts[owners] == TRAIN
        again = repeated(whole("paragraphs"), trained)
    line = 0
    for number, (part, record) in enumerate(zip(found, scans, strict=True)):
        rows = np.full(record["rows"], FILTERED, dtype=np.uint8)
        rows[part["rows"]] = verdicts[ends[number] : ends[number + 1]]
        lines = slice(line, line + len(part["owners"]))
        line = lines.stop
        save_arrays(
            part_path(job.parts, number, "verdicts.npz"), {"verdicts": rows, "repeated": again[lines][trained[lines]]}
        )
    return [
        text
        for number in range(len(found))
        for text in _held_texts(job, number, verdicts[ends[number] : ends[number + 1]])
    ]


def _load(job: Job, number: int, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    check_part(job.parts, number, "scan", record)
    arrays = load_arrays(part_path(job.parts, number, "scan.npz"))
    arrays.pop("signatures", None)
    return arrays


def _signatures(job: Job, found: Sequence[Mapping[str, np.ndarray]], verdicts: np.ndarray) -> np.ndarray:
    """Return the signatures of the documents that are still there, as a memory map."""
    path = job.parts / "signatures.npy"
    shape = (int((verdicts == TRAIN).sum()), job.corpus.clean.permutations)
    with disk_errors(path):
        if 0 in shape:
            return np.zeros(shape, dtype=np.uint32)
        target = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint32, shape=shape)
        at = start = 0
        for number, part in enumerate(found):
            signatures = load_arrays(part_path(job.parts, number, "scan.npz"))["signatures"]
            kept = signatures[verdicts[start : start + len(part["rows"])] == TRAIN]
            target[at : at + len(kept)] = kept
            at, start = at + len(kept), start + len(part["rows"])
    return target


def _held(places: np.ndarray, sizes: np.ndarray, free: np.ndarray, share: float, max_bytes: int) -> np.ndarray:
    """Return which documents are held out: those below the share, from the shuffle's start until `max_bytes` are full.

    At least one id is; documents of one id go together.
    """
    below = free & (places < np.uint64(min(share * 2**64, 2**64 - 1)))
    of = np.flatnonzero(below if below.any() else free)
    if not len(of):
        return np.zeros(len(free), dtype=bool)
    of = of[np.argsort(places[of], kind="stable")]
    full = np.cumsum(sizes[of]) > max_bytes
    full[0] = False
    if not below.any():
        full[1:] = True
    last = places[of[np.argmax(full) - 1 if full.any() else -1]]
    return free & (places <= last)


def _held_texts(job: Job, number: int, verdicts: np.ndarray) -> list[Held]:
    lines = part_path(job.parts, number, "held.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    texts = (json.loads(line) for line in lines)
    return [Held(id=name, text=text) for at, name, text in texts if verdicts[at] == HELD]


def write_contaminants(job: Job, heldout: Sequence[Held]) -> None:
    """Write what training text may not repeat, for the processes to load.

    That is the n-grams of held-out documents, over their line breaks too; their lines of at least 4 words (a heading
    such as "References" may well stand elsewhere); and the evaluation sentences.

    Raises:
        InputError: an evaluation file is missing or not readable.
    """
    clean = job.corpus.clean
    if not clean.decontaminate:
        return
    documents = [Document(id=held.id, passages=(held.text,)) for held in heldout if normalise(held.text)]
    found = find_contaminants(documents, read_sentences(clean.evaluation, job.base), clean.ngram)
    lines = (line for held in heldout for line in held.text.split("\n") if len(normalise(line)) >= FEWEST)
    whole = find_contaminants([Document(id="", passages=tuple(lines))], (), clean.ngram).whole
    arrays = {str(size): table for size, table in found.grams.items()}
    save_arrays(job.parts / CONTAMINANTS, {**arrays, "whole": np.union1d(found.whole, whole)})
