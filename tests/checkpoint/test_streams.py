"""Random numbers depend on key and place alone, are uniform, and choose as many as they are asked to."""

import hashlib

import numpy as np
import pytest
import torch

from checkpoint.streams import chosen_at, uniform_at

GOLDEN = 0x9E3779B97F4A7C15


def word(key: str, row: int, column: int) -> int:
    """The generator's definition in plain integers."""
    mixed = (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") + row * GOLDEN) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    low = (mixed ^ mixed >> 31) >> 32 ^ column * GOLDEN % 2**32
    low = (low ^ low >> 16) * 0x7FEB352D % 2**32
    low = (low ^ low >> 15) * 0x846CA68B % 2**32
    return low ^ low >> 16


def test_uniform_is_a_mix_of_key_row_and_column() -> None:
    def number(key: str, row: int, column: int) -> float:
        return (word(key, row, column) >> 8) / 2**24

    rows, columns = slice(3, 7), slice(2**20, 2**20 + 5)
    wanted = [[number("seed/name", row, column) for column in range(2**20, 2**20 + 5)] for row in range(3, 7)]
    assert uniform_at("seed/name", (rows, columns)).tolist() == wanted
    assert uniform_at("seed/name", (columns,)).tolist() == [number("seed/name", 0, c) for c in range(2**20, 2**20 + 5)]
    assert uniform_at("seed/other", (rows, columns)).tolist() != wanted


@pytest.mark.parametrize("chance", [0.5, 0.75, 0.3, 0.01, 0.999, 1 / 256, 1e-9])
def test_chosen_by_eight_digits_or_else_by_a_word(chance) -> None:
    def chosen(key: str, row: int, column: int) -> bool:
        digits = [word(key, row, column // 32 * 8 + digit) >> column % 32 & 1 for digit in range(8)]
        number = sum(bit << digit for digit, bit in enumerate(digits))
        return number < int(chance * 256) or (
            number == int(chance * 256) and word(f"{key}/rest", row, column) < chance * 256 % 1 * 2**32
        )

    for rows, columns in ((slice(0, 40), slice(0, 64)), (slice(5, 9), slice(6, 600)), (slice(2, 3), slice(3, 4))):
        wanted = [[chosen("k", row, c) for c in range(columns.start, columns.stop)] for row in range(*rows.indices(99))]
        assert chosen_at("k", (rows, columns), chance).tolist() == wanted
    assert chosen_at("k", (slice(3, 900),), chance).tolist() == [chosen("k", 0, column) for column in range(3, 900)]


@pytest.mark.parametrize("chance", [0.5, 0.3, 0.9, 0.002])
def test_as_many_are_chosen_as_asked_for_and_neighbours_are_apart(chance) -> None:
    chosen = chosen_at("a", (slice(0, 1000), slice(0, 1000)), chance).astype(float)
    deviation = (chance * (1 - chance)) ** 0.5
    assert abs(chosen.mean() - chance) < 4 * deviation / 1000
    for shift in (1, 2, 3, 4, 8, 32):
        for one, other in ((chosen[shift:], chosen[:-shift]), (chosen[:, shift:], chosen[:, :-shift])):
            assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.005


def test_uniform_numbers_are_uniform_and_apart() -> None:
    many = uniform_at("a", (slice(0, 600), slice(0, 500)))
    assert many.min() >= 0 and many.max() < 1 and many.mean().item() == pytest.approx(0.5, abs=0.003)
    counts = torch.histc(many, 100, 0, 1)
    assert float(((counts - 3000) ** 2 / 3000).sum()) < 150  # chi-square, 99 degrees of freedom
    for shift in (1, 2, 3):
        for one, other in ((many[shift:], many[:-shift]), (many[:, shift:], many[:, :-shift])):
            assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.01
