"""How the numbers of a GGUF file's tensors are stored: plain floats, or blocks that the `gguf` package unpacks.

A quantised type packs so many elements of a row into a block of so many bytes.

Facts: gguf-py 0.19 of ggml-org/llama.cpp (constants.py: GGMLQuantizationType, GGML_QUANT_SIZES; quants.py).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from parallel.errors import InputError

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types of tensors that need nobody to unpack them."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A quantised type."""

    name: str
    number: int
    block: int
    """Elements in a block, all of one row."""
    size: int
    """Bytes of a block."""


def type_of(path: Path, name: str, shape: tuple[int, ...], number: int) -> torch.dtype | Packed:
    """Return how a tensor is stored.

    Raises:
        InputError: it is quantised, and the `gguf` package is missing or cannot unpack it.
    """
    if number in PLAIN:
        return PLAIN[number]
    try:
        import gguf
    except ImportError:
        raise InputError(f"{path}: {name} is quantised: to unpack it, pip install 'growmerge[gguf]'") from None
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        packed = Packed(name=names[number], number=number, block=block, size=size)
        unpack(packed, np.zeros((1, size), dtype=np.uint8))
    except (ValueError, NotImplementedError):
        kind = names.get(number, f"of the type {number}")
        raise InputError(f"{path}: {name} is {kind}, which the gguf package does not unpack") from None
    if len(shape) < 2 or shape[-1] % block:
        raise InputError(f"{path}: {name} of shape {shape} is {packed.name}, whose rows are of whole {block} elements")
    return packed


def unpack(kind: Packed, rows: np.ndarray) -> torch.Tensor:
    """Return the numbers that rows of blocks, uint8 [rows, bytes], stand for, float32 [rows, elements]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    if rows.size == 0:  # what it does not take
        return torch.empty(len(rows), rows.shape[1] // kind.size * kind.block)
    return torch.from_numpy(dequantize(np.ascontiguousarray(rows), GGMLQuantizationType(kind.number)))
