"""Merge methods as pure functions on float32 tensors of one shape; they know no path, tile or YAML.

N models x_1 .. x_N with weights w_i; task vectors d_i = x_i - base, as far as they are kept (`merge.sparsify`).
Semantics are those of mergekit 0.1.5, but all arithmetic is float32, to be rounded once.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from checkpoint.source import empty_box, full_box

_ONE = 0x3F800000
"""The bits of 1.0 in float32."""
_SIGN = -(2**31)
"""The bit of the sign."""
GUARD = 1e-8
"""Weights whose sum is no larger are not divided by."""


Step = Callable[[int, Any, Any], Any]
"""From a model's number, what was summed up to it (None: it is the first) and where the sum may be written (None: to
new memory) to the sum with it."""
Fold = Callable[[Step, int], Any]
"""How N models are summed with a step; the sum is not to be changed, for others may go on from it."""


def in_turn(step: Step, count: int) -> Any:
    """Sum over models, all in one place."""
    total = step(0, None, None)
    for number in range(1, count):
        total = step(number, total, total)
    return total


def weighted_sum(tensors: Sequence[torch.Tensor], factors: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Return sum(f_i x_i), summed in the order given; a factor may be a tensor that broadcasts."""
    total = tensors[0] * factors[0]
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        if isinstance(factor, torch.Tensor):
            total.addcmul_(tensor, factor)
        else:
            total.add_(tensor, alpha=factor)
    return total


def _sum(tensors: Sequence[torch.Tensor], factors: Sequence[float], fold: Fold) -> torch.Tensor:
    """Return sum(f_i x_i), summed in the order given; not to be changed."""

    def step(number: int, total: torch.Tensor | None, into: torch.Tensor | None) -> torch.Tensor:
        into = room_like(tensors[number]) if into is None else into
        if total is None:
            return torch.mul(tensors[number], factors[number], out=into)
        return torch.add(total, tensors[number], alpha=factors[number], out=into)

    found: torch.Tensor = fold(step, len(tensors))
    return found


@torch.no_grad()
def linear(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool, fold: Fold = in_turn
) -> torch.Tensor:
    """Return sum(w_i x_i), divided by sum(w_i) if `normalize` (model soups, arXiv 2203.05482); not to be changed."""
    total = _sum(tensors, weights, fold)
    return torch.div(total, sum(weights), out=room_like(total)) if normalize else total


@torch.no_grad()
def task_arithmetic(
    base: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = False,
    factors: Sequence[float] | None = None,
    fold: Fold = in_turn,
) -> torch.Tensor:
    """Return base + scale * sum(w_i d_i), divided by sum(w_i) if `normalize` (arXiv 2212.04089, eq. 2).

    Args:
        factors: further factors of the task vectors, which do not count in the divisor.
    """
    total = _sum(deltas, _products(weights, factors), fold)
    if normalize and abs(sum(weights)) >= GUARD:
        total = total / sum(weights)
    return torch.add(base, total, alpha=scale, out=room_like(base))


@torch.no_grad()
def ties(
    base: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
    factors: Sequence[float] | None = None,
    fold: Fold = in_turn,
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
        fold: how models are summed; merges of subsets may share it.
    """
    products = _products(weights, factors)
    counted = normalize and len({*weights}) == 1 and weights[0] > 0 and len(weights) < 128
    if normalize and not counted:
        return _ties(base, deltas, weights, products, scale)
    room = room_like(base)

    def step(number: int, before: Any, into: Any) -> Any:
        delta, product = deltas[number], products[number]
        total, sizes, *new_counts = into or (room_like(base), room_like(base), None, None)
        size = torch.abs(delta, out=room)
        if before is None:
            torch.mul(delta, product, out=total)
            torch.mul(size, abs(product), out=sizes)
        else:
            torch.add(before[0], delta, alpha=product, out=total)
            torch.add(before[1], size, alpha=abs(product), out=sizes)
        if not counted:
            return total, sizes
        counts: Any = _is(delta, ">"), _is(delta, "<")
        if before is not None:
            pairs = zip(before[2:], counts, new_counts, strict=True)
            counts = [torch.add(one, more, out=new) for one, more, new in pairs]
        return total, sizes, *counts

    # With S = sum |w_i d_i|, and T = sum w_i d_i: those that agree with T's sign add up to +-(S + |T|) / 2. T is -0
    # only where S is 0.
    total, sizes, *counts = fold(step, len(deltas))
    merged = room_like(base)
    bits = torch.bitwise_and(total.view(torch.int32), _SIGN, out=merged.view(torch.int32))
    bits.bitwise_or_(sizes.view(torch.int32))
    merged.add_(total)
    if counted:
        above, below = counts
        agree = _is(total, "<").neg_().bitwise_and_(above ^ below).bitwise_xor_(above).clamp_(min=1)
        merged.div_(room.copy_(agree).mul_(2 * weights[0]))
    else:
        merged.mul_(0.5)
    return torch.add(base, merged, alpha=scale, out=merged)


def room_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of this shape, its values undefined, in float32."""
    if tensor.device.type == "cpu":
        return empty_box(full_box(tensor.shape))
    return torch.empty_like(tensor, dtype=torch.float32)


def _is(values: torch.Tensor, which: Literal["<", ">"]) -> torch.Tensor:
    """Return 1 where values are below or above zero, int8. (On a CPU torch takes eight times as long as numpy.)"""
    if values.device.type == "cpu":
        return torch.from_numpy((np.less if which == "<" else np.greater)(values.detach().numpy(), 0).view(np.int8))
    return (values < 0 if which == "<" else values > 0).to(torch.int8)


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
    return bits.bitwise_and_(_SIGN).bitwise_or_(_ONE).view(torch.float32)


def _no_zeros(divisor: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return divisors with 1, or what is as good, for 0: sums of some of the weights, 0 where there is none."""
    if min(weights) > 0:
        return divisor.clamp_(min=min(weights) / 2)  # of a sum of nothing, which is 0
    return divisor.masked_fill_(divisor == 0, 1.0)


def _products(weights: Sequence[float], factors: Sequence[float] | None) -> list[float]:
    return [weight * factor for weight, factor in zip(weights, factors or [1.0] * len(weights), strict=True)]


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
