"""The streamed cut is that of a stable sort, on any tiles, however many elements tie."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merge.threshold as threshold
from checkpoint.source import Box, full_box, row_major_tiles
from merge.threshold import Cut, find_cuts, trim


def kept_by_sort(values: torch.Tensor, keep: int) -> torch.Tensor:
    order = torch.sort(values.flatten().abs(), descending=True, stable=True).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view(values.shape)


def cuts(values: list[torch.Tensor], keep: list[int], tile: int, spread=map) -> list[Cut]:
    shape = tuple(values[0].shape)

    def read(box: Box, which: Sequence[int]) -> list[torch.Tensor]:
        return [values[number][box] for number in which]

    return find_cuts(read, shape, row_major_tiles(shape, tile), keep, spread)


def check(values: list[torch.Tensor], keep: list[int], tile: int) -> None:
    shape = tuple(values[0].shape)
    for value, count, cut in zip(values, keep, cuts(values, keep, tile), strict=True):
        wanted = torch.where(kept_by_sort(value, count), value, 0.0)
        assert torch.equal(trim(value, cut, shape, full_box(shape)), wanted)
        for box in row_major_tiles(shape, max(5, prod(shape) // 20)):
            assert torch.equal(trim(value[box], cut, shape, box), wanted[box])


@settings(deadline=None)
@given(
    numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    tile=st.integers(1, 70),
    data=st.data(),
)
def test_any_numbers(numbers: list[float], tile: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(numbers)))
    check([torch.tensor(numbers)], [keep], tile)


@settings(deadline=None)
@given(
    numbers=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-45]), min_size=12, max_size=12),
    tile=st.sampled_from([1, 3, 4, 9, 100]),
    keep=st.integers(1, 12),
)
def test_many_ties_in_a_matrix(numbers: list[float], tile: int, keep: int) -> None:
    check([torch.tensor(numbers).view(3, 4)], [keep], tile)


def test_several_tensors_at_once_by_any_number_of_workers() -> None:
    random = torch.Generator().manual_seed(4)
    smooth = torch.randn(60, 50, generator=random)
    coarse = (torch.randn(60, 50, generator=random) * 8).round() / 8
    values, keep = [smooth, coarse, coarse.bfloat16().float() * 0], [1500, 700, 11]
    check(values, keep, 128)
    wanted = cuts(values, keep, prod(smooth.shape))
    assert cuts(values, keep, 64) == cuts(values, keep, 35) == wanted
    with ThreadPoolExecutor(3) as pool:
        assert cuts(values, keep, 64, pool.map) == wanted
    assert wanted[0] == Cut(
        pattern=smooth.abs().flatten().sort(descending=True).values[1499].view(torch.int32).item(), last=2999
    )
    assert wanted[2] == Cut(pattern=0, last=10)


def test_few_counts_are_alive_at_a_time() -> None:
    """Tiles are handed out in windows, so that their histograms never pile up."""
    longest = 0

    def spread(function, items):
        nonlocal longest
        longest = max(longest, len(items))
        return map(function, items)

    cuts([torch.randn(100, 10)], [500], 10, spread)
    assert longest == 64


def test_a_sample_is_of_all_parts_so_that_rows_that_differ_do_not_mislead() -> None:
    """First rows of tokens that nobody uses, say: one pass is enough all the same."""
    values = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(3))
    values[:9_000] /= 100
    read = []

    def spread(function, items):
        read.append(len(items))
        return map(function, items)

    tiles = row_major_tiles((40_000, 64))
    (cut,) = find_cuts(lambda box, _: [values[box]], (40_000, 64), tiles, [20_000 * 64], spread)
    assert read == [1, len(tiles)]  # a sample, by one for all, and a pass
    assert torch.equal(trim(values, cut, (40_000, 64), full_box((40_000, 64))) != 0, kept_by_sort(values, 20_000 * 64))


@pytest.mark.parametrize("keep", [1, 9])
def test_all_equal(keep: int) -> None:
    assert cuts([torch.full((3, 3), -2.0)], [keep], 2) == [Cut(pattern=0 if keep == 9 else 0x40000000, last=keep - 1)]


@pytest.mark.parametrize(("low", "high"), [(0, 0x7FFFFFFF), (0x3E000000, 0x3F800000), (0x3F000000, 0x3F000000), (0, 0)])
def test_what_lies_between_is_the_same_on_any_device(low, high) -> None:
    values = (torch.randn(300, 7, generator=torch.Generator().manual_seed(1)) * 8).round() / 8
    values[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    bits = [abs(int(one)) & 0x7FFFFFFF for one in values.abs().view(torch.int32).flatten()]
    wanted = sum(one > high for one in bits), [one for one in bits if low <= one <= high]
    for between in (threshold._between, threshold._between_anywhere):
        above, inside = between(values, low, high)
        assert (above, inside.tolist()) == wanted
