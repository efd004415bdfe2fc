"""Corpora of any size to token files: shards are read, cleaned and tokenised in processes, then joined in order.

What a process finishes is kept, with its checksum, and not done again: a kill loses the shards at work alone. The bytes
of the result depend on text and options, not on how many processes there are or how often it was interrupted.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

from checkpoint import manifest
from checkpoint.files import inside, read_json, write_json
from parallel.errors import InputError
from train.data.decide import decide, write_contaminants
from train.data.join import join
from train.data.packages import default_cache
from train.data.parts import Corpus, Job, read_record
from train.data.scan import scan
from train.data.shards import Shard, cut_source, stamp_files, stamp_source
from train.data.tokenise import tokenise
from train.data.tokenizer import load_tokenizer
from train.data.tokens import document_ends

VERSION = 1
"""Raised when the same text and options give another result, so that an old one is not taken for it."""
SHARD_BYTES = 1 << 25
"""Some 15 seconds' work, which is what a kill loses."""
LABELS = ("name", "edition", "rights_holder", "licence")
"""What is told of a corpus; its tokens do not depend on it."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PARTS = ".parts"

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all corpora share."""

    folder: Path
    """Where the token files go."""
    tokenizer: Path
    """Folder of a Hugging Face tokenizer."""
    base: Path
    """Folder that paths of sources are relative to."""
    seed: int = 0
    """What is held out and how documents are split follow from it."""
    workers: int | None = None
    """Processes; the machine's cores by default."""
    shard_bytes: int = SHARD_BYTES
    """Size of a shard, about; the result does not depend on it."""
    cache: Path | None = None
    """Folder of downloaded wheels; see `train.data.packages`."""


def prepare(
    corpora: Mapping[str, Corpus], settings: Settings, report: Report = lambda event: None
) -> dict[str, dict[str, Any]]:
    """Make `<language>.bin`, `.idx` and `.json` of each corpus that is not up to date; return what `.json` says.

    With splits there are `<language>.<split>.bin`, `.idx` and `.json` instead, and `<language>.json` says what all of
    them come to. Held-out documents stand in `<language>.heldout.jsonl` (id, text).

    Args:
        report: is told how far it is: events `corpus`, `pass`, `shard`, `done`.

    Raises:
        InputError: a source or the tokenizer cannot be had or read; a corpus without text; a split without text; a
            full disk; a process that died.
    """
    keys = {language: corpus_key(corpus, settings) for language, corpus in corpora.items()}
    found = {language: finished(settings.folder, language, keys[language]) for language in corpora}
    for language, made in found.items():
        if made is not None and made != (labelled := _labelled(made, corpora[language])):
            write_json(settings.folder / f"{language}.json", labelled)
            found[language] = labelled
        if made is not None:  # a kill may have come after the last file
            _remove_parts(settings.folder / PARTS / language)
    todo = [language for language, made in found.items() if made is None]
    if todo:
        jobs = {language: _job(language, corpora[language], settings, keys[language]) for language in todo}
        shards = {language: _cut(jobs[language], settings) for language in todo}
        with _processes(settings.workers or os.cpu_count() or 1, max(map(len, shards.values()))) as pool:
            for language in todo:
                report({"event": "corpus", "corpus": language, "shards": len(shards[language])})
                found[language] = _prepare(jobs[language], shards[language], pool, keys[language], settings, report)
                report({"event": "done", "corpus": language})
    return {language: made for language, made in found.items() if made is not None}


def corpus_key(corpus: Corpus, settings: Settings) -> str:
    """Return a hash of all that a corpus' token files depend on: options, tokenizer, names, sizes and times of files.

    Raises:
        InputError: a glob that matches nothing; no tokenizer.
    """
    options = asdict(cast(Any, corpus))
    for labelled in (options, *options["sources"]):
        for label in LABELS:
            labelled.pop(label, None)
    stamps = [stamp_source(source, settings.base) for source in corpus.sources]
    evaluation = stamp_files(corpus.clean.evaluation, settings.base) if corpus.clean.decontaminate else []
    content = [VERSION, options, settings.seed, tokenizer_hashes(settings.tokenizer), stamps, evaluation]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_hashes(folder: Path) -> list[str]:
    """Return what a tokenizer is known by.

    Raises:
        InputError: there is none.
    """
    paths = [folder / name for name in TOKENIZER_FILES]
    if not paths[0].is_file():
        raise InputError(f"{folder}: holds no tokenizer.json (a fast Hugging Face tokenizer is needed)")
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def finished(folder: Path, language: str, key: str | None = None, *, deep: bool = False) -> dict[str, Any] | None:
    """Return what `<language>.json` says if the corpus is whole and of this key, else None.

    Args:
        deep: compare checksums of all files; otherwise of those alone whose time is another.
    """
    try:
        made: dict[str, Any] = read_json(folder / f"{language}.json")
        if key not in (None, made["key"]):
            return None
        for name, file in made["files"].items():
            path = inside(folder, name)
            stat = path.stat()
            if stat.st_size != file["size"]:
                return None
            if (deep or stat.st_mtime_ns != file["mtime_ns"]) and manifest.block_hashes(path) != file["xxh3"]:
                return None
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return None
    return made


