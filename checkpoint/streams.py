"""Random numbers by key and place: streams of which any part can be had alone, the same on any number of workers."""

import functools
import hashlib
import math
from typing import Any

import numpy as np
import torch

from checkpoint.source import Box, box_shape

DIGITS = 8
"""Of a random number, that are looked at first."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def normal_at(key: str, box: Box) -> torch.Tensor:
    """Return standard normal numbers of a stream in a box of a tensor (Box and Muller, 1958), as `uniform_at` does."""
    radius = torch.log1p(-uniform_at(f"{key}/radius", box)).mul_(-2).sqrt_()
    return radius * torch.cos(uniform_at(f"{key}/angle", box) * (2 * math.pi))


def uniform_at(key: str, box: Box) -> torch.Tensor:
    """Return the random numbers of a stream in a box of a tensor, float32 in [0, 1), in the box's shape.

    A number depends on the key and its place alone: not on what else is read, or by how many workers.
    """
    words = _words(key, *_places(box))
    words >>= np.uint32(8)
    return torch.from_numpy(words.view(np.int32)).to(torch.float32).mul_(2.0**-24).view(box_shape(box))


def chosen_at(key: str, box: Box, chance: float) -> np.ndarray:
    """Return which elements of a box a stream chooses, each with a chance in [0, 1), bool, in the box's shape.

    An element has a random number below 1, and is chosen if that is less than the chance: the first eight binary digits
    say so for most, and a number of a second stream for those where they are the chance's, if that has more of them.
    Thirty-two columns share a word for each digit, the first its lowest bit; from where the chance's are 0 on, none is
    asked for.
    """
    rows, columns = _places(box)
    first, last = columns[0], columns[-1] + 1
    groups = np.arange(first // 32, (last + 31) // 32) * DIGITS
    whole, rest = int(chance * 2**DIGITS), chance * 2**DIGITS % 1
    less: Any = np.uint32(0)
    equal: Any = np.uint32(2**32 - 1)
    last_one = (whole & -whole).bit_length() - 1 if whole and not rest else 0
    for digit in range(last_one, DIGITS):
        words = _words(key, rows, groups + digit)
        if whole >> digit & 1:
            less, equal = less | ~words, equal & words
        else:
            less, equal = less & ~words, equal & ~words

    def unpacked(words: Any) -> np.ndarray:
        bits = np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), axis=-1, bitorder="little")
        return bits[:, first % 32 : first % 32 + last - first].view(np.bool_)

    chosen = unpacked(less)
    if rest:
        at = np.nonzero(unpacked(equal))
        chosen[at] = _words(f"{key}/rest", rows[at[0], 0], columns[at[1]]) < rest * 2**32
    return chosen.reshape(box_shape(box))


def _places(box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a box, [rows, 1], and its columns; a vector is the first row of a matrix.

    Of several matrices in a tensor each has rows of its own: the first one's are those of a matrix.
    """
    *before, columns = (np.arange(part.start, part.stop) for part in box)
    rows = np.zeros(1, dtype=np.int64)
    for index in before:
        rows = ((rows << 32)[:, None] + index).reshape(-1)
    return rows[:, None], columns


def _words(key: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the random 32-bit numbers of a stream at rows and columns, which broadcast, uint32.

    A row's key is splitmix64 of its number (Steele et al., OOPSLA 2014); the columns of a row are mixed in 32 bits,
    eight at a time on most processors (the constants of `lowbias32`, C. Wellons, Prospecting for hash functions, 2018).
    """
    keys = _mix64(rows.astype(np.uint64) * _GOLDEN + _start(key)) >> np.uint64(32)
    mixed = keys.astype(np.uint32) ^ (columns.astype(np.uint64) * _GOLDEN).astype(np.uint32)
    shifted = np.empty_like(mixed)
    for bits, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        mixed ^= np.right_shift(mixed, np.uint32(bits), out=shifted)
        if factor > 1:
            mixed *= np.uint32(factor)
    return mixed


@functools.lru_cache(maxsize=1024)
def _start(key: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))


def _mix64(mixed: np.ndarray) -> np.ndarray:
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)
