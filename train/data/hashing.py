"""Hashes of words and of runs of words, a whole text at a time in numpy."""

from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

from train.data.order import mix


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """Return XXH3 of each word [words], uint64."""
    return np.fromiter(map(xxh3_64_intdigest, map(str.encode, words)), dtype=np.uint64, count=len(words))


def gram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of each n-gram in order [words - n + 1], uint64, from the hashes of a text's words [words].

    It is a sum of the words' hashes, each times an odd number of its place, mixed: chance alone makes two n-grams
    equal, once in 2**64.
    """
    count = max(0, len(words) - n + 1)
    total = np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(mix(np.arange(1, n + 1, dtype=np.uint64)) | np.uint64(1)):
        total += words[place : place + count] * factor
    return mix(total)


def contains(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return which values are in a sorted table [values], bool."""
    if not len(table):
        return np.zeros(len(values), dtype=bool)
    found = np.searchsorted(table, values)
    found[found == len(table)] = 0
    return table[found] == values
