"""Megatron-Core's distributed checkpoints: saved and loaded by itself, on CPU, in processes of its own.

Weights go in and come out by Hugging Face name; how they lie in a GPTModel, and which keys a checkpoint has, is said
here by code of its own. `run_tasks` runs tasks on so many tensor-parallel ranks, which are this file run as a program.
"""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch

LR, STEPS = 1e-2, 3
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Name in a model of the local layer spec -> in a key."""
SAME = {
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "mlp.down_proj": "mlp.linear_fc2",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}
OUTER = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}


def core_weights(state, config, padded):
    """Return the parameters of a GPTModel, whole, by their names in it; rows of padding are 99."""
    groups = config["num_key_value_heads"]
    found = {}
    for name, there in OUTER.items():
        if name in state:
            rows = padded - len(state[name]) if state[name].dim() == 2 else 0
            found[there] = torch.cat([state[name], state[name].new_full((rows, *state[name].shape[1:]), 99.0)])
    for layer in range(config["num_hidden_layers"]):
        hf, core = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for leaf in ("weight", "bias"):
            if f"{hf}self_attn.q_proj.{leaf}" in state:
                parts = [state[f"{hf}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                grouped = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in parts]
                found[f"{core}self_attention.linear_qkv.{leaf}"] = torch.cat(grouped, dim=1).flatten(0, 1)
            if f"{hf}mlp.gate_proj.{leaf}" in state:
                halves = [state[f"{hf}mlp.{part}_proj.{leaf}"] for part in ("gate", "up")]
                found[f"{core}mlp.linear_fc1.{leaf}"] = torch.cat(halves)
            for part, there in SAME.items():
                if f"{hf}{part}.{leaf}" in state:
                    found[f"{core}{there}.{leaf}"] = state[f"{hf}{part}.{leaf}"]
    return found


def hf_weights(core, config):
    """Return the opposite."""
    groups, size = config["num_key_value_heads"], config["head_dim"]
    queries = config["num_attention_heads"] // groups * size
    back = {there: name for name, there in OUTER.items()}
    found = {}
    for name, tensor in core.items():
        if name in back:
            found[back[name]] = tensor[: config["vocab_size"]] if tensor.dim() == 2 else tensor
            continue
        _, _, layer, *inner, leaf = name.split(".")
        hf, part = f"model.layers.{layer}.", ".".join(inner)
        if part == "self_attention.linear_qkv":
            pieces = tensor.reshape(groups, -1, *tensor.shape[1:]).split([queries, size, size], dim=1)
            found |= {f"{hf}self_attn.{p}_proj.{leaf}": t.flatten(0, 1) for p, t in zip("qkv", pieces, strict=True)}
        elif part == "mlp.linear_fc1":
            gate, up = tensor.chunk(2)
            found |= {f"{hf}mlp.gate_proj.{leaf}": gate, f"{hf}mlp.up_proj.{leaf}": up}
        else:
            found[next(f"{hf}{mine}.{leaf}" for mine, there in SAME.items() if there == part)] = tensor
    return found


def keys_of(core):
    """Return tensors as a checkpoint has them: by key, those of all layers stacked."""
    found, stacks = {}, {}
    for name, tensor in core.items():
        parts = name.split(".")
        if parts[1] != "layers":
            found[name] = tensor
        else:
            inner = ".".join(parts[3:])
            stacks.setdefault(f"decoder.layers.{NORMS.get(inner, inner)}", []).append(tensor)
    return found | {key: torch.stack(pieces) for key, pieces in stacks.items()}


def run_tasks(folder, tasks, world=1):
    """Run tasks, each a dict with `do` (a name below) and its arguments; return what each returned on rank 0."""
    path = folder / f"tasks-{len(list(folder.iterdir()))}.pt"
    torch.save({"tasks": tasks, "world": world}, path)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parent.parent)))}
    environment |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # what it compiles for a GPU
    command = [sys.executable, __file__, str(path)]
    ranks = []
    for rank in range(world):
        with path.with_suffix(f".{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen([*command, str(rank)], env=environment, stdout=log, stderr=log))
    codes = [rank.wait() for rank in ranks]
    assert not any(codes), "\n".join(path.with_suffix(f".{rank}.log").read_text()[-3000:] for rank in range(world))
    return torch.load(f"{path}.done", weights_only=False)  # written by _main


def _shard(name, tensor, world, rank):
    """Return a tensor-parallel rank's part of a parameter."""
    if "linear_fc1" in name:
        return torch.cat([half.chunk(world)[rank] for half in tensor.chunk(2)])
    if ("linear_proj" in name or "linear_fc2" in name) and tensor.dim() == 2:
        return tensor.chunk(world, dim=1)[rank]
    whole = "layernorm" in name or "linear_proj" in name or "linear_fc2" in name
    return tensor if whole else tensor.chunk(world)[rank]


def _build(args, config, state, world, rank):
    """Return Megatron-Core's model with the weights of a state."""
    from megatron_engine import gpt_model

    model = gpt_model(args)
    core, named = core_weights(state, config, args.padded_vocab_size), dict(model.named_parameters())
    assert named.keys() == core.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(_shard(name, core[name], world, rank))
    return model


def _optimizer(model, kind):
    """Return an optimizer of Megatron-Core: of float32 weights, or the distributed one, of bfloat16 weights."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    distributed = kind == "distributed"
    told = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    how = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=distributed,
        params_dtype=torch.bfloat16 if distributed else torch.float32,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(how, [DistributedDataParallel(model.config, told, model)])
    return optimizer, _scheduler(optimizer)


def _scheduler(optimizer):
    """Return what sets the learning rate and the weight decay of each group, as Megatron-LM has it."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=1000,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1000,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _step(optimizer, kind, steps):
    (inner,) = optimizer.chained_optimizers
    mains = [parameter for group in inner.optimizer.param_groups for parameter in group["params"]]
    for _ in range(steps):
        for main in mains:
            main.grad = torch.randn_like(main)
        inner.optimizer.step()
    if kind == "distributed":
        inner._copy_main_params_to_model_params()


