"""The files of a PEFT LoRA adapter: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

fan_in_fan_out changes nothing: peft ignores it where a layer is a torch.nn.Linear or an Embedding, and all are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import read_json
from checkpoint.pickles import load_pickle
from checkpoint.safetensors import CODES, map_file, read_header, tensor_in
from parallel.errors import InputError, one_of

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The first that is there is read, as peft does."""

READ = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save"),
    *("use_dora", "lora_bias", "init_lora_weights"),
)
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "target_modules", "task_type", "velora_config"),
)
"""What a merged weight does not depend on, given the adapter's tensors."""
REFUSED = {
    "alora_invocation_tokens": "it acts on the tokens behind an invocation alone, which no weight can hold",
    "arrow_config": "it chooses among adapters for each token, which no weight can hold",
    "kasa_config": "it takes singular values out of the base's weights",
    "layer_replication": "it makes a model of other layers",
    "monteclora_config": "its weights are drawn at random",
    "target_parameters": "it changes other parameters than those of linear layers and embeddings",
    "trainable_token_indices": "it holds single rows of an embedding; train those with modules_to_save",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it pools the inputs of a quantised base",
}
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Ways of starting A and B that leave the base's weights as they are."""


def read_config(folder: Path) -> Mapping[str, Any]:
    """Read what an adapter is.

    Raises:
        InputError: it is none, or one whose merged weights cannot be had from the base's and its own.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise InputError(f"{path}: no peft_type, so it is not the config of a PEFT adapter")
    if config["peft_type"] != "LORA":
        raise InputError(f"{path}: peft_type {config['peft_type']!r}: allowed is 'LORA'")
    for key, value in config.items():
        if key in REFUSED and value:
            raise InputError(f"{path}: {key} is set: {REFUSED[key]}; allowed are adapters without it")
        if value and key not in (*READ, *WITHOUT_EFFECT, *REFUSED):
            raise InputError(f"{path}: {one_of('setting', key, [*READ, *WITHOUT_EFFECT])}")
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        hint = "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        raise InputError(f"{path}: init_lora_weights {init!r}: its training began by changing the base; {hint}")
    for key, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("modules_to_save", list)):
        if config.get(key) and not isinstance(config[key], kind):
            raise InputError(f"{path}: {key} is {config[key]!r}: allowed is a {kind.__name__}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InputError(f"{path}: {one_of('bias', config['bias'], ['none', 'all', 'lora_only'])}")
    if config.get("use_dora") and config.get("lora_bias"):
        raise InputError(f"{path}: use_dora and lora_bias are both set: allowed is one of them")
    return config


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by name, in the file until they are read.

    Raises:
        InputError: the file is damaged, or holds other things than plain floating-point tensors.
    """
    if path.suffix == ".safetensors":
        stored = read_header(path)
        mapping = map_file(path)
        return {name: tensor_in(mapping, one) for name, one in stored.items()}
    entries = load_pickle(path, "PyTorch file")
    if not isinstance(entries, dict) or not all(torch.is_tensor(tensor) for tensor in entries.values()):
        raise InputError(f"{path}: holds other things than tensors by name, so it is not an adapter's weights")
    for name, tensor in entries.items():
        if tensor.dtype not in CODES or tensor.layout != torch.strided:
            raise InputError(f"{path}: {name} is {tensor.dtype}, {tensor.layout}; plain floating point is read")
    return {str(name): tensor.detach() for name, tensor in entries.items()}
