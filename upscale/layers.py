"""The layers of a deeper model: each is a layer of the small one, or one that passes on what it gets.

L layers of the small model, numbered from 0. Only `identity` keeps the function; the others start from a model whose
loss is higher, and training brings it down faster than from scratch (the sources of METHODS).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallel.errors import InputError, one_of

RANGE = re.compile(r"(\d+)(?:-(\d+))?")
MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Block:
    """A layer of the deeper model."""

    source: int
    """The small model's layer that it is a copy of."""
    identity: bool = False
    """Whether it adds nothing to the residual stream."""


def stack(small: int, layers: int) -> list[Block]:
    """All layers, over and over: G_stack (arXiv 2405.15319)."""
    _whole_multiple("stack", small, layers)
    return [Block(source=layer % small) for layer in range(layers)]


def interleave(small: int, layers: int) -> list[Block]:
    """Each layer several times in a row."""
    _whole_multiple("interleave", small, layers)
    return [Block(source=layer * small // layers) for layer in range(layers)]


def solar(small: int, layers: int) -> list[Block]:
    """The first half from the model's start, the second up to its end; they overlap (SOLAR, arXiv 2312.15166)."""
    if layers % 2 or not small <= layers <= 2 * small:
        raise InputError(
            f"{layers} layers by solar from {small}: allowed are even numbers from {small} to {2 * small}, "
            "half from the start and half up to the end"
        )
    half = layers // 2
    return [Block(source=layer) for layer in (*range(half), *range(small - half, small))]


def identity(small: int, layers: int) -> list[Block]:
    """All layers, and at even distances copies that add nothing yet (LLaMA-Pro, arXiv 2401.02415): exact."""
    added = layers - small
    if added < 0 or (added and small % added and added % small):
        raise InputError(
            f"{layers} layers by identity from {small}: the number of new ones has to divide {small}, "
            "or to be a multiple of it"
        )
    groups = min(added, small) or 1
    found: list[Block] = []
    for group in range(groups):
        found += [Block(source=layer) for layer in range(group * small // groups, (group + 1) * small // groups)]
        found += [replace(found[-1], identity=True)] * (added // groups)
    return found


METHODS: Mapping[str, Callable[[int, int], list[Block]]] = {
    "stack": stack,
    "interleave": interleave,
    "solar": solar,
    "identity": identity,
}


def blocks_of(depth: str | None, layers: int | None, small: int) -> list[Block]:
    """Return the layers of the grown model.

    Args:
        depth: a key of METHODS, or a map such as "0-23,8-31": the small model's layers in their new order.
        layers: of the grown model; with a method alone.
        small: L.

    Raises:
        InputError: an unknown method, a number of layers that it cannot make, a map that leaves a layer out.
    """
    if depth is None:
        if layers not in (None, small):
            raise InputError(f"{layers} layers instead of {small}: say how by depth, one of {', '.join(METHODS)}")
        return [Block(source=layer) for layer in range(small)]
    if depth[:1].isdigit():
        return _mapped(depth, layers, small)
    if depth not in METHODS:
        raise InputError(f"{one_of('depth', depth, METHODS)}; or a map of layers such as 0-{small - 1},0-{small - 1}")
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
        raise InputError(f"layers is {layers!r} with depth {depth}: say how many the grown model has, from {small} on")
    return METHODS[depth](small, layers)


def _mapped(text: str, layers: int | None, small: int) -> list[Block]:
    if layers is not None:
        raise InputError(f"layers {layers} beside the map {text}: a map says itself how many there are")
    found: list[Block] = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not 0 <= first <= last < small:
            raise InputError(f"{part.strip()!r} in the map {text}: allowed are layers 0 to {small - 1}, as 3 or 0-3")
        found += [Block(source=layer) for layer in range(first, last + 1)]
    if len(found) > MOST_LAYERS:
        raise InputError(f"the map {text} makes {len(found)} layers; allowed are {MOST_LAYERS}")
    left = sorted(set(range(small)) - {block.source for block in found})
    if left:
        raise InputError(f"the map {text} leaves a hole: layer {left[0]} of {small} is in no layer of the grown model")
    return found


def _whole_multiple(method: str, small: int, layers: int) -> None:
    if layers % small:
        raise InputError(f"{layers} layers by {method} from {small}: allowed are multiples of {small}")


def is_exact(blocks: Sequence[Block]) -> bool:
    """Return whether a deeper model is the small one's function."""
    kept = [block.source for block in blocks if not block.identity]
    return kept == [*range(len(kept))]


def deep_config(config: Mapping[str, Any], blocks: Sequence[Block]) -> dict[str, Any]:
    """Return the deeper model's Hugging Face config; attention of several kinds goes with its layers."""
    found = {**config, "num_hidden_layers": len(blocks)}
    kinds = _kinds(config)
    if kinds is not None:  # even if all are alike: a pattern may have its other kind in the deeper model alone
        found["layer_types"] = [kinds[block.source] for block in blocks]
    return found


def _kinds(config: Mapping[str, Any]) -> Sequence[str] | None:
    """Return the kind of attention of each layer; a config that does not list them means a pattern of its family."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    from transformers import AutoConfig  # it takes seconds to import

    given = {key: value for key, value in config.items() if key != "model_type"}
    found = getattr(AutoConfig.for_model(config["model_type"], **given), "layer_types", None)
    return None if found is None else list(found)
