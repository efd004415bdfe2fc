"""A source that has all that a trained model has, what is the same about two sources, and DeepSpeed's own converter."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace

import torch
from tiny import tiny_config

from checkpoint.memory import MemorySource
from checkpoint.source import SLOTS, Group, Info, RunState, read_tensor


@dataclass(frozen=True, kw_only=True)
class Trained(MemorySource):
    """A source with all slots: random, float32, its weights the masters rounded to `dtype`."""

    tensors: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    run: RunState = field(default_factory=lambda: RunState(step=5, tokens=70, samples=9, seed=3))
    groups: dict = field(
        default_factory=lambda: {
            "decay": Group(lr=1e-3, weight_decay=0.25, lr_factor=0.5, weight_decay_factor=2.0, step=5),
            "no_decay": Group(lr=1e-3, eps_factor=0.5, norm_weight=4.0, step=5),
        }
    )

    @cached_property
    def infos(self):
        slots = {"weight": self.dtype, **dict.fromkeys(SLOTS[1:], torch.float32)}
        infos = {}
        for name, tensor in self.family.tensors(self.config).items():
            group = "no_decay" if "norm" in name else "decay"
            infos[name] = Info(shape=tensor.shape, slots=slots, group=group)
            if tensor.tied_to:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
        return infos

    def read(self, name, box, out, stats=None):
        for slot, target in out.items():
            seed = list(self.infos).index(name) * 4 + SLOTS.index("master" if slot == "weight" else slot)
            values = torch.randn(self.infos[name].shape, generator=torch.Generator().manual_seed(seed))[box]
            target.copy_(values.to(self.dtype) if slot == "weight" else values)


def assert_same(found, source):
    """Compare all that two sources say and every element of every slot."""
    assert list(found.infos) == list(source.infos)
    assert (found.groups, found.run) == (source.groups, source.run)
    for name, info in source.infos.items():
        assert found.infos[name] == info
        for slot, dtype in info.slots.items():
            assert torch.equal(read_tensor(found, name, slot, dtype), read_tensor(source, name, slot, dtype)), name


def ds_to_universal(folder, target, **changes):
    """Convert with DeepSpeed's own tool, and put a model's config beside."""
    from deepspeed.checkpoint.ds_to_universal import main

    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    main(
        SimpleNamespace(
            input_folder=str(folder), output_folder=str(target), num_extract_workers=1, num_merge_workers=1, **flags
        )
    )
    (target / "config.json").write_text(json.dumps(tiny_config(**changes)))
