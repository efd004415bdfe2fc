"""Training of a tiny model under FSDP2 on real ranks, which saves and loads with torch.distributed.checkpoint."""

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import tiny_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

LR = 1e-2
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build(seed=0, **changes):
    """Return a sharded model and its optimizer: matrices, and norms without weight decay."""
    model = tiny_model(seed, **changes).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size() if dist.is_initialized() else 1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))


def whole(model, optimizer):
    """Return copies of all that they hold, on rank 0."""
    return copy.deepcopy(
        (get_model_state_dict(model, options=WHOLE), get_optimizer_state_dict(model, optimizer, options=WHOLE))
    )


def train(model, optimizer, steps, dtype=None):
    """Train on the same batch a step on every rank, and return the losses."""
    losses = []
    for step in steps:
        ids = torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state_of(model, optimizer, form):
    """Return a state dict in one of the forms that people save."""
    if form == "flat":
        return get_model_state_dict(model)
    options = StateDictOptions(flatten_optimizer_state_dict=form == "titan")
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    if form == "titan":  # as torchtitan: the model's keys at the top
        return {**get_model_state_dict(model), "optimizer": optim, "train_state": {"step": torch.tensor(3)}}
    state = {"model": get_model_state_dict(model), "optim": optim}
    return {"app": state} if form == "app" else {**state, "step": 3}


def save(ranks, folder, form="model", **changes):
    """Train three steps and save; return the whole state (rank 0) and the losses of three more."""
    model, optimizer = build(**changes)
    train(model, optimizer, range(3))
    dcp.save(state_of(model, optimizer, form), checkpoint_id=folder)
    return whole(model, optimizer), train(model, optimizer, range(3, 6))


def load(ranks, folders, optim=True, **changes):
    """Load each folder into a model of other weights; return its whole state (rank 0) and the losses of three steps."""
    results = []
    for folder in folders:
        model, optimizer = build(seed=7, **changes)
        state = {"model": get_model_state_dict(model)}
        if optim:
            state["optim"] = get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        if optim:
            set_optimizer_state_dict(model, optimizer, state["optim"])
        results.append((whole(model, optimizer), train(model, optimizer, range(3, 6))))
    return results
