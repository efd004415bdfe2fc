"""Token files: documents as one flat array of ids on disk, read by memory map.

`<name>.bin` and `<name>.idx` are an indexed dataset of Megatron-Core (`train.data.indexed`); `<name>.json`, written
last, says what they are. A dataset that Megatron, NeMo or Megatron-Bridge prepared has no `.json` and opens as well.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from checkpoint.files import read_json, write_json
from parallel.errors import InputError
from train.data.indexed import CHUNK, Offsets, Writer, beside, check_pointers, open_index

BATCH = 1024
"""Documents tokenised at a time."""
BATCH_CHARACTERS = 1 << 22
"""Characters tokenised at a time, beyond the last document: what a batch takes of memory."""


class BatchTokenizer(Protocol):
    """What writing token files needs of a tokenizer."""

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def sha256(self) -> str: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class Ends(NamedTuple):
    """The ids that each document is put between, if any."""

    bos: int | None
    eos: int | None


class Batch(NamedTuple):
    """Documents tokenised together."""

    tokens: np.ndarray
    lengths: np.ndarray
    """Tokens of each document, BOS and EOS included."""
    bytes: int
    """Of the text (UTF-8)."""
    characters: int


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Tokenised documents, each between BOS (if there is one) and EOS; `len()` counts tokens."""

    tokens: np.ndarray
    """Flat ids [tokens], a read-only memory map."""
    offsets: np.ndarray | Offsets
    """Where each document starts, and the end [documents + 1], int64."""
    metadata: Mapping[str, Any]
    """dtype, documents, tokens; with a `.json` also bytes (UTF-8) and characters of the text, tokenizer (SHA-256),
    vocab_size, bos and eos (the ids that were added, or null), and what else its maker keeps there."""

    def __len__(self) -> int:
        return len(self.tokens)

    def sequences(self, length: int) -> int:
        """Return how many whole sequences of `length` tokens, each with a target, there are."""
        return max(0, len(self) - 1) // length

    def sequence(self, number: int, length: int) -> np.ndarray:
        """Return sequence `number` [length + 1]: its last token is the last target and the next sequence's first input.

        Raises:
            IndexError: there are no more than `sequences(length)`.
        """
        self._check(number, length)
        return self.tokens[number * length : (number + 1) * length + 1]

    def starts(self, number: int, length: int) -> np.ndarray:
        """Return where in sequence `number` documents start: ascending positions of 0 to `length`, int64.

        0 is among them only if a document starts there, and `length` is the last target. Found by bisection: O(log
        documents).

        Raises:
            IndexError: there are no more than `sequences(length)`.
        """
        self._check(number, length)
        begin, documents = number * length, len(self.offsets) - 1
        first = bisect_left(self.offsets, begin, hi=documents)
        last = bisect_left(self.offsets, begin + length + 1, lo=first, hi=documents)
        # Documents without any token, which others' files may hold, start where the next one does.
        return np.unique(np.asarray(self.offsets[first:last], dtype=np.int64) - begin)

    def _check(self, number: int, length: int) -> None:
        if not 0 <= number < self.sequences(length):
            raise IndexError(f"sequence {number} of {self.sequences(length)} (length {length}, {len(self)} tokens)")