def _labelled(made: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """Return what `<language>.json` says, with the labels that the corpus has now."""
    sources = [
        {**old, **{label: getattr(new, label) for label in LABELS if label in old}}
        for old, new in zip(made["sources"], corpus.sources, strict=True)
    ]
    return {**made, "name": corpus.name, "sources": sources}


def _job(language: str, corpus: Corpus, settings: Settings, key: str) -> Job:
    tokenizer = load_tokenizer(settings.tokenizer)
    ends = document_ends(tokenizer, append_eos=corpus.append_eos, prepend_bos=corpus.prepend_bos, name=language)
    return Job(
        language=language,
        corpus=corpus,
        seed=settings.seed,
        tokenizer=settings.tokenizer,
        ends=ends,
        base=settings.base,
        cache=settings.cache or default_cache(),
        parts=settings.folder / PARTS / language / f"{key}-{settings.shard_bytes}",
    )


def _cut(job: Job, settings: Settings) -> list[tuple[int, Shard]]:
    """Return all shards of a corpus, each with the number of its source."""
    return [
        (number, shard)
        for number, source in enumerate(job.corpus.sources)
        for shard in cut_source(source, settings.base, settings.shard_bytes)
    ]


def _prepare(
    job: Job,
    shards: Sequence[tuple[int, Shard]],
    pool: ProcessPoolExecutor,
    key: str,
    settings: Settings,
    report: Report,
) -> dict[str, Any]:
    _clear(job)
    pieces = [shard for _, shard in shards]
    scans = _run(pool, scan, "scan", job, pieces, report) if job.scans else []
    heldout = decide(job, scans) if scans else []
    write_contaminants(job, heldout)
    done = _run(pool, tokenise, "done", job, pieces, report)
    made = join(job, [number for number, _ in shards], scans, done, heldout, settings.folder, key)
    _remove_parts(job.parts.parent)
    return made


def _remove_parts(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
    with suppress(OSError):  # other corpora have parts there
        folder.parent.rmdir()


def _clear(job: Job) -> None:
    """Remove parts of other options, and what a kill left half-written."""
    for folder in job.parts.parent.glob("*"):
        if folder != job.parts:
            shutil.rmtree(folder)
    for place in (job.parts, job.parts.parent.parent.parent):
        for path in place.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def _run(
    pool: ProcessPoolExecutor,
    function: Callable[[Job, int, Shard], dict[str, Any]],
    kind: str,
    job: Job,
    shards: Sequence[Shard],
    report: Report,
) -> list[dict[str, Any]]:
    """Do a pass over all shards whose part is not complete; return the parts' records in order."""
    found = {number: read_record(job.parts, number, kind) for number in range(len(shards))}
    sizes = {number: max(1, shard.size) for number, shard in enumerate(shards)}
    finished = sum(sizes[number] for number, record in found.items() if record is not None)
    report({"event": "pass", "corpus": job.language, "pass": kind, "done": finished, "total": sum(sizes.values())})
    todo = [number for number, record in found.items() if record is None]
    try:
        futures: dict[Future[dict[str, Any]], int] = {
            pool.submit(function, job, number, shards[number]): number for number in todo
        }
        for future in as_completed(futures):
            number = futures[future]
            found[number] = future.result()
            report({"event": "shard", "corpus": job.language, "shard": number, "size": sizes[number]})
    except BrokenProcessPool:
        raise InputError(
            f"{job.language}: a process died without a message (killed, or out of memory); what was finished is kept: "
            "run again, with fewer workers if memory is short"
        ) from None
    return [cast(dict[str, Any], found[number]) for number in range(len(shards))]


@contextmanager
def _processes(workers: int, shards: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes; after an error those at work are ended, since their parts do not count."""
    pool = ProcessPoolExecutor(
        max_workers=max(1, min(workers, shards)), mp_context=multiprocessing.get_context("spawn"), initializer=_begin
    )
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        running = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        raise


def _begin() -> None:
    """Prepare a process: a thread each, Ctrl-C left to the parent, and an end with the parent, however that ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
