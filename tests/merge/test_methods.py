"""Merge methods against float64 formulas written element by element."""

import numpy as np
import pytest
import torch

from merge.methods import linear, ties


def tensors(count: int, size: int = 500) -> list[torch.Tensor]:
    random = np.random.default_rng(3)
    return [torch.from_numpy(random.normal(size=size).astype(np.float32)) for _ in range(count)]


def ties_oracle(base, trimmed, weights, scale, normalize) -> np.ndarray:
    merged = []
    for place in range(len(base)):
        weighted = [float(delta[place]) * weight for delta, weight in zip(trimmed, weights, strict=True)]
        sign = 1 if sum(weighted) >= 0 else -1
        agree = [number for number, value in enumerate(weighted) if np.sign(value) == sign]
        divisor = sum(weights[number] for number in agree) if normalize else 1
        merged.append(float(base[place]) + scale * sum(weighted[number] for number in agree) / (divisor or 1))
    return np.array(merged)


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize: bool) -> None:
    values, weights = tensors(3), [0.7, -0.2, 1.9]
    wanted = sum(value.double() * weight for value, weight in zip(values, weights, strict=True))
    found = linear(values, weights, normalize=normalize)
    torch.testing.assert_close(found.double(), wanted / (2.4 if normalize else 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 2.0, 0.5], [1.0, -0.5, 0.8], [1.0, -1.0, 1.0]])
def test_ties(weights: list[float], normalize: bool) -> None:
    base, *deltas = tensors(4)
    for number, delta in enumerate(deltas):
        delta[torch.arange(500) % (number + 2) == 0] = 0
    found = ties(base, deltas, weights, scale=0.7, normalize=normalize)
    # Where weights of opposite sign agree, the divisor is small and the float32 rounding large in proportion.
    np.testing.assert_allclose(found, ties_oracle(base, deltas, weights, 0.7, normalize), rtol=1e-4, atol=1e-5)


def test_ties_by_hand() -> None:
    base = torch.tensor([10.0, 10.0, 10.0, 10.0, 10.0])
    first = torch.tensor([1.0, 2.0, 0.0, -1.0, 3.0])
    second = torch.tensor([3.0, -1.0, 0.0, 1.0, 0.0])
    # agree; + wins; nothing; a zero sum elects +; a trimmed value does not count
    assert ties(base, [first, second], [1, 1], scale=1, normalize=True).tolist() == [12, 12, 10, 11, 13]
    assert ties(base, [first, second], [1, 1], scale=1, normalize=False).tolist() == [14, 12, 10, 11, 13]
    # weighting comes before the election: 2 - 3 elects -
    assert ties(base, [first, second], [1, 3], scale=2, normalize=True).tolist() == [15, 8, 10, 12, 16]


def test_ties_divisor_of_zero_counts_as_one() -> None:
    one, minus = torch.tensor([1.0]), torch.tensor([-2.0])
    assert ties(torch.zeros(1), [one, minus], [1.0, -1.0], scale=1, normalize=True).tolist() == [3.0]


def test_inputs_stay_as_they_are() -> None:
    values = tensors(3)
    copies = [value.clone() for value in values]
    linear(values, [1, 2, 3], normalize=True)
    ties(values[0], values[1:], [1, 2], scale=1, normalize=True)
    assert all(map(torch.equal, values, copies))
