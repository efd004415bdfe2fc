"""Merging against mergekit 0.1.5, in turn: CPU seconds, wall, memory; inside a limit; and a sweep in one pass.

python benchmarks/merging.py                 # 5 models of 572M parameters: 7 GB of disk, mergekit takes minutes
python benchmarks/merging.py --memory        # every streaming method inside 1.5 GiB, page cache counted (root)
python benchmarks/merging.py --sweep         # 26 subsets x 5 methods of 180M: 50 GB of disk
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from merge.table import METHODS as ALL
from parallel.families import family_of

sys.path.append(str(Path(__file__).parents[1] / "tests" / "merge" / "parity"))
sys.path.append(str(Path(__file__).parent))

from environment import mergekit_python
from grow import drop_caches, limited

LANGUAGES = ("is", "sv", "da", "nb", "fo")
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.2},
    "task_arithmetic": {"weight": 0.2},
    "multislerp": {"weight": 0.2},
    "ties": {"weight": 0.2, "density": 0.5},
    "dare_ties": {"weight": 0.2, "density": 0.5},
}
"""The paper's."""
STREAMING = [name for name in ALL if name not in ("fisher", "regmean", "tsv")]
"""Those that need neither statistics nor whole matrices."""
BASED = ("task_arithmetic", "ties", "dare_ties")
OURS = Path(sys.executable).parent / "growmerge"


