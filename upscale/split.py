"""Share values among copies: pure functions on tensors.

A linear layer whose input is n copies of x keeps its function if and only if the n blocks that replace its matrix W
add up to W (HyperCloning, arXiv 2409.12903, section 3).
"""

from collections.abc import Callable

import numpy as np
import torch

SPREAD = 0.274
"""A share of two is uniform in 0.5 +- this: noise 10 dB below the signal (4 s^2 / 3 = 0.1), as in HyperCloning."""

Uniform = Callable[[int], torch.Tensor]
"""From a level of the split to numbers in [0, 1), float32, in the block's shape, that may be overwritten."""


def symmetric(
    block: torch.Tensor, copies: int, offset: float = 0.0, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Return equal shares, block / copies; of offset + block, less the offset, if the model adds one.

    Computed in float32 and rounded once, to `dtype`. Copies made so stay equal for ever (muPscaling,
    arXiv 2602.10545): training cannot tell them apart.
    """
    if block.dtype == dtype and not offset:
        share = block / copies  # in float32 within torch's kernel: a third of the passes over memory
    else:
        share = (block.float() / copies + (offset / copies - offset)).to(dtype)
    return [share] * copies


def diagonal(block: torch.Tensor, copies: int, output: int) -> list[torch.Tensor]:
    """Return the whole value to one of the copies, in turn by the copy of the output, and 0 to the others, in float32.

    HyperCloning's diagonal variant: with as many copies of outputs as of inputs, independent models side by side.
    """
    whole, nothing = block.float(), torch.zeros(block.shape)
    return [whole if copy == output % copies else nothing for copy in range(copies)]


def whole_to_one(block: torch.Tensor, copies: int, offset: float, uniform: torch.Tensor) -> list[torch.Tensor]:
    """Return offset + block to one of the copies, which a random number decides for each value, and 0 to the others.

    In the block's dtype and less the offset, which the model adds: exact in any dtype.
    """
    chosen = (uniform * copies).floor()
    return [torch.where(chosen == copy, block, torch.full_like(block, -offset)) for copy in range(copies)]


def cancelling_noise(std: float, copies: int, normal: Uniform) -> list[torch.Tensor]:
    """Return noise for each copy that adds up to zero: pairs of copies get +N and -N, an odd last one none.

    Apple's HyperCloning does the same. It is exact in exact arithmetic; in the model's dtype it is rounded.

    Args:
        std: standard deviation.
        normal: from a pair's number to standard normal numbers in the block's shape.
    """
    noise = [normal(pair) * std for pair in range(copies // 2)]
    found = [part for one in noise for part in (one, -one)]
    return found + [torch.zeros(())] * (copies % 2)


def exact_split(block: torch.Tensor, copies: int, uniform: Uniform) -> list[torch.Tensor]:
    """Return unequal shares of each value that add up to it exactly, in the block's own dtype.

    A value is a whole number k of units in its last place. Shares are whole numbers of the same unit that add up to
    k, none larger than k, so the dtype holds each exactly. None has the other sign; a value that is not finite is
    copied.

    Args:
        block: float32, bfloat16 or float16, any shape.
        copies: number of shares n; on average each is 1/n.
        uniform: the random numbers; called for the levels 0 .. n - 2.
    """
    if copies == 1:
        return [block]
    limits = torch.finfo(block.dtype)
    whole = block.float()
    unit = (whole.view(torch.int32) & 0x7F800000).view(torch.float32)
    # Below the smallest normal number the unit is the smallest subnormal one.
    unit = unit.mul_(limits.eps).clamp_(min=limits.tiny * limits.eps)
    rest = whole / unit  # k
    finite = bool(torch.isfinite(rest.sum()))
    shares = []
    for level in range(copies):
        left = copies - level
        share = rest
        if left > 1:
            share = uniform(level).mul_(4 * SPREAD / left).add_((1 - 2 * SPREAD) / left).mul_(rest).round_()
            rest.sub_(share)
        part = share.mul_(unit).to(block.dtype)
        shares.append(part if finite else torch.where(torch.isfinite(block), part, block))
    return shares


def exact_split_master(parts: list[torch.Tensor], weight: torch.Tensor, master: torch.Tensor) -> list[torch.Tensor]:
    """Return shares of a float32 master copy that round to the given shares of the weight.

    A trainer overwrites weights by rounding their masters, so what the weight's dtype cannot hold (master - weight)
    is given to the shares only as far as none rounds to another number; a rest beyond that is dropped.

    Args:
        parts: what `exact_split(weight, ...)` returned.
        weight: the master rounded to the weight's dtype.
    """
    rest = master - weight.float()
    found = []
    for part in parts:
        moved = rounding_to(part, part.float() + rest)
        rest = rest - (moved - part.float())
        found.append(moved)
    return found


def rounding_to(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the float32 numbers nearest to the wanted ones that round to the given numbers of a dtype."""
    # Half a unit of the dtype, in steps of float32's bit pattern; the tie itself is left out.
    mantissa = round(-np.log2(torch.finfo(part.dtype).eps))
    half = max(0, (1 << (23 - mantissa)) // 2 - 1)
    start = part.float()
    bits = start.view(torch.int32)
    ends = (bits - half).view(torch.float32), (bits + half).view(torch.float32)
    moved = wanted.clamp(min=torch.minimum(*ends), max=torch.maximum(*ends))
    return torch.where((start != 0) & torch.isfinite(start), moved, start)


def rounded_in_turn(values: torch.Tensor, copies: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return copies of float32 values, each rounded to a dtype, so that their mean is as near as it can be.

    What one copy's rounding took or gave, the next one has: the mean is off by half a unit / copies at most.
    """
    found = []
    rest = torch.zeros_like(values)
    for _ in range(copies):
        found.append((values + rest).to(dtype))
        rest = rest + (values - found[-1].float())
    return found
