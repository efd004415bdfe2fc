"""The comparison's numbers, against float64 formulas on logits that are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from upscale.verify import compare


class Table(torch.nn.Module):
    """A model whose next-token logits depend on the present token alone."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.rows[input_ids])


SMALL = [[1.0, 2.0, 0.0], [0.0, -4.0, 3.0], [0.5, 0.0, 0.0]]
GROWN = [[1.0, 2.5, 0.0], [0.0, -4.0, 3.0], [0.0, 0.5, 0.0]]


def test_numbers() -> None:
    batches = [torch.tensor([[0, 1, 2, 0]]), torch.tensor([[2, 1], [1, 1]])]
    found = compare(Table(SMALL), Table(GROWN), batches)  # type: ignore[arg-type]
    p, q = (np.array(rows) - np.log(np.exp(rows).sum(1, keepdims=True)) for rows in (SMALL, GROWN))
    tokens = [0, 1, 2, 0, 2, 1, 1, 1]
    pairs = [(0, 1), (1, 2), (2, 0), (2, 1), (1, 1)]
    assert found.max_logit_difference == 0.5
    assert found.relative == 0.5 / 4
    assert found.mean_kl == pytest.approx(np.mean([(np.exp(p[t]) * (p[t] - q[t])).sum() for t in tokens]), rel=1e-5)
    assert found.argmax_agreement == 6 / 8
    assert found.loss_small == pytest.approx(-np.mean([p[a, b] for a, b in pairs]), rel=1e-6)
    assert found.loss_grown == pytest.approx(-np.mean([q[a, b] for a, b in pairs]), rel=1e-6)
    assert found.loss_difference == abs(found.loss_grown - found.loss_small) > 0.01


def test_nothing_to_compare_is_not_a_number() -> None:
    found = compare(Table(SMALL), Table(GROWN), [])  # type: ignore[arg-type]
    assert all(map(math.isnan, (found.relative, found.mean_kl, found.argmax_agreement, found.loss_difference)))
