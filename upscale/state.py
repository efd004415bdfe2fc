"""What growth does to the optimizer: each tensor's rule, and the parameter groups that keep the small model's training.

For copies of a feature that share its gradient (growth by copying, exact in symmetric and diagonal growth and a good
approximation for unequal shares), the small model's trajectory is kept exactly by Adam's moments divided as the
gradients are, and by factors of learning rate, weight decay, eps and of the squared gradient norm in clipping.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from checkpoint.source import FACTORS, Group, Slot
from parallel.rows import Tensor
from upscale.factors import AxisGrowth, divided_dim, residual_scale


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What growth by copying does to a tensor's gradient, and so to the optimizer's state and settings.

    With r_out copies on the outputs and r_in on the inputs, a gradient is divided by r_out (each copy of an output gets
    its share), and a step of the small model's size has to move each of r_in shares; where the output is scaled, the
    gradient is divided by the scale, and the step multiplied: derived in docs/growth.md.
    """

    r_out: int
    """Copies along the dims that are copied whole."""
    r_in: int
    """Copies that share a value."""
    scale: float = 1.0
    """What the tensor is multiplied by (`residual_scale`)."""

    @property
    def gradient_divisor(self) -> float:
        """What the gradient of every copy is divided by."""
        return self.r_out * self.scale

    def divisor(self, slot: Slot) -> float:
        """Return what a slot's values are divided by in every copy: the gradient's mean once, its square's twice."""
        return {"exp_avg": self.gradient_divisor, "exp_avg_sq": self.gradient_divisor**2}.get(slot, 1.0)

    def group(self, name: str, group: Group) -> tuple[str, Group]:
        """Return the parameter group, and its name, that keeps the small model's training: factors compose."""
        grown = replace(
            group,
            lr_factor=group.lr_factor / self.r_in * self.scale,
            weight_decay_factor=group.weight_decay_factor * self.r_in / self.scale,
            eps_factor=group.eps_factor / self.gradient_divisor,
            norm_weight=group.norm_weight * self.gradient_divisor**2 / (self.r_out * self.r_in),
        )
        if all(getattr(grown, factor) == 1 for factor in FACTORS):
            return name, grown
        mark = f"in{1 / grown.lr_factor:.6g}-out{1 / grown.eps_factor:.6g}"
        # A run that did not weigh its gradient norms leaves groups that differ in that alone.
        usual = math.isclose(grown.norm_weight, grown.lr_factor / grown.eps_factor, rel_tol=1e-6)
        return f"{name.partition('/')[0]}/{mark}" + ("" if usual else f"-norm{grown.norm_weight:.6g}"), grown


def rule_of(tensor: Tensor, axes: Mapping[str, AxisGrowth], config: Mapping[str, Any]) -> Rule:
    """Return the rule of a tensor of the small model, given what becomes of its axes."""
    divided = divided_dim(tensor, config)
    copies = [axes[axis].copies for axis in tensor.axes]
    return Rule(
        r_out=math.prod(count for dim, count in enumerate(copies) if dim != divided),
        r_in=1 if divided is None else copies[divided],
        scale=residual_scale(tensor, axes, config),
    )
