"""Merge methods as pure functions on float32 tensors of one shape; they know no path, tile or YAML.

N models x_1 .. x_N with weights w_i; task vectors d_i = x_i - base. Semantics are those of mergekit 0.1.5, but all
arithmetic is float32, to be rounded once.
"""

from collections.abc import Sequence

import torch


def linear(tensors: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Return sum(w_i x_i), divided by sum(w_i) if `normalize` (model soups, arXiv 2203.05482).

    Summed in the order given, so that the same models in the same order give the same bits.
    """
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += tensor * weight
    return total / sum(weights) if normalize else total


def ties(
    base: torch.Tensor,
    trimmed: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float,
    normalize: bool,
) -> torch.Tensor:
    """Return base + scale * the task vectors' weighted mean over those that agree on the sign (arXiv 2306.01708).

    For each element the sign is that of sum(w_i d_i), + if the sum is zero; task vectors of another sign, and zeros,
    do not count. As in mergekit, weighting comes before the election of the sign (the paper elects unweighted).

    Args:
        trimmed: task vectors d_i, zero where they were trimmed.
        weights: w_i; a negative one flips its task vector's sign and counts as negative in the divisor.
        scale: lambda, the factor of the merged task vector.
        normalize: divide by the weights that agree (by 1 where they add up to 0).
    """
    weighted = [delta * weight for delta, weight in zip(trimmed, weights, strict=True)]
    total = torch.zeros_like(base)
    for delta in weighted:
        total += delta
    sign = torch.where(total >= 0, 1.0, -1.0)
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = torch.sign(delta) == sign
        merged += torch.where(agrees, delta, 0.0)
        divisor += torch.where(agrees, weight, 0.0)
    if normalize:
        merged /= torch.where(divisor == 0, 1.0, divisor)
    return base + scale * merged
