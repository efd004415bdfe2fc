"""Token losses of a running model, and the kernels that it computes them with.

With a vocabulary of 128k entries the logits of a batch take more memory than the model's activations. Above a bound
they are computed a chunk of tokens at a time, and again in the backward pass: the same numbers for one matrix product
more. torch's own `linear_cross_entropy` (2.13) and Liger's need a loss in the weights' dtype or give it in bfloat16.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from parallel.families import family_of
from parallel.sizes import tokens_a_chunk


def give_losses(model: Any, config: Mapping[str, Any]) -> None:
    """Let a transformers model return token losses [B, T] when it is called with `targets` [B, T].

    Its forward is replaced on the instance, so that DeepSpeed's hooks on the module run around it.
    """
    plain = model.forward
    key = family_of(config).logits_divisor
    divisor = float(config.get(key, 1.0)) if key else 1.0
    capped = getattr(model.config, "final_logit_softcapping", None) is not None  # the model's own head alone does it

    def forward(*given: Any, targets: torch.Tensor | None = None, **named: Any) -> Any:
        if targets is None:
            return plain(*given, **named)
        size = tokens_a_chunk(config["vocab_size"], targets.numel())
        if capped or size >= targets.numel():
            logits = plain(*given, **named).logits
            return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        hidden = model.base_model(*given, **named).last_hidden_state.flatten(0, 1)

        def part(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            logits = model.lm_head(tokens[None])[0] / divisor
            return cross_entropy(logits.float(), wanted, reduction="none")

        parts = zip(hidden.split(size), targets.flatten().split(size), strict=True)
        losses = [checkpoint(part, tokens, wanted, use_reentrant=False) for tokens, wanted in parts]
        return torch.cat(losses).view(targets.shape)

    model.forward = forward


FLASH, SDPA = "flash_attention_2", "sdpa"


def attention(kernels: str, precision: str) -> str:
    """Return the attention for training: FlashAttention-2, which masks documents without a mask, where it is installed
    and can run; else torch's own, which has a block mask for them.

    Args:
        kernels: auto, or torch: only what torch has.
    """
    return FLASH if precision == "bfloat16" and _runs(kernels, "flash_attn") else SDPA


def use_kernels(model: Any, kernels: str) -> Callable[[], None]:
    """Have norms, rotary embedding and MLP computed by Liger's kernels (arXiv 2410.10989), where CUDA and Liger are.

    Liger patches transformers' module as well, for all models to come: what is returned takes that back.
    """
    if not _runs(kernels, "liger_kernel"):
        return lambda: None
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    patched = vars(sys.modules[type(model).__module__])
    before = dict(patched)
    ours = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # see give_losses
    # Liger would compute silu, whatever a model that exists already is made of.
    ours["swiglu"] = getattr(model.config, "hidden_act", "silu") in ("silu", "swish")
    _apply_liger_kernel_to_instance(model=model, **ours)
    return lambda: patched.update(before)


def _runs(kernels: str, package: str) -> bool:
    return kernels == "auto" and torch.cuda.is_available() and importlib.util.find_spec(package) is not None
