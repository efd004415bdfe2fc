"""Duplicates in a corpus of any size: processes hash shards, one decides, and the first in the corpus' order stays.

Documents are known by their numbers in the corpus' order, so the result does not depend on how many processes hashed.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from xxhash import xxh3_128_digest

from train.data.extra import optional
from train.data.hashing import gram_hashes, word_hashes
from train.data.heldout import normalise
from train.data.order import mix

PARTS = 16
"""Parts that digests are sorted in, one after the other, to save memory."""
BATCH = 64
"""Documents sketched at once: from 256 on rensa starts threads, which would not survive a fork."""
SEED = 1
EMPTY = np.uint32(0xFFFFFFFF)
"""Every number of the signature of a text without words."""
RECALL = 0.95
"""Share of the pairs exactly as similar as the threshold that have to meet in a band."""
NEIGHBOURS = 32
"""Documents that one is compared with in a band: those that follow it there."""
PAIRS = 1 << 15
"""Pairs compared at once: 32 MiB of signatures of 128 numbers."""


def digests(texts: Iterable[str]) -> np.ndarray:
    """Return XXH3-128 of each text [texts, 2], uint64; texts equal but for white space and Unicode form have one."""
    tidied = (" ".join(unicodedata.normalize("NFC", text).split()) for text in texts)
    joined = b"".join(xxh3_128_digest(text.encode()) for text in tidied)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)


def repeated(digests: np.ndarray, alive: np.ndarray | None = None) -> np.ndarray:
    """Return which texts equal an earlier one [texts], bool.

    Args:
        digests: of the whole corpus, in its order [texts, 2].
        alive: which texts count [texts], bool; all by default. The others are neither first copies nor repeated.
    """
    found = np.zeros(len(digests), dtype=bool)
    part = digests[:, 0] >> np.uint64(60)
    for number in range(PARTS):
        mine = part == number
        places = np.flatnonzero(mine if alive is None else mine & alive)
        low, high = digests[places, 0], digests[places, 1]
        order = np.lexsort((high, low))  # stable: equal texts stay in the corpus' order
        low, high = low[order], high[order]
        same = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
        found[places[order[1:][same]]] = True
    return found


def signatures(texts: Sequence[str], *, shingle: int, permutations: int) -> np.ndarray:
    """Return a MinHash signature of each text's set of word shingles [texts, permutations], uint32.

    Two texts agree in a share of the numbers that estimates the Jaccard similarity of their sets, with a standard
    deviation of at most sqrt(J (1 - J) / permutations). Words come without case and punctuation, and a text of fewer
    words than a shingle is one shingle. R-MinHash of rensa, after Fast Similarity Sketching (arXiv 1704.04370).

    Raises:
        InputError: rensa is not installed.
    """
    sketch = optional("rensa").RMinHash.digest_matrix_from_flat_token_hashes
    found = np.empty((len(texts), permutations), dtype=np.uint32)
    for start in range(0, len(texts), BATCH):
        shingles = [_shingles(text, shingle) for text in texts[start : start + BATCH]]
        offsets = np.cumsum([0, *map(len, shingles)], dtype=np.uint64)
        rows = sketch(np.concatenate(shingles), offsets, permutations, SEED).to_rows()
        found[start : start + BATCH] = np.array(rows, dtype=np.uint32)
    return found


def _shingles(text: str, size: int) -> np.ndarray:
    words = word_hashes(normalise(text))
    return gram_hashes(words, max(1, min(size, len(words))))


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Return which documents are similar to an earlier one [documents], bool.

    Signatures are cut into bands (locality-sensitive hashing): documents that agree in all of a band are compared, each
    with the 32 that follow it, and are similar if they agree in at least `threshold` of the signature. Documents that
    similar pairs connect are a cluster, of which the first stays. One process needs 50 bytes a document beside the
    signatures, which may be a memory map.

    Args:
        signatures: of the whole corpus, in its order [documents, permutations]; texts without words are in no cluster.
        threshold: Jaccard similarity.
    """
    documents, permutations = signatures.shape
    parent = np.arange(documents)
    rows = band_rows(permutations, threshold)
    for start in range(0, permutations - rows + 1, rows):
        for first, second in _meeting(signatures[:, start : start + rows], parent):
            for at in range(0, len(first), PAIRS):
                one, other = first[at : at + PAIRS], second[at : at + PAIRS]
                similar = (signatures[one] == signatures[other]).mean(axis=1) >= threshold
                _join(parent, one[similar], other[similar])
    return _roots(parent, np.arange(documents)) != np.arange(documents)


def band_rows(permutations: int, threshold: float) -> int:
    """Return how many numbers a band has: as many as let 95 % of the pairs at the threshold meet in some band.

    Two documents of similarity J meet in one of b bands of r numbers with probability 1 - (1 - J**r)**b.
    """

    def recall(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (permutations // rows)

    return max((rows for rows in range(1, permutations + 1) if recall(rows) >= RECALL), default=1)


def _meeting(band: np.ndarray, parent: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of documents that agree in a band [documents, rows] and are in no common cluster yet."""
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in range(band.shape[1]):
        keys = mix(keys ^ band[:, column])
    order = np.flatnonzero(band[:, 0] != EMPTY)
    order = order[np.argsort(keys[order], kind="stable")]
    keys = keys[order]
    places = np.arange(len(order))
    for step in range(1, NEIGHBOURS + 1):
        places = places[places + step < len(order)]
        places = places[keys[places] == keys[places + step]]
        if not len(places):
            return
        first, second = order[places], order[places + step]
        apart = _roots(parent, first) != _roots(parent, second)
        yield first[apart], second[apart]


def _roots(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Return the first document of each document's cluster, and shorten the way to it."""
    found = parent[nodes]
    while (parent[found] != found).any():
        found = parent[found]
    parent[nodes] = found
    return found


def _join(parent: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Make the clusters of each pair one, under the earlier first document."""
    while len(first):
        one, other = _roots(parent, first), _roots(parent, second)
        apart = one != other
        first, second, one, other = first[apart], second[apart], one[apart], other[apart]
        np.minimum.at(parent, np.maximum(one, other), np.minimum(one, other))
