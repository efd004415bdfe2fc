"""How DeepSpeed's PipelineModule shares a model over stages, and what a stage has of a source.

A pipeline's layers are the embedding, each decoder layer, the final norm and the head, numbered from 0. Parameters are
called after that number and `inner.`, the place of Hugging Face's own module in ours (`train.pipeline`):
`3.inner.self_attn.q_proj.weight` is layer 2's. A tied embedding is `tied_modules.embedding.inner.weight`, in the first
stage and in the last.

Facts of DeepSpeed 0.19.8: runtime/pipe/module.py (_partition_layers, _build), runtime/utils.py (partition_balanced).
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from checkpoint.shard import Topology, numel
from checkpoint.source import Info, Source, Wrapped
from checkpoint.zero3_layout import topology_of
from checkpoint.zero12 import FlatGroup, flat_group
from parallel.errors import InputError

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
TIED = "tied_modules.embedding"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the pipeline."""

    file: str | None
    """Of its weights; a tied head has none of its own."""
    names: Mapping[str, str]
    """Hugging Face name of each of its parameters, by the name in the layer."""
    module: str
    """Its name in the pipeline."""


@dataclass(frozen=True)
class Stage(Wrapped):
    """What a stage has of a source."""

    names: Mapping[str, str]
    """Hugging Face name of each of its parameters, by the pipeline's."""

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        here = set(self.names.values())
        return {name: info for name, info in self.source.infos.items() if name in here}

    @cached_property
    def own(self) -> Mapping[str, str]:
        """The pipeline's name of each parameter, by Hugging Face name."""
        return {name: own for own, name in self.names.items()}

    @cached_property
    def topology(self) -> Topology:
        """Its parameter groups, each with its tensors."""
        return topology_of(self, 1, sys.maxsize)

    def flats(self, ranks: int) -> list[FlatGroup]:
        """Return how each group is cut over the data-parallel ranks."""
        groups = self.topology.sub_groups
        return [flat_group(group.group, dict(group.tensors), [0] * len(group.tensors), ranks) for group in groups]

    def pieces(self, flat: FlatGroup, rank: int) -> Iterator[tuple[str, int, int, int]]:
        """Yield (tensor, start, stop, place in the rank's part) of what a rank has of a group, in elements."""
        begin = rank * flat.part
        for name, at in flat.starts.items():
            start = max(begin - at, 0)
            stop = min(begin + flat.part - at, numel(self.infos[name].shape))
            if start < stop:
                yield name, start, stop, at + start - begin


def stages_of(source: Source, layers: Sequence[Layer], stages: int) -> list[tuple[Sequence[Layer], Stage]]:
    """Return the layers of each stage, and what it has of a source."""
    found = []
    for first, last in bounds(source.config["num_hidden_layers"], stages):
        here = layers[first:last]
        names = {f"{layer.module}.{own}": name for layer in here for own, name in layer.names.items()}
        found.append((here, Stage(source, names)))
    return found


def bounds(layers: int, stages: int) -> list[tuple[int, int]]:
    """Return which of a pipeline's layers each stage has, [first, last): decoder layers are shared evenly."""
    from deepspeed.runtime.utils import partition_balanced

    ends = [int(end) for end in partition_balanced([0, *[1] * layers, 0, 0], stages)]
    return list(pairwise(ends))


def layers_of(source: Source) -> list[Layer]:
    """Return the layers of a source's pipeline, in their order.

    Raises:
        InputError: a tensor belongs to none of them.
    """
    tied = source.family.is_tied(source.config)
    owned = [name for name, info in source.infos.items() if info.tied_to is None]
    decoder = [f"model.layers.{number}" for number in range(source.config["num_hidden_layers"])]
    layers = []
    for number, prefix in enumerate((EMBEDDING, *decoder, NORM, EMBEDDING if tied else HEAD)):
        again = tied and prefix == EMBEDDING and number > 0
        inside = (name for name in owned if name.startswith(f"{prefix}."))
        layers.append(
            Layer(
                file=None if again else f"layer_{number:02d}-model_states.pt",
                names={f"inner.{name.removeprefix(f'{prefix}.')}": name for name in inside},
                module=TIED if tied and prefix == EMBEDDING else str(number),
            )
        )
    placed = {name for layer in layers for name in layer.names.values()}
    for name in owned:
        if name not in placed:
            raise InputError(f"pipeline: {name} is in no layer of the pipelines that our training runs")
    return layers
