"""What a running engine holds: the bytes of all live storages that torch made, between steps and at the peak of one."""

import gc
import weakref
from typing import Any

import torch
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train.engine
import train.pipeline
from checkpoint.memory import ScratchSource
from parallel.mesh import Mesh
from parallel.sizes import Setup
from train.batch import plain_batch
from train.engine import Engine, EngineConfig
from train.pipeline import PipelineEngine


class Live(TorchDispatchMode):
    """Counts each storage once, from the operation that made it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[int, Any, str]] = {}
        self.now = self.peak = 0
        self.at_peak: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                self._see(tensor, str(func))
        return found

    def _see(self, tensor: torch.Tensor, what: str) -> None:
        storage = tensor.untyped_storage()
        # By address: DeepSpeed swaps `.data`, and one storage may come back under another Python object.
        key, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            return
        before = self.held.pop(key, None)
        self.now += size - (before[0] if before else 0)
        self.held[key] = (size, weakref.ref(storage, lambda ref: self._gone(key, ref)), f"{what} {tensor.dtype}")
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = [(size, name) for size, _, name in self.held.values()]

    def _gone(self, key: int, ref: Any) -> None:
        if key in self.held and self.held[key][1] is ref:
            self.now -= self.held.pop(key)[0]


def measure(ranks: Any, variants: dict[str, tuple[Setup, dict[str, Any]]], steps: int = 2) -> dict[str, Any]:
    """Train each variant's model for some steps; return (bytes at rest, bytes at the peak, what they were) by name."""
    found = {}
    plain = train.engine.deepspeed_config
    for name, (setup, model) in variants.items():
        how = EngineConfig(
            micro_batch=setup.micro_batch,
            accumulation=setup.accumulation,
            lr=1e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            clip=1.0,
            precision=setup.precision,
            sequence_length=setup.sequence_length,
            mesh=setup.mesh,
            zero=setup.zero,
            recompute=setup.recompute,
            offload=setup.offload,
        )

        def with_bucket(config: EngineConfig, setup: Setup = setup) -> dict[str, Any]:
            ours = plain(config)
            ours["zero_optimization"]["reduce_bucket_size"] = setup.bucket
            return ours

        train.engine.deepspeed_config = with_bucket
        train.pipeline.deepspeed_config = with_bucket
        with Live() as live:
            kind = PipelineEngine if setup.mesh.pp > 1 else Engine
            engine = kind(ScratchSource(config=tiny_config(**model), seed=1), how, ranks)
            peaks = []
            for _ in range(steps):
                gc.collect()
                live.peak = live.now
                shape = (setup.micro_batch, setup.sequence_length + 1)
                same = torch.Generator().manual_seed(0)  # tensor-parallel ranks have to have the same
                batches = [
                    plain_batch(torch.randint(0, model["vocab_size"], shape, generator=same))
                    for _ in range(setup.accumulation)
                ]
                taken = engine.step(batches, 1e-3)
                assert taken.kept, taken
                peaks.append(live.peak)
            gc.collect()
            sums: dict[str, list[int]] = {}
            for size, what in live.at_peak:
                sums.setdefault(what, []).append(size)
            found[name] = (live.now, peaks, {what: (sum(sizes), len(sizes)) for what, sizes in sums.items()})
            engine.close()
            del engine
        gc.collect()
    train.engine.deepspeed_config = train.pipeline.deepspeed_config = plain
    return found


MODEL = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
"""28 million parameters; its MLPs' matrices and its embedding are larger than PERSISTENT."""


def setup_of(**given: Any) -> Setup:
    """Return a setup for the CPU: of few tokens, as bfloat16 is slow without its instructions (a thousand: minutes)."""
    mesh = given.pop("mesh", Mesh(dp=given.pop("dp", 1)))
    return Setup(
        **{
            "zero": 3,
            "mesh": mesh,
            "micro_batch": 1,
            "accumulation": 1,
            "sequence_length": 16,
            "cuda": False,
            "bucket": 5_000_000,
            **given,
        }
    )
