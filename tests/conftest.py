"""Fixtures that tests of all rooms share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As many processes test as there are cores: threads of tiny tensors would wait for one another most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny import tiny_model
from xdist.scheduler import LoadScopeScheduling


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


class ByFile(LoadScopeScheduling):
    """Gives the tests of a file, which share what they set up, to one process; and all that use the cluster."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "tests/cluster" if path.startswith("tests/cluster/") else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Take that for every --dist: groups by marks need a pytest whose ids can be changed."""
    return ByFile(config, log)
