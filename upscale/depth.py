"""Depth as a source: a model with the layers of another one in a new order, some of which pass on what they get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from checkpoint.source import Box, Info, Map, Slot, Source, Wrapped
from parallel.rows import NORMS, Tensor
from upscale.layers import Block, deep_config


def deepen(source: Source, blocks: Sequence[Block]) -> Source:
    """Return the deeper model as a source; nothing is read yet. Adam's moments go with the layers, where there are any.

    Of what an identity block has zeroed, `exp_avg` is zero and `exp_avg_sq` the copied layer's: a step of usual size.
    """
    if blocks == [Block(source=layer) for layer in range(source.config["num_hidden_layers"])]:
        return source
    return DeepSource(source, tuple(blocks))


@dataclass(frozen=True)
class DeepSource(Wrapped):
    """A source and the layers that are made of its."""

    blocks: tuple[Block, ...]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return deep_config(self.source.config, self.blocks)

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        return self.family.tensors(self.config)

    @cached_property
    def _from(self) -> Mapping[str, str]:
        """Which tensor of the small model each one is a copy of."""
        return {
            name: name if tensor.layer is None else self.family.in_layer(tensor, self.blocks[tensor.layer].source)
            for name, tensor in self._tensors.items()
        }

    @cached_property
    def _ends(self) -> frozenset[str]:
        """The kinds of what a sublayer ends with; a zero there is a zero added to the stream.

        A norm of zeros has a gradient that explodes, so where a norm comes last it is the norm's weight.
        """
        kinds = {tensor.kind for tensor in self._tensors.values()}
        return frozenset({"post_norm"} if "post_norm" in kinds else {"matrix", "bias"})

    def silent(self, name: str) -> bool:
        """Return whether a tensor is zero so that its block adds nothing."""
        tensor = self._tensors[name]
        if tensor.layer is None or not self.blocks[tensor.layer].identity:
            return False
        return tensor.kind in self._ends and tensor.makes == "hidden"

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        known = self.source.infos
        return {name: known[self._from[name]] for name in self._tensors}

    def tiles(self, name: str) -> Sequence[Box]:
        return self.source.tiles(self._from[name])

    def collect(self, name: str, spread: Map) -> Any:
        return self.source.collect(self._from[name], spread)

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        self.source.read(self._from[name], box, out, stats)
        if not self.silent(name):
            return
        offset = self.family.norm_offset if self._tensors[name].kind in NORMS else 0.0
        for slot, target in out.items():
            if slot in ("weight", "master"):
                target.fill_(-offset)
            elif slot == "exp_avg":
                target.zero_()
