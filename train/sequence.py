"""Ulysses sequence parallelism (arXiv 2309.14509; with ZeRO-3: ALST, arXiv 2506.13996): ranks that share a sequence.

Each rank has a contiguous part of every sequence; in attention the ranks exchange parts, so that each has whole
sequences of some of the heads. DeepSpeed puts itself in the place of transformers' attention function.
"""

from typing import Any

import torch

from parallel.errors import InputError
from parallel.mesh import Mesh
from train.loss import SDPA


class SequenceParallel:
    """What an engine needs of it."""

    def __init__(self, model: Any, mesh: Mesh, config: Any, attention: str) -> None:
        """Put Ulysses in the place of attention, for training alone: in evaluation every rank has text of its own."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._mesh = mesh
        self._functions = ALL_ATTENTION_FUNCTIONS
        self._attention = attention
        self._plain = ALL_ATTENTION_FUNCTIONS[attention]
        self.mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=attention,
            sequence_parallel_size=mesh.sp,
            micro_batch_size=config.micro_batch,
            seq_length=config.sequence_length,
            seq_length_is_variable=False,
            disable_in_eval=True,
        )
        self._place = self.mpu.get_sequence_parallel_rank()

    def part(
        self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Return this rank's part of inputs, targets, weights and position ids, [B, T / sp] each.

        Raises:
            InputError: documents are masked, which needs flash attention (CUDA) with sequence parallelism.
        """
        if positions is not None and self._attention == SDPA:
            raise InputError("documents: masked with parallel.sp needs flash attention (CUDA): use documents: packed")
        length = inputs.shape[1]
        if positions is None:
            positions = torch.arange(length, device=inputs.device).expand(inputs.shape)
        size = length // self._mesh.sp
        part = slice(self._place * size, (self._place + 1) * size)
        return tuple(tensor[:, part].contiguous() for tensor in (inputs, targets, weights, positions))

    def close(self) -> None:
        """Give transformers its own attention back."""
        self._functions[self._attention] = self._plain
