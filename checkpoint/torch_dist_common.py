"""What common.pt tells Megatron-LM of a checkpoint that we write: the model's arguments, the run, the optimizer.

The optimizer's values stand where each of Megatron-Core's optimizers looks: `optimizer.optimizer` is read by the
distributed one and by that of 16-bit weights, `optimizer` by that of float32 weights. Its groups are Megatron-LM's, one
that decays and one that does not. They have no `max_lr` of their own, so a run's scheduler gives them what the run was
told; it wants `--override-opt_param-scheduler`, as its schedule is none that we know. The source's groups are in an
entry of ours.

Facts of megatron_core 0.16.1: core/optimizer/optimizer.py and distrib_optimizer.py (load_state_dict) and
core/optimizer_param_scheduler.py; of NVIDIA/Megatron-LM: megatron/training/checkpointing.py (load_checkpoint).
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from checkpoint.megatron_model import arguments_of
from checkpoint.source import Group, Source
from checkpoint.torch_dist_files import OURS, TORCH_DIST
from checkpoint.torch_dist_optim import GROUPS
from checkpoint.torch_dist_view import PADDED_TO, TorchDistView, padded_vocab
from checkpoint.zero_files import values_of
from parallel.errors import InputError

FORM = "fully_reshardable"
"""The distributed optimizer's form in which state is stored by parameter."""


def common_of(view: TorchDistView) -> dict[str, Any]:
    """Return what common.pt has.

    Raises:
        InputError: the optimizer's groups have taken several numbers of steps.
    """
    source = view.source
    moved = [name for name, info in source.infos.items() if "exp_avg" in info.slots]
    metadata: dict[str, object] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    common: dict[str, Any] = {
        "args": Namespace(**_arguments(view, with_state=bool(moved))),
        "checkpoint_version": 3.0,
        "iteration": source.run.step,
        "content_metadata": metadata,
        OURS: _ours(source),
    }
    if moved:
        metadata["distrib_optim_sharding_type"] = FORM
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
        common |= _optimizer(source, moved)
    return common


def _arguments(view: TorchDistView, *, with_state: bool) -> dict[str, object]:
    dtype = view.infos[next(iter(view.infos))].slots["weight"]
    return {
        **arguments_of(view.family, view.config),
        "padded_vocab_size": padded_vocab(view.config),
        "make_vocab_size_divisible_by": PADDED_TO,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": TORCH_DIST,
        "consumed_train_samples": view.run.samples,
        "consumed_valid_samples": 0,
        "no_save_optim": not with_state,
        "no_save_rng": True,
        **({} if view.run.seed is None else {"seed": view.run.seed}),
    }


def _ours(source: Source) -> dict[str, Any]:
    """Return how far the run was and its groups, as `checkpoint.torch_dist` reads them."""
    run = source.run
    return {
        "step": run.step,
        "tokens": run.tokens,
        "samples": run.samples,
        "seed": run.seed,
        "groups": {name: asdict(group) for name, group in source.groups.items()},
        "group_of": {name: info.group for name, info in source.infos.items() if info.tied_to is None},
    }


def _optimizer(source: Source, moved: Sequence[str]) -> dict[str, Any]:
    """Return the values of an optimizer that has these tensors, and of the scheduler of its learning rate."""
    groups = {name: source.groups.get(source.infos[name].group, Group()) for name in moved}
    steps = sorted({group.step for group in groups.values()})
    if len(steps) > 1:
        counts = " and ".join(map(str, steps))
        raise InputError(f"parameter groups have taken {counts} steps, and Megatron-Core counts one number for all")
    entries = [_entry(_first(groups, source, decays=decays), decays=decays) for decays in (True, False)]
    inner = {GROUPS: entries, "state": {"common_step": torch.tensor(float(steps[0]))}}
    decay, samples = entries[0]["weight_decay"], source.run.samples
    scheduler = {
        "max_lr": entries[0]["lr"],
        "min_lr": 0.0,
        "lr_warmup_steps": 0,
        "lr_decay_style": "constant",
        "lr_decay_steps": max(1, samples),
        "num_steps": samples,
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": max(1, samples),
    }
    optimizer = {**inner, "optimizer": inner, "param_state_sharding_type": FORM}
    return {"optimizer": optimizer, "opt_param_scheduler": scheduler}


def _first(groups: Mapping[str, Group], source: Source, *, decays: bool) -> Group:
    """Return the group of the first tensor of those that Megatron-LM has in one."""
    fitting = [group for name, group in groups.items() if (len(source.infos[name].shape) > 1) == decays]
    return next(iter([*fitting, *groups.values()]))


def _entry(group: Group, *, decays: bool) -> dict[str, Any]:
    """Return a parameter group as Megatron-Core has it, whatever Adam it is for."""
    fresh = torch.optim.AdamW([torch.zeros(1)]).state_dict()[GROUPS][0]
    values = {name: value for name, value in values_of(group).items() if name in ("lr", "betas", "eps")}
    return {
        **{name: value for name, value in fresh.items() if name != "params"},
        **values,
        "weight_decay": values_of(group)["weight_decay"] if decays else 0.0,
        "step": group.step,
        "bias_correction": True,  # asked for by Transformer Engine's Adam
        "wd_mult": 1.0 if decays else 0.0,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
    }
