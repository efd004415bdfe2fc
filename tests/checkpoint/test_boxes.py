"""Boxes and tiles: every element exactly once, in row-major order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.shard import flat_runs
from checkpoint.source import flat_boxes, row_major_tiles

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(shapes, st.integers(1, 40))
def test_tiles_cover_in_row_major_order(shape, tile):
    values = np.arange(np.prod(shape)).reshape(shape)
    pieces = [values[box].reshape(-1) for box in row_major_tiles(shape, tile)]
    assert np.array_equal(np.concatenate(pieces), values.reshape(-1))
    assert max(len(piece) for piece in pieces) <= tile


@given(shapes, st.data())
def test_flat_boxes_are_a_flat_range(shape, data):
    count = int(np.prod(shape))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    values = np.arange(count).reshape(shape)
    boxes = flat_boxes(shape, start, stop)
    found = np.concatenate([np.zeros(0, int), *[values[box].reshape(-1) for box in boxes]])
    assert np.array_equal(found, np.arange(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1


@given(shapes, st.data())
def test_flat_runs_are_a_box(shape, data):
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    values = np.arange(np.prod(shape))
    found = np.concatenate([values[start:stop] for start, stop in flat_runs(shape, tuple(box))])
    assert np.array_equal(found, values.reshape(shape)[tuple(box)].reshape(-1))


def test_a_scalar_and_an_empty_tensor():
    assert row_major_tiles(()) == [()]
    assert row_major_tiles((0, 3)) == []
