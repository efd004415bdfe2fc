"""The model and its optimizer's groups, as DeepSpeed takes them: a stock transformers model, cut as it is made.

No rank holds a whole model with ZeRO-3 or tensor parallelism: parameters are cut over the ranks as they are made, or
have no storage until AutoTP has cut them. Weights are set later, from a Source.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from checkpoint.source import FACTORS, Group, Source
from parallel.families import family_of
from parallel.family import Family
from parallel.mesh import Mesh
from parallel.rows import NORMS

DYNAMICS: dict[str, tuple[str, ...]] = {
    "preserve": FACTORS,
    "mup": ("lr_factor", "weight_decay_factor", "eps_factor"),
    "free": (),
}
"""By name: the factors of a grown model's groups that training applies. preserve: all, so that a symmetrically grown
model trains as the small one did; mup: those of the optimizer (muP's width rules, arXiv 2203.03466), clipping as usual;
free: none."""


def parameter_groups(
    named: Mapping[str, torch.nn.Parameter],
    source: Source,
    *,
    weight_decay: float,
    eps: float,
    dynamics: str = "free",
    decay_embeddings: bool = True,
    decay_norms: bool = False,
) -> list[dict[str, Any]]:
    """Return AdamW's groups by name: what is decayed, such as matrices, and what is not.

    Each is divided further by the factors of the source's groups that `dynamics` applies; they stay in the group, so
    that a checkpoint keeps them.

    Args:
        named: this rank's parameters by Hugging Face name.
        decay_embeddings: whether embeddings (and a head of its own) are decayed, too.
        decay_norms: whether norms and biases are.
    """
    table = family_of(source.config).tensors(source.config)
    undecayed = {
        *(() if decay_norms else (*NORMS, "bias", "norm_bias")),
        *(() if decay_embeddings else ("embedding", "head")),
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        kept = table[name].kind in undecayed
        grown = source.groups.get(source.infos[name].group, Group())
        factors = {key: getattr(grown, key) if key in DYNAMICS[dynamics] else 1.0 for key in FACTORS}
        mark = source.infos[name].group.partition("/")[2]
        kind = "no_decay" if kept else "decay"
        group = f"{kind}/{mark}" if any(factor != 1.0 for factor in factors.values()) else kind
        values: dict[str, Any] = {
            "name": group,
            "params": [],
            "weight_decay": 0.0 if kept else weight_decay * factors["weight_decay_factor"],
            "eps": eps * factors["eps_factor"],
            **factors,
        }
        groups.setdefault(group, values)["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["name"])


def partition_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return AutoTP's partition rules for a family: its table's columns and rows; a head of its own by rows.

    The table cuts the files too (`checkpoint.tensor_parallel`).
    """
    kinds: dict[str, list[str]] = {"column": [], "row": []}
    for row in family.rows:
        if row.split in kinds and not (row.split == "row" and row.kind == "bias"):
            kinds[row.split].append(_pattern(row.name))
    specs: list[dict[str, Any]] = [{"patterns": names, "partition_type": kind} for kind, names in kinds.items()]
    # Norms of single heads: every rank has the whole weight, and a gradient of its own heads alone.
    heads = [row.name for row in family.rows if row.kind in NORMS and row.axes == ("head_dim",)]
    if heads:
        specs.append({"patterns": [_pattern(name) for name in heads], "partition_type": "skip", "grad_allreduce": True})
    if not family.is_tied(config):
        specs.append({"patterns": [r".*lm_head\.weight$"], "partition_type": "column", "gather_output": True})
    return {"use_default_specs": False, "layer_specs": specs}


def _pattern(name: str) -> str:
    return ".*" + re.escape(name).replace(re.escape("{layer}"), r"\d+") + "$"


def build_model(
    config: Mapping[str, Any], ds_config: Mapping[str, Any], mesh: Mesh | None = None, attention: str = "sdpa"
) -> torch.nn.Module:
    """Build the stock transformers model for DeepSpeed; weights are not set.

    With sdpa attention is the model's own choice: Gemma 2's caps its scores, which sdpa cannot.

    With ZeRO-3 every parameter is cut over the ranks as it is made. With tensor parallelism a matrix has no storage:
    AutoTP cuts it, and ZeRO-3 gives its piece room.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    hf_config = AutoConfig.for_model(**config)
    hf_config.use_cache = False
    tensor_parallel = mesh is not None and mesh.tp > 1
    with _placement(ds_config, tensor_parallel), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.float32, attn_implementation=None if attention == "sdpa" else attention
        )
    if tensor_parallel:
        _give_shape_alone(model, _dtype(ds_config))
    model.tie_weights()
    # zero.Init makes every float tensor in the run's dtype; rotary frequencies lose too much in bfloat16.
    for module in model.modules():
        for name, child in module.named_children():
            if "rotary" in name:
                setattr(module, name, type(child)(config=hf_config))
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # such as a factor of the embedding
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True
            model._init_weights(module)
    return model


@contextlib.contextmanager
def _placement(ds_config: Mapping[str, Any], tensor_parallel: bool) -> Iterator[None]:
    """Decide where parameters are made: cut over the ranks, nowhere yet, or in memory."""
    import deepspeed

    if tensor_parallel:
        with torch.device("meta"):
            yield
    elif ds_config["zero_optimization"]["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=dict(ds_config)):
            yield
    else:
        yield


def _give_shape_alone(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give parameters of the meta device room: one element where AutoTP will cut a matrix, all of it elsewhere."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                whole = not isinstance(module, torch.nn.Linear)
                room = torch.zeros(parameter.shape if whole else (1,) * parameter.dim(), dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(room.expand(parameter.shape))


def _dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    return torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
