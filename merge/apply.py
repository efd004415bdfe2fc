"""A recipe applied to models: the merged model as a source, and what the user should know of it before any work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from checkpoint.source import Source
from merge.lint import lint
from merge.merge import MergedSource, check_meaning
from merge.reads import Reads
from merge.recipe import Recipe
from merge.resolve import resolve
from parallel.errors import InputError

OpenModel = Callable[[str], Source]
"""From a model as a recipe names it to its source."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A recipe and the models that it names."""

    merged: MergedSource
    models: Mapping[str, Source]
    """As they were opened, by what the recipe calls them."""


def apply_recipe(recipe: Recipe, open_model: OpenModel, *, seed: int = 0, allow_unrelated: bool = False) -> Applied:
    """Return the merged model. No tensor is read yet.

    Args:
        seed: of methods that draw random numbers.
        allow_unrelated: merge models that are known not to stem from the base, too.

    Raises:
        InputError: models or settings that do not fit, each with its line in the recipe.
    """
    lines = {one.model: one.line for part in recipe.slices for one in reversed(part.inputs)}
    models = {}
    for name in recipe.models:
        line = lines.get(name, recipe.lines.get("base_model", 1))
        try:
            models[name] = open_model(name)
        except InputError as error:
            raise InputError(f"{recipe.file}:{line}: {name}: {error}") from error
    sources = [*models.values()]
    first = recipe.models[0]
    for name, source in models.items():
        try:
            check_meaning(name, source, first, models[first], but=("tie_word_embeddings",))
        except InputError as error:
            raise InputError(f"{recipe.file}:{lines.get(name, 1)}: {error}") from error
    resolved = resolve(recipe, {name: number for number, name in enumerate(models)}, sources)
    notes = lint(recipe, models, resolved, allow_unrelated=allow_unrelated)
    return Applied(
        merged=MergedSource(
            reads=Reads(sources, [*models]),
            method=recipe.method,
            orders=resolved.orders,
            config=resolved.config,
            like=models[first],
            recipe={"method": recipe.method, "seed": seed, "text": recipe.text},
            parents=tuple(range(len(sources))),
            seed=seed,
            dtype=getattr(torch, recipe.dtype) if recipe.dtype else None,
            notes=notes,
        ),
        models=models,
    )
