"""Writing distributed checkpoints of Megatron-Core (`--ckpt-format torch_dist`): a run's folder, to be its `--load`.

With the optimizer's state it is that of an iteration, which Megatron-LM goes on from; without it is `release`, whose
weights it begins with. No rank of the run that loads it matters: keys are of whole tensors. `checkpoint.dcp_layout` has
the files, `checkpoint.torch_dist_view` the tensors, `checkpoint.torch_dist_common` what common.pt tells.

Masters are there for every optimizer: `fp32_param` and `param` are two keys of the same bytes, and with float32 weights
the weights' bytes. Each linear layer of Megatron-Core, and each norm of Transformer Engine, asks for an `_extra_state`
besides: None, which both take for nothing.

Facts of megatron_core 0.16.1: core/dist_checkpointing/strategies/torch.py (objects are lists of one),
core/transformer/utils.py (make_sharded_object_for_checkpoint) and core/tensor_parallel/layers.py (get_extra_state).
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint.dcp_files import METADATA
from checkpoint.dcp_layout import DcpLayout, Item, Key, saved
from checkpoint.layout import FilePlan, Fragment
from checkpoint.megatron_files import RELEASE, TRACKER
from checkpoint.source import Slot, Source
from checkpoint.torch_dist_common import common_of
from checkpoint.torch_dist_files import BACKEND, COMMON, TORCH_DIST, step_name
from checkpoint.torch_dist_optim import MASTERS, MOMENTS, STATE
from checkpoint.torch_dist_view import TorchDistView, view_of

LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
STATEFUL = (*LINEAR, "self_attention.core_attention", "self_attention.q_layernorm", "self_attention.k_layernorm")
"""Modules of a layer that may ask for an _extra_state."""
OUTER = "decoder.final_layernorm"
"""The one that is in no layer."""


@dataclass(frozen=True, kw_only=True)
class TorchDistLayout(DcpLayout):
    """A run's folder with one checkpoint; its weights are of `dtype`, by default each of the source's own."""

    def files(self, source: Source) -> list[FilePlan]:
        """Return the plans of the files.

        Raises:
            InputError: Megatron-Core has no such model, or cannot keep what the source has of the optimizer.
        """
        view = view_of(source)
        common_of(view)
        folder = _folder(view)
        return [
            replace(
                plan,
                name=f"{folder}/{plan.name}",
                tensors=tuple(name for key in plan.tensors for name in view.tensors_of(key)),
                create=functools.partial(_create_inside, create=plan.create),
                source=view,
            )
            for plan in super().files(view)
        ]

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        view = view_of(source)
        folder = _folder(view)
        found = super().extras(view, plans)
        backend = {"sharded_backend": TORCH_DIST, "sharded_backend_version": 1}
        backend |= {"common_backend": "torch", "common_backend_version": 1}
        return {
            "config.json": found["config.json"],
            f"{folder}/{METADATA}": found[METADATA],
            f"{folder}/{COMMON}": saved(common_of(view)),
            f"{folder}/{BACKEND}": json.dumps(backend).encode(),
            TRACKER: (str(view.run.step) if _has_state(view) else RELEASE).encode(),
        }

    def _items(self, source: Source) -> Iterator[Item]:
        view = view_of(source)
        for key, info in view.infos.items():
            dtype = self.dtype or info.slots["weight"]
            master: Slot = "master" if "master" in info.slots else "weight"
            moved = "exp_avg" in info.slots
            keys: tuple[Key, ...] = ((key,),)
            masters: tuple[Key, ...] = ()
            if moved or master == "master":
                masters = tuple((f"{STATE}{name}.{key}",) for name in MASTERS)
            if dtype == torch.float32:
                yield from self._chunks(view, key, master, dtype, keys + masters)
            else:
                yield from self._chunks(view, key, "weight", dtype, keys)
                if masters:
                    yield from self._chunks(view, key, master, torch.float32, masters)
            for slot in MOMENTS if moved else ():
                yield from self._chunks(view, key, slot, info.slots[slot], ((f"{STATE}{slot}.{key}",),))
        yield Item(keys=tuple((key,) for key in _extra_states(view)), head=saved([None]))


def _folder(view: TorchDistView) -> str:
    return step_name(view.run.step if _has_state(view) else None)


def _has_state(view: TorchDistView) -> bool:
    return any("exp_avg" in info.slots for info in view.infos.values())


def _extra_states(view: TorchDistView) -> Iterator[str]:
    layers = view.config["num_hidden_layers"]
    for module in STATEFUL:
        for layer in range(layers):
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
    yield f"{OUTER}._extra_state/shard_0_1"


def _create_inside(path: Path, *, create: Callable[[Path], Sequence[Fragment]]) -> Sequence[Fragment]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return create(path)
