"""Merge methods as pure functions on float32 tensors of one shape; they know no path, tile or YAML.

N models x_1 .. x_N with weights w_i; task vectors d_i = x_i - base, as far as they are kept (`merge.sparsify`).
Semantics are those of mergekit 0.1.5, but all arithmetic is float32, to be rounded once.
"""

from collections.abc import Sequence

import torch

from merge import sums

_ONE = 0x3F800000
"""The bits of 1.0 in float32."""
GUARD = 1e-8
"""A weight, or a sum of weights, that is no larger is not divided by at the end."""


def weighted_sum(tensors: Sequence[torch.Tensor], factors: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Return sum(f_i x_i), summed in the order given; a factor may be a tensor that broadcasts."""
    total = tensors[0] * factors[0]
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        if isinstance(factor, torch.Tensor):
            total.addcmul_(tensor, factor)
        else:
            total.add_(tensor, alpha=factor)
    return total


@torch.no_grad()
def linear(tensors: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Return sum(w_i x_i), divided by sum(w_i) if `normalize` (model soups, arXiv 2203.05482)."""
    total = sums.in_turn(sums.Weighted(), tensors, weights)
    return sums.mean(total, None, sum(weights) if normalize else None, 1.0)


@torch.no_grad()
def task_arithmetic(
    base: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> torch.Tensor:
    """Return base + scale * sum(w_i d_i), divided by sum(w_i) if `normalize` (arXiv 2212.04089, eq. 2)."""
    return sums.mean(sums.in_turn(sums.Weighted(), deltas, weights), base, divisor(weights, normalize), scale)


def divisor(weights: Sequence[float], normalize: bool) -> float | None:
    """Return what a weighted sum of task vectors is divided by, if by anything."""
    return sum(weights) if normalize and abs(sum(weights)) >= GUARD else None


@torch.no_grad()
def ties(
    base: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
    factors: Sequence[float] | None = None,
) -> torch.Tensor:
    """Return base + scale * the task vectors' weighted mean over those that agree on the sign (arXiv 2306.01708).

    For each element the sign is that of sum(w_i d_i), + if the sum is zero; task vectors of another sign, and zeros,
    do not count. As in mergekit, weighting comes before the election of the sign (the paper elects unweighted).

    Args:
        deltas: task vectors d_i, zero where they were trimmed.
        weights: w_i; a negative one flips its task vector's sign and counts as negative in the divisor.
        scale: lambda, the factor of the merged task vector.
        normalize: divide by the weights that agree (by 1 where they add up to 0).
        factors: further factors of the task vectors, which do not count in the divisor; none is negative.
    """
    products = [weight * factor for weight, factor in zip(weights, factors or [1.0] * len(weights), strict=True)]
    kind = signed(weights, normalize)
    if kind is None:
        return _ties(base, deltas, weights, products, scale)
    return sums.agreed(sums.in_turn(kind, deltas, products), base, weights[0], scale)


def signed(weights: Sequence[float], normalize: bool) -> sums.Signed | None:
    """Return what TIES sums; None if it takes more than a sum: weights that differ have to be summed by sign."""
    if not normalize:
        return sums.Signed(counted=False)
    same = len({*weights}) == 1 and weights[0] > GUARD
    return sums.Signed(counted=True) if same and len(weights) < 128 else None


def _ties(
    base: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    products: Sequence[float],
    scale: float,
) -> torch.Tensor:
    """Do the same with weights that differ."""
    total = weighted_sum(deltas, products)
    room = torch.empty_like(total)
    sign = _elected(total)
    merged, divisor = total.zero_(), torch.zeros_like(base)
    for delta, product, weight in zip(deltas, products, weights, strict=True):
        if product == 0:
            continue
        agrees = torch.mul(delta, sign, out=room).clamp_(**({"min": 0.0} if product > 0 else {"max": 0.0}))
        merged.add_(agrees, alpha=product)
        divisor.add_(agrees.sign_(), alpha=weight if product > 0 else -weight)
    return merged.div_(_no_zeros(divisor, weights)).mul_(sign).mul_(scale).add_(base)


def _elected(total: torch.Tensor) -> torch.Tensor:
    """Return the sign of a sum of task vectors, + where it is zero. (torch.where takes ten times as long.)"""
    bits = (total + 0.0).view(torch.int32)  # -0 + 0 is +0
    return bits.bitwise_and_(sums.SIGN).bitwise_or_(_ONE).view(torch.float32)


def _no_zeros(divisor: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return divisors with 1, or what is as good, for 0: sums of some of the weights, 0 where there is none."""
    if min(weights) > 0:
        return divisor.clamp_(min=min(weights) / 2)  # of a sum of nothing, which is 0
    return divisor.masked_fill_(divisor == 0, 1.0)


def sce(base: torch.Tensor, deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return base + the weighted mean of the task vectors over those that agree on the sign (arXiv 2408.07990).

    The sign is that of the unweighted sum, + if that is zero.

    Args:
        deltas: zero where the variance over the models is small.
        weights: each model's share of sum(d^2) over the whole tensor.
    """
    total = weighted_sum(deltas, [1.0] * len(deltas))
    sign = _elected(total)
    merged, divisor = total.zero_(), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta * sign).clamp_(min=0)
        merged += agrees * weight
        divisor += agrees.sign_().mul_(weight)
    return merged.div_(divisor.clamp_(min=1e-6)).mul_(sign).add_(base)


def variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return each element's variance over the models (of the population), in float32."""
    mean = weighted_sum(deltas, [1.0] * len(deltas)).div_(len(deltas))
    total, room = torch.zeros_like(mean), torch.empty_like(mean)
    for delta in deltas:
        torch.sub(delta, mean, out=room)
        total.addcmul_(room, room)
    return total.div_(len(deltas))


def ram(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], *, epsilon: float, unique: Sequence[float] | None = None
) -> torch.Tensor:
    """Return base + what one model alone has changed + the mean of what several have (arXiv 2601.13572).

    Args:
        epsilon: a change counts if it is larger.
        unique: a factor a model of what it alone has changed; 1 by default (RAM+ has others).
    """
    active = [delta.abs() > epsilon for delta in deltas]
    count = how_many(active)
    merged = torch.zeros_like(base)
    for delta, mine, factor in zip(deltas, active, unique or [1.0] * len(deltas), strict=True):
        merged += torch.where(mine, torch.where(count == 1, delta * factor, delta / count), 0.0)
    return merged.add_(base)


def how_many(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return of how many masks each element is, int16."""
    total = masks[0].to(torch.int16)
    for mask in masks[1:]:
        total += mask
    return total


def nearswap(base: torch.Tensor, other: torch.Tensor, *, t: float) -> torch.Tensor:
    """Return the base moved towards the other model by t at most, all the way where they are nearer than that."""
    weight = (t / (base - other).abs_().clamp_(min=1e-6)).clamp_(0, 1)
    return weight * other + (1 - weight) * base


def fisher(
    tensors: Sequence[torch.Tensor], fishers: Sequence[torch.Tensor], weights: Sequence[float], *, floor: float
) -> torch.Tensor:
    """Return sum(w_i F_i x_i) / sum(w_i F_i), with F_i >= floor (Matena and Raffel, arXiv 2111.09832, eq. 4).

    Where no model has any Fisher information the floor makes it the weighted mean.

    Args:
        fishers: diagonals F_i of the models' Fisher matrices.
        floor: above 0.
    """
    shares = [value.clamp(min=floor) * weight for value, weight in zip(fishers, weights, strict=True)]
    divisor = shares[0].clone()
    for share in shares[1:]:
        divisor += share
    return weighted_sum(tensors, shares).div_(divisor)
