"""The gradient norm of a step, by tensor: weighed as growth asks for, and a veto on stepping with what it belongs to.

DeepSpeed's ZeRO optimizers skip a step, and clear its gradients, when the norm that they computed is negative (their
sign for one that is not finite). That is how a step is vetoed here, between backward pass and update. The norm itself
is ours: one sum over the ranks gives that of each tensor, which the log shows by block, and from them the whole.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from parallel.errors import InputError
from parallel.mesh import Mesh
from parallel.ranks import Ranks, device

Keep = Callable[[float, float], bool]
"""(mean loss, gradient norm) -> whether to take the step."""
Pieces = Iterable[tuple[str, torch.Tensor]]
"""What a rank holds of the gradient: tensors' names, and pieces of any shape."""
INVALID = -1.0


class Norms:
    """What became of the last step's gradient."""

    def __init__(self, tensors: Sequence[str], weights: Mapping[str, float], ranks: Ranks) -> None:
        self.last = 0.0
        """Norm before clipping; infinite if it was not finite."""
        self.kept = True
        self.squares: Mapping[str, float] = {}
        """Squared norm of each tensor's gradient, before weights and clipping."""
        self._places = {name: place for place, name in enumerate(tensors)}
        self._weights = torch.tensor([weights.get(name, 1.0) for name in tensors], dtype=torch.float64)
        self._ranks = ranks
        self._keep: Callable[[float], bool] | None = None

    def expect(self, keep: Callable[[float], bool] | None) -> None:
        """Say who decides about the step that comes now, by its norm."""
        self._keep = keep

    def judge(self, pieces: Pieces) -> float:
        """Return the norm of the gradient that the ranks hold together; infinite for one not to step with.

        All ranks call this together; what several hold alike, one gives.
        """
        squares = torch.zeros(len(self._places), dtype=torch.float64)
        names, gradients = zip(*pieces, strict=True) if (pieces := list(pieces)) else ((), ())
        if gradients:
            found = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().cpu()
            squares.index_add_(0, torch.tensor([self._places[name] for name in names]), found)
        self._ranks.sum(squares)
        self.squares = dict(zip(self._places, squares.tolist(), strict=True))
        norm = math.sqrt(total) if (total := float(squares @ self._weights)) >= 0 else math.inf
        self.last = norm if math.isfinite(norm) else math.inf
        self.kept = math.isfinite(self.last) and (self._keep is None or self._keep(self.last))
        return self.last if self.kept else math.inf


