"""How far apart two merged models are, and where a method leaves open what is right.

Some elements of some methods hang on less than rounding: which of equal magnitudes stay at the threshold, which sign a
sum that is zero but for rounding has. They are found here from the inputs alone, counted, and left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from checkpoint.source import read_tensor
from merge.merge import MergedSource
from merge.stack import Order

NEAR = 1e-5
"""Relative difference of statistics that float32 may order either way."""
ELECT = ("ties", "dare_ties", "della", "breadcrumbs_ties", "sce")
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of a merged model of ours from mergekit's."""

    largest: float
    """Relative to the largest magnitude of the tensor."""
    tensor: str
    """Where that is."""
    differing: float
    """Share of the elements that are not equal."""
    left_out: float
    """Share of the elements that are not compared."""


def read_all(merged: MergedSource, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return a merged model's tensors, each rounded to its own dtype if none is given."""
    return {
        name: read_tensor(merged, name, dtype=dtype or info.slots["weight"])
        for name, info in merged.infos.items()
        if info.tied_to is None
    }


def difference(ours: Tensors, theirs: Tensors, open_: Tensors) -> Difference:
    """Compare models that have the same tensors.

    Args:
        open_: for each tensor, where it is not compared.
    """
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    largest, where, differing = 0.0, "", 0
    for name, mine in ours.items():
        assert mine.shape == theirs[name].shape, (name, mine.shape, theirs[name].shape)
        far = (mine.double() - theirs[name].double()).abs().masked_fill(open_[name], 0.0)
        differing += int(torch.count_nonzero(far))
        relative = far.max().item() / max(theirs[name].double().abs().max().item(), 1e-30)
        if relative > largest:
            largest, where = relative, name
    size = sum(map(torch.numel, ours.values()))
    left_out = sum(int(one.sum()) for one in open_.values())
    return Difference(largest=largest, tensor=where, differing=differing / size, left_out=left_out / size)


def rounded_right(ours: Tensors, exact: Tensors, open_: Tensors) -> float:
    """Return the share of elements that are the exact value, rounded; before that, 1e-6 of the largest may miss."""
    right, size = 0, 0
    for name, mine in ours.items():
        margin = 1e-6 * exact[name].abs().max()
        low, high = ((exact[name] + sign * margin).float().to(mine.dtype) for sign in (-1, 1))
        right += int(((low <= mine) & (mine <= high) | open_[name]).sum())
        size += mine.numel()
    return right / size


def error(found: Tensors, exact: Tensors, open_: Tensors) -> float:
    """Return the root of the summed squares of what a model is off."""
    squares = (
        (found[name].double() - exact[name]).masked_fill(open_[name], 0.0).square().sum().item() for name in exact
    )
    return sum(squares) ** 0.5


def undecided(merged: MergedSource, *, rounding: float = 0.0) -> dict[str, torch.Tensor]:
    """Return for each tensor of a merged model where what is right is open.

    Args:
        rounding: relative difference of magnitudes and sums that may be ordered either way.
    """
    return {
        name: _undecided(merged, order, merged.infos[name].shape, rounding) for name, order in merged.orders.items()
    }


def _undecided(merged: MergedSource, order: Order, shape: tuple[int, ...], near: float) -> torch.Tensor:
    method, sources = merged.method, merged.reads.sources
    found = torch.zeros(shape, dtype=torch.bool)
    if order.base is None or method not in (*ELECT, "breadcrumbs", "arcee_fusion"):
        return found
    base = read_tensor(sources[order.base.model], order.base.name)
    models = [read_tensor(sources[one.model], one.name) for one in order.operands]
    if method == "arcee_fusion":
        return _near_the_threshold(base, models[0])
    kept = []
    for number, model in enumerate(models):
        density, gamma = (order.each[key][number] if key in order.each else 0.0 for key in ("density", "gamma"))
        delta = model - base
        if method == "ties":
            stays, tied = _largest(delta.abs(), 0, max(1, int(density * delta.numel())) if density < 1 else None, near)
        elif method.startswith("breadcrumbs"):
            keep = int(density * delta.numel()) if density < 1 else None
            stays, tied = _largest(delta.abs(), int(gamma * delta.numel()), keep, near)
        else:
            stays, tied = torch.ones_like(found), torch.zeros_like(found)
        found |= tied
        kept.append(delta.double() * stays)
    if method == "sce":
        share = order.shared["select_topk"]
        spread = torch.stack(kept).var(dim=0, unbiased=False)
        stays, tied = _largest(
            spread, 0, int(torch.count_nonzero(spread) * share) if share < 1 else None, max(near, NEAR)
        )
        found |= tied
        kept = [delta * stays for delta in kept]
    if method in ELECT:
        weights = order.each.get("weight", (1.0,) * len(kept))
        weighted = torch.stack([delta * weight for delta, weight in zip(kept, weights, strict=True)])
        size = weighted.abs().sum(dim=0)
        found |= (weighted.sum(dim=0).abs() <= max(near, 1e-6) * size) & (torch.count_nonzero(weighted, dim=0) > 1)
    return found


def _largest(size: torch.Tensor, skip: int, keep: int | None, near: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which elements come after the `skip` largest and are among the `keep` next, and which hang on a tie."""
    stays, tied = torch.ones_like(size, dtype=torch.bool), torch.zeros_like(size, dtype=torch.bool)
    if keep is None:
        return stays, tied
    ordered = size.flatten().sort(descending=True).values
    skip = min(skip, len(ordered) - keep)
    for end, after in ((skip, False), (skip + keep, True)):
        if 0 < end < len(ordered):
            last, next_ = ordered[end - 1].item(), ordered[end].item()
            stays &= size >= last if after else size < last
            if last - next_ <= near * last:
                tied |= (size - last).abs() <= near * last
    return stays & (keep > 0), tied & (size > 0)


def _near_the_threshold(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return where Arcee's Fusion hangs on rounding: importance within a 1e-5th of the threshold."""
    p, q = (torch.softmax(one.double(), dim=-1) + 1e-8 for one in (other, base))
    importance = (other - base).double().abs() * (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    ordered = importance.flatten().sort().values
    first, median, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    return (importance - threshold).abs() <= NEAR * threshold.abs()
