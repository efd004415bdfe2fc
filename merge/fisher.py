"""Fisher-weighted averaging over boxes of a stack: the mean Fisher of a tensor first, which its floor is a share of."""

import math

import torch

from checkpoint.source import Box, Map
from merge import methods
from merge.stack import Stack


def mean(stack: Stack, spread: Map) -> float:
    """Return the mean of the models' Fishers over the whole tensor."""

    def totals(tile: Box) -> float:
        return sum(one.sum(dtype=torch.float64).item() for one in stack.fishers(tile))

    def make() -> float:
        return sum(spread(totals, stack.tiles)) / (stack.count * math.prod(stack.shape))

    return stack.reads.once_a_tensor(stack.name, ("fisher", stack.order.fishers), make)


def box(stack: Stack, box: Box, stats: float) -> torch.Tensor:
    """Return the merged values; the floor is that share of the tensor's mean Fisher.

    The paper's code (github.com/mmatena/model_merging) has 1e-6 for all. But squared gradients are the smaller, the
    more parameters a model has and the better it fits: an absolute floor above most of them would make the merge a
    plain mean without a word. A share means the same everywhere; 1e-6 is far below what tells models apart. It is one
    floor for all models: where none of them has information they count by weight alone.
    """
    values, weights = stack.values(box), stack.weights
    if stats < torch.finfo(torch.float32).tiny:
        return methods.linear(values, weights, normalize=True)
    fishers = [one / stats for one in stack.fishers(box)]
    return methods.fisher(values, fishers, weights, floor=stack.order.shared["floor"])
