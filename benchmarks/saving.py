"""How long a save keeps training waiting: ours in the background against DeepSpeed's own, warm, in turn.

python benchmarks/saving.py [--millions 50] [--folder DIR]     # 600 MB of state on 1 and on 2 ranks

DeepSpeed's own save (TorchCheckpointEngine) writes and does not sync; ours copies, and syncs in the background. Before
each save the disk has nothing left to write. The same steps run alone and while our save is being written.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROUNDS, BATCH, LENGTH = 7, 1, 32
EVENTS = ("checkpoint_event_prologue", "checkpoint_event_epilogue")
"""What our engine replaces on DeepSpeed's optimizer."""


def config(millions: int) -> dict[str, Any]:
    """Return a Llama of about so many million parameters: 5 layers of 2 million, and as many tokens as it takes."""
    return {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": (millions * 10**6 - 5 * 2_230_000) // 512,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }


def seconds(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def work(rank: int, world: int, folder: str, millions: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    from checkpoint.memory import ScratchSource
    from parallel.ranks import connect
    from train.batch import plain_batch
    from train.checkpointing import ShardEngine, shard_bytes
    from train.engine import Engine, EngineConfig

    ranks = connect(rank, world, rendezvous=Path(f"{folder}/meet-{world}"))
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
    engine = Engine(ScratchSource(config=config(millions), seed=0), how, ranks)
    running, saves = engine._engine, Path(folder) / f"saves-{world}"
    ours = ShardEngine(ranks, expected=shard_bytes(engine.topology), background=True)
    running._configure_checkpointing()  # DeepSpeed's own engine instead of the one that training sets
    own = running.checkpoint_engine
    batch = plain_batch(torch.randint(0, 30000, (BATCH, LENGTH + 1)))
    found: dict[str, list[float]] = {name: [] for name in ("ours", "theirs", "copied", "written", "alone", "beside")}

    def save(name: str, turn: int) -> float:
        if name == "ours":
            ours.attach(running)
        else:
            running.checkpoint_engine = own
            for target, given in ((running, "_copy_recovery_script"), *((running.optimizer, name) for name in EVENTS)):
                vars(target).pop(given, None)
        if ranks.first:
            os.sync()
        ranks.barrier()
        return seconds(lambda: running.save_checkpoint(str(saves), tag=f"{name}-{turn}", save_latest=name != "ours"))

    def step() -> float:
        return seconds(lambda: engine.step([batch], 1e-3))

    for turn in range(ROUNDS + 1):
        alone = [step() for _ in range(4)]
        theirs_s = save("theirs", turn)
        ours_s = save("ours", turn)
        beside = []
        while not all(ranks.gather(ours.finished() is not None)):
            beside.append(step())
        (outcome,) = ours.settle()
        assert outcome.complete, outcome.error
        if ranks.first:
            for name in ("ours", "theirs"):
                shutil.rmtree(saves / f"{name}-{turn}")
            if turn == 0:
                print(f"first save, {world} ranks: ours {ours_s:.3f} s, DeepSpeed's {theirs_s:.3f} s", flush=True)
        if turn:
            found["ours"].append(ours_s)
            found["theirs"].append(theirs_s)
            found["copied"].append(outcome.blocked_s)
            found["written"].append(outcome.written_s)
            found["alone"] += alone
            found["beside"] += beside
    if ranks.first:
        show(world, found, outcome.bytes)
    engine.close()
    ranks.barrier()
    os._exit(0)


def show(world: int, found: dict[str, list[float]], size: int) -> None:
    median = {name: statistics.median(values) for name, values in found.items()}
    ratios = [other / one for one, other in zip(found["ours"], found["theirs"], strict=True)]
    table = Table(title=f"A save of {size / 1e6:.0f} MB, {world} rank(s), median of {ROUNDS} turns")
    for column in (
        "ours s",
        "of it copying s",
        "DeepSpeed s",
        "times less [least, most]",
        "written after s",
        "step alone ms",
        "step beside writing ms",
    ):
        table.add_column(column, justify="right")
    table.add_row(
        f"{median['ours']:.3f}",
        f"{median['copied']:.3f}",
        f"{median['theirs']:.3f}",
        f"{statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]",
        f"{median['written']:.2f}",
        f"{median['alone'] * 1e3:.0f}",
        f"{median['beside'] * 1e3:.0f}",
    )
    Console(width=140).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=50, help="parameters; 12 bytes of state each")
    parser.add_argument("--folder", help="where to save; default: a temporary one")
    arguments = parser.parse_args()
    for world in (1, 2):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            torch.multiprocessing.spawn(work, args=(world, place, arguments.millions), nprocs=world)
