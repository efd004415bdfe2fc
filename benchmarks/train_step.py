"""Steps of our ZeRO-3 engine against DeepSpeed's defaults: the quickstart's models on 2 gloo ranks, one thread each."""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROUNDS, STEPS, BATCH, LENGTH = 8, 10, 4, 128


def quickstart_config(hidden: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": 3,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": hidden // 48,
        "head_dim": 16,
        "intermediate_size": hidden * 8 // 3,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }


def work(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    from checkpoint.memory import ScratchSource
    from parallel.ranks import connect
    from train import engine as ours
    from train.batch import plain_batch
    from train.engine import Engine, EngineConfig

    ranks = connect(rank, 2, rendezvous=Path(rendezvous))
    batch = plain_batch(torch.randint(0, 2048, (BATCH, LENGTH + 1)))
    tuned, gather_at_once = ours.deepspeed_config, ours._gather_at_once
    rows = []
    for hidden in (96, 192):
        engines = {}
        for name in ("ours", "defaults"):
            if name == "defaults":
                ours.deepspeed_config = lambda how: {**tuned(how), "zero_optimization": {"stage": 3}}
                ours._gather_at_once = lambda persistent: None
            how = EngineConfig(
                micro_batch=BATCH,
                accumulation=1,
                lr=1e-3,
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=0.1,
                clip=1.0,
                precision="float32",
            )
            engines[name] = Engine(ScratchSource(config=quickstart_config(hidden), seed=0), how, ranks)
            ours.deepspeed_config, ours._gather_at_once = tuned, gather_at_once
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(ROUNDS + 1):
            for name, engine in engines.items():
                ranks.barrier()
                began = time.perf_counter()
                for _ in range(STEPS):
                    engine.step([batch], 1e-3)
                if turn:  # the first turn warms up
                    seconds[name].append((time.perf_counter() - began) / STEPS)
        pairs = [other / one for one, other in zip(seconds["ours"], seconds["defaults"], strict=True)]
        rows.append((hidden, statistics.median(seconds["ours"]), statistics.median(seconds["defaults"]), pairs))
    if rank == 0:
        table = Table(title="A step of 1,024 tokens, 2 ranks on CPU (median of 8 turns)")
        for column in ("hidden", "ours ms", "DeepSpeed defaults ms", "tokens/s", "times as fast", "least", "most"):
            table.add_column(column, justify="right")
        for hidden, one, other, pairs in rows:
            table.add_row(
                str(hidden),
                f"{one * 1e3:.0f}",
                f"{other * 1e3:.0f}",
                f"{2 * BATCH * LENGTH / one:,.0f}",
                f"{statistics.median(pairs):.2f}",
                f"{min(pairs):.2f}",
                f"{max(pairs):.2f}",
            )
        Console().print(table)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(f"{folder}/meet",), nprocs=2)
