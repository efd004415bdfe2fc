"""Any size as a source: a model with more of everything, in which what is new does not count yet.

D hidden, H query heads, K key/value heads, d head_dim, F ffn. What is new in the residual stream is zero, since nothing
writes there yet (embedding, o_proj and down_proj have zeros); what reads from there has random numbers, and so do new
heads and new ffn features, whose outputs are not read yet (zeros in o_proj and down_proj). So all that is new has a
gradient from the first steps on (after arXiv 2308.06103, whose norms are scaled alike).

A norm over the stream takes its mean over D' elements, of which D' - D are zero: its weight is multiplied by
sqrt(D / D'), and its eps by D / D'. Norms of heads share that eps with them in the config: relative to the mean square
of a head's elements their change is eps (1 - D / D') / 2, all that is not exact.

With a head_dim m times as large, pair j of the rotary embedding, which turns by base^(-2j / d), is pair m j of the new
one, which turns by base^(-2mj / (m d)): the same. New rows of k_proj are zero, and where attention is scaled by
1 / sqrt(head_dim), q_proj and k_proj are multiplied by m^(1/4).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from checkpoint.source import SLOTS, Box, Info, Map, Slot, Source, Wrapped, box_shape, empty_box, row_major_tiles
from checkpoint.streams import normal_at
from parallel.families import family_of
from parallel.family import Family
from parallel.rows import JOINED, NORMS, Tensor
from upscale.sizes import Sizes, padded_config, sizes_of

Values = dict[Slot, torch.Tensor]


def pad(source: Source, sizes: Sizes, seed: int = 0) -> Source:
    """Return the padded model as a source; nothing is read yet.

    Of new elements Adam's `exp_avg` is zero, and `exp_avg_sq` the mean of the tensor's, so that the first steps there
    are of usual size; of what is scaled both are as its gradient is.

    Raises:
        InputError: see `padded_config`.
    """
    config = padded_config(source.config, sizes)
    return source if sizes_of(config) == sizes_of(source.config) else PaddedSource(source, config, seed)


@dataclass(frozen=True)
class Stats:
    """What reading a padded tensor needs to know of it."""

    inner: Any
    size: float = 0.0
    """Root mean square of the weights."""
    square: float = 0.0
    """Mean of Adam's second moment."""


