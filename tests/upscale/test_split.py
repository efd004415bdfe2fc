"""Shares add up to the value, bit for bit, in every dtype."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpoint.source import full_box
from checkpoint.streams import uniform_at
from upscale.split import exact_split, exact_split_master, symmetric

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def split(block: torch.Tensor, copies: int, key: str = "k") -> list[torch.Tensor]:
    return exact_split(block, copies, lambda level: uniform_at(f"{key}/{level}", full_box(block.shape)))


def patterns(dtype: torch.dtype) -> st.SearchStrategy[list[int]]:
    width = dtype.itemsize * 8 - 1
    return st.lists(st.integers(-(2**width), 2**width - 1), min_size=1, max_size=40)


def check(bits: list[int], dtype: torch.dtype, copies: int) -> None:
    block = torch.tensor(bits, dtype=BITS[dtype]).view(dtype)
    parts = split(block, copies)
    assert len(parts) == copies and all(part.dtype == dtype for part in parts)
    for number, value in enumerate(block.tolist()):
        shares = [part[number].item() for part in parts]
        if not np.isfinite(value):
            np.testing.assert_array_equal(shares, [value] * copies)
            continue
        assert sum(map(Fraction, shares)) == Fraction(value)
        assert all(abs(share) <= abs(value) for share in shares)
        assert all(share == 0 or np.signbit(share) == np.signbit(value) for share in shares)


@settings(deadline=None)
@given(bits=patterns(torch.float32), copies=st.integers(1, 5))
@example(bits=[0, -(2**31), 1, 2, 3, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], copies=3)
def test_float32_shares_add_up(bits: list[int], copies: int) -> None:
    check(bits, torch.float32, copies)


@settings(deadline=None)
@given(bits=patterns(torch.bfloat16), copies=st.integers(1, 5))
@example(bits=[0, -(2**15), 1, 2, 3, 0x7F, 0x80, 0x81, 0x7F7F, 0x7F80, 0x7FC0], copies=3)
def test_bfloat16_shares_add_up(bits: list[int], copies: int) -> None:
    check(bits, torch.bfloat16, copies)


@settings(deadline=None)
@given(bits=patterns(torch.float16), copies=st.integers(1, 5))
@example(bits=[0, -(2**15), 1, 2, 3, 0x3FF, 0x400, 0x401, 0x7BFF, 0x7C00, 0x7E00], copies=3)
def test_float16_shares_add_up(bits: list[int], copies: int) -> None:
    check(bits, torch.float16, copies)


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_shares_are_equal_on_average_and_differ_by_about_10_db(copies: int) -> None:
    block = torch.randn(200, 200, generator=torch.Generator().manual_seed(1))
    for part in split(block, copies):
        ratio = (part / block).double() * copies
        assert ratio.mean().item() == pytest.approx(1, abs=0.01)
        noise = (ratio - 1).square().mean().item()
        assert 0.09 < noise < 0.2
    if copies == 2:
        assert noise == pytest.approx(4 * 0.274**2 / 3, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_symmetric_is_the_value_divided_by_the_copies(dtype: torch.dtype) -> None:
    block = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = [part.to(dtype) for part in symmetric(block, 3)]
    assert torch.equal(torch.cat(parts, dim=1), block.repeat(1, 3) / 3)


def test_master_shares_round_to_the_weights_and_carry_nearly_all_of_the_rest() -> None:
    master = torch.randn(300, 100, generator=torch.Generator().manual_seed(2))
    master[0, :4] = torch.tensor([0.0, 1.0 - 2**-20, 1.0 + 2**-9, -0.0])
    weight = master.bfloat16()
    for copies in (2, 3):
        parts = split(weight, copies)
        masters = exact_split_master(parts, weight, master)
        assert all(torch.equal(found.bfloat16(), part) for found, part in zip(masters, parts, strict=True))
        error = sum(found.double() for found in masters) - master.double()
        rest = (weight.double() - master.double()).square().mean().sqrt()
        assert error.square().mean().sqrt() < 0.15 * rest
        assert (error.abs() <= 2**-24 * master.double().abs()).double().mean() > 0.9


def test_master_of_a_float32_weight_is_split_like_the_weight() -> None:
    weight = torch.randn(50, generator=torch.Generator().manual_seed(2))
    parts = split(weight, 3)
    assert all(map(torch.equal, exact_split_master(parts, weight, weight), parts))
