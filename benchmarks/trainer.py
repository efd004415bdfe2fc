"""`growmerge train` against the Trainer of transformers with the same DeepSpeed config, each as its users start it.

python benchmarks/trainer.py [--precision float32] [--rounds 5] [--auto] [--folder DIR]   # 2 gloo ranks, a thread each
python benchmarks/trainer.py --gpu                                                        # all GPUs, NCCL, bfloat16

Both train the same model from the same weights on the same samples in the same order, in turn. Measured are tokens/s of
whole steps, with all that a loop does between them; seconds from the command to the end of the first step, imports and
all; and how long a save keeps training waiting, the first one left out. The Trainer's save is the one that
`save_strategy="steps"` makes: DeepSpeed's shards, which ours compare with, and the whole model in 16 bits besides. The
losses say whether both did the same work. `--auto` adds a Trainer whose sizes of ZeRO-3 are "auto", as in its docs.
`--gpu` adds model FLOPs utilisation, and peak memory beside what the planner says (without the CUDA context).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

FIRST = 3
"""Steps that are left out of tokens/s."""
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
SAVES, APART = 5, 4
"""Saves of a run that saves, and the steps between two, in which ours is written."""
PEERS = {"trainer": "Trainer", "auto": "Trainer, auto sizes"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is trained."""

    config: dict[str, Any]
    length: int
    micro: int
    passes: int
    steps: int
    ranks: int
    precision: str
    cuda: bool
    saves: bool = False
    """Whether a run that saves is measured, too."""

    @property
    def batch(self) -> int:
        return self.micro * self.passes * self.ranks


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a run."""

    start_s: float
    """From the command to the end of the first step."""
    step_s: float
    """A step, the first ones left out."""
    loss: float
    """Of the last step."""
    saves: Sequence[float]
    """Seconds that each save kept training waiting."""
    shards: Sequence[float]
    """Those of them in DeepSpeed's own save."""
    memory: int
    """Peak of what is allocated on the first GPU (bytes)."""


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }


def cases(given: argparse.Namespace) -> list[Case]:
    if not given.gpu:
        cpu: dict[str, Any] = {"passes": 1, "ranks": 2, "precision": given.precision, "cuda": False}
        return [
            Case(config=llama(192, 3, 12, 4, 512, 2048), length=128, micro=4, steps=43, **cpu),
            Case(config=llama(512, 8, 8, 4, 1408, 16384), length=256, micro=2, steps=13, saves=True, **cpu),
        ]
    import torch

    from parallel.presets import PRESETS

    if not torch.cuda.is_available():
        sys.exit("benchmarks/trainer.py: --gpu needs CUDA, and torch finds none here")
    gpu: dict[str, Any] = {"passes": 4, "ranks": torch.cuda.device_count(), "precision": "bfloat16", "cuda": True}
    return [
        Case(config=PRESETS["llama-572m"], length=2048, micro=8, steps=18, **gpu),
        Case(config=PRESETS["llama-1.7b"], length=4096, micro=2, steps=18, **gpu),
    ]


def prepare(home: Path, case: Case) -> None:
    """Write model, tokenizer and token file, and the samples of a run as ours takes them out of that file."""
    import numpy as np
    import torch

    from checkpoint.memory import ScratchSource
    from checkpoint.safetensors import SafetensorsLayout
    from checkpoint.writer import write_checkpoint
    from growmerge.run_of_ranks import run_samples
    from growmerge.training import load, plan_of
    from train.data.indexed import Writer
    from train.data.tokenizer import train_tokenizer
    from train.data.tokens import token_dtype

    vocab, steps = case.config["vocab_size"], max(case.steps, SAVES * APART + 1)
    # In the run's own precision, or one of both would start from weights that were not rounded yet.
    layout = SafetensorsLayout(dtype=getattr(torch, case.precision))
    write_checkpoint(ScratchSource(config=case.config, seed=0), home / "model", layout, workers=2)
    train_tokenizer([str(__doc__)], vocab_size=300, folder=home / "tokenizer")
    # Some tokens are far more frequent than others: there is something to learn.
    drawn = np.random.default_rng(0).random((steps * case.batch, case.length)) ** 3
    with Writer(home / "data" / "text", token_dtype(vocab)) as writer:
        writer.add((drawn * vocab).astype(token_dtype(vocab)).ravel(), [case.length] * len(drawn))
    config, _ = load(write_run(home, case, "samples", steps, steps))
    sample = run_samples(config, home, plan_of(config), vocab)[0]
    np.save(home / "samples.npy", np.stack([sample(at).ids for at in range(steps * case.batch)]).astype(np.int64))


