"""`growmerge train` against the Trainer of transformers with the same DeepSpeed config, each as its users start it.

python benchmarks/trainer.py [--precision float32] [--rounds 5] [--auto] [--folder DIR]   # 2 gloo ranks, a thread each
python benchmarks/trainer.py --gpu [--case 0]                                             # all GPUs, NCCL, bfloat16

Both train the same model from the same weights on the same samples in the same order, in turn. Measured are tokens/s of
whole steps, with all that a loop does between them; seconds from the command to the end of the first step, imports and
all; and how long a save keeps training waiting, the first one left out. The Trainer's save is the one that
`save_strategy="steps"` makes: DeepSpeed's shards, which are what ours has, and the whole model in 16 bits besides. The
losses say whether both did the same work. `--auto` adds a Trainer whose sizes of ZeRO-3 are "auto", as in its docs.
`--gpu` adds model FLOPs utilisation, and peak memory beside what the planner says (without the CUDA context).

Nothing else should run on the machine: torchrun gives each rank a session of its own, and Linux shares time by session.
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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

FIRST = 3
"""Steps that are left out of tokens/s."""
HOW: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
SAVES, APART = 5, 4
"""Saves of a run that saves, and the steps from one to the next, beside which ours is written."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is trained."""

    config: dict[str, Any]
    length: int
    micro: int
    steps: int
    precision: str
    passes: int = 1
    ranks: int = 2
    cuda: bool = False
    saves: bool = False
    """Whether a run that saves is measured, too."""

    @property
    def batch(self) -> int:
        return self.micro * self.passes * self.ranks


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a run; times are seconds since the epoch."""

    began: float
    """When its command was given."""
    ends: Sequence[float]
    """When its steps ended."""
    loss: float
    """Of the last step."""
    memory: int
    """Peak of what is allocated on the first GPU (bytes)."""
    saves: Sequence[float] = ()
    """Seconds that each save kept training waiting."""
    shards: Sequence[float] = ()
    """Those of them in DeepSpeed's own save."""


def cases(given: argparse.Namespace) -> list[Case]:
    from parallel.presets import PRESETS

    if given.gpu:
        import torch

        if not torch.cuda.is_available():
            sys.exit("benchmarks/trainer.py: --gpu needs CUDA, and torch finds none here")
        gpu: dict[str, Any] = {"passes": 4, "ranks": torch.cuda.device_count(), "precision": "bfloat16", "cuda": True}
        return [
            Case(config=PRESETS["llama-572m"], length=2048, micro=8, steps=18, **gpu),
            Case(config=PRESETS["llama-1.7b"], length=4096, micro=2, steps=18, **gpu),
        ]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    small = {**PRESETS["llama-180m"], **dict(zip(names, (192, 3, 12, 4, 512), strict=True)), "vocab_size": 2048}
    large = {**PRESETS["llama-180m"], **dict(zip(names, (512, 8, 8, 4, 1408), strict=True)), "vocab_size": 16384}
    return [
        Case(config=small, length=128, micro=4, steps=43, precision=given.precision),
        Case(config=large, length=256, micro=2, steps=13, precision=given.precision, saves=True),
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
    # In the run's own precision, or one of both would start from weights that are not rounded yet.
    layout = SafetensorsLayout(dtype=getattr(torch, case.precision))
    write_checkpoint(ScratchSource(config=case.config, seed=0), home / "model", layout, workers=os.cpu_count() or 1)
    train_tokenizer([str(__doc__)], vocab_size=300, folder=home / "tokenizer")
    # Some tokens are far more frequent than others: there is something to learn.
    drawn = np.random.default_rng(0).random((steps * case.batch, case.length)) ** 3
    with Writer(home / "data" / "text", token_dtype(vocab)) as writer:
        writer.add((drawn * vocab).astype(token_dtype(vocab)).ravel(), [case.length] * len(drawn))
    config, _ = load(write_run(home, case, steps, steps))
    sample = run_samples(config, home, plan_of(config), vocab)[0]
    np.save(home / "samples.npy", np.stack([sample(at).ids for at in range(steps * case.batch)]).astype(np.int64))


def write_run(home: Path, case: Case, steps: int, save_every: int) -> Path:
    """Write the file of a run of ours."""
    import yaml

    training = {**HOW, "steps": steps, "sequence_length": case.length, "global_batch": case.batch}
    training |= {"micro_batch": case.micro, "schedule": "constant", "precision": case.precision, "zero": 3}
    training["checkpoint_every"] = save_every
    run = {"name": "ours", "model": "model", "tokenizer": "tokenizer", "training": training}
    run |= {"data": {"folder": "data", "mixture": "all"}, "mixtures": {"all": {"text": 1.0}}}
    run["resources"] = {"ranks": case.ranks, **({"gpus": case.ranks} if case.cuda else {"threads": 1})}
    (home / "ours.yaml").write_text(yaml.safe_dump(run))
    return home / "ours.yaml"


def start(home: Path, *command: str) -> float:
    """Run a command of Python's to its end and return when it was given."""
    began, output = time.time(), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([sys.executable, *command], cwd=home, text=True, **output)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return began


def train_ours(home: Path, case: Case, saves: bool) -> Run:
    """Run `growmerge train`; when its steps ended stands in the job's events."""
    from growmerge.events import read_events
    from train.tracker import read_metrics

    steps = SAVES * APART + 1 if saves else case.steps
    file = write_run(home, case, steps, APART if saves else steps)
    began = start(home, "-m", "growmerge.cli", "train", file.name, "--executor", "local")
    folder = home / "runs" / "ours"
    (events,) = (folder / "jobs").glob("*/events.jsonl")
    ends = [event["time"] for event in read_events(events) if event["event"] == "step"]
    timings = read_metrics(folder / "timings.jsonl")
    took = [case.batch * case.length / line["tokens_per_second"] for line in timings]
    # All that comes between two steps: of a save, also what DeepSpeed does around it.
    between = [after - before - seconds for (before, after), seconds in zip(pairwise(ends), took[1:], strict=True)]
    loss = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line][-1]
    memory, waited = timings[-1].get("device_allocated", 0), between[APART - 1 :: APART] if saves else ()
    shutil.rmtree(folder)
    return Run(began=began, ends=ends, loss=loss, memory=memory, saves=waited)


