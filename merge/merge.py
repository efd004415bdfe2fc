"""Merging as a source: any box of the merged model, made from the same box of every model.

Models are read box by box, all together, and computed in float32; nothing is ever held whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from checkpoint.provenance import descend, stems_from
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, Source, WithoutState, box_shape, row_major_tiles
from merge.methods import linear, ties
from merge.threshold import Cut, find_cuts, trim
from parallel.errors import InputError, one_of
from parallel.families import Family

SAME = ("num_attention_heads", "hidden_act", "rms_norm_eps", "rope_theta", "rope_parameters")
"""Further keys of the config that change what weights mean; models that state one differently are not merged."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What reading needs to know of a whole tensor first."""

    inner: Sequence[Any]
    """Each model's own, the base's last."""
    method: Any
    """The method's; None if it needs nothing."""


@dataclass(frozen=True, kw_only=True)
class MergedSource:
    """Models, and how they are merged; made by `merge`."""

    sources: tuple[Source, ...]
    base: Source | None
    method: str
    weights: tuple[float, ...]
    density: float
    scale: float
    normalize: bool
    notes: tuple[str, ...]
    """What the user should know, a line each."""

    @property
    def _like(self) -> Source:
        """What shapes, config and dtypes are taken from: the base, or else the first model."""
        return WithoutState(self.sources[0] if self.base is None else self.base)

    @cached_property
    def _all(self) -> tuple[Source, ...]:
        return self.sources if self.base is None else (*self.sources, self.base)

    @property
    def family(self) -> Family:
        return self._like.family

    @property
    def config(self) -> Mapping[str, Any]:
        return self._like.config

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        return {
            name: replace(info, slots={slot: dtype for slot, dtype in info.slots.items() if slot == "weight"})
            for name, info in self._like.infos.items()
        }

    @property
    def groups(self) -> Mapping[str, Group]:
        return self._like.groups

    @property
    def run(self) -> RunState:
        recipe = {
            "method": self.method,
            "weights": list(self.weights),
            "density": self.density,
            "scale": self.scale,
            "normalize": self.normalize,
        }
        parents = descend([source.run.provenance for source in self._all])
        return RunState(provenance={"verb": "merge", "recipe": recipe, **parents})

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Stats:
        inner = [source.collect(name, spread) for source in self._all]
        collect = METHODS[self.method].collect
        return Stats(inner=inner, method=collect and collect(self, name, inner, spread))

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        out["weight"].copy_(METHODS[self.method].merge(self, name, box, stats))

    def values(self, name: str, box: Box, inner: Sequence[Any]) -> list[torch.Tensor]:
        """Read a box of as many models as there are `inner` stats, in float32; the base is the last of all.

        Raises:
            InputError: a weight is not finite.
        """
        found = []
        for number, stats in enumerate(inner):
            source = self._all[number]
            tensor = torch.empty(box_shape(box), dtype=torch.float32)
            source.read(name, box, {"weight": tensor}, stats)
            if not torch.isfinite(tensor).all():
                who = _label(source, number, self.base)
                raise InputError(f"{who}: {name} holds a value that is not finite; such a model cannot be merged")
            found.append(tensor)
        return found

    def task_vectors(self, name: str, box: Box, inner: Sequence[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read a box of the base, and of what each model adds to it."""
        *tensors, base = self.values(name, box, inner)
        return base, [tensor - base for tensor in tensors]


def _merge_linear(merged: MergedSource, name: str, box: Box, stats: Stats) -> torch.Tensor:
    tensors = merged.values(name, box, stats.inner[: len(merged.sources)])
    return linear(tensors, merged.weights, normalize=merged.normalize)


def _merge_ties(merged: MergedSource, name: str, box: Box, stats: Stats) -> torch.Tensor:
    base, deltas = merged.task_vectors(name, box, stats.inner)
    shape = merged.infos[name].shape
    trimmed = [trim(delta, cut, shape, box) for delta, cut in zip(deltas, stats.method, strict=True)]
    return ties(base, trimmed, merged.weights, scale=merged.scale, normalize=merged.normalize)


def _collect_ties(merged: MergedSource, name: str, inner: Sequence[Any], spread: Map) -> list[Cut]:
    """Find each task vector's cut: of n elements the max(1, int(density n)) largest stay, as in mergekit."""
    shape = merged.infos[name].shape
    keep = max(1, int(merged.density * math.prod(shape)))
    return find_cuts(
        lambda box: merged.task_vectors(name, box, inner)[1],
        shape,
        merged.tiles(name),
        [keep] * len(merged.sources),
        spread,
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method is run over boxes."""

    merge: Callable[[MergedSource, str, Box, Stats], torch.Tensor]
    """From a box to its merged values, float32."""
    collect: Callable[[MergedSource, str, Sequence[Any], Map], Any] | None = None
    """What it needs to know of a whole tensor first."""
    needs_base: bool = False


METHODS: dict[str, Method] = {
    "linear": Method(merge=_merge_linear),
    "ties": Method(merge=_merge_ties, collect=_collect_ties, needs_base=True),
}


def merge(
    sources: Sequence[Source],
    method: str,
    *,
    base: Source | None = None,
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    scale: float = 1.0,
    normalize: bool = True,
    allow_unrelated: bool = False,
) -> MergedSource:
    """Return the merged model as a source, in the base's (else the first model's) dtypes. Nothing is read yet.

    Args:
        sources: the models, in the order that they are summed in.
        method: a key of METHODS.
        base: what all started from. `linear` does not use its values; list it among the models if it should count.
        weights: one a model; all 1 by default.
        density: share of each task vector, tensor by tensor, that ties keeps; above 0, at most 1.
        scale: lambda, factor of the merged task vector.
        normalize: divide by the sum of the weights (ties: of those that agree).
        allow_unrelated: merge models that are known not to stem from the base, too.

    Raises:
        InputError: models that do not fit together, or settings that make no sense: the line names which.
    """
    if method not in METHODS:
        raise InputError(one_of("merge method", method, METHODS))
    if not sources:
        raise InputError("no models to merge: at least one is needed")
    if METHODS[method].needs_base and base is None:
        raise InputError(f"merge method {method} needs a base: the model that all models started from")
    if weights is None:
        weights = [1.0] * len(sources)
    if len(weights) != len(sources):
        raise InputError(f"{len(weights)} weights given for {len(sources)} models: one weight a model is needed")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"weights {list(weights)}: finite numbers are needed")
    if method == "linear" and normalize and abs(sum(weights)) <= 1e-9 * sum(map(abs, weights)):
        raise InputError(f"weights {list(weights)} add up to 0: nothing to divide by; give others or normalize: false")
    if not 0 < density <= 1:
        raise InputError(f"density is {density}: allowed are numbers above 0, up to 1")
    if not math.isfinite(scale):
        raise InputError(f"scale is {scale}: a finite number is needed")
    _check_fit(sources, base)
    return MergedSource(
        sources=tuple(sources),
        base=base,
        method=method,
        weights=tuple(weights),
        density=density,
        scale=scale,
        normalize=normalize,
        notes=() if base is None else _check_descent(sources, base, allow_unrelated),
    )


def _label(source: Source, number: int, base: Source | None) -> str:
    """Name a source in a message: its folder, the name in its provenance, or its place."""
    place = "base" if source is base else f"model {number + 1}"
    name = getattr(source, "folder", None) or source.run.provenance.get("name")
    return f"{place} ({name})" if name else place


def _check_fit(sources: Sequence[Source], base: Source | None) -> None:
    """Check that all models have the tensors, shapes and meaning of the base, or else of the first."""
    like = sources[0] if base is None else base
    reference = _label(like, 0, base)
    for number, source in enumerate(sources):
        who = _label(source, number, base)
        if source.family.name != like.family.name:
            raise InputError(f"{who} is of family {source.family.name}, {reference} of {like.family.name}")
        given, wanted = _meaning(source), _meaning(like)
        for key in [key for key in given if key in wanted and given[key] != wanted[key]]:
            raise InputError(f"{who} has {key} {given[key]}, {reference} has {wanted[key]}: they cannot be merged")
        for name in [*like.infos, *source.infos]:
            if name not in source.infos:
                raise InputError(f"{who} lacks the tensor {name}, which {reference} has")
            if name not in like.infos:
                raise InputError(f"{who} has the tensor {name}, which {reference} lacks")
            mine, theirs = source.infos[name].shape, like.infos[name].shape
            if mine != theirs:
                raise InputError(f"{who}: {name} has shape {mine}, in {reference} it has {theirs}")


def _meaning(source: Source) -> dict[str, Any]:
    """Return the sizes of a model's axes and what its config states of the meaning of its weights."""
    config = source.config
    stated = {key: config[key] for key in SAME if config.get(key) is not None}
    return {**source.family.axes(config), "tie_word_embeddings": source.family.is_tied(config), **stated}


def _check_descent(sources: Sequence[Source], base: Source, allow_unrelated: bool) -> tuple[str, ...]:
    """Refuse models known not to stem from the base; return a note for each of which that is not known."""
    notes = []
    for number, source in enumerate(sources):
        who, origin = _label(source, number, base), _label(base, 0, base)
        stems = stems_from(source.run.provenance, base.run.provenance)
        if stems is None:
            notes.append(f"{who}: not known whether it stems from {origin}")
        elif not stems:
            line = f"{who} does not stem from {origin}"
            if not allow_unrelated:
                raise InputError(f"{line}: merge models of one base, or allow unrelated models")
            notes.append(line)
    return tuple(notes)
