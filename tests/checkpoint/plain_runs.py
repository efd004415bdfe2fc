"""Runs of plain DeepSpeed, whatever the stage, for tests that read what it wrote; and a hostile pickle."""

import json
from pathlib import Path

import torch
from tiny import on_ranks, tiny_config, tiny_model

from checkpoint.open import open_checkpoint
from checkpoint.source import read_tensor
from train.batch import plain_batch
from train.build import build_model
from train.engine import Engine, EngineConfig, deepspeed_config, import_deepspeed

BATCH, LENGTH, STEPS = 12, 16, 3
GROUPS = {"decay": 0.1, "no_decay": 0.0, "last": 0.0}
"""Weight decay by name: matrices, norms of layers, and the final norm."""
HOW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip": 0.5, "accumulation": 1}


def batch_of(step, ranks, tensor=1):
    """Return this rank's share of a step's batch [B, T + 1]; the ranks' shares make the same batch however many."""
    ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    share = BATCH // (ranks.world_size // tensor)
    begin = ranks.rank // tensor * share
    return ids[begin : begin + share]


def how(ranks, bf16, tensor=1):
    micro_batch = BATCH // (ranks.world_size // tensor)
    return EngineConfig(**HOW, micro_batch=micro_batch, precision="bfloat16" if bf16 else "float32")


def tensor_parallel(size):
    """Return DeepSpeed's settings for our own partition rule; the head's rows are cut too where it is not tied."""
    column, row = r".*\.(q|k|v|gate|up)_proj\.(weight|bias)$", r".*\.(o|down)_proj\.weight$"
    specs = [
        {"patterns": [column], "partition_type": "column"},
        {"patterns": [row], "partition_type": "row"},
        {"patterns": [r".*lm_head\.weight$"], "partition_type": "column", "gather_output": True},
    ]
    return {"autotp_size": size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def build(ranks, variant):
    """Return plain DeepSpeed's engine for a variant; three parameter groups, named unless the variant says so.

    A variant has: zero (DeepSpeed's zero_optimization), bf16; and may have: model (changes of the tiny config),
    frozen (parts of names of parameters that are not trained), named, config (further settings of DeepSpeed),
    tensor (ranks of tensor parallelism) and tensor_config (DeepSpeed's settings of it, for our own),
    group_of (group by tensor, of those that are trained) and order (of groups), as a source to be loaded has them.
    """
    import deepspeed

    tensor = variant.get("tensor", 1)
    config = {**deepspeed_config(how(ranks, variant["bf16"], tensor)), **variant.get("config", {})}
    config["zero_optimization"] = variant["zero"]
    config.pop(
        "data_types", None
    )  # with float32 gradient sums DeepSpeed takes another optimizer for ZeRO-1 in bfloat16
    if tensor > 1:
        config["tensor_parallel"] = variant.get("tensor_config") or tensor_parallel(tensor)
    changes = variant.get("model", {})
    sharded = variant["zero"]["stage"] == 3 and tensor == 1
    model = tiny_model(**changes).train()
    if sharded:
        weights, model = dict(model.named_parameters()), build_model(tiny_config(**changes), config)
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weights[name].data)
    chosen = variant.get("group_of") or {
        name: "last" if name == "model.norm.weight" else "no_decay" if "norm" in name else "decay"
        for name, _ in model.named_parameters()
    }
    order = variant.get("order", GROUPS)
    groups = {name: {"params": [], "weight_decay": GROUPS.get(name, 0.0)} for name in order}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in variant.get("frozen", ())))
        if name in chosen:
            groups[chosen[name]]["params"].append(parameter)
    kept = {name: group for name, group in groups.items() if group["params"]}
    named = [{**group, "name": name} if variant.get("named", True) else group for name, group in kept.items()]
    optimizer = torch.optim.AdamW(named, lr=HOW["lr"], betas=HOW["betas"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def gathered(engine):
    """Return every slot of every parameter as the engine itself gathers it."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not engine.zero_optimization_partition_weights():
        # DeepSpeed 0.19.8 links moments when the first group has stepped, and so finds those of no other group.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter]):
            slots = {"weight": parameter.detach().clone()}
        if parameter.requires_grad:
            slots["master"] = safe_get_full_fp32_param(parameter)
            for slot in ("exp_avg", "exp_avg_sq"):
                slots[slot] = safe_get_full_optimizer_state(parameter, slot)
        found[name] = slots
    return found


def steps(engine, ranks, first, last, variant):
    """Train steps [first, last) and return their losses, the mean over all ranks.

    With DeepSpeed's own settings of tensor parallelism the head's output may be cut; the model's own loss knows how.
    """
    tensor = variant.get("tensor", 1)
    losses = []
    for step in range(first, last):
        ids = batch_of(step, ranks, tensor)
        if "tensor_config" in variant:
            loss = engine(input_ids=ids, labels=ids).loss
        else:
            logits = engine(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(float(ranks.sum(loss.detach().double())) / ranks.world_size)
    return losses


def train(ranks, folder, variants):
    """Train each variant, save it, and return what its engine gathers then and the losses of two more steps."""
    import_deepspeed().init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    found = {}
    for key, variant in variants.items():
        engine = build(ranks, variant)
        steps(engine, ranks, 0, STEPS, variant)
        now = gathered(engine)
        state = {"growmerge": {"tokens": 7, "samples": 9, "seed": 1}}
        engine.save_checkpoint(folder, tag=key, client_state=state, save_latest=False)
        if ranks.first:
            config = json.dumps(tiny_config(**variant.get("model", {})))
            (Path(folder) / key / "config.json").write_text(config)
        found[key] = (now, steps(engine, ranks, STEPS, STEPS + 2, variant))
        engine.destroy()
    return found


def run_variants(folder, world, variants):
    """Return, by variant, what its engine gathered (see `gathered`) and its next losses; folders are folder/run/key."""
    return on_ranks(folder, world, train, str(folder / "run"), variants)[0]


def loaded(ranks, folder, tag, variant):
    """Load a ZeRO checkpoint with DeepSpeed's own loader; return its losses of two steps and what it gathers first."""
    import_deepspeed().init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    engine = build(ranks, variant)
    path, client = engine.load_checkpoint(folder, tag=tag)
    assert path is not None
    assert client["growmerge"]["tokens"] == 7
    assert engine.global_steps == STEPS
    now = gathered(engine)
    losses = steps(engine, ranks, STEPS, STEPS + 2, variant)
    engine.destroy()
    return now, losses


def resumed(ranks, folder, bf16=False):
    """Go on from any checkpoint in our own ZeRO-3 engine; return the losses of two steps."""
    engine = Engine(open_checkpoint(folder), how(ranks, bf16), ranks)
    losses = []
    for step in range(STEPS, STEPS + 2):
        ids = batch_of(step, ranks)
        losses.append(engine.step([plain_batch(ids)], HOW["lr"]).loss)
    engine.close()
    return losses


def assert_read(source, found, links=True):
    """Compare every element of every slot with what `gathered` returned; without `links` that knows weights alone."""
    for name, slots in found.items():
        info = source.infos[name]
        assert info.slots == {slot: tensor.dtype for slot, tensor in slots.items()}, name
        assert info.shape == tuple(slots["weight"].shape)
        assert info.trainable == ("master" in slots)
        for slot, tensor in slots.items():
            if links or slot == "weight":
                assert torch.equal(read_tensor(source, name, slot, tensor.dtype), tensor), (name, slot)
        if info.trainable:
            assert torch.equal(read_tensor(source, name, "master").to(slots["weight"].dtype), slots["weight"]), name


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))
