"""What can be known to be wrong with a recipe before any work: by provenance, configs, dtypes and arithmetic."""

from collections.abc import Iterator, Mapping

import torch

from checkpoint.provenance import by_name, stems_from
from checkpoint.source import Source
from merge.recipe import Recipe
from merge.resolve import Resolved
from merge.stack import Order
from merge.table import METHODS
from parallel.errors import InputError

HEAD = "lm_head_normalization_factor"
"""Key of HyperLlama's configs: its forward pass divides the tied head by it; a plain Llama's weights hold that."""


def lint(
    recipe: Recipe, models: Mapping[str, Source], resolved: Resolved, *, allow_unrelated: bool = False
) -> tuple[str, ...]:
    """Return what the user should know, a line each.

    Raises:
        InputError: a model is known not to stem from the base; heads that are scaled in different ways.
    """
    found = [*recipe.warnings, *resolved.unused]
    _check_heads(recipe, models)
    found += _descent(recipe, models, allow_unrelated)
    found += _precision(recipe, models)
    at = recipe.at("merge_method")
    found += [f"{at}: {line}" for line in dict.fromkeys(_reductions(recipe.method, [*resolved.orders.values()]))]
    return tuple(dict.fromkeys(found))


def _descent(recipe: Recipe, models: Mapping[str, Source], allow_unrelated: bool) -> Iterator[str]:
    for part in recipe.slices:
        base = part.base or recipe.base
        if base is None or METHODS[recipe.method].base == "none":
            continue
        for one in part.inputs:
            stems = stems_from(models[one.model].run.provenance, models[base].run.provenance)
            where = f"{recipe.file}:{one.line}"
            if stems is None and one.model != base:
                yield from _names(where, one.model, base, models)
            elif stems is False:
                line = f"{where}: {one.model} does not stem from the base_model {base}"
                if not allow_unrelated:
                    raise InputError(f"{line}: name the model that it was trained from, or pass --allow-unrelated")
                yield line


def _names(where: str, model: str, base: str, models: Mapping[str, Source]) -> Iterator[str]:
    """Yield what names say where no hash tells whether a model stems from the base."""
    record = models[model].run.provenance
    if "trained_from" not in record:
        yield f"{where}: {model}: not known whether it stems from {base}"
    elif start := by_name(record, models[base].run.provenance):
        yield f"{where}: {model} was trained from {start}; nothing says that the base_model {base} is that model"


def _check_heads(recipe: Recipe, models: Mapping[str, Source]) -> None:
    scales = {name: source.config.get(HEAD) for name, source in models.items()}
    if len({*scales.values()}) > 1:
        parts = ", ".join(f"{name} {scale or 'none'}" for name, scale in scales.items())
        line = f"{recipe.file}:{recipe.slices[0].line}"
        raise InputError(f"{line}: the models scale their heads differently ({HEAD}: {parts}): convert them first")


def _precision(recipe: Recipe, models: Mapping[str, Source]) -> Iterator[str]:
    kinds = {dtype for source in models.values() for info in source.infos.values() for dtype in info.slots.values()}
    at = recipe.at("out_dtype" if "out_dtype" in recipe.lines else "dtype")
    if recipe.dtype == "float16" and kinds != {torch.float16}:
        yield f"{at}: float16 loses digits below 6e-5 and ends at 65504; sums are float32 here, but bfloat16 holds them"
    if recipe.dtype == "bfloat16" and torch.float32 in kinds:
        yield f"{at}: models in float32 are rounded to bfloat16"


def _reductions(method: str, orders: list[Order]) -> Iterator[str]:
    """Yield what a method comes to with these parameters."""

    def always(name: str, value: object) -> bool:
        return all(order.shared.get(name) == value for order in orders)

    def of_each(name: str, value: object) -> bool:
        return all(one == value for order in orders for one in order.each.get(name, ()))

    dense = "density" in METHODS[method].parameters and of_each("density", 1.0)
    if method == "task_arithmetic" and always("normalize", True) and always("lambda", 1.0):
        yield "task_arithmetic with normalize and lambda 1 is linear, whatever the base: base + mean(x - base)"
    if method in ("ties", "della", "breadcrumbs_ties", "dare_ties") and dense:
        yield f"{method} at density 1 drops nothing: it only elects signs"
    if method in ("dare_linear", "della_linear", "breadcrumbs") and dense:
        yield f"{method} at density 1 is task_arithmetic"
    if method == "sce" and always("select_topk", 0.0):
        yield "sce with select_topk 0 is the base"
    if method == "nearswap" and always("t", 0.0):
        yield "nearswap with t 0 is the base"
    for t, what in ((0.0, "the base"), (1.0, "the other model")):
        if method == "slerp" and always("t", t):
            yield f"slerp with t {t:g} is {what}"
    alone = ("linear", "multislerp", "karcher", "fisher", "regmean")
    if method in alone and all(len(order.operands) == 1 for order in orders):
        yield f"{method} of one model is that model"
