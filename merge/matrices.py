"""Methods whose working set is a matrix: RegMean's least squares and the singular vectors of TSV-Merge.

O outputs and I inputs of a linear layer, W [O, I] as torch.nn.Linear stores it; N models; R = min(O, I). All is float64
and rounded once to float32; a merged matrix is held as long as it is written.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch

from checkpoint.source import Box, Map
from merge import methods
from merge.stack import Stack

RIDGE = 1e-4
"""Least share of its diagonal that a Gram matrix keeps to itself: rounded to float32, one that is singular has
eigenvalues of -4e-6 of its diagonal with 4096 inputs, growing with their square root."""
ROWS = 256
"""Rows of W that are multiplied and solved for at once: results do not depend on who does it."""


def regmean(
    tensors: Iterable[torch.Tensor],
    grams: Iterable[torch.Tensor],
    weights: Sequence[float],
    *,
    alpha: float,
    spread: Map = map,
) -> torch.Tensor:
    """Return W [O, I], W^T = (sum w_i G_i)^-1 sum w_i G_i W_i^T, float32 (Jin et al., arXiv 2212.09849, eq. 2 and 3).

    It is nearest to all models in what it makes of their own inputs: it minimizes sum_i w_i ||X_i (W - W_i)^T||^2. What
    is solved for is how far it is from the first model, so that equal models are merged into themselves.

    Elements of G_i = X_i^T X_i beside the diagonal are multiplied by alpha, as they do; by 1 - RIDGE at most, so that
    fewer tokens than inputs do not make the sum singular. Directions that no input has are then decided by the
    diagonals, and an input that is always 0 has the models' weighted mean; a pseudo-inverse would make both 0.

    Memory: 8 (4 I^2 + 4 O I) bytes, one model's tensors at a time.

    Args:
        tensors: W_i, read one after the other; so are `grams`.
        grams: G_i [I, I], divided by their tokens if the length of a text is not to count.

    Raises:
        torch.linalg.LinAlgError: the sum is not positive definite: no sum of Gram matrices.
    """
    alpha = min(alpha, 1 - RIDGE)
    first: torch.Tensor | None = None
    for tensor, gram, weight in zip(tensors, grams, weights, strict=True):
        scaled = gram.double() * (alpha * weight)
        scaled.diagonal().copy_(gram.diagonal().double() * weight)
        if first is None:
            first, total = tensor.double(), scaled
            right, mean = torch.zeros_like(first), torch.zeros_like(first)
            blocks = [slice(at, at + ROWS) for at in range(0, len(first), ROWS)]
            continue
        away = tensor - first
        total += scaled
        mean.add_(away, alpha=weight)
        for rows, part in zip(blocks, spread(partial(_product, away, scaled), blocks), strict=True):
            right[rows] += torch.from_numpy(part)
    assert first is not None, "no models"
    unused = total.diagonal() == 0
    total.diagonal()[unused] = 1
    factor = torch.linalg.cholesky(total)
    for rows, part in zip(blocks, spread(partial(_solution, right, factor), blocks), strict=True):
        right[rows] = torch.from_numpy(part)
    right[:, unused] = mean[:, unused] / sum(weights)
    return right.add_(first).float()


def _product(away: torch.Tensor, gram: torch.Tensor, rows: slice) -> np.ndarray:
    return (away[rows] @ gram).numpy()


def _solution(right: torch.Tensor, factor: torch.Tensor, rows: slice) -> np.ndarray:
    return torch.cholesky_solve(right[rows].T, factor).T.numpy()


Singular = tuple[torch.Tensor, ...]
"""U [O, k], s [k], V^T [k, I]."""


def singular(delta: torch.Tensor, rank: int) -> Singular:
    """Return the largest singular values of a matrix, so many at most, and their vectors, float64.

    Those that are 0 but for rounding are left out: their vectors are any.
    """
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    count = min(rank, _positive(s, delta))
    return u[:, :count].clone(), s[:count].clone(), vt[:count].clone()


def tsv(parts: Sequence[Singular]) -> torch.Tensor:
    """Return the sum of task vectors whose singular vectors were made orthogonal to one another's, float64.

    TSV-Merge (Gargiulo et al., arXiv 2412.00081): U = [U_1 ... U_N] and V = [V_1 ... V_N]
    are replaced by the nearest matrices with orthonormal columns (Procrustes), and U diag(s) V^T is the sum.

    Args:
        parts: of each task vector, R / N of them each. Signs and the models' order do not matter.
    """
    u, s, vt = torch.cat([u for u, _, _ in parts], dim=1), torch.cat([s for _, s, _ in parts]), [vt for *_, vt in parts]
    return (_orthonormal(u) * s) @ _orthonormal(torch.cat(vt))


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix with orthonormal rows or columns: U V^T of its singular vectors.

    Vectors of singular values that are 0 are left out: models that share a direction would else get any other as well.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    count = _positive(s, matrix)
    return u[:, :count] @ vt[:count]


def _positive(s: torch.Tensor, matrix: torch.Tensor) -> int:
    """Return how many singular values are more than rounding."""
    return int((s > s[:1] * (max(matrix.shape) * torch.finfo(s.dtype).eps)).sum())


def regmean_stats(stack: Stack, spread: Map) -> torch.Tensor | None:
    """Return the merged matrix; None for what is no linear layer's."""
    grams = stack.order.grams
    if not grams:
        return None
    names = [operand.name for operand in stack.order.operands]
    try:
        return regmean(
            (stack.whole(operand) for operand in stack.order.operands),
            (gram.matrix(name).double() / max(1, gram.tokens) for gram, name in zip(grams, names, strict=True)),
            stack.weights,
            alpha=stack.order.shared["alpha"],
            spread=spread,
        )
    except torch.linalg.LinAlgError:
        folders = ", ".join(str(gram.folder) for gram in grams)
        raise stack.error(f"its Gram matrices are no X^T X, or hold values that are not finite: {folders}") from None


def regmean_box(stack: Stack, box: Box, stats: torch.Tensor | None) -> torch.Tensor:
    return methods.linear(stack.values(box), stack.weights, normalize=True) if stats is None else stats[box]


def tsv_stats(stack: Stack, spread: Map) -> torch.Tensor | None:
    """Return the merged matrix; None for what is no linear layer's: an embedding's rows are tokens, not a map."""
    if stack.kind != "matrix":
        return None
    if len(stack.shape) > 2:
        raise stack.error("tsv merges matrices, and this holds those of all experts")
    rank = min(stack.shape) // stack.count
    if rank == 0:
        raise stack.error(f"tsv gives each of {stack.count} models a part of {min(stack.shape)} singular vectors")
    assert stack.order.base is not None, f"{stack.name} has no base"
    base = stack.whole(stack.order.base).double()

    def part(number: int) -> tuple[np.ndarray, ...]:
        found = singular(stack.whole(stack.order.operands[number]) - base, rank)
        return tuple(one.numpy() for one in found)

    parts = [tuple(map(torch.from_numpy, one)) for one in spread(part, range(stack.count))]
    return tsv(parts).mul_(stack.order.shared["lambda"]).add_(base).float()


def tsv_box(stack: Stack, box: Box, stats: torch.Tensor | None) -> torch.Tensor:
    if stats is not None:
        return stats[box]
    scale = stack.order.shared["lambda"]
    return methods.task_arithmetic(stack.base(box), stack.deltas(box), [1.0] * stack.count, scale=scale, normalize=True)
