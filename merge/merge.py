"""Merging as a source: any box of the merged model, made from the same box of every model.

Models are read box by box, all together, and computed in float32; nothing is ever held whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.memory import infos_of
from checkpoint.provenance import descend, stems_from
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, Source, WithoutState, row_major_tiles
from merge.boxes import RUNNERS
from merge.inform import Place, inform
from merge.reads import Operand, Reads, all_finite
from merge.settings import check_count, settings_of
from merge.stack import Order, Stack, Stats
from merge.sums import merged_of
from merge.table import METHODS
from parallel.errors import InputError, one_of
from parallel.family import Family
from parallel.rows import Kind

EXPERTS = ("num_experts_per_tok", "norm_topk_prob")
SAME = (
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "rope_parameters",
    *EXPERTS,
)
"""Further keys of the config that change what weights mean; models that state one differently are not merged."""

DOUBTFUL = SAME[1:]
"""Those with which a merge can be made, whatever it is good for."""


@dataclass(frozen=True, kw_only=True)
class MergedSource:
    """Models, and how each tensor is merged from theirs; made by `merge` or by `merge.apply.apply_recipe`."""

    reads: Reads
    method: str
    orders: Mapping[str, Order]
    """How each tensor is made, by its name; without aliases."""
    config: Mapping[str, Any]
    """Of the merged model."""
    like: Source
    """What dtypes and groups are taken from: the base, or else the first model."""
    recipe: Mapping[str, Any]
    """What was asked for, as provenance says it."""
    parents: tuple[int, ...]
    """Numbers of the models that it comes from, the base last."""
    seed: int = 0
    """Of methods that draw random numbers."""
    dtype: torch.dtype | None = None
    """Of all tensors; by default each has that of the tensors that it is made from."""
    notes: tuple[str, ...] = ()
    """What the user should know, a line each."""

    @property
    def family(self) -> Family:
        return self.like.family

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, info in infos_of(self.config, torch.float32).items():
            if info.tied_to is None:
                order = self.orders[name]
                first = order.base or order.operands[0]
                theirs = self.like.infos.get(name)
                if theirs is None or theirs.tied_to is not None:
                    theirs = self.reads.sources[first.model].infos[first.name]
                dtype = self.dtype or theirs.slots["weight"]
                info = replace(info, slots={"weight": dtype}, group=theirs.group, trainable=theirs.trainable)
            infos[name] = info
        return infos

    @property
    def one_process(self) -> bool:
        """Whether those that read it should be threads of one process: whole matrices, and a GPU, are there once."""
        return METHODS[self.method].whole_matrix or self.reads.device.type != "cpu"

    @property
    def groups(self) -> Mapping[str, Group]:
        return WithoutState(self.like).groups

    @property
    def run(self) -> RunState:
        parents = descend([self.reads.sources[number].run.provenance for number in self.parents])
        return RunState(provenance={"verb": "merge", "recipe": self.recipe, **parents})

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Stats:
        order = self.orders[name]
        operands = [*order.operands, *([order.base] if order.base else []), *order.fishers]
        operands += self.reads.everyone(name)
        inner = self.reads.once_a_tensor(
            name, ("inner", *operands), lambda: {one: self.reads.collect(name, one, spread) for one in operands}
        )
        runner = RUNNERS[self.method]
        stack = Stack(
            name=name,
            kind=self._kinds[name],
            shape=self.infos[name].shape,
            order=order,
            reads=self.reads,
            inner=inner,
            seed=self.seed,
            check=runner.drops(order),
        )
        known = runner.collect and runner.collect(stack, spread)
        if stack.check and runner.finite(known):
            stack = replace(stack, check=False)
        return Stats(stack=stack, method=known, summed=runner.summed(stack, known))

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        self.read_together([self], name, box, {slot: one[None] for slot, one in out.items()}, [stats])

    @staticmethod
    @torch.no_grad()
    def read_together(
        sources: "Sequence[MergedSource]",
        name: str,
        box: Box,
        outs: Mapping[Slot, torch.Tensor],
        stats: Sequence[Stats],
    ) -> None:
        """Read a box of several, which goes on from sums that they share (`checkpoint.source.read_together`)."""
        rounded = outs["weight"]
        rows = [*zip(rounded.unbind(), stats, strict=True)]
        sums = [(row, one.summed) for row, one in rows if one.summed is not None]
        for (row, _), merged in zip(sums, merged_of([one for _, one in sums], box), strict=True):
            row.copy_(merged)
        for source, (row, one) in zip(sources, rows, strict=True):
            merge = RUNNERS[source.method].merge
            if one.summed is None and merge is not None:
                row.copy_(merge(one.stack, box, one.method))
        for row, one in rows if not all_finite(rounded) else ():
            if not all_finite(row):
                one.stack.look_at([box])  # is it one of theirs?
                raise InputError(f"{name}: a merged value is too large for {str(row.dtype).removeprefix('torch.')}")

    @cached_property
    def _kinds(self) -> Mapping[str, Kind]:
        return {name: tensor.kind for name, tensor in self.family.tensors(self.config).items()}


def merge(
    sources: Sequence[Source],
    method: str,
    *,
    base: Source | None = None,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    allow_unrelated: bool = False,
    place: Place = Path,
) -> MergedSource:
    """Return the merged model as a source, in the base's (else the first model's) dtypes. Nothing is read yet.

    Args:
        sources: the models, in the order that they are summed in.
        method: a key of METHODS.
        base: what all started from. Methods without a base do not use its values; list it if it should count.
        weights: one a model; all 1 by default.
        parameters: the method's others by name; a sequence for those that each model has of its own, such as the
            folders of its statistics.
        names: of the models, for messages and as keys of random numbers; by default their folders or places.
        seed: of methods that draw random numbers.
        allow_unrelated: merge models that are known not to stem from the base, too.
        place: from a folder that is among the parameters to where it lies.

    Raises:
        InputError: models that do not fit together, or settings that make no sense: the line names which.
    """
    if method not in METHODS:
        raise InputError(one_of("merge method", method, METHODS))
    if not sources:
        raise InputError("no models to merge: at least one is needed")
    takes = METHODS[method]
    if takes.base == "needed" and base is None:
        raise InputError(f"merge method {method} needs a base: the model that all models started from")
    check_count(method, len(sources))
    if weights is not None and len(weights) != len(sources):
        raise InputError(f"{len(weights)} weights given for {len(sources)} models: one weight a model is needed")
    labels = [label(source, number, names) for number, source in enumerate(sources)]
    given = dict(parameters or {})
    if weights is not None and "weight" not in takes.parameters:
        raise InputError(f"merge method {method} takes no weights")
    if weights is not None and "weight" in given:
        raise InputError("weights are given twice: as weights and among the parameters")
    if "weight" in takes.parameters:
        given.setdefault("weight", [1.0] * len(sources) if weights is None else list(weights))
    settings = settings_of(method, given, labels)
    check_fit(sources, labels, base, but=DOUBTFUL if allow_unrelated else ())
    like = sources[0] if base is None else base
    counted = base is not None and takes.base != "none"
    everything = [*sources, *([base] if base is not None else [])]
    orders = {
        name: Order(
            operands=tuple(Operand(model=number, name=name) for number in range(len(sources))),
            base=Operand(model=len(sources), name=name) if counted else None,
            **settings,
        )
        for name, info in like.infos.items()
        if info.tied_to is None
    }
    informed = inform(method, orders, everything, place=place)
    names_of = [*labels, *([label(base, None)] if base is not None else []), *informed.labels]
    return MergedSource(
        reads=Reads([*everything, *informed.fishers], names_of),
        method=method,
        orders=informed.orders,
        config=like.config,
        like=like,
        recipe={"method": method, "seed": seed, **{name: given[name] for name in sorted(given)}},
        parents=tuple(range(len(everything))),
        seed=seed,
        notes=(*informed.notes, *(() if base is None else descent(sources, labels, base, allow_unrelated))),
    )


def label(source: Source, number: int | None, names: Sequence[str] | None = None) -> str:
    """Name a source in a message: as given, by its folder, the name in its provenance, or its place."""
    if names is not None and number is not None:
        return names[number]
    place = "base" if number is None else f"model {number + 1}"
    name = getattr(source, "folder", None) or source.run.provenance.get("name")
    return f"{place} ({name})" if name else place


def check_fit(
    sources: Sequence[Source], labels: Sequence[str], base: Source | None, *, but: Sequence[str] = ()
) -> None:
    """Check that all models have the tensors, shapes and meaning of the base, or else of the first."""
    like = sources[0] if base is None else base
    reference = labels[0] if base is None else label(base, None)
    for who, source in zip(labels, sources, strict=True):
        check_meaning(who, source, reference, like, but=but)
        for name in [*like.infos, *source.infos]:
            if name not in source.infos:
                raise InputError(f"{who} lacks the tensor {name}, which {reference} has")
            if name not in like.infos:
                raise InputError(f"{who} has the tensor {name}, which {reference} lacks")
            mine, theirs = source.infos[name].shape, like.infos[name].shape
            if mine != theirs:
                raise InputError(f"{who}: {name} has shape {mine}, in {reference} it has {theirs}")


def check_meaning(who: str, source: Source, reference: str, like: Source, *, but: Sequence[str] = ()) -> None:
    """Check that a model's weights mean what those of another one do, but for some keys."""
    if source.family.name != like.family.name:
        raise InputError(f"{who} is of family {source.family.name}, {reference} of {like.family.name}")
    given, wanted = _meaning(source), _meaning(like)
    for key in [key for key in given if key not in but and key in wanted and given[key] != wanted[key]]:
        what = "--allow-unrelated merges them all the same" if key in DOUBTFUL else "they cannot be merged"
        raise InputError(f"{who} has {key} {given[key]}, {reference} has {wanted[key]}: {what}")


def _meaning(source: Source) -> dict[str, Any]:
    """Return the sizes of a model's axes and what its config states of the meaning of its weights."""
    config = source.config
    stated = {key: config[key] for key in SAME if config.get(key) is not None}
    return {**source.family.axes(config), "tie_word_embeddings": source.family.is_tied(config), **stated}


def descent(sources: Sequence[Source], labels: Sequence[str], base: Source, allow_unrelated: bool) -> tuple[str, ...]:
    """Refuse models known not to stem from the base; return a note for each of which that is not known."""
    notes = []
    origin = label(base, None)
    for who, source in zip(labels, sources, strict=True):
        stems = stems_from(source.run.provenance, base.run.provenance)
        if stems is None:
            notes.append(f"{who}: not known whether it stems from {origin}")
        elif not stems:
            line = f"{who} does not stem from {origin}"
            if not allow_unrelated:
                raise InputError(f"{line}: merge models of one base, or allow unrelated models")
            notes.append(line)
    return tuple(notes)