def write_run(home: Path, case: Case, name: str, steps: int, save_every: int) -> Path:
    """Write the file of a run of ours."""
    import yaml

    training = {"steps": steps, "sequence_length": case.length, "global_batch": case.batch, "micro_batch": case.micro}
    training |= {"lr": LR, "schedule": "constant", "betas": [*BETAS], "eps": EPS, "weight_decay": DECAY, "clip": CLIP}
    run = {
        "name": name,
        "model": "model",
        "tokenizer": "tokenizer",
        "data": {"folder": "data", "mixture": "all"},
        "mixtures": {"all": {"text": 1.0}},
        "training": {**training, "precision": case.precision, "zero": 3, "checkpoint_every": save_every},
        "resources": {"ranks": case.ranks, **({"gpus": case.ranks} if case.cuda else {"threads": 1})},
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def start(home: Path, case: Case, command: Sequence[str]) -> float:
    """Run a command to its end and return when it was started."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cuda" if case.cuda else "cpu"}
    if not case.cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    began = time.time()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=home,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return began


def step_seconds(ends: Sequence[float]) -> float:
    return (ends[-1] - ends[FIRST - 1]) / (len(ends) - FIRST)


def train_ours(home: Path, case: Case, *, saves: bool) -> Run:
    """Run `growmerge train`; when its steps ended stands in the job's events."""
    from growmerge.events import read_events
    from train.tracker import read_metrics

    steps = SAVES * APART + 1 if saves else case.steps
    file = write_run(home, case, "ours", steps, APART if saves else steps)
    began = start(home, case, ["-m", "growmerge.cli", "train", file.name])
    folder = home / "runs" / "ours"
    (events,) = (folder / "jobs").glob("*/events.jsonl")
    ends = [event["time"] for event in read_events(events) if event["event"] == "step"]
    timings = read_metrics(folder / "timings.jsonl")
    took = [case.batch * case.length / line["tokens_per_second"] for line in timings]
    # All that came between one step and the next: a save with what DeepSpeed does around it.
    between = [after - before - seconds for (before, after), seconds in zip(pairwise(ends), took[1:], strict=True)]
    run = Run(
        start_s=ends[0] - began,
        step_s=step_seconds(ends),
        loss=read_metrics(folder / "metrics.jsonl")[-2]["loss"],  # the last line is of the evaluation
        saves=between[APART - 1 :: APART] if saves else [],
        shards=[],
        memory=timings[-1].get("device_allocated", 0),
    )
    shutil.rmtree(folder)
    return run


def train_theirs(home: Path, case: Case, *, auto: bool, saves: bool) -> Run:
    """Run the Trainer under torchrun."""
    from train.engine import EngineConfig, deepspeed_config

    config = deepspeed_config(
        EngineConfig(
            micro_batch=case.micro,
            accumulation=case.passes,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            clip=CLIP,
            precision=case.precision,
        )
    )
    if auto:
        sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        config["zero_optimization"] = {"stage": 3, **dict.fromkeys(sizes, "auto")}
    # As in the docs of transformers; without it a save writes DeepSpeed's shards twice.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    arguments = {
        "output_dir": "theirs",
        "deepspeed": config,
        "max_steps": SAVES * APART + 1 if saves else case.steps,
        "per_device_train_batch_size": case.micro,
        "gradient_accumulation_steps": case.passes,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "bf16": case.precision == "bfloat16",
        "use_cpu": not case.cuda,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "save_strategy": "steps" if saves else "no",
        "save_steps": APART,
        "save_total_limit": 2,
    }
    (home / "arguments.json").write_text(json.dumps(arguments))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    began = start(home, case, [*launcher, str(Path(__file__).resolve()), "--worker"])
    found = json.loads((home / "found.json").read_text())
    shutil.rmtree(home / "theirs", ignore_errors=True)
    ends = found.pop("ends")
    return Run(start_s=ends[0] - began, step_s=step_seconds(ends), **found)