def train_theirs(home: Path, case: Case, saves: bool, *, auto: bool = False) -> Run:
    """Run the Trainer under torchrun."""
    from train.engine import EngineConfig, deepspeed_config

    passes = {"micro_batch": case.micro, "accumulation": case.passes}
    config = deepspeed_config(EngineConfig(**HOW, **passes, precision=case.precision))
    if auto:
        sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        config["zero_optimization"] = {"stage": 3, **dict.fromkeys(sizes, "auto")}
    # As in the docs of transformers; without it a save writes DeepSpeed's shards twice.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    arguments: dict[str, Any] = {"deepspeed": config, "max_steps": SAVES * APART + 1 if saves else case.steps}
    arguments |= {"per_device_train_batch_size": case.micro, "gradient_accumulation_steps": case.passes}
    arguments |= {"learning_rate": HOW["lr"], "lr_scheduler_type": "constant", "weight_decay": HOW["weight_decay"]}
    arguments |= {"adam_beta1": HOW["betas"][0], "adam_beta2": HOW["betas"][1], "adam_epsilon": HOW["eps"]}
    arguments |= {"max_grad_norm": HOW["clip"], "bf16": case.precision == "bfloat16", "use_cpu": not case.cuda}
    arguments |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "output_dir": "theirs"}
    arguments |= {"save_strategy": "steps" if saves else "no", "save_steps": APART, "save_total_limit": 2}
    arguments |= {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    (home / "arguments.json").write_text(json.dumps(arguments))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks))
    began = start(home, *launcher, str(Path(__file__).resolve()), "--worker")
    found = json.loads((home / "found.json").read_text())
    shutil.rmtree(home / "theirs", ignore_errors=True)
    return Run(began=began, **found)


