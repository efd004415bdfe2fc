"""Growth as a source: any box of the grown model, made from the pieces of the small one that it needs.

Every copy of a feature carries the same value, so each layer computes what it did, and logits do not change.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

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
    empty_box,
    row_major_tiles,
)
from checkpoint.streams import normal_at, uniform_at
from parallel.errors import InputError, one_of
from parallel.family import Family
from parallel.rows import NORMS, Tensor
from upscale.depth import deepen
from upscale.factors import AxisGrowth, Recipe, Run, axis_growths, copied_config, divided_dim
from upscale.pad import pad
from upscale.split import (
    cancelling_noise,
    diagonal,
    exact_split,
    exact_split_master,
    rounded_in_turn,
    rounding_to,
    symmetric,
    whole_to_one,
)
from upscale.state import Rule, rule_of
from upscale.upcycle import upcycle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Values = dict[Slot, torch.Tensor]
Shares = dict[Slot, list[torch.Tensor]]


def grow(source: Source, recipe: Recipe) -> Source:
    """Return the grown model as a source; nothing is read yet. It is at step 0 unless the recipe keeps Adam's state.

    By whole factors first, then to other sizes, then each layer is put where it stands in the deeper model, and at last
    feed-forward blocks become experts.

    Raises:
        InputError: the recipe's factors do not fit the model, or its weights have a dtype that cannot be split.
    """
    axis_growths(recipe, source.config)
    for name, info in source.infos.items():
        if "weight" in info.slots and info.slots["weight"] not in DTYPES:
            raise InputError(f"{name}: {one_of('dtype to grow', info.slots['weight'], DTYPES)}")
    wide: Source = GrownSource(source=source, recipe=recipe)
    if recipe.sizes.given():
        wide = pad(wide, recipe.sizes, recipe.seed)
    deep = deepen(wide, recipe.blocks(source.config))
    return upcycle(deep, recipe.experts, recipe.experts_per_token, recipe.seed) if recipe.upcycles else deep


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
        return copied_config(self.recipe, self.source.config)

    @cached_property
    def _small(self) -> Mapping[str, Info]:
        return self._start.infos

    @cached_property
    def _start(self) -> Source:
        """What is grown of the small source."""
        return WithoutState(self.source) if self.recipe.state == "reset" else self.source

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        return self.family.tensors(self.source.config)

    @cached_property
    def _axes(self) -> Mapping[str, AxisGrowth]:
        return axis_growths(self.recipe, self.source.config)

    def growths(self, name: str) -> tuple[AxisGrowth, ...]:
        """Return what becomes of each dim of a tensor."""
        return tuple(self._axes[axis] for axis in self._tensors[name].axes)

    def rule(self, name: str) -> Rule:
        """Return what growth does to a tensor's gradient."""
        return self._rules[name]

    @cached_property
    def _rules(self) -> Mapping[str, Rule]:
        return {name: rule_of(tensor, self._axes, self.source.config) for name, tensor in self._tensors.items()}

    @cached_property
    def _divided(self) -> Mapping[str, int | None]:
        return {name: divided_dim(tensor, self.source.config) for name, tensor in self._tensors.items()}

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        shapes = {name: tensor.shape for name, tensor in self.family.tensors(self.config).items()}
        return {
            name: replace(info, shape=shapes[name], group=self._group(name)[0]) for name, info in self._small.items()
        }

    def _group(self, name: str) -> tuple[str, Group]:
        group = self._small[name].group
        values = self._start.groups.get(group, Group())
        return (group, values) if self.recipe.state == "reset" else self.rule(name).group(group, values)

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        """The small model's groups, each divided by what its tensors need to go on as they did; in the same order."""
        found: dict[str, dict[str, Group]] = {name: {} for name in self._start.groups}
        for name, info in self._small.items():
            if info.tied_to is None:
                grown, values = self._group(name)
                found.setdefault(info.group, {})[grown] = values
        return {grown: values for parts in found.values() for grown, values in parts.items()}

    @property
    def run(self) -> RunState:
        recipe = self.recipe.plain()
        parents = descend([self.source.run.provenance])
        provenance = {"verb": "grow", "recipe": recipe, **parents}
        return replace(self._start.run, tokens=self.source.run.tokens, provenance=provenance)

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        """Return what the small source needs to know first, and how large a tensor that gets noise is."""
        stats = self.source.collect(name, spread)
        if self.recipe.noise_db is None or self._tensors[name].kind != "matrix":
            return stats, 0.0

        def square(box: Box) -> float:
            values = empty_box(box)
            self.source.read(name, box, {"weight": values}, stats)
            return float(values.double().square().sum())

        shape = self._small[name].shape
        power = math.fsum(spread(square, self.source.tiles(name))) / math.prod(shape)
        return stats, math.sqrt(power / 10 ** (self.recipe.noise_db / 10)) / self.rule(name).r_in

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        inner, noise = stats if stats is not None else (None, 0.0)
        divided = self._divided[name]
        # The dim whose copies may differ.
        shared = 0 if self.rule(name).scale != 1.0 else divided
        dims = [_by_source(growth, part) for growth, part in zip(self.growths(name), box, strict=True)]
        for piece in product(*(dim.items() for dim in dims)):
            place = tuple(slice(*source) for source, _ in piece)
            small = self._read_small(name, place, out, inner)
            shares: dict[tuple[int, ...], Shares] = {}
            for runs in product(*(runs for _, runs in piece)):
                tiled = tuple(run.copy for dim, run in enumerate(runs) if dim != shared)
                if tiled not in shares:
                    shares[tiled] = self._share(name, place, small, out, divided, tiled, noise)
                share = 0 if shared is None else runs[shared].copy
                first = not any(run.copy for run in runs)
                for slot, target in out.items():
                    part = target[tuple(run.target for run in runs)]
                    if slot not in ("exp_avg", "exp_avg_sq"):
                        part.copy_(shares[tiled][slot][share])
                    elif first or self.recipe.state == "scaled":
                        part.copy_(small[slot]).div_(self.rule(name).divisor(slot))
                    else:
                        part.zero_()

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
                values[slot] = empty_box(box, dtype)
        self.source.read(name, box, values, stats)
        return values

    def _share(
        self,
        name: str,
        box: Box,
        small: Values,
        out: Mapping[Slot, torch.Tensor],
        divided: int | None,
        tiled: tuple[int, ...],
        noise: float,
    ) -> Shares:
        """Divide a box of the small weight and master among the copies of one dim, for one copy of the others."""
        whole: Values = {slot: small[slot] for slot in SLOTS[:2] if slot in small}
        # What a norm adds to its weight is scaled and shared with it.
        offset = self.family.norm_offset if self._tensors[name].kind in NORMS else 0.0
        scale = self.rule(name).scale
        if scale != 1.0:
            return self._scaled(whole, self.growths(name)[0].copies, scale, offset)
        if divided is None:
            return {slot: [values] for slot, values in whole.items()}
        copies = self.growths(name)[divided].copies
        shape = self._small[name].shape
        # The shape tells a second growth's numbers from those of the first.
        key = f"{self.recipe.seed}/{name}/{shape}/{tiled}"
        if self.recipe.method != "exact-split":
            output = tiled[-1] if tiled else 0
            # Where the outputs have no copies of their own, a whole value for one input leaves the others unused.
            alone = self.recipe.method == "diagonal" and self.rule(name).r_out > 1
            dtypes = {slot: torch.float32 if noise or slot not in out else out[slot].dtype for slot in whole}
            parts = {
                slot: diagonal(values, copies, output) if alone else symmetric(values, copies, offset, dtypes[slot])
                for slot, values in whole.items()
            }
            if noise:
                added = cancelling_noise(noise, copies, lambda pair: normal_at(f"{key}/{pair}", box))
                parts = {slot: [a + b for a, b in zip(shares, added, strict=True)] for slot, shares in parts.items()}
            return parts

        def uniform(level: int) -> torch.Tensor:
            return uniform_at(f"{key}/{level}", box)

        if offset:
            # Shares of offset + weight are seldom numbers of the dtype, but the whole and nothing are.
            return {slot: whole_to_one(values, copies, offset, uniform(0)) for slot, values in whole.items()}
        found: Shares = {"weight": exact_split(whole["weight"], copies, uniform)} if "weight" in whole else {}
        if "master" in whole:
            found["master"] = exact_split_master(found["weight"], whole["weight"], whole["master"])
        return found

    def _scaled(self, whole: Values, copies: int, scale: float, offset: float) -> Shares:
        """Return the copies of a norm that has to multiply by more, rounded in turn unless they have to be equal."""
        large = {slot: (values.float() + offset) * scale - offset for slot, values in whole.items()}
        if self.recipe.method != "exact-split" or "weight" not in whole:
            return {slot: [values] * copies for slot, values in large.items()}
        weights = rounded_in_turn(large["weight"], copies, whole["weight"].dtype)
        found: Shares = {"weight": weights}
        if "master" in whole:
            found["master"] = [rounding_to(weight, large["master"]) for weight in weights]
        return found


def _by_source(growth: AxisGrowth, part: slice) -> dict[tuple[int, int], list[Run]]:
    """Group the runs of a piece of a grown axis by where they come from, so that each place is read once."""
    found: dict[tuple[int, int], list[Run]] = {}
    for run in growth.runs(part):
        found.setdefault(run.source, []).append(run)
    return found
