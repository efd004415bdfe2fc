"""Fixtures that tests of all rooms share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model and return its folder."""

    def make(name: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        folder = tmp_path / name
        model = tiny_model(seed, dtype, **changes)
        model.config.dtype = dtype
        model.save_pretrained(folder)
        return folder

    return make