def work() -> None:
    """Train with the Trainer as one of torchrun's ranks; nothing of ours is imported, which would take its time."""
    import deepspeed.ops

    if os.environ["DS_ACCELERATOR"] == "cpu":  # it would be compiled for minutes, see `train.engine.import_deepspeed`
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    found: dict[str, Any] = {"ends": [], "saves": [], "shards": []}

    class Timed(Trainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            began = time.time()
            super()._save_optimizer_and_scheduler(output_dir)  # DeepSpeed's save_checkpoint
            found["shards"].append(time.time() - began)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            found["ends"].append(time.time())
            control.should_log = state.global_step >= state.max_steps - 1  # a line has the mean since the one before

        def on_save(self, *given: Any, **named: Any) -> None:
            found["saves"].append(time.time() - found["ends"][-1])

    arguments = TrainingArguments(**json.loads(Path("arguments.json").read_text()))
    # `shift_labels`: as many targets as inputs; of labels that transformers shifts there is one fewer.
    rows = torch.from_numpy(np.load("samples.npy"))
    samples = [{"input_ids": row[:-1], "labels": row[:-1], "shift_labels": row[1:]} for row in rows]
    model = AutoModelForCausalLM.from_pretrained("model")
    trainer = Timed(model=model, args=arguments, train_dataset=samples, callbacks=[Clock()])
    trainer.train()
    if arguments.process_index == 0:
        found["loss"] = [line["loss"] for line in trainer.state.log_history if "loss" in line][-1]
        found["memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        Path("found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # threads of gloo may abort an orderly end


AUTO = "Trainer, auto sizes"
SIDES = {"ours": train_ours, "Trainer": train_theirs, AUTO: partial(train_theirs, auto=True)}


def compare(table: Any, what: str, found: dict[str, list[float]], digits: int = 0, *, less: bool = True) -> None:
    """Add a row: medians, and how much better ours is, turn by turn; better is `less`, or else more."""
    cells = [what]
    for name, values in found.items():
        cells.append(f"{statistics.median(values):,.{digits}f}")
        if name != "ours":
            pairs = zip(found["ours"], values, strict=True)
            ratios = [theirs / ours if less else ours / theirs for ours, theirs in pairs]
            cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    table.add_row(*cells)


def measure(table: Any, case: Case, sides: Sequence[str], given: argparse.Namespace) -> None:
    """Run a case on all sides, in turn, and add its rows."""
    from parallel.families import family_of

    runs: dict[str, list[Run]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        home = Path(place)
        prepare(home, case)
        for _ in range(given.rounds):
            for name in sides:
                runs[name].append(SIDES[name](home, case, False))
        saving = {name: SIDES[name](home, case, True) for name in ("ours", "Trainer") if case.saves}
    count, tokens = family_of(case.config).parameters(case.config), case.batch * case.length
    steady = tokens * (case.steps - FIRST)
    rates = {name: [steady / (run.ends[-1] - run.ends[FIRST - 1]) for run in runs[name]] for name in sides}
    starts = {name: [run.ends[0] - run.began for run in runs[name]] for name in sides}
    table.add_section()
    table.add_row(f"[bold]{count / 1e6:,.0f} million parameters, {tokens:,} tokens a step")
    compare(table, "tokens/s", rates, less=False)
    compare(table, "command to end of first step, s", starts, 1)
    if saving:
        # Not the first; nor the Trainer's after the last step, which keeps nobody waiting.
        warm = {name: list(run.saves[1:SAVES]) for name, run in saving.items()}
        compare(table, f"waiting for a save of {12 * count / 1e6:,.0f} MB of state, s", warm, 3)
        warm["Trainer"] = list(saving["Trainer"].shards[1:SAVES])
        compare(table, "  of it DeepSpeed's shards", warm, 3)
    if case.cuda:
        compare_gpu(table, case, runs, rates)
    compare(table, "loss of the last step", {name: [run.loss for run in runs[name]] for name in sides}, 4)


def compare_gpu(table: Any, case: Case, runs: dict[str, list[Run]], rates: dict[str, list[float]]) -> None:
    import torch

    from parallel.gpus import peak_flops
    from parallel.mesh import Mesh
    from parallel.planner import memory_of
    from parallel.sizes import Setup
    from parallel.timing import flops_per_token

    peak = peak_flops(torch.cuda.get_device_name())
    if peak is not None:
        share = 100 * flops_per_token(case.config, case.length) / (case.ranks * peak)
        shares = {name: [share * rate for rate in found] for name, found in rates.items()}
        compare(table, "MFU, %", shares, 1, less=False)
    about = {"micro_batch": case.micro, "accumulation": case.passes, "sequence_length": case.length}
    planned = memory_of(case.config, Setup(zero=3, mesh=Mesh(dp=case.ranks), **about))
    size = (planned.total - planned.peak["CUDA context"]) / 1e9
    memory = {name: [run.memory / 1e9 for run in found] for name, found in runs.items()}
    compare(table, f"peak memory, GB (planner: {size:.1f})", memory, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--auto", action="store_true", help=f"also a {AUTO}")
    parser.add_argument("--gpu", action="store_true", help="on all GPUs")
    parser.add_argument("--case", type=int, choices=(0, 1), help="only the smaller model, or the larger; default: both")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cuda" if given.gpu else "cpu"}
    if not given.gpu:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    from rich.console import Console
    from rich.table import Table

    todo = cases(given) if given.case is None else [cases(given)[given.case]]
    sides = [name for name in SIDES if name != AUTO or given.auto]
    where = f"{todo[0].ranks} {'GPU(s)' if given.gpu else 'ranks on CPU'}"
    table = Table("", title=f"ZeRO-3 in {todo[0].precision}, {where}: medians of {given.rounds} turns")
    for name in sides:
        table.add_column(name, justify="right")
        if name != "ours":
            table.add_column("times better [least, most]", justify="right")
    for case in todo:
        measure(table, case, sides, given)
    Console(width=150).print(table)


if __name__ == "__main__":
    work() if "--worker" in sys.argv else main()
