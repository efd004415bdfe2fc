"""Short DeepSpeed runs that stop and go on: what tests grow optimizer state of."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from tiny import tiny_config

import train.engine
from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from train.batch import plain_batch
from train.engine import Engine, EngineConfig

BATCH, LENGTH, STOP = 12, 16, 4
HOW = EngineConfig(
    micro_batch=BATCH,
    accumulation=1,
    lr=3e-3,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.1,
    clip=0.5,
    precision="float32",
)


def run(ranks, start, folder, first, last, precision="float32", dynamics="free", **model):
    """Train steps [first, last) from a folder, or from scratch; save at STOP; return losses and gradient norms."""
    source = open_checkpoint(start) if start else ScratchSource(config=tiny_config(**model), seed=1)
    share = BATCH // ranks.world_size
    train.engine.SUB_GROUP = 10**9  # DeepSpeed's own, which is how files are written
    engine = Engine(source, replace(HOW, micro_batch=share, precision=precision, dynamics=dynamics), ranks)
    losses, norms = [], []
    for step in range(first, last):
        ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step % 7))
        mine = ids[ranks.rank * share : (ranks.rank + 1) * share]
        taken = engine.step([plain_batch(mine)], HOW.lr)
        losses.append(taken.loss)
        norms.append(taken.grad_norm)
        if folder and step + 1 == STOP:
            files = {"config.json": json.dumps(dict(source.config)).encode()}
            engine.save(Path(folder), "stop", {"tokens": 7, "samples": 9, "seed": 1}, files)
    engine.close()
    return losses, norms
