"""`growmerge tokenizer extend` and `replace`: a tokenizer with more tokens, and models with rows for new ones."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.files import read_json, write_bytes, write_json
from checkpoint.open import open_checkpoint
from checkpoint.provenance import descend
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import RunState, Source, WithoutState
from checkpoint.team import as_many_as_fit
from checkpoint.writer import PROGRESS, write_checkpoint
from eval.bits_per_byte import score_documents
from eval.model import load_model, stream_model
from growmerge import __version__
from growmerge.token_roles import SETTINGS, Named, check_rows, moved_ids, new_rows, read_tokenizer
from growmerge.tokenizer_report import read_text
from parallel.errors import InputError
from parallel.memory import available_memory
from train.data.readers import Document
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.data.vocabulary import count_words, extend
from upscale.vocabulary import rows_of, with_vocabulary

GENERATION = "generation_config.json"
WINDOW = 1024
"""Tokens of a window at most, when held-out text is scored; it moves by half."""


@dataclass(frozen=True, kw_only=True)
class Remodel:
    """A model that gets rows for a new vocabulary, and where it goes."""

    model: Path
    """A checkpoint of any format."""
    folder: Path
    multiple: int = 1
    """Rows are padded to a multiple of this many."""
    heldout: Path | None = None
    """Text that both models are scored on."""
    workers: int | None = None
    """Processes; by default as many as there are cores and memory for."""


def extend_tokenizer(tokenizer: Path, folder: Path, texts: Sequence[Path], add: int, target: Remodel | None) -> str:
    """Learn new tokens from texts, write the tokenizer and, with a target, the model; return what is said of them.

    Raises:
        InputError: a file cannot be read, a folder is taken, the text does not do (`train.data.vocabulary.extend`), or
            the model's own tokenizer is another one. Nothing is written then.
    """
    old = read_tokenizer(tokenizer)
    _free(folder)
    if target is not None:
        _check(target, old)
        if target.folder.resolve() == folder.resolve():
            raise InputError(f"{folder}: cannot be the tokenizer's folder and the model's; choose another for one")
        own = target.model / "tokenizer.json"
        if own.is_file() and read_tokenizer(target.model).vocabulary.ids != old.vocabulary.ids:
            raise InputError(f"{own}: has other tokens than {tokenizer}; extend the model's own tokenizer")
    documents = (document for text in texts for document in read_text(text))
    words = count_words(old.vocabulary, (passage for document in documents for passage in document.passages))
    try:
        found = extend(old.vocabulary, words, add)
    except InputError as error:
        raise InputError(f"{tokenizer}: {error}") from error
    for name, data in _settings(tokenizer).items():
        write_bytes(folder / name, data)
    write_json(folder / "tokenizer.json", found.data)
    said = (
        f"{folder}: {add:,} tokens more, {len(old.vocabulary.ids) + add:,} in all; the text's words are "
        f"{found.before:,} -> {found.after:,} tokens ({100 * (1 - found.after / found.before):.1f} % fewer)"
    )
    return said if target is None else f"{said}\n{replace_tokenizer(target, folder, tokenizer)}"


def replace_tokenizer(target: Remodel, new_tokenizer: Path, tokenizer: Path | None = None) -> str:
    """Write a model with a row for each token of a new tokenizer, that beside it; return what is said of it.

    Args:
        target: the model, of any format, and where it goes.
        tokenizer: folder of the tokenizer that the model has had; its own folder by default.

    Raises:
        InputError: tokenizers of an unsupported kind, one that is not the model's, or a target that is taken.
    """
    old_folder = tokenizer or target.model
    old, new = read_tokenizer(old_folder), read_tokenizer(new_tokenizer)
    opened, documents = _check(target, old)
    rows = new_rows(opened.config, old, new, multiple=target.multiple)
    source = WithoutState(opened)
    before = bits_per_byte(source, load_tokenizer(old_folder), documents)
    files = {**_settings(new_tokenizer), "tokenizer.json": (new_tokenizer / "tokenizer.json").read_bytes()}
    if (target.model / GENERATION).is_file():
        generation = read_json(target.model / GENERATION)
        files[GENERATION] = (json.dumps({**generation, **moved_ids(generation, old, new)}, indent=2) + "\n").encode()
    _write(with_vocabulary(source, rows), opened.run, target, files)
    facts = rows.about
    said = (
        f"{target.folder}: {len(rows.pieces):,} rows: {facts['kept']:,} kept, {facts['means']:,} means of old pieces, "
        f"{facts['unknown']:,} means of all old rows"
    )
    if not documents:
        return said
    after = bits_per_byte(open_checkpoint(target.folder), load_tokenizer(target.folder), documents)
    bits, tokens = f"{before[0]:.4f} -> {after[0]:.4f} bits per byte", f"{before[1]:,} -> {after[1]:,} tokens"
    return f"{said}\n{target.heldout}: {bits}, {tokens}"


def _check(target: Remodel, old: Named) -> tuple[Source, list[Document]]:
    """Find what is wrong with a model, its tokenizer or its target before anything is written; return model and text.

    Raises:
        InputError: see `replace_tokenizer`.
    """
    _free(target.folder)
    rows_of((), multiple=target.multiple)
    source = open_checkpoint(target.model)
    check_rows(target.model, source.config, old)
    return source, read_text(target.heldout) if target.heldout else []


def _settings(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SETTINGS if (folder / name).is_file()}


def _write(source: Source, run: RunState, target: Remodel, files: Mapping[str, bytes]) -> None:
    about = {
        "format": 1,
        "name": target.folder.name,
        **source.run.provenance,
        **descend([{**run.provenance, "name": run.provenance.get("name", target.model.name)}]),
        "tokens": run.tokens,
        "inputs": [_fingerprint(target.model)],
        "versions": {"growmerge": __version__, "torch": torch.__version__},
    }
    workers = target.workers or as_many_as_fit()
    write_checkpoint(source, target.folder, SafetensorsLayout(), workers=workers, about=about, extra_files=files)


def bits_per_byte(source: Source, tokenizer: TextTokenizer, documents: Sequence[Document]) -> tuple[float, int]:
    """Return the bits per byte of documents, and their tokens; a model that memory has no room for is streamed."""
    if not documents:
        return math.nan, 0
    room = 0.8 * available_memory()
    model = (load_model if 4 * source.family.parameters(source.config) < room else stream_model)(source)
    window = min(WINDOW, model.config.max_position_embeddings)
    scores = score_documents(model, documents, tokenizer, window=window, stride=window // 2, batch_tokens=4 * window)
    size = sum(score.bytes for score in scores)
    return sum(score.bits for score in scores) / size, sum(score.tokens for score in scores)


def _free(folder: Path) -> None:
    """Refuse a folder that holds anything but an unfinished checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROGRESS).is_file():
        raise InputError(f"{folder}: is not empty; choose another folder")


def _fingerprint(folder: Path) -> str:
    """Return what tells a folder from another: its files' names, sizes and times."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    text = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()
