"""Methods that are sums over models: each step adds a model, and what is merged is made of the sum at the end.

That is how merges of subsets of the same models share them: {1, 2, 3} goes on from the sum of {1, 2}.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from checkpoint.source import Box, empty_tensor

SIGN = -(2**31)
"""The bit of the sign in float32."""


class Kind(Protocol):
    """What is summed of tensors of one shape."""

    def room(self, like: torch.Tensor) -> Any:
        """Return where a sum may be kept."""

    def add(self, before: Any, tensor: torch.Tensor, factor: float, into: Any) -> None:
        """Write a sum with one more tensor; `before` is what was summed so far, None at first, or `into` itself."""


@dataclass(frozen=True)
class Weighted:
    """sum(f_i x_i): a tensor."""

    def room(self, like: torch.Tensor) -> torch.Tensor:
        return room_like(like)

    def add(self, before: torch.Tensor | None, tensor: torch.Tensor, factor: float, into: torch.Tensor) -> None:
        if before is None:
            torch.mul(tensor, factor, out=into)
        else:
            torch.add(before, tensor, alpha=factor, out=into)


@dataclass(slots=True)
class Signs:
    """T = sum(f_i x_i), S = sum |f_i x_i|, and how many x_i are above and below zero."""

    total: torch.Tensor
    sizes: torch.Tensor
    above: torch.Tensor | None = None
    """int8; None if they are not counted."""
    below: torch.Tensor | None = None


@dataclass(frozen=True)
class Signed:
    """What TIES sums; of less than 128 models if they are counted."""

    counted: bool

    def room(self, like: torch.Tensor) -> Signs:
        return Signs(room_like(like), room_like(like))

    def add(self, before: Signs | None, tensor: torch.Tensor, factor: float, into: Signs) -> None:
        above, below = (is_(tensor, ">"), is_(tensor, "<")) if self.counted else (None, None)
        if before is None:
            torch.mul(tensor, factor, out=into.total)
            torch.abs(into.total, out=into.sizes)
        else:
            torch.add(before.total, tensor, alpha=factor, out=into.total)
            torch.add(before.sizes, torch.abs(tensor, out=room_like(tensor)), alpha=abs(factor), out=into.sizes)
            if above is not None and below is not None and before.above is not None and before.below is not None:
                above.add_(before.above)
                below.add_(before.below)
        into.above, into.below = above, below


def mean(total: torch.Tensor, base: torch.Tensor | None, divisor: float | None, scale: float) -> torch.Tensor:
    """Return base + scale * total / divisor; without a base, or a divisor, what is left."""
    if divisor is not None:
        total = torch.div(total, divisor, out=room_like(total))
    return total if base is None else torch.add(base, total, alpha=scale, out=room_like(base))


def agreed(signs: Signs, base: torch.Tensor, weight: float, scale: float) -> torch.Tensor:
    """Return base + scale * the sum of those that agree with T's sign, + if T is zero.

    Args:
        weight: of each of them, by which and by whose number the sum is divided if they were counted.
    """
    # They add up to +-(S + |T|) / 2. T is -0 only where S is 0.
    merged = room_like(base)
    bits = torch.bitwise_and(signs.total.view(torch.int32), SIGN, out=merged.view(torch.int32))
    bits.bitwise_or_(signs.sizes.view(torch.int32))
    merged.add_(signs.total)
    if signs.above is None or signs.below is None:
        return torch.add(base, merged, alpha=scale / 2, out=merged)
    count = is_(signs.total, "<").neg_().bitwise_and_(signs.above ^ signs.below).bitwise_xor_(signs.above)
    merged.div_(room_like(base).copy_(count.clamp_(min=1)))
    return torch.add(base, merged, alpha=scale / (2 * weight), out=merged)


@dataclass(frozen=True, kw_only=True)
class Summed:
    """A merge of one tensor as a sum."""

    kind: Kind
    keys: tuple[Any, ...]
    """What each model adds; two of one kind with the same key add the same."""
    factors: tuple[float, ...]
    read: Callable[[int, Box], torch.Tensor]
    """From a model's number to a box of what it adds; not to be changed."""
    finish: Callable[[Any, Box], torch.Tensor]
    """From the sum, which is not to be changed, to the merged values in a box."""


def merged_of(merges: Sequence[Summed], box: Box) -> Iterator[torch.Tensor]:
    """Yield a box of each merge, good until the next is asked for; each goes on from where the last one began alike."""
    kind: Kind | None = None
    keys: tuple[Any, ...] = ()
    sums: list[Any] = []
    """Of the first models of the last merge: of one, of two, ...; of a merge alone, all in one place."""
    alone = len(merges) == 1
    for one in merges:
        if one.kind != kind:
            kind, keys, sums = one.kind, (), []
        same = 0
        while same < min(len(keys), len(one.keys)) and keys[same] == one.keys[same]:
            same += 1
        for number in range(same, len(one.keys)):
            tensor = one.read(number, box)
            place = 0 if alone else number
            if place == len(sums):
                sums.append(kind.room(tensor))
            kind.add(sums[place - (not alone)] if number else None, tensor, one.factors[number], sums[place])
        keys = one.keys
        yield one.finish(sums[0 if alone else len(keys) - 1], box)


def in_turn(kind: Kind, tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> Any:
    """Return the sum of tensors."""
    total = None
    room = kind.room(tensors[0])
    for tensor, factor in zip(tensors, factors, strict=True):
        kind.add(total, tensor, factor, room)
        total = room
    return total


def room_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of this shape, its values undefined, in float32."""
    if tensor.device.type == "cpu":
        return empty_tensor(tensor.shape)
    return torch.empty_like(tensor, dtype=torch.float32)


def is_(values: torch.Tensor, which: Literal["<", ">"]) -> torch.Tensor:
    """Return 1 where values are below or above zero, int8. (On a CPU torch takes eight times as long as numpy.)"""
    if values.device.type == "cpu":
        return torch.from_numpy((np.less if which == "<" else np.greater)(values.detach().numpy(), 0).view(np.int8))
    return (values < 0 if which == "<" else values > 0).to(torch.int8)
