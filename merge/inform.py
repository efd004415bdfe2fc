"""Statistics that a method goes by: the folders that its parameters name, opened, and checked to be the models' own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.open import open_checkpoint
from checkpoint.source import Source
from merge.reads import Operand
from merge.stack import Order
from merge.statistics_files import check_model
from merge.table import statistic_of
from parallel.errors import InputError

Place = Callable[[str], Path]
"""From a folder as parameters or a recipe name it to where it lies."""


@dataclass(frozen=True, kw_only=True)
class Informed:
    """Orders with what they need of the statistics."""

    orders: Mapping[str, Order]
    fishers: tuple[Source, ...] = ()
    """To be read behind the models: operands of `Order.fishers` count from there."""
    labels: tuple[str, ...] = ()
    """What messages call them."""
    notes: tuple[str, ...] = ()


def inform(
    method: str,
    orders: Mapping[str, Order],
    sources: Sequence[Source],
    *,
    models: Sequence[Source] | None = None,
    place: Place = Path,
    at: Callable[[int], str] = lambda number: "",
) -> Informed:
    """Open the statistics of each model that a method goes by; nothing but headers and parts of the models is read.

    Args:
        sources: what is merged.
        models: the same before their vocabularies were aligned: what the statistics are of.
        at: what a message about a model's statistics begins with.

    Raises:
        InputError: a folder that cannot be opened, is incomplete or damaged, of another model, or lacks a tensor.
    """
    key = statistic_of(method)
    if key is None:
        return Informed(orders=orders)
    models = models or sources
    pairs = [pair for order in orders.values() for pair in zip(order.operands, order.each[key], strict=True)]
    found: dict[tuple[int, str], Any] = {}
    for number, folder in dict.fromkeys((operand.model, folder) for operand, folder in pairs):
        try:
            found[number, folder] = (_fisher if key == "fisher" else _gram)(_placed(place, folder), models[number])
        except InputError as error:
            raise InputError(f"{at(number)}{error}") from None
    if key == "gram":
        return _with_grams(orders, models, found, at)
    return _with_fishers(orders, sources, found, at)


def _placed(place: Place, folder: str) -> Path:
    try:
        return place(folder)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _fisher(folder: Path, model: Source) -> Source:
    found = open_checkpoint(folder)
    said = found.run.provenance
    if said.get("verb") != "stats fisher":
        raise InputError(f"{folder}: is no diagonal Fisher: `growmerge stats fisher` writes one")
    check_model(folder, said["statistic"]["model"], model)
    for name, info in model.infos.items():
        if info.tied_to is None:
            if name not in found.infos:
                raise InputError(f"{folder}: lacks the tensor {name}")
            if found.infos[name].shape != info.shape:
                raise InputError(f"{folder}: {name} has shape {found.infos[name].shape}, the model's is {info.shape}")
    return found


def _gram(folder: Path, model: Source) -> Any:
    from merge.gram import open_gram  # transformers, which it imports, takes seconds

    return open_gram(folder, model)


def _with_fishers(
    orders: Mapping[str, Order],
    sources: Sequence[Source],
    found: Mapping[tuple[int, str], Source],
    at: Callable[[int], str],
) -> Informed:
    place = {which: len(sources) + number for number, which in enumerate(found)}
    changed = {}
    for name, order in orders.items():
        operands = []
        for operand, folder in zip(order.operands, order.each["fisher"], strict=True):
            if operand.name in getattr(sources[operand.model], "changed", ()):  # merge.vocabulary.AlignedSource
                raise InputError(
                    f"{at(operand.model)}{folder}: rows of {operand.name} are other tokens' than in the merged model: "
                    "a merge by Fisher needs models of one vocabulary, without tokenizer_source"
                )
            operands.append(Operand(model=place[operand.model, folder], name=operand.name))
        changed[name] = replace(order, fishers=tuple(operands))
    return Informed(orders=changed, fishers=tuple(found.values()), labels=tuple(folder for _, folder in found))


def _with_grams(
    orders: Mapping[str, Order],
    models: Sequence[Source],
    found: Mapping[tuple[int, str], Any],
    at: Callable[[int], str],
) -> Informed:
    """Give each linear layer's weight its Gram matrices: the family's matrices, and a head where all have their own."""
    tensors = [model.family.tensors(model.config) for model in models]
    changed, widest = {}, dict.fromkeys(found, 0)
    for name, order in orders.items():
        grams = []
        for operand, folder in zip(order.operands, order.each["gram"], strict=True):
            which = operand.model, folder
            gram, tensor = found[which], tensors[operand.model][operand.name]
            if operand.name in gram.weights:
                shape, inputs = gram.stored[gram.weights[operand.name]].shape, tensor.shape[-1]
                if shape[0] != inputs:
                    line = f"the Gram matrix of {operand.name} has shape {shape}, the weight has {inputs} inputs"
                    raise InputError(f"{at(operand.model)}{gram.folder}: {line}")
                widest[which] = max(widest[which], inputs)
                grams.append(gram)
            elif tensor.kind == "matrix":
                raise InputError(f"{at(operand.model)}{gram.folder}: holds no Gram matrix for {operand.name}")
        whole = len(grams) == len(order.operands)
        changed[name] = replace(order, grams=tuple(grams) if whole else ())
    notes = [
        f"{at(number)}{gram.folder}: {gram.tokens} tokens for {widest[number, folder]} inputs of a layer: "
        "directions that none of them has are decided by the diagonals"
        for (number, folder), gram in found.items()
        if gram.tokens < widest[number, folder]
    ]
    return Informed(orders=changed, notes=tuple(notes))