def _slots(model, optimizer, kind, config):
    """Return slot -> Hugging Face name -> tensor."""
    core = {"weight": {}}
    for name, parameter in model.named_parameters():
        core["weight"][name] = parameter.detach().clone()
        if optimizer is None:
            continue
        (inner,) = optimizer.chained_optimizers
        if kind == "distributed":
            state = inner._get_main_param_and_optimizer_states(parameter)
        else:
            state = {"param": parameter, **inner.optimizer.state[parameter]}
        for slot, key in (("master", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            core.setdefault(slot, {})[name] = state[key].detach().clone().view(parameter.shape)
    return {slot: hf_weights(tensors, config) for slot, tensors in core.items()}


def _keep_steps(inner):
    """Have the distributed optimizer load torch's Adam: its state has the step, Transformer Engine's has not."""
    plain = inner._set_main_param_and_optimizer_states

    def set_states(parameter, tensors):
        step = inner._get_main_param_and_optimizer_states(parameter)["step"].clone()
        plain(parameter, {"step": step, **tensors})

    inner._set_main_param_and_optimizer_states = set_states


def save(world, rank, *, folder, config, state, args, metadata=None, kind=None, with_args=True):
    """Save a model of these weights, stepped if it has an optimizer; return its logits and all its slots.

    Args:
        metadata: what `sharded_state_dict` is told.
        kind: of optimizer, see `_optimizer`.
        with_args: whether common.pt says what the model is.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.transformer.enums import AttnBackend
    from megatron_engine import logits_of

    model = _build(args, config, state, world, rank)
    told = dict(metadata or {})
    optimizer = None
    if kind is not None:
        optimizer, scheduler = _optimizer(model, kind)
        _step(optimizer, kind, STEPS)
    whole = {"checkpoint_version": 3.0, "iteration": 7, "model": model.sharded_state_dict(metadata=told)}
    if optimizer is not None:
        whole["optimizer"] = optimizer.sharded_state_dict(whole["model"], metadata=told)
        whole["opt_param_scheduler"] = scheduler.state_dict()
    if with_args:
        whole["args"] = Namespace(**vars(args), attention_backend=AttnBackend.auto)
    states = [{"torch_rng_state": torch.get_rng_state()}]
    whole["rng_state"] = ShardedObject("rng_state", states, (1, world), (0, rank), replica_id=0)
    slots = _slots(model, optimizer, kind, config) if world == 1 else None
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    kept = {key: value for key, value in told.items() if key != "dp_cp_group"}
    dist_checkpointing.save(whole, str(folder), content_metadata=kept)
    return logits_of(model, config["vocab_size"]), slots


def _losses(model, optimizer, vocab_size, steps):
    """Train on a text with the optimizer of float32 weights; return the losses before each step."""
    from megatron_engine import forward, ids_of

    (inner,) = optimizer.chained_optimizers
    losses, ids = [], ids_of(vocab_size)
    for _ in range(steps):
        logits = forward(model, vocab_size)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        inner.optimizer.step()
        losses.append(float(loss))
    return losses


def load(world, rank, *, folder, config, state, args, kind=None, goes_on=0):
    """Load a checkpoint over other weights, as Megatron-LM does.

    Args:
        goes_on: steps to train; their losses are returned instead.

    Returns:
        logits, all slots, the optimizer's steps, the keys that the model did not ask for, and the arguments saved.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron_engine import logits_of

    model = _build(args, config, state, world, rank)
    told = dist_checkpointing.load_content_metadata(str(folder)) or {}
    told["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    optimizer = None
    if kind is not None:
        optimizer, scheduler = _optimizer(model, kind)
        _step(optimizer, kind, 1)
    asked = {"model": model.sharded_state_dict(metadata=told)}
    if optimizer is not None:
        asked["optimizer"] = optimizer.sharded_state_dict(asked["model"], is_loading=True, metadata=told)
    found, unasked, lacking = dist_checkpointing.load(asked, str(folder), strict="return_all")
    assert not lacking, f"the checkpoint has no {lacking}"
    model.load_state_dict(found["model"], strict=True)
    steps = set()
    if optimizer is not None:
        (inner,) = optimizer.chained_optimizers
        if kind == "distributed":
            _keep_steps(inner)
        optimizer.load_state_dict(found["optimizer"])
        scheduler.load_state_dict(found["opt_param_scheduler"])
        assert [group["lr"] for group in optimizer.param_groups] == [LR, LR]
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
        steps = {int(one["step"]) for one in inner.optimizer.state.values()}
    if goes_on:
        return _losses(model, optimizer, config["vocab_size"], goes_on)
    slots = _slots(model, optimizer, kind, config) if world == 1 else None
    return logits_of(model, config["vocab_size"]), slots, steps, sorted(unasked), vars(found["args"])


def _main(path, rank):
    from megatron_engine import begin

    told = torch.load(path, weights_only=False)  # written by run_tasks
    world = told["world"]
    meet = f"file://{path}.meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    begin(Namespace(world_size=world))
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    results = []
    for task in told["tasks"]:
        torch.manual_seed(5)
        results.append(globals()[task.pop("do")](world, rank, **task))
    if rank == 0:
        torch.save(results, f"{path}.done")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
