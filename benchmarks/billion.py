"""A billion, really run: 1.1 billion parameters through a ZeRO-3 start, steps, a kill, a resume and growth.

python benchmarks/billion.py                # 24 GiB of memory, 70 GB of disk, an hour of 2 cores at most
python benchmarks/billion.py --layers 2     # the same in small, to try it

1. `growmerge train` starts on 2 ranks of ZeRO-3, in bfloat16, and saves after 2 steps; both ranks are killed in step 3.
2. The same command with 1 rank goes on from there and ends with step 3.
3. The checkpoint of step 3 is grown to twice the width as ZeRO-3 shards with optimizer state, as many of the shards of
   64 ranks as the disk takes; each file is then read back and compared with its checksums.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from checkpoint.layout import FilePlan
from checkpoint.manifest import block_hashes
from checkpoint.open import open_checkpoint
from checkpoint.source import Source
from checkpoint.writer import PROGRESS, write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from parallel.families import family_of
from train.data.tokenizer import train_tokenizer
from train.data.tokens import write_tokens
from upscale.factors import Recipe
from upscale.grow import grow

SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 25,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SHARDS = 64
ROOM = 8 * 10**9
"""Bytes of disk that are left free."""


class Memory:
    """The most that this process and its children have had at once (GB; what they share counts once)."""

    def __init__(self) -> None:
        self.most = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.most = max(self.most, total / 2**30)

    def __exit__(self, *given: object) -> None:
        self._stop.set()
        self._thread.join()


def prepare(home: Path, layers: int) -> dict[str, Any]:
    """Make a tokenizer, random text, and the files of the run; return the model's config as it will be."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, 6)) for _ in range(6000)]
    texts = [" ".join(generator.choice(words, 200)) for _ in range(60)]
    tokenizer = train_tokenizer(texts, vocab_size=2000, folder=home / "tokenizer")
    write_tokens(texts, tokenizer, home / "data" / "eng")
    run = {
        "name": "billion",
        "tokenizer": "tokenizer",
        "data": {"folder": "data", "mixture": "all"},
        "mixtures": {"all": {"eng": 1.0}},
        "training": {
            "steps": 3,
            "sequence_length": 64,
            "global_batch": 2,
            "lr": 1e-4,
            "precision": "bfloat16",
            "recompute": True,
            "checkpoint_every": 2,
            "keep": 1,
            "saves": "blocking",
        },
        "resources": {"ranks": 2},
    }
    run["shape"] = {**SHAPE, "num_hidden_layers": layers}
    (home / "run.yaml").write_text(yaml.safe_dump(run))
    run["resources"] = {"ranks": 1}
    (home / "resume.yaml").write_text(yaml.safe_dump(run))
    return {"model_type": "llama", "vocab_size": tokenizer.vocab_size, **SHAPE, "num_hidden_layers": layers}


def train(home: Path, file: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "growmerge.cli", "train", file]
    # Freed memory goes back at once instead of into a heap full of holes: a gigabyte less, for some time.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return subprocess.Popen(command, cwd=home, text=True, start_new_session=True, env=environment)


def logged(home: Path) -> list[dict[str, Any]]:
    path = home / "runs" / "billion" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def start_and_kill(home: Path) -> None:
    """Train until the checkpoint of step 2 is complete, then kill all ranks."""
    saved = home / "runs" / "billion" / "checkpoints" / "step-00000002" / "manifest.json"
    process = train(home, "run.yaml")
    while not saved.is_file():
        time.sleep(0.2)
        if process.poll() is not None:
            sys.exit(f"the run ended with {process.returncode}")
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.wait()


def resume(home: Path) -> None:
    if code := train(home, "resume.yaml").wait():
        sys.exit(f"the resumed run ended with {code}")


class SomeShards(Zero3Layout):
    """A layout that writes the first of its files alone."""

    count: int = 0

    def files(self, source: Source) -> list[FilePlan]:
        return super().files(source)[: self.count]


def grow_shards(home: Path) -> tuple[int, int, float]:
    """Grow the last checkpoint; return (shards written, bytes, billions of parameters)."""
    small = open_checkpoint(home / "runs" / "billion" / "checkpoints" / "step-00000003")
    large = grow(small, Recipe(width=2, state="scaled"))
    parameters = family_of(large.config).parameters(large.config)
    a_shard = 12 * parameters // SHARDS
    room = shutil.disk_usage(home).free - ROOM
    shards = max(1, min(SHARDS, room // a_shard))
    layout = SomeShards(ranks=SHARDS)
    object.__setattr__(layout, "count", 2 * shards)
    target = home / "grown"
    write_checkpoint(large, target, layout, workers=2, about={"name": "billion"})
    known = json.loads((target / "manifest.json").read_text())["files"]
    for name, entry in known.items():
        assert block_hashes(target / name) == entry["xxh3"], name
    assert not (target / PROGRESS).exists()
    return shards, sum(entry["size"] for entry in known.values()), parameters / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="where; a temporary folder here by default")
    given = parser.parse_args()
    table = Table(title="one machine, CPU, 2 cores")
    for column in ("what", "seconds", "memory at most, GiB", "seen"):
        table.add_column(column)
    with tempfile.TemporaryDirectory(dir=given.folder or ".") as name:
        home = Path(name).absolute()
        config = prepare(home, given.layers)
        count = family_of(config).parameters(config) / 1e9

        def measure(what: str, action: Any) -> Any:
            began = time.perf_counter()
            with Memory() as memory:
                found = action(home)
            row = [what, f"{time.perf_counter() - began:.0f}", f"{memory.most:.1f}"]
            return row, found

        row, _ = measure(f"{count:.2f} billion: ZeRO-3 start on 2 ranks, 2 steps, save, SIGKILL", start_and_kill)
        before = [line["loss"] for line in logged(home) if "loss" in line]
        table.add_row(*row, f"losses {before}")
        row, _ = measure("resume on 1 rank, step 3, save, export", resume)
        after = [line["loss"] for line in logged(home) if "loss" in line]
        assert after[:2] == before[:2], (before, after)
        table.add_row(*row, f"losses {after}")
        row, (shards, size, parameters) = measure(
            "grow x2 with optimizer state to ZeRO-3 shards, read back", grow_shards
        )
        table.add_row(*row, f"{parameters:.2f} billion; {shards} of {SHARDS} ranks' shards, {size / 1e9:.1f} GB")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
