"""Experts as a source: a mixture of experts made of a dense model (sparse upcycling, arXiv 2212.05055).

E experts a layer, of width F; a token is sent to k of them. Each expert starts as the dense model's feed-forward block,
and the gates of those k add up to one, so the function stays whatever the router says. The router starts as small
normal numbers: tokens are spread over all experts, which training then makes different, since each sees others.

Qwen2-MoE has one expert beside them that sees every token, its output times a sigmoid. It is the dense block too, its
sigmoid's weight zero, which makes that one half, and the other experts' down_proj are halved: exact in any dtype, and
nothing is without a gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from checkpoint.source import Box, Info, Map, Slot, Source, Wrapped, box_shape, row_major_tiles
from checkpoint.streams import normal_at
from parallel.families import family_of
from parallel.family import Family
from parallel.rows import Tensor
from upscale.siblings import moe_config

DOWN = "experts.down_proj"
MADE: Mapping[str, tuple[str, ...]] = {
    "gate.weight": (),
    "experts.gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    DOWN: ("down_proj.weight",),
    "shared_expert.gate_proj.weight": ("gate_proj.weight",),
    "shared_expert.up_proj.weight": ("up_proj.weight",),
    "shared_expert.down_proj.weight": ("down_proj.weight",),
    "shared_expert_gate.weight": (),
}
"""Of a layer's `mlp`: tensor -> the dense model's that it is made of, one below the other; none for what is new."""
STD = 0.02
"""Of a router's weights, if the config has no initializer_range."""


def upcycle(source: Source, experts: int | None, per_token: int | None, seed: int = 0) -> Source:
    """Return the model with experts as a source; nothing is read yet.

    Args:
        source: a dense model, without Adam's moments: no rule is known for what would become of them.
        experts: E.
        per_token: k; 2 by default.
        seed: decides the routers' weights, together with their names.

    Raises:
        InputError: see `moe_config`.
    """
    return UpcycledSource(source, moe_config(source.config, experts, per_token), seed)


@dataclass(frozen=True)
class UpcycledSource(Wrapped):
    """A dense source and the config of the model with experts."""

    mixed: Mapping[str, Any]
    seed: int

    @property
    def config(self) -> Mapping[str, Any]:
        return self.mixed

    @cached_property
    def family(self) -> Family:
        return family_of(self.mixed)

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        return self.family.tensors(self.mixed)

    @cached_property
    def _made(self) -> Mapping[str, tuple[str, ...]]:
        """The dense model's tensors that a tensor is made of, for each that it has not itself."""
        blocks = {name: f"model.layers.{tensor.layer}.mlp." for name, tensor in self._tensors.items()}
        return {
            name: tuple(block + part for part in MADE[name.removeprefix(block)])
            for name, block in blocks.items()
            if name.removeprefix(block) in MADE
        }

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        known = self.source.infos
        alike = {name: f"model.layers.{self._tensors[name].layer}.mlp.gate_proj.weight" for name in self._made}
        return {
            name: replace(known[alike.get(name, name)], shape=tensor.shape) for name, tensor in self._tensors.items()
        }

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape) if name in self._made else self.source.tiles(name)

    def collect(self, name: str, spread: Map) -> Any:
        """Return what the dense source needs to know of each tensor that this one is made of."""
        if name not in self._made:
            return self.source.collect(name, spread)
        return [self.source.collect(part, spread) for part in self._made[name]]

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        if name not in self._made:
            self.source.read(name, box, out, stats)
        elif self._made[name]:
            self._copy(name, box, out, stats)
        else:
            router = self._tensors[name].axes[0] == "experts"
            values = self._drawn(name, box) if router else torch.zeros(box_shape(box))
            for target in out.values():
                target.copy_(values)

    def _drawn(self, name: str, box: Box) -> torch.Tensor:
        key = f"{self.seed}/upcycle/{name}/{self._tensors[name].shape}"
        return normal_at(key, box).mul_(self.mixed.get("initializer_range", STD))

    def _copy(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any) -> None:
        """Read what a box has of each dense matrix once, and give it to all experts of the box."""
        *experts, rows, columns = box
        parts = self._made[name]
        height = self._tensors[name].shape[-2] // len(parts)
        halved = name.endswith(DOWN) and "shared_ffn" in self.family.widths
        for number, part in enumerate(parts):
            start, stop = max(rows.start, number * height), min(rows.stop, (number + 1) * height)
            if start >= stop:
                continue
            here = slice(start - rows.start, stop - rows.start)
            targets = {slot: target[..., here, :] for slot, target in out.items()}
            firsts = {slot: target[0] if experts else target for slot, target in targets.items()}
            place = (slice(start - number * height, stop - number * height), columns)
            self.source.read(part, place, firsts, None if stats is None else stats[number])
            for slot, first in firsts.items():
                if halved:
                    first.mul_(0.5)
                if experts:
                    targets[slot][1:].copy_(first)
