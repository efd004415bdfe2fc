"""Files as nanotron writes them, of a tiny Llama or Qwen2: by code of its own, from what nanotron's sources say."""

import json

import torch
from safetensors.torch import save_file

INSIDE = {
    "attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
    "input_layernorm": ["input_layernorm"],
    "post_attention_layernorm": ["post_attention_layernorm"],
}
OUTSIDE = {
    "model.token_position_embeddings.pp_block.token_embedding": "model.embed_tokens",
    "model.final_layer_norm.pp_block": "model.norm",
    "model.lm_head.pp_block": "lm_head",
}
SLOTS = ("master", "exp_avg", "exp_avg_sq")


def model_config(config, **changes):
    """Return the model_config.json that nanotron's dataclass gives for a Hugging Face config."""
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    same += ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    return {
        **{key: config[key] for key in same},
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "is_llama_config": True,
        "attention_bias": False,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "rope_interleaved": False,
        "use_cache": True,
        "_attn_implementation": "flash_attention_2",
        "z_loss_enabled": False,
        "z_loss_coefficient": 0.0001,
        **changes,
    }


def interleave(tensor, head_dim):
    """Return the rows of q or k as a model with interleaved rotary embeddings has them."""
    order = [row // 2 + row % 2 * (head_dim // 2) for row in range(head_dim)]
    return torch.cat([head[order] for head in tensor.split(head_dim)])


def parameters(state, config, interleaved=False):
    """Return name -> (the tensors that it is made of, dim that is cut or None, pipeline stage in [0, 1))."""
    found = {}
    layers = config["num_hidden_layers"]
    for module, hf in OUTSIDE.items():
        if f"{hf}.weight" in state:
            dim = None if hf == "model.norm" else 0
            found[f"{module}.weight"] = [state[f"{hf}.weight"]], dim, 0 if hf == "model.embed_tokens" else 0.99
    for layer in range(layers):
        for module, parts in INSIDE.items():
            for leaf in ("weight", "bias"):
                tensors = [state[name] for part in parts if (name := f"model.layers.{layer}.{part}.{leaf}") in state]
                if not tensors:
                    continue
                if interleaved and module == "attn.qkv_proj":
                    tensors[:2] = [interleave(tensor, config["head_dim"]) for tensor in tensors[:2]]
                dim = None if "norm" in module else 1 if module in ("attn.o_proj", "mlp.down_proj") else 0
                found[f"model.decoder.{layer}.pp_block.{module}.{leaf}"] = tensors, dim, layer / layers
    return found


def shard(tensors, dim, tp, rank):
    """Return a rank's part of a parameter, its slices here and in the whole, and the whole's shape."""
    if dim is None:
        return torch.cat(tensors), None, None
    here = whole = 0
    pieces, pairs = [], []
    for tensor in tensors:
        size = tensor.shape[dim] // tp
        pieces.append(tensor.narrow(dim, rank * size, size))
        sides = []
        # A parameter that is not fused has slices without ends on its own side.
        for start in (here if len(tensors) > 1 else None, whole + rank * size):
            cut = "None,None,None" if start is None else f"{start},{start + size},None"
            sides.append("|".join(cut if at == dim else "None,None,None" for at in range(tensor.dim())))
        pairs.append("#".join(sides))
        here, whole = here + size, whole + tensor.shape[dim]
    shape = tuple(whole if at == dim else size for at, size in enumerate(tensors[0].shape))
    return torch.cat(pieces, dim=dim if len(tensors) == 1 else 0).contiguous(), ";".join(pairs), shape


def write_run(folder, state, config, *, tp=1, pp=1, interleaved=False, numpy=False, **changes):
    """Write a step's folder: the weights, and what says what they are.

    Args:
        state: Hugging Face name -> tensor, a tied head left out.
        numpy: shapes are written as newer versions of numpy print their numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (tensors, dim, depth) in parameters(state, config, interleaved).items():
        inside = folder.joinpath("model", *name.split(".")[:-1])
        inside.mkdir(parents=True, exist_ok=True)
        leaf, stage = name.rpartition(".")[2], int(depth * pp)
        for rank in range(1 if dim is None else tp):
            data, pairs, shape = shard(tensors, dim, tp, rank)
            if dim is None:
                save_file({"data": data}, inside / f"model_{leaf}.safetensors", metadata={})
                continue
            text = f"(np.int64({shape[0]}), {', '.join(map(str, shape[1:]))})" if numpy else str(shape)
            metadata = {"version": "1.4", "local_global_slices_pairs": pairs, "unsharded_shape": text}
            path = inside / f"model_{leaf}_pp-rank-{stage}-of-{pp}_tp-rank-{rank}-of-{tp}.safetensors"
            save_file({"data": data}, path, metadata=metadata)
    (folder / "model_config.json").write_text(json.dumps(model_config(config, rope_interleaved=interleaved, **changes)))
    stages = [{"name": "stable", "start_training_step": 1, "consumed_train_samples": 70}]
    stages[0]["consumed_tokens_per_dataset_folder"] = {"a": 3000, "b": 580}
    metas = {"consumed_train_samples": 70, "last_train_step": 7, "last_stage_idx": 0, "data_stages": stages}
    (folder / "checkpoint_metadata.json").write_text(json.dumps({"version": "1.4", "tp": tp, "dp": 1, "metas": metas}))
    return folder


def write_optimizer(folder, slots, config, *, tp=1, pp=1, dp=None, interleaved=False, tied=False):
    """Write the optimizer's files: of ZeRO-0, or of ZeRO-1 with so many data-parallel ranks.

    Args:
        slots: slot -> Hugging Face name -> float32 tensor.
    """
    inside = folder / "optimizer"
    inside.mkdir()
    laid = {slot: parameters(slots[slot], config, interleaved) for slot in SLOTS}
    for stage in range(pp):
        names = [name for name, (_, _, depth) in laid["master"].items() if int(depth * pp) == stage]
        if tied and stage == pp - 1 and stage > 0:  # the head's, under the embedding's name
            names.append("model.token_position_embeddings.pp_block.token_embedding.weight")
        for rank in range(tp):
            for dp_rank in range(dp or 1):
                held = {}
                for name in names:
                    for slot in SLOTS:
                        tensors, dim, _ = laid[slot][name]
                        data = shard(tensors, dim, tp, rank)[0]
                        if dp is not None:
                            data = torch.tensor_split(data.flatten(), dp)[dp_rank]
                        if data.numel():
                            held.setdefault(name, {})[slot] = data
                which = "" if dp is None else f"_dp-{dp_rank}-of-{dp}"
                name = f"optimizer_pp-{stage}-of-{pp}{which}_tp-{rank}-of-{tp}_exp-0-of-1.pt"
                torch.save(_state(held), inside / name)
    (inside / "optimizer_config.json").write_text("{}")


def _state(held):
    """Return a rank's state as its optimizer gives it; the float32 weights are views of one buffer."""
    buffer = torch.cat([slots["master"].flatten() for slots in held.values()])
    masters, at = {}, 0
    for name, slots in held.items():
        count = slots["master"].numel()
        masters[name] = buffer[at : at + count].view_as(slots["master"]).requires_grad_()
        at += count
    values = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "fused": True, "initial_lr": 1e-3}
    numbers = {name: number for number, name in enumerate(held)}
    norms = [number for name, number in numbers.items() if "norm" in name]
    rest = [number for name, number in numbers.items() if "norm" not in name]
    return {
        "state": {
            numbers[name]: {
                "step": torch.tensor(7.0),
                "exp_avg": slots["exp_avg"].clone(),
                "exp_avg_sq": slots["exp_avg_sq"].clone(),
            }
            for name, slots in held.items()
        },
        "param_groups": [
            {**values, "weight_decay": 0.1, "params": rest},
            {**values, "weight_decay": 0.0, "params": norms},
        ],
        "names": {number: name for name, number in numbers.items()},
        "gradient_accumulator": masters,
    }
