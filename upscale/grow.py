"""Growth as a source: any box of the grown model, made from the pieces of the small one that it needs.

Every copy of a feature carries the same value, so each layer computes what it did, and logits do not change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from checkpoint.provenance import descend
from checkpoint.source import (
    SLOTS,
    Box,
    Group,
    Info,
    Map,
    RunState,
    Slot,
    Source,
    WithoutState,
    box_shape,
    row_major_tiles,
)
from parallel.errors import InputError, one_of
from parallel.families import Family, Tensor
from upscale.factors import AxisGrowth, Recipe, Run, axis_growths, divided_dim, grown_config
from upscale.split import exact_split, exact_split_master, symmetric, uniform_at

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Values = dict[Slot, torch.Tensor]
Shares = dict[Slot, list[torch.Tensor]]


def grow(source: Source, recipe: Recipe) -> "GrownSource":
    """Return the grown model as a source: weights and masters, at step 0. Nothing is read yet.

    Raises:
        InputError: the recipe's factors do not fit the model, or its weights have a dtype that cannot be split.
    """
    axis_growths(recipe, source.config)
    for name, info in source.infos.items():
        if "weight" in info.slots and info.slots["weight"] not in DTYPES:
            raise InputError(f"{name}: {one_of('dtype to grow', info.slots['weight'], DTYPES)}")
    return GrownSource(source=source, recipe=recipe)


@dataclass(frozen=True, kw_only=True)
class GrownSource:
    """A small source and the recipe that it is grown by."""

    source: Source
    recipe: Recipe

    @property
    def family(self) -> Family:
        return self.source.family

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return grown_config(self.recipe, self.source.config)

    @cached_property
    def _small(self) -> Mapping[str, Info]:
        return WithoutState(self.source).infos

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        return self.family.tensors(self.source.config)

    @cached_property
    def _axes(self) -> Mapping[str, AxisGrowth]:
        return axis_growths(self.recipe, self.source.config)

    def growths(self, name: str) -> tuple[AxisGrowth, ...]:
        """Return what becomes of each dim of a tensor."""
        return tuple(self._axes[axis] for axis in self._tensors[name].axes)

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        shapes = {name: tensor.shape for name, tensor in self.family.tensors(self.config).items()}
        return {name: replace(info, shape=shapes[name]) for name, info in self._small.items()}

    @property
    def groups(self) -> Mapping[str, Group]:
        return WithoutState(self.source).groups

    @property
    def run(self) -> RunState:
        recipe = {**self.recipe.factors(), "method": self.recipe.method, "seed": self.recipe.seed}
        parents = descend([self.source.run.provenance])
        return replace(self.source.run, provenance={"verb": "grow", "recipe": recipe, **parents})

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return self.source.collect(name, spread)

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        divided = divided_dim(self._tensors[name], bool(self.config.get("tie_word_embeddings")))
        dims = [_by_source(growth, part) for growth, part in zip(self.growths(name), box, strict=True)]
        for piece in product(*(dim.items() for dim in dims)):
            place = tuple(slice(*source) for source, _ in piece)
            small = self._read_small(name, place, out, stats)
            shares: dict[tuple[int, ...], Shares] = {}
            for runs in product(*(runs for _, runs in piece)):
                tiled = tuple(run.copy for dim, run in enumerate(runs) if dim != divided)
                if tiled not in shares:
                    shares[tiled] = self._share(name, place, small, divided, tiled)
                share = 0 if divided is None else runs[divided].copy
                for slot, target in out.items():
                    target[tuple(run.target for run in runs)].copy_(shares[tiled][slot][share])

    def _read_small(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any) -> Values:
        """Read a box of the small tensor: the slots asked for, and the weight that a master is split with.

        In the stored dtype; a narrower output is rounded to before the split, so that its parts still add up.
        """
        stored = self._small[name].slots
        values: dict[Slot, torch.Tensor] = {}
        for slot in SLOTS:
            if slot in out or (slot == "weight" and "master" in out):
                dtype = stored[slot]
                if slot in out and out[slot].dtype.itemsize <= dtype.itemsize:
                    dtype = out[slot].dtype
                values[slot] = torch.empty(box_shape(box), dtype=dtype)
        self.source.read(name, box, values, stats)
        return values

    def _share(self, name: str, box: Box, small: Values, divided: int | None, tiled: tuple[int, ...]) -> Shares:
        """Divide a box of the small tensor among the copies of one dim, for one copy of the others."""
        if divided is None:
            return {slot: [values] for slot, values in small.items()}
        copies = self.growths(name)[divided].copies
        if self.recipe.method == "symmetric":
            return {slot: symmetric(values, copies) for slot, values in small.items()}
        shape = self._small[name].shape
        index = np.ravel_multi_index(tuple(np.ogrid[box]), shape)

        # The shape tells a second growth's numbers from those of the first.
        def uniform(level: int) -> torch.Tensor:
            return uniform_at(f"{self.recipe.seed}/{name}/{shape}/{tiled}/{level}", index)

        parts: Shares = {"weight": exact_split(small["weight"], copies, uniform)}
        if "master" in small:
            parts["master"] = exact_split_master(parts["weight"], small["weight"], small["master"])
        return parts


def _by_source(growth: AxisGrowth, part: slice) -> dict[tuple[int, int], list[Run]]:
    """Group the runs of a piece of a grown axis by where they come from, so that each place is read once."""
    found: dict[tuple[int, int], list[Run]] = {}
    for run in growth.runs(part):
        found.setdefault(run.source, []).append(run)
    return found
