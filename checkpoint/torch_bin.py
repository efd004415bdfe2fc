"""Hugging Face folders of PyTorch pickles: `pytorch_model.bin`, or shards with an index; weights alone, read lazily.

A file is `torch.save` of {name: tensor}. Nothing in it is run (`checkpoint.pickles`), and its tensors stay in
the file until a tile of them is read. Many folders of the hub hold the same model as safetensors too: those are then
read, and this format does not claim the folder. Files of torch before 1.6 are no zip archives and cannot be mapped:
load and save such a model with transformers first. So it is with mixtures of experts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint import safetensors
from checkpoint.experts import entries_of
from checkpoint.files import inside, read_json
from checkpoint.memory import MemorySource, infos_of
from checkpoint.pickles import load_pickle
from checkpoint.source import RunState, Source
from parallel.errors import InputError
from parallel.families import family_of

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

COMPUTED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Endings of entries that transformers used to save and that are not weights: the config gives them."""


def _stored(folder: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """Return name in the files -> its file and the tensor, mapped."""
    single = (folder / SINGLE).is_file()
    names = [SINGLE] if single else sorted(set(_weight_map(folder / INDEX).values()))
    found: dict[str, tuple[Path, torch.Tensor]] = {}
    for file in names:
        path = inside(folder, file)
        found |= {name: (path, tensor) for name, tensor in _load(path).items()}
    return found


def _tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return name -> tensor, for every tensor that is no alias, each as config.json says."""
    if family_of(config).experts:
        line = "experts are read from safetensors alone: load the model with transformers and save it again"
        raise InputError(f"{folder}: {line}")
    family, expected = family_of(config), infos_of(config, torch.float32)
    spelled = {entries_of(family, name, info.shape)[0].name: name for name, info in expected.items()}
    stored = {spelled.get(name, name): there for name, there in _stored(folder).items()}
    for name, (path, _) in stored.items():
        if name not in expected and not name.endswith(COMPUTED):
            raise InputError(f"{path}: holds {name}, which the {family.name} model of config.json has not")
    found = {}
    for name, info in expected.items():
        if info.tied_to is not None:
            continue
        # Of tied tensors a file may hold one alone, under either name.
        names = [name, *(alias for alias, other in expected.items() if other.tied_to == name)]
        at = next((candidate for candidate in names if candidate in stored), None)
        if at is None:
            file = SINGLE if (folder / SINGLE).is_file() else INDEX
            raise InputError(f"{folder / file}: tensor {name} is missing")
        path, tensor = stored[at]
        if tuple(tensor.shape) != info.shape:
            raise InputError(f"{path}: {at} has shape {tuple(tensor.shape)}, config.json says {info.shape}")
        if tensor.dtype not in safetensors.CODES or tensor.layout != torch.strided:
            raise InputError(f"{path}: {at} is {tensor.dtype}, {tensor.layout}; plain floating point is read")
        found[name] = tensor
    return found


def _load(path: Path) -> dict[str, torch.Tensor]:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise InputError(f"{path}: no zip archive, so damaged, or of torch before 1.6 (load and save it again)")
    entries = load_pickle(path, "PyTorch file")
    if not isinstance(entries, dict) or not all(torch.is_tensor(tensor) for tensor in entries.values()):
        raise InputError(f"{path}: holds other things than tensors by name, so it is not a model's weights")
    return {str(name): tensor for name, tensor in entries.items()}


def _weight_map(path: Path) -> Mapping[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no weight_map, so it does not say which file holds what")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{path}: weight_map names something that is not a file")
    return weight_map


def is_torch_bin(folder: Path) -> bool:
    """Return whether a folder's weights are `.bin` files; false where safetensors of the model lie beside them."""
    if any((folder / name).is_file() for name in (safetensors.SINGLE, safetensors.INDEX)):
        return False
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def open_torch_bin(folder: Path) -> Source:
    """Open a Hugging Face folder of `.bin` weights; its tensors stay in the files until they are read.

    Raises:
        InputError: config.json is missing or of no known family; a file is missing, damaged or names anything but
            tensors; a tensor is missing, unknown, or of another shape than config.json says.
    """
    config = read_json(folder / "config.json")
    try:
        family_of(config)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    about = read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {}
    return MemorySource(config=config, tensors=_tensors(folder, config), run=RunState(provenance=about))
