"""Files as Megatron-LM writes them, of a tiny model: by code of its own, from what Megatron's sources say."""

import io
import random
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import torch
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

SLOTS = ("master", "exp_avg", "exp_avg_sq")
MULTIPLE = 16
"""--make-vocab-size-divisible-by"""
FAMILIES = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "attention_bias": False},
}
"""Changes of the tiny config."""
CLASSES = {name: name.capitalize() for name in ("llama", "mistral", "qwen2", "qwen3")}


def config_of(kind="llama", **changes):
    config = tiny_config(**{"rms_norm_eps": 1e-6, **FAMILIES[kind], **changes})
    config["architectures"] = [f"{CLASSES[config['model_type']]}ForCausalLM"]
    return config


def model_of(config):
    """Return transformers' model of a config, every weight of it random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif parameter.dim() == 1:
            parameter.data.normal_(std=0.1)
    return model.eval()


def state_of(config, dtype=torch.float32):
    """Return such a model's tensors by name; a tied head is left out."""
    state = {name: tensor.to(dtype) for name, tensor in model_of(config).state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    return state


def padded(config, tp=1):
    return -(-config["vocab_size"] // (MULTIPLE * tp)) * MULTIPLE * tp


def arguments(config, *, tp=1, pp=1, **changes):
    """Return a run's arguments, as its command line would have made them; many more are in a real one."""
    rope = config.get("rope_parameters", {})
    kind = config["model_type"]
    window = config.get("sliding_window") if kind == "mistral" else None
    values = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "kv_channels": config["head_dim"],
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": 64,
        "position_embedding_type": "rope",
        "rotary_base": int(rope.get("rope_theta", 10000)),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": rope["factor"] if rope.get("rope_type") == "linear" else None,
        "use_rope_scaling": rope.get("rope_type") == "llama3",
        "rope_scaling_factor": 8.0,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": bool(config.get("mlp_bias")),
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind == "qwen3",
        "window_size": (window - 1, 0) if window else None,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "num_experts": None,
        "multi_latent_attention": False,
        "mtp_num_layers": None,
        "softmax_type": "vanilla",
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": padded(config, tp),
        "make_vocab_size_divisible_by": MULTIPLE,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "init_method_std": 0.02,
        "consumed_train_samples": 70,
        "params_dtype": torch.bfloat16,
        "data_path": ["one", "two"],
        "seed": 1234,
    }
    return Namespace(**{**values, **changes})


def cut(tensor, dim, tp, rank):
    return tensor.chunk(tp, dim=dim)[rank].clone()


def layer_of(state, number, config, *, tp=1, rank=0, fused=False):
    """Return a rank's part of a layer, in the order of Megatron-Core's modules, by the names inside the layer."""
    prefix = f"model.layers.{number}."
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    groups, dim = config["num_key_value_heads"], config["head_dim"]

    def qkv(leaf):
        q, k, v = (inner[f"self_attn.{part}_proj.{leaf}"] for part in "qkv")
        q = q.reshape(groups, dim * config["num_attention_heads"] // groups, -1)
        joined = torch.cat([q, k.reshape(groups, dim, -1), v.reshape(groups, dim, -1)], dim=1)
        return cut(joined.reshape(-1, *inner[f"self_attn.q_proj.{leaf}"].shape[1:]), 0, tp, rank)

    def fc1(leaf):
        return torch.cat([cut(inner[f"mlp.{part}_proj.{leaf}"], 0, tp, rank) for part in ("gate", "up")])

    biased = "mlp.gate_proj.bias" in inner
    found = {}
    if not fused:
        found["input_layernorm.weight"] = inner["input_layernorm.weight"]
    found["self_attention.linear_proj.weight"] = cut(inner["self_attn.o_proj.weight"], 1, tp, rank)
    if biased:
        found["self_attention.linear_proj.bias"] = inner["self_attn.o_proj.bias"]
    if fused:
        found["self_attention.linear_proj._extra_state"] = None
        found["self_attention.linear_qkv.layer_norm_weight"] = inner["input_layernorm.weight"]
    found["self_attention.linear_qkv.weight"] = qkv("weight")
    if "self_attn.q_proj.bias" in inner:
        found["self_attention.linear_qkv.bias"] = qkv("bias")
    if fused:
        found["self_attention.linear_qkv._extra_state"] = io.BytesIO(b"float8")
    for part in "qk":
        if f"self_attn.{part}_norm.weight" in inner:
            found[f"self_attention.{part}_layernorm.weight"] = inner[f"self_attn.{part}_norm.weight"]
    norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    found[norm] = inner["post_attention_layernorm.weight"]
    found["mlp.linear_fc1.weight"] = fc1("weight")
    if biased:
        found["mlp.linear_fc1.bias"] = fc1("bias")
    if fused:
        found["mlp.linear_fc1._extra_state"] = torch.empty(0, dtype=torch.uint8)
    found["mlp.linear_fc2.weight"] = cut(inner["mlp.down_proj.weight"], 1, tp, rank)
    if biased:
        found["mlp.linear_fc2.bias"] = inner["mlp.down_proj.bias"]
    return found


def vocabulary(tensor, config, tp, rank):
    """Return a rank's rows of tokens; padding is what no token has."""
    rows = padded(config, tp) - len(tensor)
    return cut(torch.cat([tensor, torch.full((rows, tensor.shape[1]), 99.0, dtype=tensor.dtype)]), 0, tp, rank)


def chunk_of(state, config, layers, *, first, last, tp=1, rank=0, fused=False, copied=False):
    """Return a rank's state_dict of a stage that has these layers; `copied`: of a tied embedding there is a copy."""
    found = OrderedDict()
    if first:
        found["embedding.word_embeddings.weight"] = vocabulary(state["model.embed_tokens.weight"], config, tp, rank)
    for number, layer in enumerate(layers):
        for name, tensor in layer_of(state, layer, config, tp=tp, rank=rank, fused=fused).items():
            found[f"decoder.layers.{number}.{name}"] = tensor
    if last:
        found["decoder.final_layernorm.weight"] = state["model.norm.weight"]
        if copied or "lm_head.weight" in state:
            head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
            found["output_layer.weight"] = vocabulary(head, config, tp, rank)
    return found


def stages_of(layers, pp, virtual=1):
    """Return stage -> virtual stage -> its layers."""
    each = layers // (pp * virtual)
    return [
        [[(part * pp + stage) * each + number for number in range(each)] for part in range(virtual)]
        for stage in range(pp)
    ]


def write_run(folder, state, config, *, tp=1, pp=1, virtual=1, fused=False, slots=None, optimizer=None, **changes):
    """Write a run's folder with one step: weights, and what a training run has beside them.

    Args:
        state: Hugging Face name -> tensor, a tied head left out.
        virtual: virtual stages of each stage.
        slots: slot -> Hugging Face name -> float32 tensor; Adam's state, written by `optimizer`.
        optimizer: `plain_state` or `distributed_state`.
    """
    step = folder / "iter_0000007"
    stages = stages_of(config["num_hidden_layers"], pp, virtual)
    for stage in range(pp):
        for rank in range(tp):

            def chunks(tensors, stage=stage, rank=rank):
                return [
                    chunk_of(
                        tensors,
                        config,
                        layers,
                        first=stage == part == 0,
                        last=stage == pp - 1 and part == virtual - 1,
                        copied=pp > 1,
                        tp=tp,
                        rank=rank,
                        fused=fused,
                    )
                    for part, layers in enumerate(stages[stage])
                ]

            inside = step / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            inside.mkdir(parents=True)
            models = chunks(state)
            keys = ["model"] if virtual == 1 else [f"model{part}" for part in range(virtual)]
            beside = optimizer(inside, models, {slot: chunks(slots[slot]) for slot in SLOTS}) if optimizer else None
            torch.save(
                {
                    "args": arguments(config, tp=tp, pp=pp, **changes),
                    "checkpoint_version": 3.0,
                    "iteration": 7,
                    **dict(zip(keys, models, strict=True)),
                    **({"optimizer": beside} if beside else {}),
                    "opt_param_scheduler": {"max_lr": 1e-3, "lr_decay_style": "cosine", "num_steps": 70},
                    "rng_state": [rng_state()],
                    "num_floating_point_operations_so_far": 1.5e9,
                },
                inside / "model_optim_rng.pt",
            )
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def rng_state():
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }


def groups_of(chunks):
    """Return the names of what decays, and of what does not."""
    names = [(part, name) for part, chunk in enumerate(chunks) for name in chunk if not name.endswith("_extra_state")]
    one_dim = [place for place in names if chunks[place[0]][place[1]].dim() == 1]
    return [place for place in names if place not in one_dim], one_dim


def param_group(decays, **more):
    values = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1 if decays else 0.0}
    values |= {"wd_mult": 1.0 if decays else 0.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    return {**values, "default_config": True, "max_lr": 1e-3, "min_lr": 1e-5, **more}


def plain_state(inside, chunks, slots):
    """Return the state of Float16OptimizerWithFloat16Params, or of FP32Optimizer for float32 weights."""
    groups = groups_of(chunks)
    state, entries, masters, number = {}, [], [], 0
    for decays, places in zip((True, False), groups, strict=True):
        entries.append(param_group(decays, params=list(range(number, number + len(places)))))
        masters.append([slots["master"][part][name].clone().requires_grad_() for part, name in places])
        for part, name in places:
            moments = {slot: slots[slot][part][name].clone() for slot in SLOTS[1:]}
            state[number] = {"step": torch.tensor(7.0), **moments}
            number += 1
    inner = {"state": state, "param_groups": entries}
    if chunks[0][groups[0][0][1]].dtype == torch.float32:
        return inner
    return {"optimizer": inner, "fp32_from_fp16_params": masters}


def distributed_state(inside, chunks, slots, buckets=1):
    """Write the buffers of DistributedOptimizer and return what the other file has of it.

    Buckets end after so many parameters (of a stage, from its last on) as make them alike in number.
    """
    stored = {"buckets_coalesced": True}
    for part, chunk in enumerate(chunks):
        names = [name for name in reversed(chunk) if not name.endswith("_extra_state")]
        each = -(-len(names) // buckets)
        tensors = {}
        for key, slot in (("param", "master"), *((slot, slot) for slot in SLOTS[1:])):
            flat = []
            for start in range(0, len(names), each):
                bucket = torch.empty(0)
                for name in names[start : start + each]:
                    gap = torch.full((-len(bucket) % 64,), 77.0)
                    bucket = torch.cat([bucket, gap, slots[slot][part][name].flatten()])
                flat.append(bucket)
            tensors[key] = torch.cat(flat)
        tensors["numel_unpadded"] = len(tensors["param"])
        stored[part] = {(torch.bfloat16, torch.float32): tensors}
    torch.save(stored, inside / "distrib_optim.pt")
    return {"optimizer": {"param_groups": [param_group(True, step=7), param_group(False, step=7)]}}
