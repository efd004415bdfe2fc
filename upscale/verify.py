"""Is the function preserved, and do the copies differ? The two questions that every grown model has to answer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from upscale.factors import AxisGrowth
from upscale.state import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """How far a grown model is from the small one on given text."""

    max_logit_difference: float
    relative: float
    """The same, as a share of the small model's largest absolute logit."""
    mean_kl: float
    """Mean KL divergence of the grown model's next-token distribution from the small one's (nats)."""
    argmax_agreement: float
    """Share of the positions at which both expect the same token."""
    loss_small: float
    """Mean cross-entropy of the next token (nats)."""
    loss_grown: float

    @property
    def loss_difference(self) -> float:
        return abs(self.loss_grown - self.loss_small)


@torch.inference_mode()
def compare(small: "PreTrainedModel", grown: "PreTrainedModel", batches: Iterable[torch.Tensor]) -> Preservation:
    """Run both models on token ids [B, T] and compare their logits [B, T, V].

    The models compute in the dtype that they were loaded in. Load both from their checkpoints: casting a running
    model rounds its rotary frequencies too. Batches without two tokens in a row give no loss (nan).
    """
    largest = difference = divergence = loss_small = loss_grown = 0.0
    same = positions = targets = 0
    for ids in batches:
        logits = [model(input_ids=ids).logits for model in (small, grown)]
        # Sample by sample [T, V]: with a large vocabulary each number of a position more is much memory.
        for tokens, before, after in zip(ids, *logits, strict=True):
            before, after = before.float(), after.float()
            largest = max(largest, before.abs().max().item())
            difference = max(difference, (after - before).abs().max().item())
            p, q = before.log_softmax(-1), after.log_softmax(-1)
            divergence += (p.exp() * (p - q)).sum(-1).double().sum().item()
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            positions += len(tokens)
            targets += len(tokens) - 1
            loss_small += _summed_loss(p, tokens[1:])
            loss_grown += _summed_loss(q, tokens[1:])
    return Preservation(
        max_logit_difference=difference,
        relative=difference / largest if largest else math.nan,
        mean_kl=divergence / positions if positions else math.nan,
        argmax_agreement=same / positions if positions else math.nan,
        loss_small=loss_small / targets if targets else math.nan,
        loss_grown=loss_grown / targets if targets else math.nan,
    )


def _summed_loss(log_probabilities: torch.Tensor, follow: torch.Tensor) -> float:
    losses = F.nll_loss(log_probabilities[:-1], follow, reduction="none")
    return losses.double().sum().item()


@dataclass(frozen=True, kw_only=True)
class GradientCheck:
    """How far gradients are from the rule that optimizer state is grown by (`Rule`); the worst tensor counts."""

    mean: float
    """Largest difference of the mean over copies from the rule, as a share of the largest gradient: rounding alone
    where the function is preserved, whatever the shares."""
    single: float
    """Root mean square of single copies' difference from the rule, as a share of the gradient's: 0 where all copies are
    equal. Where it is not, moments that are grown by the rule are right on average."""


def check_gradients(
    small: "PreTrainedModel",
    grown: "PreTrainedModel",
    ids: torch.Tensor,
    growths: Mapping[str, Sequence[AxisGrowth]],
    rules: Mapping[str, Rule],
) -> GradientCheck:
    """Compare gradients of both models with the rule.

    Args:
        ids: token ids [B, T]; the loss is the mean cross-entropy of the next token.
        growths, rules: by name, of every tensor that is no alias.
    """
    found = []
    for model in (small, grown):
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    before, after = found
    mean = single = 0.0
    for name, gradient in before.items():
        wanted = gradient.numpy() / rules[name].gradient_divisor
        values = after[name].numpy()
        places = [_places(growth) for growth in growths[name]]
        copies = [values[np.ix_(*place)] for place in product(*places)]
        largest, size = float(np.abs(wanted).max()), float(np.sqrt(np.square(wanted).mean()))
        if largest == 0.0:
            continue
        mean = max(mean, float(np.abs(sum(copies) / len(copies) - wanted).max()) / largest)
        spread = sum(float(np.square(copy - wanted).mean()) for copy in copies) / len(copies)
        single = max(single, math.sqrt(spread) / size)
    return GradientCheck(mean=mean, single=single)


def clone_asymmetry(tensor: torch.Tensor, growths: Sequence[AxisGrowth], *, sampled: int | None = None) -> float:
    """Return how far the copies in a grown tensor are from their mean, as a share of it (root mean squares).

    0 means that all copies are equal: gradients then are too, and the model trains as the small one would.

    Args:
        growths: what became of each dim, such as `GrownSource.growths(name)`.
        sampled: of each dim of the small tensor so many entries are looked at; all by default.
    """
    places = [_places(growth)[:, :sampled] for growth in growths]
    copies = np.stack([_picked(tensor, place) for place in product(*places)])
    mean = copies.mean(0)
    size = float(np.sqrt(np.square(mean).mean()))
    return float(np.sqrt(np.square(copies - mean).mean())) / size if size else 0.0


def _picked(tensor: torch.Tensor, place: Sequence[np.ndarray]) -> np.ndarray:
    for dim, indices in enumerate(place):
        tensor = tensor.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    return tensor.double().cpu().numpy()


def _places(growth: AxisGrowth) -> np.ndarray:
    """Return where each copy of each element stands on the grown axis, [copies, size]."""
    found = np.empty((growth.copies, growth.size), dtype=np.int64)
    for run in growth.runs(slice(0, growth.copies * growth.size)):
        found[run.copy, slice(*run.source)] = np.r_[run.target]
    return found
