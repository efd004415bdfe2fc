"""Where the rows of a model's tensors lie in a distributed checkpoint of Megatron-Core, and reading them.

A key is the name of a parameter (`checkpoint.megatron_model`, norms as in Transformer Engine's layer spec whichever the
run had), or the same without the layer's number for one tensor [L, ...] of that parameter of all L layers. Whole
tensors are stored: neither tensor nor pipeline parallelism changes them. `linear_fc1` is gate over up, or the keys
`..._w` and `..._v`. The vocabulary is padded. A slot of the optimizer has the same keys behind a prefix.

Until Megatron-Core 0.13 the distributed optimizer stored its slots flattened: of a tensor [X, Y] that ranks have in
parts [x, y], a tensor [X / x, Y / y, x * y].

Facts of megatron_core 0.16.1: core/transformer/transformer_block.py (layers), mlp.py (apply_swiglu_sharded_factory),
core/models/gpt/gpt_layer_specs.py (sharded_state_dict_keys_map); of megatron_core 0.13.1:
core/dist_checkpointing/strategies/torch.py (sharded_tensor_to_torch_sharded_tensor).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from checkpoint.dcp_files import DcpFiles, Entry
from checkpoint.megatron_model import Parameter
from checkpoint.shard import flat_runs
from checkpoint.source import Box
from parallel.errors import InputError

HALVES = ("_w", "_v")
"""Endings of the keys of gate and up, where they have one each."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows [start, stop) of a tensor: the key that has them, of one layer in it if it has many, and the first there."""

    start: int
    stop: int
    key: str
    layer: int | None
    at: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """The stored tensor of a parameter, or of a half of one."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    """Of the layer's part."""


def generic(parameter: Parameter) -> str:
    """Return the key of a parameter of all layers."""
    if parameter.layer is None:
        return parameter.name
    return parameter.name.replace(f"layers.{parameter.layer}.", "layers.", 1)


def find(files: DcpFiles, parameter: Parameter, layers: int) -> list[Found]:
    """Return the stored tensors that a parameter is in, from its first row to its last.

    Raises:
        InputError: it is not there, or in another shape.
    """
    forms: list[tuple[str, int | None]] = [(parameter.name, None)]
    if parameter.layer is not None:
        forms.append((generic(parameter), parameter.layer))
    for stem, layer in forms:
        for endings in (("",), HALVES) if parameter.halves == len(HALVES) else (("",),):
            keys = [f"{stem}{ending}" for ending in endings]
            if all(key in files.tensors for key in keys):
                shape = (parameter.shape[0] // len(keys), *parameter.shape[1:])
                for key in keys:
                    stored = files.tensors[key].shape
                    expected = shape if layer is None else (layers, *shape)
                    if stored != expected:
                        raise InputError(f"{files.path}: {key} has shape {stored}, its model's has {expected}")
                return [Found(key=key, layer=layer, shape=shape) for key in keys]
    raise InputError(f"{files.path}: tensor {forms[-1][0]} is missing")


def rows_of(parameter: Parameter, found: list[Found]) -> Iterator[tuple[str, Rows]]:
    """Return each tensor that a parameter holds rows of, with where they are."""
    size = found[0].shape[0]
    whole = 0
    for piece in parameter.pieces:
        number, at = divmod(whole, size)
        assert at + piece.stop - piece.start <= size, f"{piece} of {parameter.name} is in two halves"
        place = found[number]
        yield piece.tensor, Rows(start=piece.start, stop=piece.stop, key=place.key, layer=place.layer, at=at)
        whole += piece.stop - piece.start


def by_layer(files: DcpFiles, keys: Iterable[str], layers: int) -> DcpFiles:
    """Return the files with keys of each layer besides, which have that layer's chunks alone: few to go through."""
    tensors = dict(files.tensors)
    for key in keys:
        entry = files.tensors[key]
        chunks: list[list[int]] = [[] for _ in range(layers)]
        for number, (box, _) in enumerate(entry.chunks):
            for layer in range(box[0].start, min(box[0].stop, layers)):
                chunks[layer].append(number)
        for layer, numbers in enumerate(chunks):
            tensors[layer_key(key, layer)] = replace(entry, chunks=[entry.chunks[number] for number in numbers])
    return replace(files, tensors=tensors)


def layer_key(key: str, layer: int | None) -> str:
    return key if layer is None else f"{key}[{layer}]"


def read_rows(files: DcpFiles, prefix: str, places: Iterable[Rows], box: Box, out: torch.Tensor) -> None:
    """Fill `out`, of the box's shape, with that box of a tensor whose rows lie in places.

    Args:
        prefix: of the slot, before the keys.

    Raises:
        InputError: a chunk is damaged.
    """
    rows, *columns = box
    for place in places:
        low, high = max(place.start, rows.start), min(place.stop, rows.stop)
        if low >= high:
            continue
        within: Box = (slice(low - place.start + place.at, high - place.start + place.at), *columns)
        target = out[low - rows.start : high - rows.start]
        if place.layer is not None:
            within, target = (slice(place.layer, place.layer + 1), *within), target.unsqueeze(0)
        key = layer_key(f"{prefix}{place.key}", place.layer)
        if len(files.tensors[key].shape) == len(within):
            files.read(key, within, target)
        else:
            _read_flat(files, key, within, files.tensors[layer_key(place.key, place.layer)].shape, target)


def flat_part(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of the parts of a tensor of this shape that an entry has flattened; None if it is not that."""
    *grid, count = entry.shape
    if len(grid) != len(shape) or any(not cut or size % cut for size, cut in zip(shape, grid, strict=True)):
        return None
    part = tuple(size // cut for size, cut in zip(shape, grid, strict=True))
    return part if math.prod(part) == count else None


def _read_flat(files: DcpFiles, key: str, box: Box, shape: tuple[int, ...], out: torch.Tensor) -> None:
    """Fill a box of a tensor that is stored in flattened parts."""
    part = flat_part(files.tensors[key], shape)
    assert part is not None, (key, shape)
    ranges = [range(one.start // size, -(-one.stop // size)) for one, size in zip(box, part, strict=True)]
    for place in product(*ranges):
        begins = [number * size for number, size in zip(place, part, strict=True)]
        common = [
            slice(max(one.start, begin), min(one.stop, begin + size))
            for one, begin, size in zip(box, begins, part, strict=True)
        ]
        inner = tuple(slice(one.start - begin, one.stop - begin) for one, begin in zip(common, begins, strict=True))
        piece = torch.empty([one.stop - one.start for one in inner], dtype=out.dtype)
        flat, at = piece.view(-1), 0
        for start, stop in flat_runs(part, inner):
            target = flat[at : at + stop - start].view(*(1 for _ in part), -1)
            files.read(key, (*(slice(number, number + 1) for number in place), slice(start, stop)), target)
            at += stop - start
        outer = tuple(
            slice(one.start - asked.start, one.stop - asked.start) for one, asked in zip(common, box, strict=True)
        )
        out[outer].copy_(piece)
