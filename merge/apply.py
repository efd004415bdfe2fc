"""A recipe applied to models: the merged model as a source, and what the user should know of it before any work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.source import Source
from merge.averaging import with_checkpoints
from merge.inform import Place, inform
from merge.lint import lint
from merge.merge import DOUBTFUL, MergedSource, check_meaning
from merge.reads import Reads
from merge.recipe import Recipe
from merge.resolve import resolve
from parallel.errors import InputError

OpenModel = Callable[[str], Source]
"""From a model as a recipe names it to its source."""

Align = Callable[[Mapping[str, Source]], Mapping[str, Source]]
"""From all models to the same ones over one vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A recipe and the models that it names."""

    merged: MergedSource
    models: Mapping[str, Source]
    """As they were opened, by what the recipe calls them."""
    recipe: Recipe
    """With the checkpoints of runs as models of their own."""


def apply_recipe(
    recipe: Recipe,
    open_model: OpenModel,
    *,
    align: Align | None = None,
    place: Place = Path,
    seed: int = 0,
    device: str = "cpu",
    allow_unrelated: bool = False,
    reads: Reads | None = None,
) -> Applied:
    """Return the merged model. No tensor is read yet.

    Args:
        reads: models that several merges share, by what the recipes call them; instead of a reading of its own.
        place: from a folder that the recipe names, of statistics or of a training run, to where it lies.
        seed: of methods that draw random numbers.
        device: where values are merged, as torch names it.
        allow_unrelated: merge models that are known not to stem from the base, too.

    Raises:
        InputError: models or settings that do not fit, each with its line in the recipe.
    """
    recipe = with_checkpoints(recipe, place)
    models = {}
    for name in recipe.models:
        try:
            models[name] = open_model(name)
        except InputError as error:
            raise InputError(f"{recipe.file}:{recipe.line_of(name)}: {name}: {error}") from error
    opened, models = [*models.values()], dict(align(models)) if align else models
    sources = [*models.values()]
    first = recipe.models[0]
    for name, source in models.items():
        try:
            but = ("tie_word_embeddings", *(DOUBTFUL if allow_unrelated else ()))
            check_meaning(name, source, first, models[first], but=but)
        except InputError as error:
            raise InputError(f"{recipe.file}:{recipe.line_of(name)}: {error}") from error
    reads = Reads(sources, [*models], device=device) if reads is None else reads
    numbers = {name: reads.labels.index(name) for name in models}
    sources = [*reads.sources]
    resolved = resolve(recipe, numbers, sources)
    notes = lint(recipe, models, resolved, allow_unrelated=allow_unrelated)
    informed = inform(
        recipe.method,
        resolved.orders,
        sources,
        models=opened,
        place=place,
        at=lambda number: f"{recipe.file}:{_line_of_statistics(recipe, [*models][number])}: ",
    )
    return Applied(
        merged=MergedSource(
            reads=reads.with_more(informed.fishers, informed.labels),
            method=recipe.method,
            orders=informed.orders,
            config=resolved.config,
            like=models[first],
            recipe={"method": recipe.method, "seed": seed, "text": recipe.text},
            parents=tuple(numbers.values()),
            seed=seed,
            dtype=getattr(torch, recipe.dtype) if recipe.dtype else None,
            notes=(*notes, *informed.notes),
        ),
        models=models,
        recipe=recipe,
    )


def _line_of_statistics(recipe: Recipe, model: str) -> int:
    inputs = [one for part in recipe.slices for one in part.inputs if one.model == model]
    given = [one.parameters[key] for one in inputs for key in ("fisher", "gram") if key in one.parameters]
    return given[0].line if given else inputs[0].line if inputs else recipe.lines.get("base_model", 1)
