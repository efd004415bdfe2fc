"""Token files: documents as one flat array of ids on disk, read by memory map.

`<name>.bin` holds little-endian uint16 (uint32 where the vocabulary has more than 65,536 entries), `<name>.idx.npy`
where each document starts, and `<name>.json`, written last, what they are.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoint.files import read_json, write_bytes, write_json
from parallel.errors import InputError

BATCH = 1024
"""Documents tokenised at a time."""


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


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Tokenised documents, each between BOS (if there is one) and EOS; `len()` counts tokens."""

    tokens: np.ndarray
    """Flat ids [tokens], a read-only memory map."""
    offsets: np.ndarray
    """Where each document starts, and the end [documents + 1], int64."""
    metadata: Mapping[str, Any]
    """dtype, documents, tokens, bytes (UTF-8, of the text), tokenizer (SHA-256)."""

    def __len__(self) -> int:
        return len(self.tokens)

    def sequences(self, length: int) -> int:
        """Return how many whole sequences of `length` tokens, each with a target, there are."""
        return (len(self) - 1) // length

    def sequence(self, number: int, length: int) -> np.ndarray:
        """Return sequence `number` [length + 1]: its last token is the last target and the next sequence's first input.

        Raises:
            IndexError: there are no more than `sequences(length)`.
        """
        if not 0 <= number < self.sequences(length):
            raise IndexError(f"sequence {number} of {self.sequences(length)} (length {length}, {len(self)} tokens)")
        return self.tokens[number * length : (number + 1) * length + 1]


def write_tokens(texts: Iterable[str], tokenizer: BatchTokenizer, path: Path) -> TokenFile:
    """Tokenise documents into `<path>.bin`, `.idx.npy` and `.json`, and open the result.

    Raises:
        InputError: there is no text, the tokenizer has no EOS, or the disk is full.
    """
    if tokenizer.eos is None:
        raise InputError(f"{path.name}: the tokenizer has no EOS token, which ends each document")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    documents = list(texts)
    # Evaluation conditions every text on BOS, so training has to have seen it.
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), BATCH):
        for ids in tokenizer.encode_batch(documents[start : start + BATCH]):
            pieces.append(np.array([*first, *ids, tokenizer.eos], dtype=dtype))
    if not pieces:
        raise InputError(f"{path.name}: there is no text to tokenise")
    tokens = np.concatenate(pieces)
    offsets = np.cumsum([0, *(len(piece) for piece in pieces)], dtype="<i8")
    index = io.BytesIO()
    np.save(index, offsets, allow_pickle=False)
    write_bytes(_beside(path, ".bin"), tokens.tobytes())
    write_bytes(_beside(path, ".idx.npy"), index.getvalue())
    metadata = {
        "dtype": dtype.name,
        "documents": len(pieces),
        "tokens": len(tokens),
        "bytes": sum(len(text.encode()) for text in documents),
        "tokenizer": tokenizer.sha256,
    }
    write_json(_beside(path, ".json"), metadata)
    return open_tokens(path)


def open_tokens(path: Path) -> TokenFile:
    """Open what `write_tokens` wrote to `path`.

    Raises:
        InputError: a file is missing, or its size is not what the metadata says.
    """
    metadata = read_json(_beside(path, ".json"))
    data, index = _beside(path, ".bin"), _beside(path, ".idx.npy")
    try:
        tokens = np.memmap(data, dtype=np.dtype(metadata["dtype"]).newbyteorder("<"), mode="r")
        offsets = np.load(index, allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{data}: not a readable token file ({error}); delete it to have it made again") from error
    if len(tokens) != metadata["tokens"] or len(offsets) != metadata["documents"] + 1 or offsets[-1] != len(tokens):
        raise InputError(
            f"{data}: holds {len(tokens)} tokens, not {metadata['tokens']} in {metadata['documents']} documents; "
            "delete it to have it made again"
        )
    return TokenFile(tokens=tokens, offsets=offsets, metadata=metadata)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
