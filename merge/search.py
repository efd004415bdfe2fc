"""Searching for the weights of a merge: one a model, block of layers and kind of tensor, by bits per byte of texts.

Gradient-free, by CMA-ES (Hansen, arXiv 1604.00772) on the logarithms of the weights, which so stay positive. Each try
is merged in memory into one model that is scored; nothing is written.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.model import load_model, refill
from eval.score import Request, token_logprobs, total
from merge.merge import MergedSource
from merge.search_settings import Search
from merge.stack import Order
from parallel.rows import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 4096
"""Tokens of a batch at most, padding included."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A language's development text."""

    requests: tuple[Request, ...]
    bytes: int
    """Of what is scored, in UTF-8."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One merge that was tried."""

    factors: Mapping[str, tuple[float, ...]]
    """By group: what the weight of each model is multiplied by."""
    bits_per_byte: Mapping[str, float]
    """By language."""
    seconds: float

    @property
    def mean(self) -> float:
        return float(np.mean([*self.bits_per_byte.values()]))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search has come to."""

    start: Try
    """With the weights as they were given."""
    best: Try
    tries: tuple[Try, ...]
    """All, the start first, in order."""


def group_of(tensor: Tensor, layers: int, search: Search) -> str:
    """Return the group that a tensor's weights belong to."""
    if tensor.layer is None:
        return "outside" if search.blocks > 1 or search.kinds else "all"
    block = f"block {tensor.layer * search.blocks // layers + 1}" if search.blocks > 1 else "layers"
    if not search.kinds:
        return block if search.blocks > 1 else "all"
    kind = "attention" if "self_attn" in tensor.name else "feed-forward" if "mlp" in tensor.name else "norms"
    return f"{block}, {kind}"


def groups_of(merged: MergedSource, search: Search) -> dict[str, str]:
    """Return the group of each tensor, by name."""
    tensors = merged.family.tensors(merged.config)
    layers = merged.config["num_hidden_layers"]
    return {name: group_of(tensors[name], layers, search) for name in merged.orders}


def with_factors(
    merged: MergedSource, groups: Mapping[str, str], factors: Mapping[str, Sequence[float]]
) -> MergedSource:
    """Return the merge with the weights of each group's tensors multiplied."""

    def changed(name: str, order: Order) -> Order:
        own = factors[groups[name]]
        weights = tuple(weight * factor for weight, factor in zip(order.each["weight"], own, strict=True))
        return replace(order, each={**order.each, "weight": weights})

    return replace(merged, orders={name: changed(name, order) for name, order in merged.orders.items()})


def search_weights(
    merged: MergedSource,
    search: Search,
    texts: Mapping[str, Text],
    report: Callable[[int, Try], None],
    known: Sequence[Try] = (),
) -> Found:
    """Try merges and return the best.

    Args:
        merged: the merge with the weights to begin with.
        report: called with the number and outcome of each try.
        known: the first tries of the same search, from the start on: those of equal factors are not made again.

    Raises:
        InputError: a model that cannot be read, or that diverges on a text.
    """
    import cma

    groups = groups_of(merged, search)
    names = [*dict.fromkeys(groups.values())]
    count = len(next(iter(merged.orders.values())).operands)
    opened = cache(lambda: load_model(merged))  # where all is known, none is needed
    tries: list[Try] = []

    def attempt(point: Any) -> float:
        values = np.exp(np.asarray(point).reshape(len(names), count))
        factors = {name: tuple(map(float, row)) for name, row in zip(names, values, strict=True)}
        old = known[len(tries)] if len(tries) < len(known) else None
        tries.append(old if old is not None and old.factors == factors else made(factors))
        report(len(tries), tries[-1])
        return tries[-1].mean

    def made(factors: Mapping[str, tuple[float, ...]]) -> Try:
        began = time.perf_counter()
        model = opened()
        refill(model, with_factors(merged, groups, factors))
        bits = {language: bits_per_byte(model, text) for language, text in texts.items()}
        return Try(factors=factors, bits_per_byte=bits, seconds=time.perf_counter() - began)

    start = np.zeros(len(names) * count)
    attempt(start)
    options: dict[str, Any] = {"seed": search.seed + 1, "verbose": -9, "verb_log": 0}
    strategy = cma.CMAEvolutionStrategy(start, search.step, options)
    while len(tries) < search.evaluations and not strategy.stop():
        points = strategy.ask()[: search.evaluations - len(tries)]
        values = [attempt(point) for point in points]
        if len(points) == strategy.popsize:
            strategy.tell(points, values)
    best = min(tries, key=lambda one: one.mean)
    return Found(start=tries[0], best=best, tries=tuple(tries))


def bits_per_byte(model: "PreTrainedModel", text: Text) -> float:
    """Return what a text costs, by the rule of `eval.bits_per_byte`."""
    scores = token_logprobs(model, text.requests, batch_tokens=BATCH)
    return -sum(map(total, scores)) / math.log(2) / text.bytes
