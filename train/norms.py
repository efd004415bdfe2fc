"""The gradient norm of a step: weighed as growth asks for, and a veto on stepping with what it belongs to.

DeepSpeed's ZeRO optimizers skip a step, and clear its gradients, when the norm that they computed is negative (their
sign for one that is not finite). That is how a step is vetoed here, between backward pass and update.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from parallel.errors import InputError

Keep = Callable[[float, float], bool]
"""(mean loss, gradient norm) -> whether to take the step."""
INVALID = -1.0


class Norms:
    """What became of the last step's gradient."""

    def __init__(self) -> None:
        self.last = 0.0
        """Norm before clipping; infinite if it was not finite."""
        self.kept = True
        self._keep: Callable[[float], bool] | None = None

    def expect(self, keep: Callable[[float], bool] | None) -> None:
        """Say who decides about the step that comes now, by its norm."""
        self._keep = keep

    def judge(self, norm: float) -> bool:
        """Return whether to step with a gradient of this norm, and remember it."""
        self.last = norm if math.isfinite(norm) and norm >= 0 else math.inf
        self.kept = math.isfinite(self.last) and (self._keep is None or self._keep(self.last))
        return self.kept


def watch_norms(engine: Any, zero: int) -> Norms:
    """Set the hooks on a live DeepSpeed engine: groups are weighed by their `norm_weight`, and a step may be vetoed."""
    norms = Norms()
    optimizer = engine.optimizer
    if zero == 3:
        mapping = optimizer.sub_group_to_group_id
        weights = [optimizer.param_groups[mapping[index]]["norm_weight"] for index in range(len(mapping))]
        plain = optimizer._get_norm_groups

        def norm_groups() -> list[torch.Tensor]:
            found = _weighed(plain(), weights)
            return found if norms.judge(_combined(found)) else [torch.full_like(norm, INVALID) for norm in found]

        optimizer._get_norm_groups = norm_groups
    elif hasattr(optimizer, "params_in_partition"):
        weights = [group["norm_weight"] for group in optimizer.param_groups]

        def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
            found = _weighed(
                [
                    optimizer.complete_grad_norm_calculation_for_cpu_offload(parameters)
                    if optimizer.cpu_offload
                    else optimizer.get_grad_norm_direct(optimizer.averaged_gradients[index], parameters)
                    for index, parameters in enumerate(optimizer.params_in_partition)
                ],
                weights,
            )
            norm = _combined(found)
            return torch.tensor(norm if norms.judge(norm) else INVALID, device=found[0].device)

        optimizer.scaled_global_norm = scaled_global_norm
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        _watch_bf16(optimizer, norms)
    else:
        _watch_plain(engine, norms)
    return norms


def _watch_bf16(optimizer: Any, norms: Norms) -> None:
    """DeepSpeed's BF16_Optimizer, which stands for ZeRO-1 in bfloat16, decides within its step: asked before."""
    from deepspeed.runtime.utils import get_global_norm_of_tensors

    if any(group["norm_weight"] != 1.0 for group in optimizer.param_groups):
        raise InputError("dynamics: preserve needs zero: 2 or 3 in bfloat16: ZeRO-1 weighs no norms")
    step = optimizer.step

    def kept_step(*given: Any, **named: Any) -> Any:
        tensors, _ = optimizer.get_grads_for_norm()
        norm = get_global_norm_of_tensors(tensors, mpu=optimizer.mpu, norm_type=optimizer.norm_type)
        if norms.judge(float(norm)):
            return step(*given, **named)
        optimizer.overflow = True
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
        return None

    optimizer.step = kept_step


def _watch_plain(engine: Any, norms: Norms) -> None:
    """ZeRO-0: DeepSpeed clips, then calls torch's optimizer."""
    optimizer = engine.optimizer
    step = optimizer.step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = [group["norm_weight"] for group in optimizer.param_groups for _ in group["params"]]

    def clip() -> None:
        found = [torch.linalg.vector_norm(parameter.grad.float()) for parameter in parameters]
        norm = _combined(_weighed(found, weights))
        if norms.judge(norm) and norm > engine.gradient_clipping():
            for parameter in parameters:
                parameter.grad.mul_(engine.gradient_clipping() / (norm + 1e-6))

    def kept_step(*given: Any, **named: Any) -> Any:
        return step(*given, **named) if norms.kept else None

    engine.clip_fp32_gradients = clip
    optimizer.step = kept_step


def _weighed(found: list[Any], weights: list[float]) -> list[torch.Tensor]:
    # A norm of -1 stands for one that is not finite.
    tensors = [torch.as_tensor(norm) for norm in found]
    return [
        norm if weight == 1.0 else torch.where(norm < 0, norm, norm * math.sqrt(weight))
        for norm, weight in zip(tensors, weights, strict=True)
    ]


def _combined(found: list[torch.Tensor]) -> float:
    if any(float(norm) < 0 for norm in found):
        return math.inf
    return math.sqrt(sum(float(norm) ** 2 for norm in found))
