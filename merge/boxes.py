"""How each merge method is run over boxes of a stack: what is collected of a whole tensor first, and then a box."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from checkpoint.source import Box, Map
from merge import directions, fisher, matrices, methods, sums
from merge.sparsify import Kept, Sparsifier, whole_rows
from merge.stack import Order, Stack
from merge.sums import Summed
from merge.threshold import Cut, find_cuts, trim


def linear(stack: Stack, stats: None) -> Summed:
    divisor = sum(stack.weights) if stack.order.shared["normalize"] else None
    return weighted(stack, stack.weights, of="models", divisor=divisor)


def weighted(
    stack: Stack,
    factors: Sequence[float],
    *,
    of: Literal["models", "directions"],
    divisor: float | None = None,
    scale: float = 1.0,
) -> Summed:
    """Return a merge that is a sum of the models, or of their task vectors if there is a base, which is added then."""
    based = of == "directions" and stack.order.base is not None
    base = stack.order.base if based else None
    return Summed(
        kind=sums.Weighted(),
        keys=tuple(
            (stack.reads, operand, base, float(factor).hex())  # 0.0 == -0.0
            for operand, factor in zip(stack.order.operands, factors, strict=True)
        ),
        factors=tuple(factors),
        read=stack.delta if based else stack.value,
        finish=lambda total, box: sums.mean(total, stack.base(box) if based else None, divisor, scale),
    )


def passthrough(stack: Stack, box: Box, stats: None) -> torch.Tensor:
    scale = stack.order.each["scale"][0]
    return stack.value(0, box) if scale is None else stack.value(0, box) * scale


def nearswap(stack: Stack, box: Box, stats: None) -> torch.Tensor:
    return methods.nearswap(stack.base(box), stack.value(0, box), t=stack.order.shared["t"])


def _sparsifiers(stack: Stack, kind: Any) -> list[Sparsifier]:
    each, rescale = stack.order.each, stack.order.shared["rescale"]
    nothing = (0.0,) * stack.count
    return [
        Sparsifier(
            kind=kind,
            density=density,
            gamma=gamma,
            epsilon=epsilon,
            rescale=rescale,
            key=stack.random_key(number) if kind in ("random", "ranked") else "",
        )
        for number, (density, gamma, epsilon) in enumerate(
            zip(each["density"], each.get("gamma", nothing), each.get("epsilon", nothing), strict=True)
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Runner:
    """How a method is run."""

    merge: Callable[[Stack, Box, Any], torch.Tensor] | None = None
    """From a box, and what was collected, to its merged values, float32."""
    summed: Callable[[Stack, Any], Summed | None] = lambda stack, stats: None
    """The same as a sum over models, of which merges of subsets share what they can; None if `merge` has to do it."""
    collect: Callable[[Stack, Map], Any] | None = None
    """What it needs to know of a whole tensor first."""
    drops: Callable[[Order], bool] = lambda order: False
    """Whether a value that is not finite may leave the merged ones finite."""
    finite: Callable[[Any], bool] = lambda stats: False
    """From what was collected to whether all values are known to be: they need not be looked at again."""


def task_arithmetic(stack: Stack, stats: None) -> Summed:
    shared = stack.order.shared
    divisor = methods.divisor(stack.weights, shared["normalize"])
    return weighted(stack, stack.weights, of="directions", divisor=divisor, scale=shared["lambda"])


def sparse(kind: str, *, elect: bool) -> Runner:
    """Return how a method is run that sums sparse task vectors, of those that agree on the sign if one is elected."""

    def collect(stack: Stack, spread: Map) -> list[tuple[Sparsifier, Kept]]:
        sparsifiers = _sparsifiers(stack, kind)
        return [*zip(sparsifiers, stack.collect_kept(sparsifiers, spread), strict=True)]

    def summed(stack: Stack, stats: Sequence[tuple[Sparsifier, Kept]]) -> Summed | None:
        weights, shared = stack.weights, stack.order.shared
        scale, normalize = shared["lambda"], shared["normalize"]
        signed = methods.signed(weights, normalize) if elect else None
        if elect and signed is None:
            return None
        factors = tuple(weight * kept.factor for weight, (_, kept) in zip(weights, stats, strict=True))
        divisor = methods.divisor(weights, normalize)

        def finish(total: Any, box: Box) -> torch.Tensor:
            base = stack.base(box)
            return sums.agreed(total, base, weights[0], scale) if elect else sums.mean(total, base, divisor, scale)

        return Summed(
            kind=signed or sums.Weighted(),
            keys=tuple(
                (stack.reads, operand, stack.order.base, sparsifier, factor.hex())
                for operand, (sparsifier, _), factor in zip(stack.order.operands, stats, factors, strict=True)
            ),
            factors=factors,
            read=lambda number, box: stack.kept(number, *stats[number], box),
            finish=finish,
        )

    def merge(stack: Stack, box: Box, stats: Sequence[tuple[Sparsifier, Kept]]) -> torch.Tensor:
        return methods.ties(
            stack.base(box),
            [stack.kept(number, one, kept, box) for number, (one, kept) in enumerate(stats)],
            stack.weights,
            scale=stack.order.shared["lambda"],
            normalize=stack.order.shared["normalize"],
            factors=[kept.factor for _, kept in stats],
        )

    def drops(order: Order) -> bool:
        # What is not finite is larger than all that is, and stays; but nothing does of a model that does not count.
        return kind != "magnitude" or 0 in order.each["weight"] or min(order.each["density"]) <= 0

    def finite(stats: Sequence[tuple[Sparsifier, Kept]]) -> bool:
        return all(kept.finite for _, kept in stats)

    return Runner(merge=merge, summed=summed, collect=collect, drops=drops, finite=finite)


def always(order: Order) -> bool:
    """Whether a value that is not finite may be dropped, where a method does not go by size."""
    return True


def _along(stack: Stack, coefficients: np.ndarray, box: Box, along: str) -> list[float | torch.Tensor]:
    """Return the factor of each model in a box, from coefficients [models] or [rows or columns, models]."""
    if coefficients.ndim == 1:
        return [float(one) for one in coefficients]
    if len(box) < 2:
        return [float(one) for one in coefficients[0]]
    part = torch.from_numpy(coefficients[box[0] if along == "rows" else box[-1]]).float().to(stack.reads.device)
    return [one[:, None] if along == "rows" else one for one in part.unbind(-1)]


def slerp_stats(stack: Stack, spread: Map) -> np.ndarray:
    return directions.slerp(stack.gram(spread, of="base and models"), stack.order.shared["t"])


def slerp(stack: Stack, box: Box, stats: np.ndarray) -> torch.Tensor:
    return methods.weighted_sum([stack.base(box), stack.value(0, box)], stats.tolist())


def _sides(stack: Stack) -> Any:
    shared = stack.order.shared
    return "all" if shared["nuslerp_flatten"] else "columns" if shared["nuslerp_row_wise"] else "rows"


def nuslerp_stats(stack: Stack, spread: Map) -> np.ndarray:
    total = sum(stack.weights)
    t = 0.5 if abs(total) < 1e-6 else stack.weights[1] / total
    return directions.nuslerp(stack.gram(spread, along=_sides(stack)), t)


def _combined(stack: Stack, box: Box, factors: Sequence[float | torch.Tensor]) -> torch.Tensor:
    total = methods.weighted_sum(stack.directions(box), factors)
    return total if stack.order.base is None else total.add_(stack.base(box))


def nuslerp(stack: Stack, box: Box, stats: np.ndarray) -> torch.Tensor:
    return _combined(stack, box, _along(stack, stats, box, _sides(stack)))


def multislerp_stats(stack: Stack, spread: Map) -> np.ndarray | None:
    if stack.count == 1:
        return None
    shared, weights = stack.order.shared, np.array(stack.weights)
    if shared["normalize_weights"]:
        weights = weights / weights.sum()
    try:
        return directions.multislerp(stack.gram(spread), weights, eps=shared["eps"])
    except ZeroDivisionError:
        raise stack.error("multislerp: the models' weighted directions cancel; give them other weights") from None


def multislerp(stack: Stack, stats: np.ndarray | None) -> Summed:
    if stats is None:  # of one model
        return weighted(stack, [1.0], of="models")
    return weighted(stack, stats.tolist(), of="directions")


def karcher_stats(stack: Stack, spread: Map) -> np.ndarray | None:
    shared = stack.order.shared
    if stack.count == 1:
        return None
    return directions.karcher(stack.gram(spread), max_iter=shared["max_iter"], tol=shared["tol"])


def stock_stats(stack: Stack, spread: Map) -> np.ndarray:
    return directions.model_stock(stack.gram(spread, along="rows" if stack.order.shared["filter_wise"] else "all"))


def stock(stack: Stack, box: Box, stats: np.ndarray) -> torch.Tensor:
    share = (stats / stack.count)[..., None]
    return _combined(stack, box, _along(stack, np.repeat(share, stack.count, axis=-1), box, "rows"))


@dataclass(frozen=True, kw_only=True)
class _Selected:
    cut: Any
    """Of the variances: a Cut, None for all elements, False for none of them."""
    weights: tuple[float, ...]


def _sce_deltas(stack: Stack, box: Box, cut: Any) -> list[torch.Tensor]:
    deltas = stack.deltas(box)
    if cut is None:
        return deltas
    if cut is False:
        return [torch.zeros_like(delta) for delta in deltas]
    stays = trim(methods.variance(deltas), cut, stack.shape, box) != 0
    return [torch.where(stays, delta, 0.0) for delta in deltas]


def sce_stats(stack: Stack, spread: Map) -> _Selected:
    share = stack.order.shared["select_topk"]
    cut: Cut | bool | None = None

    def differing(tile: Box) -> int:
        return int(torch.count_nonzero(methods.variance(stack.deltas(tile))))

    if share < 1:
        keep = int(sum(spread(differing, stack.tiles)) * share)
        cut = False
        if keep:
            cut = find_cuts(
                lambda box, _: [methods.variance(stack.deltas(box))], stack.shape, stack.tiles, [keep], spread
            )[0]

    def squares(tile: Box) -> np.ndarray:
        return np.array([one.square().sum(dtype=torch.float64).item() for one in _sce_deltas(stack, tile, cut)])

    means = sum(spread(squares, stack.tiles), np.zeros(stack.count)) / np.prod(stack.shape)
    total = means.sum()
    weights = means / total if total >= 1e-6 else np.full(stack.count, 1 / stack.count)
    return _Selected(cut=cut, weights=tuple(weights.tolist()))


def sce(stack: Stack, box: Box, stats: _Selected) -> torch.Tensor:
    return methods.sce(stack.base(box), _sce_deltas(stack, box, stats.cut), stats.weights)


def ram(stack: Stack, box: Box, stats: Sequence[float] | None) -> torch.Tensor:
    return methods.ram(stack.base(box), stack.deltas(box), epsilon=stack.order.shared["epsilon"], unique=stats)


def ram_stats(stack: Stack, spread: Map) -> list[float]:
    """Return the factor of what each model alone has changed: 1 + r clip(shared / unique, 0, alpha)."""
    shared = stack.order.shared

    def counts(tile: Box) -> np.ndarray:
        active = [delta.abs() > shared["epsilon"] for delta in stack.deltas(tile)]
        alone = methods.how_many(active) == 1
        mine = np.array([torch.count_nonzero(one & alone).item() for one in active])
        return np.stack([[torch.count_nonzero(one).item() for one in active] - mine, mine])

    common, unique = sum(spread(counts, stack.tiles), np.zeros((2, stack.count)))
    ratio = common / unique.clip(min=shared["epsilon"])
    return [float(1 + shared["r"] * one) for one in ratio.clip(0, shared["alpha"])]


def _importance(stack: Stack, rows: Box) -> torch.Tensor:
    """Return how much each element of whole rows matters: |d| times the rows' KL divergence as distributions.

    In float64 until the end: the divergence of near rows is the difference of numbers near to one another.
    """
    base, other = stack.base(rows), stack.value(0, rows)
    p, q = (torch.softmax(one.double(), dim=-1) + 1e-8 for one in (other, base))
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True).clamp_(min=0)
    return ((other - base).abs_() * divergence).float()


def fusion_stats(stack: Stack, spread: Map) -> float:
    """Return the threshold: median + 1.5 (third quartile - first), of all elements."""
    size = int(np.prod(stack.shape))
    ranks = [size - int(share * (size - 1)) for share in (0.25, 0.5, 0.75)]

    def read(tile: Box, which: Sequence[int]) -> list[torch.Tensor]:
        rows, inside = whole_rows(tile, stack.shape)
        return [_importance(stack, rows)[inside]] * len(which)

    cuts = find_cuts(read, stack.shape, stack.tiles, ranks, spread)
    first, median, third = np.array([cut.pattern for cut in cuts], dtype=np.int32).view(np.float32)
    return float(median + 1.5 * (third - first))


def fusion(stack: Stack, box: Box, stats: float) -> torch.Tensor:
    rows, inside = whole_rows(box, stack.shape)
    stays = _importance(stack, rows)[inside] >= stats
    base = stack.base(box)
    return base + torch.where(stays, stack.value(0, box) - base, 0.0)


RUNNERS: dict[str, Runner] = {
    "linear": Runner(summed=linear),
    "slerp": Runner(merge=slerp, collect=slerp_stats),
    "nuslerp": Runner(merge=nuslerp, collect=nuslerp_stats),
    "multislerp": Runner(summed=multislerp, collect=multislerp_stats),
    "karcher": Runner(summed=multislerp, collect=karcher_stats),
    "model_stock": Runner(merge=stock, collect=stock_stats),
    "task_arithmetic": Runner(summed=task_arithmetic),
    "ties": sparse("magnitude", elect=True),
    "dare_linear": sparse("random", elect=False),
    "dare_ties": sparse("random", elect=True),
    "della": sparse("ranked", elect=True),
    "della_linear": sparse("ranked", elect=False),
    "breadcrumbs": sparse("outliers", elect=False),
    "breadcrumbs_ties": sparse("outliers", elect=True),
    "sce": Runner(merge=sce, collect=sce_stats, drops=always),
    "ram": Runner(merge=ram, drops=always),
    "ramplus_tl": Runner(merge=ram, collect=ram_stats, drops=always),
    "nearswap": Runner(merge=nearswap),
    "arcee_fusion": Runner(merge=fusion, collect=fusion_stats, drops=always),
    "passthrough": Runner(merge=passthrough),
    "fisher": Runner(merge=fisher.box, collect=fisher.mean, drops=always),
    "regmean": Runner(merge=matrices.regmean_box, collect=matrices.regmean_stats),
    "tsv": Runner(merge=matrices.tsv_box, collect=matrices.tsv_stats),
}
