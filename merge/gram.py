"""Gram matrices of a model's inputs as a folder: which weight uses which, kept in safetensors, read one at a time.

`gram.json` says it all: {"format", "model": its digest, "tokens", "sequences", "weights": {weight: matrix},
"files": {matrix: file}}. The folder is complete if and only if its manifest is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from checkpoint import manifest
from checkpoint.files import inside, read_json, write_bytes, write_json
from checkpoint.safetensors import Stored, read_header
from checkpoint.source import Source
from merge.statistics_files import Sums, check_model, write_tensors
from parallel.errors import InputError
from parallel.families import family_of
from parallel.faults import point

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "gram.json"
FORMAT = 1
SHARD = 5 * 10**9
"""Bytes of a file at most; a larger matrix has one of its own."""


@torch.no_grad()
def shared_inputs(model: "PreTrainedModel") -> dict[str, str]:
    """Return the name of the Gram matrix of each linear layer's weight: layers of the same input share one.

    Those are the family's matrices and an untied head. Which share (q, k, v; gate, up) is seen in a pass over two
    tokens, not assumed. A matrix is called by the first module that takes its input.
    """
    seen: list[tuple[str, torch.Tensor]] = []
    found: dict[str, str] = {}

    def look(weight: str, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        name = next((name for name, inputs in seen if inputs is given[0]), None)
        if name is None:
            name = weight.removesuffix(".weight")
            seen.append((name, given[0]))
        found[weight] = name

    config = model.config.to_dict()
    if family_of(config).experts:
        name = family_of(config).name
        raise InputError(f"no Gram matrices are taken of {name} models: an expert sees some of the inputs alone")
    tensors = family_of(config).tensors(config)
    matrices = [name for name, tensor in tensors.items() if tensor.kind == "matrix"]
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in matrices}
    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in modules.items()]
    model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert set(found) == set(matrices), f"{set(matrices) - set(found)} took no input"
    heads = [name for name, tensor in tensors.items() if tensor.kind == "head" and tensor.tied_to is None]
    return {name: found[name] for name in matrices} | {name: name.removesuffix(".weight") for name in heads}


def gram_sums(model: "PreTrainedModel") -> Sums:
    """Return the sums that a pass of `merge.statistics.gram` starts from; memory is taken as they are written to."""
    sizes = {matrix: model.get_parameter(weight).shape[1] for weight, matrix in shared_inputs(model).items()}
    options: dict[str, Any] = {"dtype": torch.float64, "device": model.device}
    return Sums(tensors={name: torch.zeros(size, size, **options) for name, size in sizes.items()})


@dataclass(frozen=True, kw_only=True)
class Gram:
    """The Gram matrices of a folder; nothing is read until it is asked for."""

    folder: Path
    model: str
    """Digest of the model that they are of; see `merge.statistics_files.digest`."""
    tokens: int
    """Tokens that they are summed over."""
    weights: Mapping[str, str]
    """The matrix of each weight, both by name."""
    stored: Mapping[str, Stored] = field(repr=False)
    """Where each matrix lies."""

    def matrix(self, weight: str) -> torch.Tensor:
        """Return X^T X [I, I] of the inputs of a weight [O, I], float32; its pages are read as they are looked at.

        Raises:
            InputError: there is none for a weight of this name.
        """
        if weight not in self.weights:
            raise InputError(f"{self.folder}: holds no Gram matrix for {weight}")
        at = self.stored[self.weights[weight]]
        # Copy-on-write, since torch wants to be able to write; nobody does.
        return torch.from_numpy(np.memmap(at.path, dtype="<f4", mode="c", offset=at.offset, shape=at.shape))

    def check(self, source: Source) -> None:
        """Check that these are the matrices of a model.

        Raises:
            InputError: they are of another one.
        """
        check_model(self.folder, self.model, source)


def open_gram(folder: Path | str, source: Source | None = None) -> Gram:
    """Open a folder of Gram matrices lazily.

    Args:
        source: the model that they have to be of.

    Raises:
        InputError: no such folder, one of something else, one that is incomplete, truncated or damaged, or matrices of
            another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of Gram matrices")
    manifest.check(folder)
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: holds no Gram matrices (it has no {INDEX})")
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise InputError(
            f"{folder / INDEX}: of format {index.get('format')!r}, this version of growmerge knows {FORMAT}"
        )
    stored: dict[str, Stored] = {}
    for name in sorted(set(index["files"].values())):
        stored.update(read_header(inside(folder, name)))
    for weight, name in index["weights"].items():
        if name not in stored:
            raise InputError(f"{folder}: the Gram matrix {name}, of {weight}, is missing")
        shape, dtype = stored[name].shape, stored[name].dtype
        if len(shape) != 2 or shape[0] != shape[1] or dtype != torch.float32:
            raise InputError(f"{stored[name].path}: {name} is {dtype} {shape}, not a square float32 matrix")
    gram = Gram(folder=folder, model=index["model"], tokens=index["tokens"], weights=index["weights"], stored=stored)
    if source is not None:
        gram.check(source)
    return gram


def write_gram(
    folder: Path,
    matrices: Mapping[str, torch.Tensor],
    weights: Mapping[str, str],
    facts: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
) -> None:
    """Write Gram matrices, float32 by name, into a folder, the manifest last.

    Args:
        weights: the matrix of each weight.
        facts: `model`, `tokens` and `sequences`.
        extra_files: further files by relative name.

    Raises:
        InputError: a full disk, or a place that cannot be written.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, matrix in matrices.items():
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + matrix.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = matrix
    files = {}
    for number, shard in enumerate(shards, 1):
        file = f"gram-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard)
        files.update(dict.fromkeys(shard, file))
    write_json(folder / INDEX, {"format": FORMAT, **facts, "weights": dict(weights), "files": files})
    for name, data in extra_files.items():
        write_bytes(inside(folder, name), data)
    point("write/manifest")
    manifest.write_manifest(folder)
