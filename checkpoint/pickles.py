"""Pickles of PyTorch and DeepSpeed, loaded without running anything that they say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel.errors import InputError


class _Stub:
    """Stands for the few DeepSpeed classes that optimizer files name; it keeps their state and does nothing."""

    def __new__(cls, *args: object) -> "_Stub":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Stub, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Stub, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Stub, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Stub, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def load_pickle(path: Path, kind: str = "DeepSpeed file") -> Any:
    """Load a `.pt` file without running anything that it says: plain data, tensors and the classes in ALLOWED.

    Tensors stay in the file until they are read (mmap).

    Raises:
        InputError: the file is missing, truncated, or names anything else.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except Exception as error:  # torch.load raises errors of many kinds for a damaged or hostile file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: damaged, or not a plain {kind} ({reason[:200]})") from error
