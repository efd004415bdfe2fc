"""Streaming and growing a checkpoint against `cp` of as many bytes, both synced, in turn."""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.writer import write_checkpoint
from upscale.grow import Recipe, grow

ROUNDS = 3
CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
"""SmolLM2-135M with 12 of its 30 layers: 71 M parameters."""


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", str(source), str(target)], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        layout, workers = SafetensorsLayout(), os.cpu_count() or 1
        write_checkpoint(
            ScratchSource(config=CONFIG, seed=0, dtype=torch.bfloat16), folder / "small", layout, workers=workers
        )
        small = open_checkpoint(folder / "small")
        cases: dict[str, Callable[[Path], object]] = {
            "convert": lambda target: write_checkpoint(small, target, layout, workers=workers),
            "grow x2, symmetric": lambda target: write_checkpoint(
                grow(small, Recipe(width=2, method="symmetric")), target, layout, workers=workers
            ),
            "grow x2, exact split": lambda target: write_checkpoint(
                grow(small, Recipe(width=2)), target, layout, workers=workers
            ),
        }
        table = Table(title=f"71 M parameters, bfloat16, {workers} workers (median of {ROUNDS} turns, warm)")
        for column in ("what", "MB out", "ours s", "cp s", "share of cp's speed"):
            table.add_column(column, justify="right")
        for what, action in cases.items():
            ours, theirs = [], []
            for turn in range(ROUNDS):
                target = folder / f"out-{turn}"
                ours.append(seconds(lambda action=action, target=target: action(target)))  # type: ignore[misc]
                written = target / "model.safetensors"
                theirs.append(seconds(lambda written=written, turn=turn: copy(written, folder / f"cp-{turn}")))  # type: ignore[misc]
                size = written.stat().st_size
                shutil.rmtree(target)
                (folder / f"cp-{turn}").unlink()
            ratio = statistics.median(other / one for one, other in zip(ours, theirs, strict=True))
            table.add_row(
                what,
                f"{size / 1e6:.0f}",
                f"{statistics.median(ours):.2f}",
                f"{statistics.median(theirs):.2f}",
                f"{ratio:.0%}",
            )
        Console().print(table)


if __name__ == "__main__":
    main()
