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


@pytest.hookimpl(tryfirst=True)  # pytest-xdist names the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of a file, which share what they set up, to one process; and all that use the cluster."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("cluster" if "cluster" in item.path.parts else item.path.name))
