"""Tiny models in the forms of "Grow Up and Merge", by code of its own: its exporter's, its trainer's, its recipes.

Sizes are those of the paper's models, divided: three query heads a key/value head, GELU, tied embeddings. H query
heads, K key/value heads of 8, D hidden, F feed-forward.
"""

import json
from itertools import combinations

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LANGUAGES = {"ekk": "estonian", "fao": "faroese", "fas": "persian", "isl": "icelandic", "swe": "swedish"}
SETUPS = {"1x": "180M", "1x_cloned": "572M", "2x": "572M"}
METHODS = ("linear", "multislerp", "task_arithmetic", "ties", "dare_ties")
VOCABULARY, LAYERS, HEAD = 258, 2, 8
SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}
LARGE = {name: 2 * size for name, size in SMALL.items()}


def new_weights(seed):
    """Return a small model's weights in bfloat16, by Hugging Face names; the head is the embedding."""
    generator = torch.Generator().manual_seed(seed)
    size, ffn, kv = SMALL["hidden_size"], SMALL["intermediate_size"], HEAD * SMALL["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (VOCABULARY, size), "model.norm.weight": (size,)}
    for layer in range(LAYERS):
        parts = {"self_attn.q_proj": (size, size), "self_attn.k_proj": (kv, size), "self_attn.v_proj": (kv, size)}
        parts |= {"self_attn.o_proj": (size, size), "mlp.gate_proj": (ffn, size), "mlp.up_proj": (ffn, size)}
        parts |= {"mlp.down_proj": (size, ffn), "input_layernorm": (size,), "post_attention_layernorm": (size,)}
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        name: (1 + 0.2 * values if values.dim() == 1 else 0.2 * values).bfloat16() for name, values in drawn.items()
    }


def adapted(weights, seed):
    """Return weights as after some training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (values.float() + 0.03 * torch.randn(values.shape, generator=generator)).bfloat16()
        for name, values in weights.items()
    }


def cloned(weights):
    """Return HyperCloning's model of twice the width: matrices tiled and halved, embedding and norms tiled alone."""

    def tile(name, values):
        if values.dim() == 1:
            return values.repeat(2)
        return values.repeat(1, 2) if "embed" in name else values.repeat(2, 2) / 2

    return {name: tile(name, values) for name, values in weights.items()}