def document_ends(
    tokenizer: BatchTokenizer, *, append_eos: bool = True, prepend_bos: bool | None = None, name: str
) -> Ends:
    """Return the ids that each document is put between.

    Args:
        append_eos: end each document with EOS.
        prepend_bos: begin each document with BOS; by default if the tokenizer has one: evaluation conditions every
            text on it, so training has to have seen it.
        name: what messages call the corpus.

    Raises:
        InputError: the tokenizer has no such token.
    """
    if append_eos and tokenizer.eos is None:
        raise InputError(
            f"{name}: the tokenizer has no EOS token, which ends each document: name one in its tokenizer_config.json "
            "(eos_token), or set append_eos: false"
        )
    if prepend_bos and tokenizer.bos is None:
        raise InputError(f"{name}: prepend_bos is set, and the tokenizer has no BOS token")
    return Ends(bos=None if prepend_bos is False else tokenizer.bos, eos=tokenizer.eos if append_eos else None)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of the ids of a vocabulary, one that Megatron-Core knows."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def encode_documents(texts: Iterable[str], tokenizer: BatchTokenizer, ends: Ends, *, name: str) -> Iterator[Batch]:
    """Tokenise documents batch by batch, in order.

    Raises:
        InputError: the tokenizer gives ids beyond its vocabulary, which the file has no room for.
    """
    before = [] if ends.bos is None else [ends.bos]
    after = [] if ends.eos is None else [ends.eos]
    for batch in _batches(texts):
        ids = [np.array([*before, *found, *after], dtype=np.int64) for found in tokenizer.encode_batch(batch)]
        tokens = np.concatenate(ids)
        if len(tokens) and (highest := int(tokens.max())) >= tokenizer.vocab_size:
            entries = f"{tokenizer.vocab_size} entries"
            raise InputError(f"{name}: the tokenizer gave the id {highest}, though it says that it has {entries}")
        yield Batch(
            tokens=tokens.astype(token_dtype(tokenizer.vocab_size)),
            lengths=np.array([len(found) for found in ids]),
            bytes=sum(len(text.encode()) for text in batch),
            characters=sum(len(text) for text in batch),
        )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def write_tokens(
    texts: Iterable[str],
    tokenizer: BatchTokenizer,
    path: Path,
    *,
    append_eos: bool = True,
    prepend_bos: bool | None = None,
) -> TokenFile:
    """Tokenise documents into `<path>.bin`, `.idx` and `.json`, a batch in memory at a time, and open the result.

    Args:
        append_eos, prepend_bos: see `document_ends`.

    Raises:
        InputError: there is no text, the tokenizer has no EOS, or the disk is full.
    """
    ends = document_ends(tokenizer, append_eos=append_eos, prepend_bos=prepend_bos, name=path.name)
    counts = {"bytes": 0, "characters": 0}
    with Writer(path, token_dtype(tokenizer.vocab_size)) as writer:
        for batch in encode_documents(texts, tokenizer, ends, name=path.name):
            writer.add(batch.tokens, batch.lengths)
            counts["bytes"] += batch.bytes
            counts["characters"] += batch.characters
        if not writer.documents:
            raise InputError(f"{path.name}: there is no text to tokenise")
    counts |= {"documents": writer.documents, "tokens": writer.tokens}
    write_json(beside(path, ".json"), describe_tokens(tokenizer, ends, counts))
    return open_tokens(path)


def describe_tokens(tokenizer: BatchTokenizer, ends: Ends, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return what `.json` says of a token file.

    Args:
        counts: documents, tokens, bytes, characters.
    """
    return {
        "dtype": token_dtype(tokenizer.vocab_size).name,
        **{key: counts[key] for key in ("documents", "tokens", "bytes", "characters")},
        "tokenizer": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **ends._asdict(),
    }


def open_tokens(path: Path, *, vocab_size: int | None = None) -> TokenFile:
    """Open what `write_tokens`, `growmerge data prepare` or Megatron's tools wrote to `path`.

    Args:
        path: without `.bin`.
        vocab_size: entries of the model's vocabulary: a corpus of a larger one is refused. Where no `.json` says which
            vocabulary it is, the first million ids are looked at.

    Raises:
        InputError: a file is missing or damaged, or its size is not what index or metadata say; another vocabulary.
    """
    about, data = beside(path, ".json"), beside(path, ".bin")
    metadata = read_json(about) if about.is_file() else None
    if metadata is not None and not (isinstance(metadata, dict) and {"documents", "tokens"} <= metadata.keys()):
        raise InputError(f"{about}: does not describe a token file; delete it to have it made again")
    if metadata is not None and not data.is_file() and metadata.get("splits"):
        raise InputError(f"{data}: no such file: {path.name} was split: use {', '.join(metadata['splits'])}")
    index = open_index(path)
    try:
        tokens = np.memmap(data, dtype=index.dtype, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"{data}: not a readable token file ({error}); delete it to have it made again") from error
    documents = len(index.first) - 1
    if metadata is None:
        check_pointers(path, index)
        metadata = {"dtype": index.dtype.name, "documents": documents, "tokens": index.tokens}
    if not len(tokens) == index.tokens == metadata["tokens"] or documents != metadata["documents"]:
        raise InputError(
            f"{data}: holds {len(tokens)} tokens, not {metadata['tokens']} in {metadata['documents']} documents; "
            "delete it to have it made again"
        )
    if vocab_size is not None:
        known = metadata.get("vocab_size")
        entries = int(tokens[:CHUNK].max()) + 1 if known is None else known
        if entries > vocab_size:
            raise InputError(
                f"{path}: a tokenizer that does not match the model's vocabulary: the corpus has "
                f"{'at least ' if known is None else ''}{entries} entries, the model {vocab_size}"
            )
    return TokenFile(tokens=tokens, offsets=Offsets(index), metadata=metadata)
