"""The owner of the format: megatron_core's GPTModel and optimizers, on CPU, in processes of their own."""

import contextlib
from argparse import Namespace
from functools import wraps
from pathlib import Path

import torch
from megatron_runs import rng_state

BATCH, LENGTH = 2, 24


def ids_of(vocab_size):
    return torch.randint(0, vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def on_cpu():
    """Have what megatron_core asks of a GPU answered by the CPU: nothing of what is tested."""

    def elsewhere(make):
        @wraps(make)
        def here(*args, **kwargs):
            if "cuda" in str(kwargs.get("device")):
                kwargs["device"] = "cpu"
            return make(*args, **kwargs)

        return here

    for name in ("tensor", "zeros", "ones", "empty"):
        setattr(torch, name, elsewhere(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")
    kind = torch.Tensor.type

    def type_of(self, *args, **kwargs):
        found = kind(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    torch.Tensor.type = type_of
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def begin(ranks, stages=1):
    on_cpu()
    from megatron.core import parallel_state
    from megatron.core.transformer import dot_product_attention

    parallel_state.initialize_model_parallel(ranks.world_size // stages, stages)
    # The state of a GPU's random numbers, for dropout, which is 0.
    quiet = Namespace(fork=contextlib.nullcontext)
    dot_product_attention.tensor_parallel = Namespace(get_cuda_rng_tracker=lambda: quiet)


def transformer_config(args):
    """Return Megatron-Core's config of a run's arguments, as megatron/training/arguments.py makes it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    same = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "qk_layernorm")
    same += ("add_bias_linear", "add_qkv_bias", "normalization", "attention_dropout", "hidden_dropout")
    return TransformerConfig(
        **{name: getattr(args, name) for name in same},
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        layernorm_epsilon=args.norm_epsilon,
        rotary_interleaved=args.rotary_interleaved,
        window_size=getattr(args, "window_size", None),
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        params_dtype=args.params_dtype,
        pipeline_dtype=args.params_dtype,
        bf16=args.params_dtype == torch.bfloat16,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )


def gpt_model(args, first=True, last=True):
    """Return the model of a run's arguments, as pretrain_gpt.py builds it with the local layer spec."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    model = GPTModel(
        config=transformer_config(args),
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=first,
        post_process=last,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
    )
    # Its forward pass takes parameters in another precision than float32 where it finds them.
    return model.to(args.params_dtype).eval()


def forward(model, vocab_size):
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    hidden = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return model(ids_of(vocab_size), positions, hidden)[..., :vocab_size].float()


def logits_of(model, vocab_size):
    with torch.no_grad():
        return forward(model, vocab_size)


def loaded(ranks, folders):
    """Load each written folder as Megatron-LM's --load does, strictly; return its logits."""
    begin(ranks)
    found = {}
    for key, folder in folders.items():
        tracker = (Path(folder) / "latest_checkpointed_iteration.txt").read_text().strip()
        assert tracker == "release"
        path = Path(folder) / "release" / f"mp_rank_{ranks.rank:02d}" / "model_optim_rng.pt"
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        args = state["args"]
        assert (args.tensor_model_parallel_size, state["checkpoint_version"]) == (ranks.world_size, 3.0)
        model = gpt_model(args)
        assert list(state["model"]) == [name for name in model.state_dict() if not name.endswith("_extra_state")]
        model.load_state_dict(state["model"], strict=True)
        found[key] = logits_of(model, args.vocab_size)
    return found


def saved(ranks, folder, variants):
    """Build each variant, step its optimizer, and save it as Megatron-LM does; return what was in it.

    A variant has args (without enums), and may have optimizer: plain, or distributed (with a bucket's size, or None).

    Returns:
        by variant: logits, and slot -> the rank's shard by name.
    """
    begin(ranks)
    from megatron.core.transformer.enums import AttnBackend

    found = {}
    for key, variant in variants.items():
        args = Namespace(**{**vars(variant["args"]), "attention_backend": AttnBackend.auto})
        torch.manual_seed(5 + ranks.rank)
        model = gpt_model(args)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
                torch.distributed.broadcast(parameter.data.uniform_(0.5, 1.5), 0)
            elif parameter.dim() == 1:
                parameter.data.normal_(std=0.1)
        inside = Path(folder) / key / "iter_0000007" / f"mp_rank_{ranks.rank:02d}"
        inside.mkdir(parents=True)
        slots, beside = {}, {}
        if "optimizer" in variant:
            slots, state = stepped(model, args, variant, inside)
            beside = {"optimizer": state}
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        found[key] = (logits_of(model, args.vocab_size), {"weight": weights, **slots})
        state = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
        state |= {"model": model.state_dict_for_save_checkpoint(), **beside, "rng_state": [rng_state()]}
        torch.save(state, inside / "model_optim_rng.pt")
        if ranks.first:
            (Path(folder) / key / "latest_checkpointed_iteration.txt").write_text("7")
    return found


def stepped(model, args, variant, inside):
    """Take a step of Megatron's optimizer on random gradients; return its slots by name, and its state."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    distributed = variant["optimizer"] == "distributed"
    bucket = variant.get("bucket")
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=bucket is not None,
        bucket_size=bucket,
    )
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    how = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.1,
        bf16=args.params_dtype == torch.bfloat16,
        params_dtype=args.params_dtype,
        use_distributed_optimizer=distributed,
        apply_wd_to_qk_layernorm=getattr(args, "apply_wd_to_qk_layernorm", False),
    )
    (optimizer,) = get_megatron_optimizer(how, [wrapped]).chained_optimizers
    # It is what takes the decay from the group that has none.
    constant = {
        "lr_warmup_steps": 0,
        "lr_decay_steps": 10,
        "wd_incr_steps": 10,
        "use_checkpoint_opt_param_scheduler": True,
    }
    constant |= {"init_lr": 1e-2, "max_lr": 1e-2, "min_lr": 1e-2, "start_wd": 0.1, "end_wd": 0.1}
    OptimizerParamScheduler(optimizer, lr_decay_style="constant", wd_incr_style="constant", **constant)
    mains = [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
    for _ in range(3):
        for main in mains:
            main.grad = torch.randn_like(main)
        optimizer.optimizer.step()
    if distributed or how.bf16:
        optimizer._copy_main_params_to_model_params()
    slots = {slot: {} for slot in ("master", "exp_avg", "exp_avg_sq")}
    for name, parameter in model.named_parameters():
        if distributed:
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        else:
            main = parameter.main_param if how.bf16 else parameter
            tensors = {"param": main, **optimizer.optimizer.state[main]}
        for slot, key in (("master", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            slots[slot][name] = tensors[key].detach().clone().view(parameter.shape)
    if distributed:
        optimizer.save_parameter_state(str(inside / "distrib_optim.pt"))
    return slots, optimizer.state_dict()


def staged(ranks, folder, args):
    """Build the stages of a pipeline, one a rank, and save them; return a rank's weights by their names there."""
    begin(ranks, stages=ranks.world_size)
    torch.manual_seed(5)  # so that the copy of a tied embedding is one
    model = gpt_model(args, first=ranks.first, last=ranks.rank == ranks.world_size - 1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    inside = Path(folder) / f"mp_rank_00_{ranks.rank:03d}"
    inside.mkdir(parents=True)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": model.state_dict_for_save_checkpoint()}
    torch.save(state, inside / "model_optim_rng.pt")
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
