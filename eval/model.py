"""Any Source, on disk or in memory, as a stock transformers model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from checkpoint.source import Source
from parallel.errors import InputError


def load_model(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a transformers model with a source's weights, on the CPU, in eval mode.

    The source is read tile by tile straight into the parameters: nothing but the model itself is held in memory.
    Rotary frequencies are computed anew in float32 whatever `dtype` is; rounding them to bfloat16 changes the model.

    Raises:
        InputError: the source lacks a tensor of the model, has one too many, or one of another shape.
    """
    settings = {key: value for key, value in source.config.items() if key != "model_type"}
    config = AutoConfig.for_model(source.config["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = set(dict(model.named_parameters()))
    _compare(source, {name: model.get_parameter(name).shape for name in sorted(parameters)})
    model.to_empty(device="cpu")
    model.tie_weights()
    _recompute_buffers(model)
    with torch.no_grad():
        for name in source.infos:
            if name in parameters:
                target = model.get_parameter(name)
                stats = source.collect(name, map)
                for box in source.tiles(name):
                    source.read(name, box, {"weight": target[box]}, stats)
    return model.eval()


def _compare(source: Source, shapes: dict[str, torch.Size]) -> None:
    """Check names and shapes against the model's own parameters (a tied one is listed once, under its owner)."""
    owned = {name: info for name, info in source.infos.items() if info.tied_to is None}
    if missing := sorted(set(shapes) - set(owned)):
        raise InputError(f"the source lacks {len(missing)} of the model's {len(shapes)} tensors: first {missing[0]}")
    if extra := sorted(set(owned) - set(shapes)):
        raise InputError(f"the source has {len(extra)} tensors that its config knows nothing of: first {extra[0]}")
    for name, shape in shapes.items():
        if tuple(shape) != owned[name].shape:
            raise InputError(f"{name} has shape {owned[name].shape}, the config says {tuple(shape)}")


def _recompute_buffers(model: PreTrainedModel) -> None:
    """Compute what checkpoints do not hold, such as rotary frequencies, which `to_empty` leaves uninitialised.

    The model's own initialisation knows how; it passes over parameters that are marked.
    """
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True
            model._init_weights(module)