def watch_norms(
    engine: Any,
    zero: int,
    names: Mapping[torch.nn.Parameter, str],
    tensors: Sequence[str],
    ranks: Ranks,
    mesh: Mesh,
    cut: Collection[str] = (),
) -> Norms:
    """Set the hooks on a live DeepSpeed engine: groups are weighed by their `norm_weight`, and a step may be vetoed.

    Args:
        names: Hugging Face name of each parameter of this rank.
        tensors: all names, in an order that is the same on every rank.
        cut: names of those that tensor-parallel ranks hold pieces of; of the others all have all.
    """
    optimizer, rank = engine.optimizer, ranks.rank
    alone = mesh.tensor_rank(rank) == 0
    first = mesh.data_rank(rank) == 0 and mesh.sequence_rank(rank) == 0

    def given(pairs: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> Pieces:
        """Yield what this rank is to give of its pieces; a tied tensor of two pipeline stages comes from one."""
        for parameter, gradient in pairs:
            name = names[parameter]
            if (alone or name in cut) and not getattr(parameter, "ds_pipe_replicated", False):
                yield name, gradient

    def partitions(groups: Sequence[Sequence[torch.nn.Parameter]], offload: bool) -> Iterator[tuple[Any, torch.Tensor]]:
        for index, group in enumerate(groups):
            if offload:  # DeepSpeed took the norms when it moved the gradients away
                found = {one: optimizer.norm_for_param_grads.get(optimizer.get_param_id(one)) for one in group}
                known = {one: torch.as_tensor(norm).float().cpu() for one, norm in found.items() if norm is not None}
                yield from known.items()
            else:
                yield from zip(group, optimizer.averaged_gradients[index], strict=False)  # it may end with padding

    if zero == 3:
        mapping = optimizer.sub_group_to_group_id
        groups = [(mapping[index], group) for index, group in enumerate(optimizer.fp16_groups)]
        norms = Norms(tensors, _weights(optimizer, groups, names), ranks)

        def norm_groups() -> list[torch.Tensor]:
            found = norms.judge(given(partitions(optimizer.fp16_groups, optimizer.offload_optimizer)))
            return [_signed(found, optimizer.offload_optimizer)]

        optimizer._get_norm_groups = norm_groups
    elif hasattr(optimizer, "params_in_partition"):
        norms = Norms(tensors, _weights(optimizer, enumerate(optimizer.bit16_groups), names), ranks)

        def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
            found = norms.judge(given(partitions(optimizer.params_in_partition, optimizer.cpu_offload)))
            return _signed(found, optimizer.cpu_offload)

        optimizer.scaled_global_norm = scaled_global_norm
        _watch_partitions(optimizer)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        if any(group["norm_weight"] != 1.0 for group in optimizer.param_groups):
            raise InputError("dynamics: preserve needs zero: 2 or 3 in bfloat16: ZeRO-1 weighs no norms")
        if mesh.sp > 1:
            optimizer.mpu = None  # its own norm would be taken over the ranks of a sequence, all but the first empty
        norms = Norms(tensors, {}, ranks)

        def whole() -> Iterator[tuple[Any, torch.Tensor]]:
            for index, group in enumerate(optimizer.bf16_groups if first else ()):
                of_group = optimizer.fp32_groups_gradients[index], optimizer.fp32_groups_has_gradients[index]
                yield from ((one, found) for one, found, there in zip(group, *of_group, strict=True) if there)

        _watch_bf16(optimizer, lambda: norms.judge(given(whole())))
    else:
        groups = [(index, group["params"]) for index, group in enumerate(optimizer.param_groups)]
        norms = Norms(tensors, _weights(optimizer, groups, names), ranks)
        parameters = [parameter for _, group in groups for parameter in group]

        def plain() -> Iterator[tuple[Any, torch.Tensor]]:
            return ((one, one.grad) for one in parameters if first and one.grad is not None)

        _watch_plain(engine, parameters, lambda: norms.judge(given(plain())))
    return norms


def _weights(
    optimizer: Any, groups: Iterable[tuple[int, Sequence[Any]]], names: Mapping[torch.nn.Parameter, str]
) -> dict[str, float]:
    weights = [group["norm_weight"] for group in optimizer.param_groups]
    return {names[parameter]: weights[index] for index, group in groups for parameter in group}


def _signed(norm: float, offload: bool) -> torch.Tensor:
    """Return a norm as DeepSpeed takes it: where the gradients lie."""
    return torch.tensor(norm if math.isfinite(norm) else INVALID, device="cpu" if offload else device())


def _watch_partitions(optimizer: Any) -> None:
    """DeepSpeed's ZeRO-1 and 2: let the norm alone decide, and have gradients that are not stepped with forgotten.

    It looks for infinite gradients before it takes the norm, and returns without one; and with offload it would add a
    skipped step's gradients to the next one's (0.19.8).
    """
    step = optimizer.step

    def forgetful_step(*given: Any, **named: Any) -> Any:
        found = step(*given, **named)
        if optimizer.overflow:
            for index in optimizer.averaged_gradients:
                optimizer.averaged_gradients[index] = None
        return found

    optimizer.check_overflow = lambda *_, **__: None
    optimizer.step = forgetful_step


def _watch_bf16(optimizer: Any, judge: Callable[[], float]) -> None:
    """DeepSpeed's BF16_Optimizer, which stands for ZeRO-1 in bfloat16, decides within its step: asked before."""
    step = optimizer.step

    def kept_step(*given: Any, **named: Any) -> Any:
        if math.isfinite(judge()):
            return step(*given, **named)
        optimizer.overflow = True
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
        return None

    optimizer.step = kept_step


def _watch_plain(engine: Any, parameters: Sequence[torch.nn.Parameter], judge: Callable[[], float]) -> None:
    """ZeRO-0: DeepSpeed clips, then calls torch's optimizer."""
    optimizer = engine.optimizer
    step = optimizer.step
    kept = True

    def clip() -> None:
        nonlocal kept
        norm = judge()
        kept = math.isfinite(norm)
        if kept and norm > engine.gradient_clipping():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(engine.gradient_clipping() / (norm + 1e-6))

    def kept_step(*given: Any, **named: Any) -> Any:
        return step(*given, **named) if kept else None

    engine.clip_fp32_gradients = clip
    optimizer.step = kept_step