def config(size: str) -> dict[str, Any]:
    """Return the config of one of the paper's models: depth 30, head_dim 64, vocabulary 128,256, tied."""
    hidden, heads, kv_heads, ffn = {"180M": (576, 9, 3, 1536), "572M": (1152, 18, 6, 3072)}[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": 30,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "intermediate_size": ffn,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }


def make(folder: Path, size: str) -> None:
    """Write a base, N(0, 0.0417), and a model a language, the base + N(0, 0.004), in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    models: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("base", *LANGUAGES)}
    for name, tensor in family_of(config(size)).tensors(config(size)).items():
        if tensor.tied_to is None:
            base = (torch.randn(tensor.shape, generator=draw) * 0.0417).bfloat16()
            models["base"][name] = base
            for language in LANGUAGES:
                models[language][name] = (base + torch.randn(tensor.shape, generator=draw) * 0.004).bfloat16()
    for name in [*models]:
        (folder / name).mkdir()
        save_file(models.pop(name), folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config(size)))


def recipe(folder: Path, method: str, languages: tuple[str, ...] = LANGUAGES) -> Path:
    """Write a recipe as both read it."""
    found: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folder / name)} for name in languages],
        "parameters": METHODS[method],
        "dtype": "bfloat16",
    }
    if method in BASED:
        found["base_model"] = str(folder / "base")
    path = folder / f"{method}-{len(languages)}.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a command took."""

    wall: float
    cpu: float
    anonymous: float
    """MiB at most."""


def anonymous(pid: int) -> int:
    """Return KiB of a process and those that it has started; what they share is counted once."""
    try:
        others = psutil.Process(pid).children(recursive=True)
        file, key = ("smaps_rollup", "Pss_Anon:") if others else ("status", "RssAnon:")
        lines = [Path(f"/proc/{one}/{file}").read_text() for one in (pid, *(other.pid for other in others))]
    except (OSError, psutil.NoSuchProcess):  # one of them has just ended
        return 0
    return sum(int(line.split()[1]) for text in lines for line in text.splitlines() if line.startswith(key))


def run(command: list[str], *, watched: bool = True, every: float = 0.05) -> Took:
    """Run a command and measure it and the processes that it starts; their memory every so many seconds if watched.

    A sum over all pages that several processes map takes long enough to slow them down.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            most[0] = max(most[0], anonymous(process.pid))

    if watched:
        threading.Thread(target=watch, daemon=True).start()
    _, errors = process.communicate()
    stop.set()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: {errors[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(wall=time.perf_counter() - began, cpu=cpu, anonymous=most[0] / 1024)


def ours(path: Path, out: Path, workers: int) -> Took:
    took = run([str(OURS), "merge", str(path), str(out), "--workers", str(workers)], watched=workers == 1)
    shutil.rmtree(out)
    return took


def theirs(path: Path, out: Path) -> Took:
    tool = ["-m", "mergekit.scripts.run_yaml", str(path), str(out), "--random-seed", "42"]
    took = run([str(mergekit_python()), *tool, "--no-copy-tokenizer", "--no-write-model-card"])
    shutil.rmtree(out)
    return took


def floor(folder: Path) -> tuple[float, float]:
    """Return CPU and wall seconds of reading what a merge with a base reads and writing what it writes, from cache."""
    command = "import sys; b=bytearray(1<<24)\nfor p in sys.argv[1:]:\n f=open(p,'rb',0)\n while f.readinto(b): pass"
    files = [str(folder / name / "model.safetensors") for name in ("base", *LANGUAGES)]
    read = run([sys.executable, "-c", command, *files])
    write = run(["cp", files[0], str(folder / "copy")])
    (folder / "copy").unlink()
    return read.cpu + write.cpu, read.wall + write.wall


def speed(folder: Path, rounds: int, methods: list[str]) -> None:
    make(folder, "572M")
    cpu_floor, wall_floor = floor(folder)
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"5 models of 572M parameters, bfloat16, {cores} cores; median of {rounds} turns")
    for column in ("method", "workers", "CPU s", "mergekit's", "times less", "wall s", "mergekit's", "times less"):
        table.add_column(column, justify="right")
    for column in ("CPU / floor", "anon. MiB", "mergekit's"):
        table.add_column(column, justify="right")
    for method in methods:
        path = recipe(folder, method)
        counts = sorted({1, cores})
        turns = [
            [*(ours(path, folder / "out", count) for count in counts), theirs(path, folder / "out")]
            for _ in range(rounds)
        ]
        for place, count in enumerate(counts):
            mine, other = [turn[place] for turn in turns], [turn[-1] for turn in turns]
            row = [method, str(count)]
            for key in ("cpu", "wall"):
                values = [[getattr(took, key) for took in side] for side in (mine, other)]
                ratios = [b / a for a, b in zip(*values, strict=True)]
                row += [f"{statistics.median(side):.1f}" for side in values]
                row.append(f"{statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]")
            row.append(f"{statistics.median(took.cpu for took in mine) / cpu_floor:.1f}")
            memory = [max(took.anonymous for took in side) for side in (mine, other)]
            row += [f"{most:.0f}" if most else "" for most in memory]
            table.add_row(*row)
            print("  ".join(row), flush=True)
    Console(width=170).print(table)
    print(
        f"floor: 6.9 GB read and 1.1 GB written from and to the page cache: {cpu_floor:.1f} CPU s, {wall_floor:.1f} s"
    )


def memory(folder: Path, methods: list[str]) -> None:
    """Merge by streaming methods inside the limit."""
    make(folder, "572M")
    table = Table(title="5 models of 572M parameters, 2 workers, inside 1.5 GiB with the page cache")
    for column in ("method", "seconds", "anonymous memory at most, MiB"):
        table.add_column(column, justify="right")
    for method in methods:
        takes = ALL[method]
        count = min(len(LANGUAGES), takes.most or len(LANGUAGES))
        parameters = {"weight": 0.2, "density": 0.5, "t": 0.3, "select_topk": 0.5}
        found: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(folder / name)} for name in LANGUAGES[:count]],
            "parameters": {name: value for name, value in parameters.items() if name in takes.parameters},
            "dtype": "bfloat16",
        }
        if takes.base == "needed":
            found["base_model"] = str(folder / "base")
        path = folder / f"{method}.yaml"
        path.write_text(yaml.safe_dump(found))
        drop_caches()
        with limited() as group:
            join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
            took = run(["sh", "-c", join, "sh", str(OURS), "merge", str(path), str(folder / "out"), "--workers", "2"])
        shutil.rmtree(folder / "out")
        table.add_row(method, f"{took.wall:.0f}", f"{took.anonymous:.0f}")
        print(method, f"{took.wall:.0f} s", f"{took.anonymous:.0f} MiB", flush=True)
    Console(width=110).print(table)


def sweep(folder: Path) -> None:
    """Make one setup's 130 merges in one pass; mergekit makes one of each method and size of subset."""
    make(folder, "180M")
    spec = {
        "models": {name: str(folder / name) for name in LANGUAGES},
        "base_model": str(folder / "base"),
        "methods": {
            method: {name: value for name, value in given.items() if name != "weight"}
            for method, given in METHODS.items()
        },
        "dtype": "bfloat16",
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    mine = run([str(OURS), "sweep", str(path), str(folder / "out"), "--allow-unrelated"], every=2.0)
    merges = len(json.loads((folder / "out" / "sweep.json").read_text()))
    shutil.rmtree(folder / "out")
    subsets = {2: 10, 3: 10, 4: 5, 5: 1}
    total = {"wall": 0.0, "cpu": 0.0}
    for method in METHODS:
        ends = {size: theirs(recipe(folder, method, LANGUAGES[:size]), folder / "one") for size in (2, 5)}
        for size, count in subsets.items():  # what is between the smallest and the largest lies on a line
            share = (size - 2) / 3
            for key in total:
                low, high = (getattr(ends[end], key) for end in (2, 5))
                total[key] += count * (low + share * (high - low))
    print(
        f"{merges} merges of 180M: {mine.wall:.0f} s, {mine.cpu:.0f} CPU s, {mine.anonymous:.0f} MiB anonymous at most"
    )
    print(
        f"mergekit, extrapolated from 2 and 5 models by each method: {total['wall']:.0f} s, {total['cpu']:.0f} CPU s: "
        f"{total['wall'] / mine.wall:.1f} times the time, {total['cpu'] / mine.cpu:.1f} times the CPU seconds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="the memory part instead")
    parser.add_argument("--sweep", action="store_true", help="the sweep instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="some of them", choices=STREAMING)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        if given.memory:
            memory(folder, given.methods or STREAMING)
        elif given.sweep:
            sweep(folder)
        else:
            speed(folder, given.rounds, given.methods or [*METHODS])


if __name__ == "__main__":
    main()