@dataclass(frozen=True)
class PaddedSource(Wrapped):
    """A source and the config of the model that it is padded to."""

    padded: Mapping[str, Any]
    seed: int

    @property
    def config(self) -> Mapping[str, Any]:
        return self.padded

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        return self.family.tensors(self.padded)

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        return {name: replace(info, shape=self._tensors[name].shape) for name, info in self.source.infos.items()}

    @cached_property
    def _old(self) -> Mapping[str, np.ndarray]:
        """For each axis, which old index stands at each new one; -1 where none does."""
        before, after = sizes_of(self.source.config), sizes_of(self.padded)
        small, large = self.family.axes(self.source.config), self.family.axes(self.padded)
        found = {axis: _padded(np.arange(small[axis]), size) for axis, size in large.items()}
        turns = self._within_heads(before["head_dim"], after["head_dim"])
        group, wide = before["heads"] // before["kv_heads"], after["heads"] // after["kv_heads"]
        kv = _padded(np.arange(before["kv_heads"]), after["kv_heads"])
        # Head i attends to key/value head i // group: old ones come first among those of theirs.
        q = np.stack([np.where((kv >= 0) & (at < group), kv * group + at, -1) for at in range(wide)], axis=1).flatten()
        for axis, heads in (("q", q), ("kv", kv)):
            there = (heads[:, None] >= 0) & (turns[None] >= 0)
            found[axis] = np.where(there, heads[:, None] * before["head_dim"] + turns[None], -1).flatten()
        for axis in self.family.joined:
            starts = np.cumsum([0, *(small[part] for part in axis.split(JOINED))])
            parts = zip(axis.split(JOINED), starts[:-1], strict=True)
            found[axis] = np.concatenate([np.where(found[part] < 0, -1, found[part] + at) for part, at in parts])
        return found

    def _within_heads(self, before: int, after: int) -> np.ndarray:
        """Return which old element of a head stands at each new one: pairs (j, d/2 + j) at (m j, m (d/2 + j))."""
        found = np.full(after, -1)
        found[np.arange(before) * (after // before)] = np.arange(before)
        return found

    @cached_property
    def _scales(self) -> Mapping[str, float]:
        return {name: scale_of(tensor, self.source.config, self.padded) for name, tensor in self._tensors.items()}

    def _changed(self, name: str) -> bool:
        return self._tensors[name].shape != self.source.infos[name].shape or self._scales[name] != 1

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        inner = self.source.collect(name, spread)
        if not self._changed(name):
            return Stats(inner)
        slots = self.source.infos[name].slots
        wanted: list[Slot] = [slot for slot in ("weight", "exp_avg_sq") if slot in slots]

        def sums(box: Box) -> np.ndarray:
            values = {slot: empty_box(box) for slot in wanted}
            self.source.read(name, box, values, inner)
            squares = float(values["weight"].double().square().sum()) if "weight" in values else 0.0
            return np.array([squares, float(values["exp_avg_sq"].double().sum()) if "exp_avg_sq" in values else 0.0])

        count = max(1, math.prod(self.source.infos[name].shape))
        squares, moments = sum(spread(sums, self.source.tiles(name)), np.zeros(2)) / count
        return Stats(inner, size=math.sqrt(squares), square=moments)

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        stats = Stats(None) if stats is None else stats
        if not self._changed(name):
            self.source.read(name, box, out, stats.inner)
            return
        tensor, scale = self._tensors[name], self._scales[name]
        old = [self._old[axis][part] for axis, part in zip(tensor.axes, box, strict=True)]
        fresh = any((of < 0).any() for of in old) and not out.keys().isdisjoint(SLOTS[:2])
        new = self._new(name, box, stats.size) if fresh else torch.zeros(box_shape(box))
        places = [np.flatnonzero(of >= 0) for of in old]
        within = [of[place] for of, place in zip(old, places, strict=True)]
        small: Values = {}
        if all(len(place) for place in places):
            # Old indices grow with the new ones: what is asked for lies in one box of the old tensor.
            source = tuple(slice(int(of[0]), int(of[-1]) + 1) for of in within)
            small = self._read_small(name, source, out, stats.inner)
        at = np.ix_(*places)
        offset = self.family.norm_offset if tensor.kind in NORMS else 0.0
        for slot, target in out.items():
            if slot == "exp_avg":
                values = torch.zeros(box_shape(box))
            elif slot == "exp_avg_sq":
                values = torch.full(box_shape(box), stats.square / scale**2)
            else:
                values = new.clone()
            if slot in small:
                chosen = small[slot][np.ix_(*[of - of[0] for of in within])]
                if scale != 1:
                    divisor = {"exp_avg": scale, "exp_avg_sq": scale**2}.get(slot)
                    chosen = (chosen + offset) * scale - offset if divisor is None else chosen / divisor
                values[at] = chosen
            target.copy_(values)

    def _read_small(
        self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], inner: Any
    ) -> dict[Slot, torch.Tensor]:
        """Return a box of the slots that are asked for, in float32; a weight that is scaled is its master, scaled."""
        known = self.source.infos[name].slots
        of_master = self._scales[name] != 1 and "weight" in out and "master" in known
        wanted: Values = {slot: empty_box(box) for slot in (*out, *(("master",) if of_master else ()))}
        self.source.read(name, box, wanted, inner)
        if of_master:
            wanted["weight"] = wanted["master"]
        return wanted

    def _new(self, name: str, box: Box, size: float) -> torch.Tensor:
        """Return what new elements of a box are."""
        tensor = self._tensors[name]
        if tensor.kind in NORMS:
            offset = self.family.norm_offset
            return torch.full(box_shape(box), self._scales[name] - offset)
        if tensor.kind in ("embedding", "bias") or (tensor.kind == "matrix" and tensor.makes == "hidden"):
            return torch.zeros(box_shape(box))
        found = normal_at(f"{self.seed}/pad/{name}/{tensor.shape}", box).mul_(size)
        if tensor.axes[0] == "kv" and is_key(self.family, tensor):
            # Within a head that is there, queries meet zeros where they are new.
            dim = self.family.axes(self.padded)["head_dim"]
            rows = np.arange(box[0].start, box[0].stop)
            heads = self._old["kv"].reshape(-1, dim).max(axis=1)
            silent = (heads[rows // dim] >= 0) & (self._old["kv"][box[0]] < 0)
            found[torch.from_numpy(np.flatnonzero(silent))] = 0
        return found


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([values, np.full(size - len(values), -1)])


def is_key(family: Family, tensor: Tensor) -> bool:
    """Return whether a tensor makes keys."""
    return ".k_proj." in tensor.name


def scale_of(tensor: Tensor, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Return what the old elements of a tensor are multiplied by."""
    family = family_of(before)
    shrunk = math.sqrt(before["hidden_size"] / after["hidden_size"])
    if tensor.axes == ("hidden",) and tensor.kind in NORMS:
        # A tied head of an embedding that is scaled has what the final norm lacks.
        tied = tensor.kind == "final_norm" and family.scaled_embeddings and family.is_tied(before)
        return 1.0 if tied else shrunk
    if tensor.kind == "embedding" and family.scaled_embeddings:
        return shrunk
    times = family.axes(after)["head_dim"] / family.axes(before)["head_dim"]
    if times != 1 and (is_key(family, tensor) or ".q_proj." in tensor.name) and not family.attention_scale:
        return float(times**0.25)
    return 1.0
