"""Share values among copies: pure functions on tensors, and the random numbers that they use.

A linear layer whose input is n copies of x keeps its function if and only if the n blocks that replace its matrix W
add up to W (HyperCloning, arXiv 2409.12903, section 3).
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch

SPREAD = 0.274
"""A share of two is uniform in 0.5 +- this: noise 10 dB below the signal (4 s^2 / 3 = 0.1), as in HyperCloning."""

Uniform = Callable[[int], torch.Tensor]
"""From a level of the split to numbers in [0, 1), float32, in the block's shape."""


def symmetric(block: torch.Tensor, copies: int) -> list[torch.Tensor]:
    """Return equal shares, block / copies, in float32.

    Copies made so stay equal for ever (muPscaling, arXiv 2602.10545): training cannot tell them apart.
    """
    return [block.float() / copies] * copies


def diagonal(block: torch.Tensor, copies: int, output: int) -> list[torch.Tensor]:
    """Return the whole value to one of the copies, in turn by the copy of the output, and 0 to the others, in float32.

    HyperCloning's diagonal variant: with as many copies of outputs as of inputs, independent models side by side.
    """
    whole, nothing = block.float(), torch.zeros(block.shape)
    return [whole if copy == output % copies else nothing for copy in range(copies)]


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
    k, none larger than k, so the dtype holds each exactly. They have the value's sign; a value that is not finite
    is copied.

    Args:
        block: float32, bfloat16 or float16, any shape.
        copies: number of shares n; on average each is 1/n.
        uniform: the random numbers; called for the levels 0 .. n - 2.
    """
    if copies == 1:
        return [block]
    limits = torch.finfo(block.dtype)
    whole = block.float()
    power = (whole.view(torch.int32) & 0x7F800000).view(torch.float32)
    # Below the smallest normal number the unit is the smallest subnormal one.
    unit = (power * limits.eps).clamp_(min=limits.tiny * limits.eps)
    rest = whole.abs().div_(unit)
    odd = ~torch.isfinite(whole)
    shares = []
    for level in range(copies):
        left = copies - level
        share = rest
        if left > 1:
            ratio = uniform(level).mul(4 * SPREAD).add_(1 - 2 * SPREAD).div_(left)
            share = ratio.mul_(rest).round_()
            rest = rest - share
        part = torch.copysign(share * unit, whole)
        shares.append(torch.where(odd, whole, part).to(block.dtype))
    return shares


def exact_split_master(parts: list[torch.Tensor], weight: torch.Tensor, master: torch.Tensor) -> list[torch.Tensor]:
    """Return shares of a float32 master copy that round to the given shares of the weight.

    A trainer overwrites weights by rounding their masters, so what the weight's dtype cannot hold (master - weight)
    is given to the shares only as far as none rounds to another number; a rest beyond that is dropped.

    Args:
        parts: what `exact_split(weight, ...)` returned.
        weight: the master rounded to the weight's dtype.
    """
    # Half a unit of the weight's dtype, in steps of float32's bit pattern; the tie itself is left out.
    mantissa = round(-np.log2(torch.finfo(weight.dtype).eps))
    half = max(0, (1 << (23 - mantissa)) // 2 - 1)
    rest = master - weight.float()
    found = []
    for part in parts:
        start = part.float()
        bits = start.view(torch.int32)
        ends = (bits - half).view(torch.float32), (bits + half).view(torch.float32)
        moved = (start + rest).clamp(min=torch.minimum(*ends), max=torch.maximum(*ends))
        moved = torch.where((start != 0) & torch.isfinite(start), moved, start)
        rest = rest - (moved - start)
        found.append(moved)
    return found


def normal_at(key: str, index: np.ndarray) -> torch.Tensor:
    """Return standard normal numbers of a stream at the given places (Box and Muller, 1958), as `uniform_at` does."""
    radius = torch.log1p(-uniform_at(f"{key}/radius", index)).mul_(-2).sqrt_()
    return radius * torch.cos(uniform_at(f"{key}/angle", index) * (2 * math.pi))


def uniform_at(key: str, index: np.ndarray) -> torch.Tensor:
    """Return the random numbers of a stream at the given places, float32 in [0, 1), in the index's shape.

    A number depends on the key and its place alone: not on what else is read, or by how many workers. The generator
    is splitmix64 (Steele et al., OOPSLA 2014), which turns a counter into its number by mixing.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    mixed = index.astype(np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(start)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    mixed >>= np.uint64(40)
    return torch.from_numpy(mixed.astype(np.float32)).mul_(2.0**-24)
