"""Any Source, on disk or in memory, as a stock transformers model, whole or a module at a time."""

from typing import TYPE_CHECKING, Any

import torch

from checkpoint.source import Source
from parallel.errors import InputError
from parallel.memory import give_back_freed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(source: Source, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """Return a transformers model with a source's weights, on the CPU, in eval mode.

    The source is read tile by tile straight into the parameters: nothing but the model itself is held in memory.
    Rotary frequencies are computed anew in float32 whatever `dtype` is; rounding them to bfloat16 changes the model.

    Raises:
        InputError: the source lacks a tensor of the model, has one too many, or one of another shape.
    """
    model = _empty_model(source, dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    _recompute_buffers(model)
    refill(model, source)
    return model.eval()


def refill(model: "PreTrainedModel", source: Source) -> None:
    """Give a model the weights of another source of the same tensors."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(source, name, parameter)


def stream_model(source: Source, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """Return a model as `load_model` does, for inference, that reads a module's weights when it is called.

    They are given back at once, so that the largest tensor is all that is ever held; every call reads the source anew.

    Raises:
        InputError: as `load_model`.
    """
    model = _empty_model(source, dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
    _recompute_buffers(model)
    for path, module in model.named_modules():
        names = {name: f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if names:
            _read_when_called(module, source, {key: source.infos[name].tied_to or name for key, name in names.items()})
    return model.eval()


def _read_when_called(module: torch.nn.Module, source: Source, names: dict[str, str]) -> None:
    """Let a module have its parameters while it computes; `names` are those of the source by the module's own."""
    empty = {key: module.get_parameter(key) for key in names}

    def take(*_: Any) -> None:
        for key, name in names.items():
            values = torch.empty_like(empty[key], device="cpu", requires_grad=False)
            _fill(source, name, values)
            setattr(module, key, torch.nn.Parameter(values, requires_grad=False))

    def give_back(*_: Any) -> None:
        for key, parameter in empty.items():
            setattr(module, key, parameter)
        give_back_freed()

    module.register_forward_pre_hook(take)
    module.register_forward_hook(give_back)


def _fill(source: Source, name: str, target: torch.Tensor) -> None:
    stats = source.collect(name, map)
    with torch.no_grad():
        for box in source.tiles(name):
            source.read(name, box, {"weight": target[box]}, stats)


def _empty_model(source: Source, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model of a source's config without any data, its parameters compared with the source's tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM  # they take seconds to import

    settings = {key: value for key, value in source.config.items() if key != "model_type"}
    config = AutoConfig.for_model(source.config["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _compare(source, {name: parameter.shape for name, parameter in model.named_parameters()})
    return model


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


def _recompute_buffers(model: "PreTrainedModel") -> None:
    """Compute what checkpoints do not hold, such as rotary frequencies, which `to_empty` leaves uninitialised.

    The model's own initialisation knows how; it passes over parameters that are marked.
    """
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True
            model._init_weights(module)
