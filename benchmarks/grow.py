"""Growing and converting against `cp` of as many bytes and whole models in memory, in turn; memory inside a limit.

python benchmarks/grow.py            # 0.5 billion parameters out: seconds
python benchmarks/grow.py --memory   # 1.7 -> 6.8 billion inside 1.5 GiB, page cache counted (root, 17 GB of disk)
python benchmarks/grow.py --source nanotron [--model 1.7B]   # 2 tensor-parallel ranks in, ZeRO-3 for 3 ranks out
python benchmarks/grow.py --source nanotron --model 150M --folder /dev/shm   # in memory: what it costs beside a disk
"""

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint.memory import ScratchSource
from checkpoint.nanotron_layout import NanotronLayout
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Box, box_shape
from checkpoint.writer import write_checkpoint
from upscale.factors import Recipe, grown_config
from upscale.grow import grow

ROUNDS = 5
IMPORTS = "import growmerge.cli, growmerge.convert, upscale.grow, checkpoint.zero3_layout, checkpoint.nanotron"
"""What the command imports before it begins to write."""
LIMIT = 1536 * 2**20


def config(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    """Return a config of SmolLM2's kind: head_dim 64, 49,152 entries, tied."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "intermediate_size": ffn,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }


MODELS = {
    "17M": config(256, 4, 4, 2, 1024),
    "135M": config(576, 30, 9, 3, 1536),
    "150M": config(640, 20, 10, 10, 2560),
    "0.5B": config(1152, 20, 18, 18, 4608),
    "1.7B": config(2048, 24, 32, 32, 8192),
}
"""SmolLM2-135M and -1.7B, two between them that 2 tensor ranks can share, and one to see that all works."""


@dataclass(frozen=True, kw_only=True)
class Quick(ScratchSource):
    """Random weights that cost nothing to make: the same numbers over and over."""

    def read(self, name: str, box: Box, out: Any, stats: Any = None) -> None:
        for target in out.values():
            flat = target.view(-1)
            flat.copy_(NUMBERS[: len(flat)].to(flat.dtype))
        assert box_shape(box) == tuple(target.shape)


NUMBERS = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * 0.02


def make(name: str, folder: Path) -> Path:
    if not (folder / "manifest.json").is_file():
        source = Quick(config=MODELS[name], seed=0, dtype=torch.bfloat16)
        write_checkpoint(source, folder, SafetensorsLayout(), workers=os.cpu_count() or 1)
    return folder


def copy(source: Path, target: Path, files: str = "*.safetensors") -> None:
    target.mkdir()
    for path in source.glob(files):
        subprocess.run(["cp", str(path), str(target / path.name)], check=True)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def drop_caches() -> bool:
    """Forget the page cache, if this process may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def speed(folder: Path) -> None:
    small = make("135M", folder / "small")
    workers = os.cpu_count() or 1
    recipes: dict[str, Recipe | None] = {
        "convert": None,
        "grow x2, symmetric": Recipe(width=2, method="symmetric"),
        "grow x2, exact split": Recipe(width=2),
    }
    table = Table(title=f"135M parameters in, bfloat16, {workers} workers; median of {ROUNDS} turns [least, most]")
    for column in ("what", "cache", "MB out", "ours s", "cp s", "share of cp's speed", "ns an element a worker"):
        table.add_column(column, justify="right")
    for what, recipe in recipes.items():
        for cache in ("warm", "cold"):
            if cache == "cold" and not drop_caches():
                continue
            ours, theirs, size = [], [], 0
            for _ in range(ROUNDS):
                target, other = folder / "out", folder / "cp"
                source = open_checkpoint(small)
                made = grow(source, recipe) if recipe else source
                if cache == "cold":
                    drop_caches()
                ours.append(seconds(partial(write_checkpoint, made, target, SafetensorsLayout(), workers=workers)))
                if cache == "cold":
                    drop_caches()
                theirs.append(seconds(partial(copy, target, other)))
                size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
                shutil.rmtree(target)
                shutil.rmtree(other)
            ratios = [other / one for one, other in zip(ours, theirs, strict=True)]
            table.add_row(
                what,
                cache,
                f"{size / 1e6:.0f}",
                f"{statistics.median(ours):.2f}",
                f"{statistics.median(theirs):.2f}",
                f"{statistics.median(ratios):.0%} [{min(ratios):.0%}, {max(ratios):.0%}]",
                f"{statistics.median(ours) * workers / (size / 2) * 1e9:.1f}",
            )
    Console(width=130).print(table)


def whole_models(small: Path, target: Path) -> None:
    """Grow as the authors' package of HyperCloning does (arXiv 2409.12903), by its rule and in its order of work.

    Both models are in memory in float32, the large one is initialised at random first, then every parameter is cloned;
    the head is untied. The package itself is on no package index and does not run with transformers 5.
    """
    source = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    shape = {**grown_config(Recipe(width=2), source.config.to_dict()), "tie_word_embeddings": False}
    large = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            values = source.get_parameter(name.replace("lm_head", "model.embed_tokens"))
            copies = [new // old for new, old in zip(parameter.shape, values.shape, strict=True)]
            divided = copies[-1] if name.endswith(("proj.weight", "lm_head.weight")) else 1
            parameter.copy_(values.repeat(copies) / divided)
    large.save_pretrained(target)
    for path in target.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def against_whole_models(folder: Path) -> None:
    workers = os.cpu_count() or 1
    small, target = folder / "small-float32", folder / "out"
    write_checkpoint(
        Quick(config=MODELS["135M"], seed=0), small, SafetensorsLayout(), workers=workers, about={"name": "135M"}
    )
    recipes = {"symmetric, as theirs": Recipe(width=2, method="symmetric"), "exact split": Recipe(width=2)}
    table = Table(title=f"135M -> 481M parameters, float32, disk to disk; median of {ROUNDS} turns [least, most]")
    for column in ("ours", "ours s", "both models in memory: s", "times as fast"):
        table.add_column(column, justify="right")
    ours: dict[str, list[float]] = {what: [] for what in recipes}
    theirs = []

    def run(took: list[float], action: Callable[[], object]) -> None:
        took.append(seconds(action))
        shutil.rmtree(target)

    for _ in range(ROUNDS):
        run(theirs, partial(whole_models, small, target))
        for what, recipe in recipes.items():
            made = grow(open_checkpoint(small), recipe)
            run(ours[what], partial(write_checkpoint, made, target, SafetensorsLayout(), workers=workers))
    for what, took in ours.items():
        ratios = [other / one for one, other in zip(took, theirs, strict=True)]
        table.add_row(
            what,
            f"{statistics.median(took):.2f}",
            f"{statistics.median(theirs):.2f}",
            f"{statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]",
        )
    Console(width=110).print(table)


@contextmanager
def limited() -> Iterator[Path]:
    """A memory cgroup of LIMIT bytes, page cache counted; needs root."""
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    root = next(root for root in roots if (root / "cgroup.procs").is_file())
    group = root / f"growmerge-{os.getpid()}"
    group.mkdir()
    limit = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").is_file() else "memory.max"
    (group / limit).write_text(str(LIMIT))
    try:
        yield group
    finally:
        time.sleep(0.5)
        group.rmdir()


def child(source: Path, target: Path, group: Path | None) -> None:
    """Grow inside the group and print seconds and the most anonymous memory (MiB)."""
    if group:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            lines = Path("/proc/self/status").read_text().splitlines()
            most[0] = max(most[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

    threading.Thread(target=watch, daemon=True).start()
    layout = SafetensorsLayout()
    took = seconds(lambda: write_checkpoint(grow(open_checkpoint(source), Recipe(width=2)), target, layout, workers=2))
    stop.set()
    print(f"{took:.1f} {most[0] / 1024:.0f}")


def memory(folder: Path) -> None:
    table = Table(title="grow x2, exact split, bfloat16, 2 workers, inside 1.5 GiB with the page cache")
    for column in ("in", "GB out", "seconds", "anonymous memory at most, MiB"):
        table.add_column(column, justify="right")
    for name in ("0.5B", "1.7B"):
        small, target = make(name, folder / name), folder / "out"
        drop_caches()
        with limited() as group:
            command = [sys.executable, __file__, "--child", str(small), str(target), str(group)]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(f"{name}: ended with {ran.returncode}: {ran.stderr}")
        took, most = ran.stdout.split()
        size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        table.add_row(name, f"{size / 1e9:.1f}", took, most)
        shutil.rmtree(target)
        shutil.rmtree(small)
    Console(width=110).print(table)


def anonymous(process: int) -> float:
    """Return the anonymous memory (MiB) of a process and those that it has started, what they share counted once."""
    pages = 0
    with suppress(psutil.NoSuchProcess, OSError):  # they come and go
        for one in (psutil.Process(process), *psutil.Process(process).children(recursive=True)):
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
            pages += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
    return pages / 1024


def from_nanotron(folder: Path, name: str) -> None:
    """Grow a nanotron checkpoint of 2 tensor-parallel ranks into a ZeRO-3 run of 3 ranks, by the command line.

    Memory is limited where the folder is on a disk: files of a folder in memory would count.
    """
    on_disk = os.geteuid() == 0 and not folder.resolve().is_relative_to("/dev/shm")
    empty = min(seconds(partial(subprocess.run, [sys.executable, "-c", IMPORTS], check=True)) for _ in range(3))
    small, target = folder / "nanotron", folder / "out"
    source = Quick(config=MODELS[name], seed=0, dtype=torch.bfloat16)
    write_checkpoint(source, small, NanotronLayout(tp=2), workers=os.cpu_count() or 1)
    command = [sys.executable, "-m", "growmerge.cli", "grow", str(small), str(target)]
    command += ["--width", "2", "--format", "zero3", "--dp", "3"]
    table = Table(
        title=f"{name}, bfloat16, nanotron tp 2 -> twice as wide, ZeRO-3 for 3 ranks; caches warm, without imports"
    )
    columns = ("recipe", "GB in", "GB out", "seconds", "cp s", "share of cp's speed", "ns an element a worker", "MiB")
    for column in columns:
        table.add_column(column, justify="right")
    for method in ("exact-split", "symmetric") * ROUNDS:
        with limited() if on_disk else nullcontext() as group:
            joined = f"echo $$ > {group}/cgroup.procs; " if group else ""
            began, most = time.perf_counter(), 0.0
            process = subprocess.Popen(["sh", "-c", joined + shlex.join([*command, "--method", method])])
            while process.poll() is None:
                most = max(most, anonymous(process.pid))
                time.sleep(0.5)  # looking takes time of theirs
            took = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"{name}: ended with {process.returncode}")
        other = folder / "cp"
        copied = seconds(partial(copy, target, other, "*.pt"))
        sizes = [sum(path.stat().st_size for path in at.rglob("*") if path.is_file()) / 1e9 for at in (small, target)]
        wrote = took - empty
        spent = wrote * (os.cpu_count() or 1) / (sizes[1] / 4)  # seconds a billion: float32, master weights
        found = (f"{wrote:.1f}", f"{copied:.1f}", f"{copied / wrote:.0%}", f"{spent:.1f}", f"{most:.0f}")
        table.add_row(method, *(f"{size:.2f}" for size in sizes), *found)
        shutil.rmtree(target)
        shutil.rmtree(other)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="the memory part instead")
    parser.add_argument("--source", choices=["nanotron"], help="what is grown into ZeRO-3, instead")
    parser.add_argument("--model", choices=MODELS, default="0.5B", help="with --source; of an even number of heads")
    parser.add_argument("--folder", default=".", help="where to work")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*map(Path, given.child))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        if given.source:
            from_nanotron(Path(name), given.model)
        elif given.memory:
            memory(Path(name))
        else:
            speed(Path(name))
            against_whole_models(Path(name))


if __name__ == "__main__":
    main()