def peer() -> None:
    """Train with the Trainer as one of torchrun's ranks; nothing of ours is imported, which would take its time."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as `train.engine.import_deepspeed`
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []
    saves: list[float] = []
    shards: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            save = trainer.deepspeed.save_checkpoint

            def timed(*given: Any, **named: Any) -> None:
                began = time.time()
                save(*given, **named)
                shards.append(time.time() - began)

            trainer.deepspeed.save_checkpoint = timed

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            ends.append(time.time())
            control.should_log = state.global_step >= state.max_steps - 1  # a log line is a mean since the one before

        def on_save(self, *given: Any, **named: Any) -> None:
            saves.append(time.time() - ends[-1])

    arguments = TrainingArguments(**json.loads(Path("arguments.json").read_text()))
    # `shift_labels`: as many targets as inputs; labels that transformers shifts itself are one fewer.
    samples = [
        {"input_ids": ids[:-1], "labels": ids[:-1], "shift_labels": ids[1:]}
        for ids in torch.from_numpy(np.load("samples.npy"))
    ]
    model = AutoModelForCausalLM.from_pretrained("model")
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, callbacks=[Clock()])
    trainer.train()
    if arguments.process_index == 0:
        loss = [line["loss"] for line in trainer.state.log_history if "loss" in line][-1]
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        found = {"ends": ends, "loss": loss, "saves": saves, "shards": shards, "memory": memory}
        Path("found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # threads of gloo may abort an orderly end


def compare(table: Any, what: str, found: dict[str, list[float]], *, digits: int = 0, less: bool = True) -> None:
    """Add a row: medians, and by how much ours is better, turn by turn; `less` is better, or more."""
    cells = [what, f"{statistics.median(found['ours']):,.{digits}f}"]
    for name in PEERS:
        if name in found:
            pairs = zip(found["ours"], found[name], strict=True)
            ratios = [theirs / ours if less else ours / theirs for ours, theirs in pairs]
            cells.append(f"{statistics.median(found[name]):,.{digits}f}")
            cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    table.add_row(*cells)


def measure(table: Any, case: Case, given: argparse.Namespace) -> None:
    """Run a case on all sides, in turn, and add its rows."""
    from parallel.families import family_of

    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        home = Path(place)
        prepare(home, case)
        sides: dict[str, Callable[..., Run]] = {
            "ours": lambda saves: train_ours(home, case, saves=saves),
            "trainer": lambda saves: train_theirs(home, case, auto=False, saves=saves),
        }
        if given.auto:
            sides["auto"] = lambda saves: train_theirs(home, case, auto=True, saves=saves)
        runs: dict[str, list[Run]] = {name: [] for name in sides}
        for _ in range(given.rounds):
            for name, side in sides.items():
                runs[name].append(side(saves=False))
        saving = {name: sides[name](saves=True) for name in ("ours", "trainer")} if case.saves else {}
    count = family_of(case.config).parameters(case.config)
    table.add_section()
    tokens = case.batch * case.length
    table.add_row(f"[bold]{count / 1e6:,.0f} million parameters, {tokens:,} tokens a step")
    rates = {name: [tokens / run.step_s for run in found] for name, found in runs.items()}
    compare(table, "tokens/s", rates, less=False)
    compare(
        table, "command to end of first step, s", {name: [run.start_s for run in runs[name]] for name in runs}, digits=1
    )
    if saving:
        warm = {name: list(run.saves[1:SAVES]) for name, run in saving.items()}
        compare(table, f"waiting for a save of {12 * count / 1e6:,.0f} MB of state, s", warm, digits=3)
        warm["trainer"] = list(saving["trainer"].shards[1:SAVES])
        compare(table, "  DeepSpeed's shards alone, s", warm, digits=3)
    if case.cuda:
        gpu_rows(table, case, runs, rates)
    losses = {name: [run.loss for run in found] for name, found in runs.items()}
    compare(table, "loss of the last step", losses, digits=4)


def gpu_rows(table: Any, case: Case, runs: dict[str, list[Run]], rates: dict[str, list[float]]) -> None:
    import torch

    from parallel.gpus import peak_flops
    from parallel.mesh import Mesh
    from parallel.planner import memory_of
    from parallel.sizes import Setup
    from parallel.timing import flops_per_token

    peak = peak_flops(torch.cuda.get_device_name())
    if peak is not None:
        share = 100 * flops_per_token(case.config, case.length) / (case.ranks * peak)
        compare(
            table,
            "MFU, %",
            {name: [rate * share for rate in found] for name, found in rates.items()},
            digits=1,
            less=False,
        )
    setup = Setup(
        zero=3, mesh=Mesh(dp=case.ranks), micro_batch=case.micro, accumulation=case.passes, sequence_length=case.length
    )
    planned = memory_of(case.config, setup)
    size = (planned.total - planned.peak["CUDA context"]) / 1e9
    memory = {name: [run.memory / 1e9 for run in found] for name, found in runs.items()}
    compare(table, f"peak memory, GB (planner: {size:.1f})", memory, digits=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--auto", action="store_true", help='also a Trainer whose sizes of ZeRO-3 are "auto"')
    parser.add_argument("--gpu", action="store_true", help="on all GPUs")
    parser.add_argument("--folder", help="where to work; default: a temporary one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        peer()
        return
    from rich.console import Console
    from rich.table import Table

    todo = cases(given)
    where = f"{todo[0].ranks} GPU(s)" if given.gpu else "2 ranks on CPU"
    table = Table(title=f"ZeRO-3 in {todo[0].precision}, {where}, {given.rounds} turns")
    columns = ["", "ours"] + [
        column for name in PEERS if name == "trainer" or given.auto for column in (PEERS[name], "times better")
    ]
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for case in todo:
        measure(table, case, given)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