def logits_of(weights, ids, divisor=1):
    """Return a HyperLlama's logits [T, V] in float32: its head is the embedding divided by a number."""
    weights = {name: values.float() for name, values in weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    heads, kv = (weights[f"model.layers.0.self_attn.{one}_proj.weight"].shape[0] // HEAD for one in "qk")
    angle = torch.arange(len(ids))[:, None] / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = (torch.cat([turn, turn], -1)[:, None] for turn in (angle.cos(), angle.sin()))

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[name]

    def turned(x):  # [T, heads, 8]
        return x * cos + torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1) * sin

    x = embedding[ids]
    for layer in range(LAYERS):

        def linear(part, value, at=f"model.layers.{layer}"):
            return value @ weights[f"{at}.{part}_proj.weight"].T

        h = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = (linear(f"self_attn.{one}", h).view(len(ids), -1, HEAD) for one in "qkv")
        q, k = turned(q), turned(k).repeat_interleave(heads // kv, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / HEAD**0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v.repeat_interleave(heads // kv, 1))
        x = x + linear("self_attn.o", mixed.reshape(len(ids), -1))
        h = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        x = x + linear("mlp.down", F.gelu(linear("mlp.gate", h)) * linear("mlp.up", h))
    return norm(x, "model.norm.weight") @ (embedding / divisor).T


def config_of(weights, **changes):
    small = weights["model.norm.weight"].shape[0] == SMALL["hidden_size"]
    return {
        **(SMALL if small else LARGE),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "initializer_range": 0.041666666666666664,
        "max_position_embeddings": 64,
        "num_hidden_layers": LAYERS,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCABULARY,
        **changes,
    }


def write_exported(folder, weights, factor=2, **changes):
    """Write what the exporter does: a HyperLlama with its code, or a Llama if the head divides by nothing.

    Returns:
        a file that is there once any of that code has run.
    """
    folder.mkdir(parents=True)
    ran = folder.parent / f"{folder.name}-ran"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "head_dim": HEAD}
    config |= config_of(weights, transformers_version="4.57.1")
    if factor != 1:
        code = {"AutoConfig": "configuration_hyperllama.HyperLlamaConfig"}
        code["AutoModelForCausalLM"] = "modeling_hyperllama.HyperLlamaForCausalLM"
        config |= {"architectures": ["HyperLlamaForCausalLM"], "model_type": "hyperllama", "auto_map": code}
        config["lm_head_normalization_factor"] = factor
        for name in ("configuration_hyperllama", "modeling_hyperllama", "tokenization_hyperllama"):
            (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise SystemExit('code was run')\n")
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "transformers_version": "4.57.1"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return ran


def write_tokenizer(folder, **settings):
    """Write a tokenizer as Llama 3's: bytes alone, "!" is 0, special tokens behind all others."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|eot_id|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def write_nanotron(folder, weights, factor=2, start=None, run=None):
    """Write a step of a nanotron run: a file for each parameter, q over k over v, and gate over up; its configs.

    Args:
        start: what the run's config says of its start: `model.init_method` or `checkpoints`.
    """
    for name, parts, dim in _parameters(weights):
        inside = folder.joinpath("model", *name.split("."))
        inside.mkdir(parents=True)
        whole = torch.cat(parts)
        if dim is None:
            save_file({"data": whole}, inside / "model_weight.safetensors", metadata={})
            continue
        pairs, row = [], 0
        for part in parts:
            ends = (row, row + part.shape[0]) if dim == 0 else (0, part.shape[1])
            cut = [f"{ends[0]},{ends[1]},None" if at == dim else "None,None,None" for at in range(2)]
            here = cut if len(parts) > 1 else ["None,None,None"] * 2
            pairs.append(f"{'|'.join(here)}#{'|'.join(cut)}")
            row += part.shape[0]
        about = {
            "version": "1.4",
            "local_global_slices_pairs": ";".join(pairs),
            "unsharded_shape": str((*whole.shape,)),
        }
        save_file({"data": whole}, inside / "model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors", metadata=about)
    about = config_of(weights, is_llama_config=True, rope_interleaved=False, lm_head_normalization_factor=factor)
    (folder / "model_config.json").write_text(json.dumps(about))
    metas = {"consumed_train_samples": 70, "last_train_step": 7, "last_stage_idx": 0, "data_stages": []}
    (folder / "checkpoint_metadata.json").write_text(json.dumps({"version": "1.4", "tp": 1, "dp": 1, "metas": metas}))
    config = {"checkpoints": {"resume_checkpoint_path": None}, "model": {"init_method": {"std": 0.04}}}
    config |= {"general": {"project": "edulm", "run": run or folder.parent.name}, **(start or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _parameters(weights):
    """Yield each parameter's name, the matrices in it and the dim that tensor-parallel ranks would share."""
    yield "model.token_position_embeddings.pp_block.token_embedding", [weights["model.embed_tokens.weight"]], 0
    yield "model.final_layer_norm.pp_block", [weights["model.norm.weight"]], None
    inside = [
        ("attn.qkv_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 0),
        ("attn.o_proj", ["self_attn.o_proj"], 1),
        ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"], 0),
        ("mlp.down_proj", ["mlp.down_proj"], 1),
        *((norm, [norm], None) for norm in ("input_layernorm", "post_attention_layernorm")),
    ]
    for layer in range(LAYERS):
        for module, parts, dim in inside:
            tensors = [weights[f"model.layers.{layer}.{part}.weight"] for part in parts]
            yield f"model.decoder.{layer}.pp_block.{module}", tensors, dim


def write_recipes(folder):
    """Write the 390 merge recipes as the paper's repository has them: subsets x methods x setups, bases and all."""
    folder.mkdir()
    for setup, size in SETUPS.items():
        for count in range(2, 6):
            for subset in combinations(LANGUAGES, count):
                for method in METHODS:
                    path = folder / f"{method}_{setup}_{'_'.join(subset)}.yaml"
                    path.write_text(yaml.safe_dump(_recipe(method, setup, size, subset)))
    return sorted(folder.iterdir())


def _recipe(method, setup, size, subset):
    parts = {"weight": 1.0}
    recipe = {"dtype": "float16", "merge_method": method, "parameters": {"int8_mask": True, "normalize": True}}
    if method not in ("linear", "multislerp"):
        parts["density"] = 0.5
        right = method in ("ties", "dare_ties") and setup == "2x" and len(subset) == 5
        cloned_base = "572M-english-2x" if right else "572M-english-1x-cloned"
        recipe["base_model"] = f"liu-nlp/HyperLlama-{'180M-english-1x' if setup == '1x' else cloned_base}"
    end = setup.replace("_", "-")
    recipe["models"] = [
        {"model": f"liu-nlp/HyperLlama-{size}-{LANGUAGES[code]}-{end}", "parameters": parts.copy()} for code in subset
    ]
    return recipe
