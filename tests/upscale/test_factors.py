"""Recipes: what becomes of axes and config, and what is refused."""

import pytest
from grown_models import config

from parallel.errors import InputError
from upscale.factors import AxisGrowth, Recipe, axis_growths, grown_config


def order(growth: AxisGrowth, part: slice | None = None) -> list[tuple[int, int]]:
    """(copy, small index) of every element of a piece of the grown axis."""
    part = part or slice(0, growth.size * growth.copies)
    found = []
    for run in growth.runs(part):
        assert run.target.start == len(found)
        found += [(run.copy, at) for at in range(*run.source)]
        assert run.target.stop == len(found)
    return found


def test_copies_stand_in_tile_order() -> None:
    whole = order(AxisGrowth(size=3, copies=2, run=3))
    assert whole == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_repeated_runs_follow_one_another() -> None:
    growth = AxisGrowth(size=4, copies=4, run=2, repeats=2)
    first = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert order(growth) == first + [(copy + 2, at) for copy, at in first]


@pytest.mark.parametrize(
    "growth", [AxisGrowth(size=6, copies=3, run=6), AxisGrowth(size=6, copies=4, run=2, repeats=2)]
)
def test_any_piece_of_an_axis_is_a_piece_of_the_whole(growth: AxisGrowth) -> None:
    whole = order(growth)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            assert order(growth, slice(start, stop)) == whole[start:stop]


def test_grown_config_multiplies_sizes_and_keeps_head_dim() -> None:
    small = {**config(), "rope_theta": 5e5}
    del small["head_dim"]
    grown = grown_config(Recipe(width=2, ffn=3), small)
    assert grown == {
        **small,
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 60,
        "head_dim": 6,
    }


def test_config_without_kv_heads_has_as_many_as_heads() -> None:
    small = config()
    del small["num_key_value_heads"]
    assert grown_config(Recipe(heads=2, kv_heads=2), small)["num_key_value_heads"] == 8


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (Recipe(width=0), "growth factor of hidden is 0: allowed are whole numbers from 1 on"),
        (Recipe(ffn=1.5), "growth factor of ffn is 1.5: allowed are whole numbers from 1 on"),  # type: ignore[arg-type]
        (
            Recipe(width=2, method="exactsplit"),  # type: ignore[arg-type]
            "unknown growth method 'exactsplit': allowed are exact-split, symmetric, diagonal; "
            "did you mean 'exact-split'?",
        ),
        (
            Recipe(heads=3, kv_heads=2),
            "growth factor of heads is 3: allowed are multiples of that of kv_heads, 2, "
            "so that each query head keeps its key/value head",
        ),
        (
            Recipe(heads=5, kv_heads=5),
            "hidden size 24 and 20 heads after growth: "
            "transformers' llama allows a hidden size that is a multiple of the heads alone",
        ),
    ],
)
def test_refused(recipe: Recipe, line: str) -> None:
    with pytest.raises(InputError) as error:
        axis_growths(recipe, config())
    assert str(error.value) == line


def test_mistral_allows_any_number_of_heads() -> None:
    assert axis_growths(Recipe(heads=5, kv_heads=5), config(model_type="mistral"))["q"].copies == 5
