"""Training text kept clear of held-out and evaluation text, a document at a time, in any number of processes.

`train.data.heldout.decontaminate` says the same with sets of words, for corpora that fit in memory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from parallel.errors import InputError, one_of
from train.data.hashing import contains, gram_hashes, word_hashes
from train.data.heldout import normalise
from train.data.places import opened
from train.data.readers import Document

SHORTEST = 8
"""Words in the shortest evaluation sentence that is looked for inside longer text (GPT-3: arXiv 2005.14165, appendix
C); shorter ones would be found by chance."""
FEWEST = 4
"""Words in the shortest evaluation sentence that is looked for as a whole passage; labels and keys have fewer."""


@dataclass(frozen=True, kw_only=True)
class Contaminants:
    """What training text may not repeat, as hashes: 8 bytes a word, to be handed to every process."""

    grams: Mapping[int, np.ndarray]
    """By number of words: n-grams, sorted, uint64."""
    whole: np.ndarray
    """Passages, sorted, uint64."""


def find_contaminants(heldout: Iterable[Document], sentences: Iterable[str], n: int) -> Contaminants:
    """Return the n-grams and passages of held-out documents and of evaluation sentences.

    An n-gram of a document may run over its passages. A sentence of fewer than n words is an n-gram by itself from
    8 words on, and a passage from 4.
    """
    grams: dict[int, list[np.ndarray]] = {n: []}
    whole: list[int] = []
    for document in heldout:
        passages = [normalise(passage) for passage in document.passages]
        grams[n].append(gram_hashes(word_hashes([word for words in passages for word in words]), n))
        whole += map(_whole, passages)
    for sentence in sentences:
        words = normalise(sentence)
        if len(words) >= FEWEST:
            whole.append(_whole(words))
        if len(words) >= min(n, SHORTEST):
            size = min(n, len(words))
            grams.setdefault(size, []).append(gram_hashes(word_hashes(words), size))
    return Contaminants(
        grams={size: np.unique(np.concatenate([np.empty(0, np.uint64), *found])) for size, found in grams.items()},
        whole=np.unique(np.array(whole, dtype=np.uint64)),
    )


def contaminated(passages: Sequence[str], contaminants: Contaminants) -> dict[int, str]:
    """Return the numbers of a document's passages that have to go, each with its reason: `equal` or `shared_ngram`.

    The rule is that of `train.data.heldout.decontaminate`: an n-gram may run over several passages, and then all of
    them go; what stays is looked at again, since it is next to other text now.
    """
    texts = [normalise(passage) for passage in passages]
    whole = np.array([_whole(words) for words in texts], dtype=np.uint64)
    dropped = dict.fromkeys(np.flatnonzero(contains(contaminants.whole, whole)).tolist(), "equal")
    hashes = word_hashes(list(chain.from_iterable(texts)))
    owner = np.repeat(np.arange(len(texts)), [len(words) for words in texts])
    bad = np.array(list(dropped), dtype=np.int64)
    while True:
        if len(bad):
            stays = ~np.isin(owner, bad)
            hashes, owner = hashes[stays], owner[stays]
        bad = _touching(hashes, owner, contaminants.grams)
        if not len(bad):
            return dropped
        dropped |= dict.fromkeys(bad.tolist(), "shared_ngram")


def _touching(hashes: np.ndarray, owner: np.ndarray, grams: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return the numbers of the passages that hold a word of an n-gram, from each word's hash and passage [words]."""
    touched = np.zeros(len(hashes), dtype=bool)
    for n, table in grams.items():
        for at in np.flatnonzero(contains(table, gram_hashes(hashes, n))):
            touched[at : at + n] = True
    return np.unique(owner[touched])


def _whole(words: Sequence[str]) -> int:
    return xxh3_64_intdigest(" ".join(words).encode())


def read_sentences(patterns: Iterable[str], folder: Path) -> Iterator[str]:
    """Yield the texts of evaluation files: strings of JSON objects (.jsonl), cells (.tsv), lines (.txt).

    Args:
        patterns: globs of the files.
        folder: what they are relative to.

    Raises:
        InputError: no file matches, a file is of another kind, or cannot be read; it is named with the line.
    """
    with opened(folder) as find:
        for pattern in patterns:
            for file in find(pattern):
                kind = Path(file.name).suffix
                if kind not in _CELLS:
                    raise InputError(f"{file.where}: " + one_of("kind of evaluation file", kind, _CELLS))
                for number, line in enumerate(file.read().split(b"\n"), start=1):
                    try:
                        yield from _CELLS[kind](line.decode("utf-8-sig"))
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"{file.where}:{number}: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    return f"not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else f"not valid JSON ({error})"


def _json_strings(line: str) -> Iterator[str]:
    waiting: list[Any] = [json.loads(line)] if line.strip() else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value


_CELLS = {".jsonl": _json_strings, ".tsv": lambda line: line.split("\t"), ".txt": lambda line: [line]}
