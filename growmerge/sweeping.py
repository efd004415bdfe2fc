"""`growmerge sweep`: all merges of a spec, those of one group in one pass over their models."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint.files import write_bytes, write_json
from checkpoint.layout import Layout
from checkpoint.writer import Output, write_checkpoints
from growmerge.convert import Target, held, planned
from growmerge.merging import Models, checked_device, different_words, written_of
from growmerge.places import is_folder, parts_of
from merge.apply import Applied, apply_recipe
from merge.reads import Reads
from merge.recipe import Recipe
from merge.recipe_files import parse_recipe
from merge.sweep import Merge, Sweep, read_sweep
from merge.table import METHODS
from parallel.errors import InputError

AT_ONCE = 200
"""Merges that are written side by side at most: each has a file open."""
INDEX = "sweep.json"


def sweep_file(
    path: Path,
    target: Target,
    *,
    seed: int | None,
    allow_unrelated: bool,
    device: str,
    recipes_only: bool,
    dry_run: bool,
) -> Iterator[str]:
    """Do what a spec asks for; yield what is said of it.

    Args:
        target: how the models are written; its folder is the folder of all of them.
        seed: instead of the spec's.
        device: where values are merged, as torch names it.
        recipes_only: write each one's recipe instead of the model.

    Raises:
        InputError: anything wrong with the spec, its models or the place.
    """
    sweep = read_sweep(path)
    seed = sweep.seed or 0 if seed is None else seed
    for group in sweep.groups:
        applied, models = applied_group(sweep, group, seed, allow_unrelated=allow_unrelated, device=device)
        yield from dict.fromkeys(note for one in applied.values() for note in _notes(one))
        yield from (f"note: {sweep.file}: {note}" for note in different_words(models))
        if dry_run:
            yield from (_told(merge) for merge in group)
        elif recipes_only or not sweep.materialize:
            for merge in group:
                text = replace(merge, seed=seed).recipe(_from_there(models, target.folder))
                write_bytes(target.folder / f"{merge.name}.yml", text.encode())
        else:
            with held(target.folder, "growmerge sweep"):
                yield from _write(applied, models, target)
    count = f"{len(sweep.merges)} merges"
    if not dry_run:
        write_json(target.folder / INDEX, [_entry(merge, seed) for merge in sweep.merges])
    yield count if dry_run else f"{target.folder}: {count}"


def applied_group(
    sweep: Sweep, group: Sequence[Merge], seed: int, *, allow_unrelated: bool, device: str
) -> tuple[dict[str, Applied], Models]:
    """Open what a group shares, once, and apply each recipe to it."""
    # Subset after subset as in a dictionary: each goes on from sums of its first models, which the last one had too.
    places = {name: place for place, name in enumerate(dict.fromkeys(name for merge in group for name in merge.models))}
    in_order = sorted(group, key=lambda one: (one.method, str(one.parameters), [places[name] for name in one.models]))
    recipes = {one.name: parse_recipe(one.recipe(), sweep.file.parent / f"{one.name}.yml") for one in in_order}
    models = Models(file=sweep.file, recipe=next(iter(recipes.values())))
    opened = {}
    for name in dict.fromkeys(name for recipe in recipes.values() for name in recipe.models):
        try:
            opened[name] = models.open(name)
        except InputError as error:
            raise InputError(f"{sweep.file}: {name}: {error}") from error
    labels = [*opened]
    merged = {one.model for recipe in recipes.values() for part in recipe.slices for one in part.inputs}
    together = [number for number, name in enumerate(labels) if name in merged]
    reads = Reads([*opened.values()], labels, together, checked_device(device))
    applied = {}
    for name, recipe in recipes.items():
        try:
            applied[name] = apply_recipe(
                recipe, opened.__getitem__, seed=seed, allow_unrelated=allow_unrelated, reads=reads
            )
        except InputError as error:
            raise InputError(f"{sweep.file}: {name}: {_without_place(str(error), recipe)}") from error
    return applied, models


def _write(applied: Mapping[str, Applied], models: Models, target: Target) -> Iterator[str]:
    """Write what is not there, as many at once as files may be open; those that hold whole matrices one by one."""
    groups: dict[tuple[str, ...], list[tuple[Output, Layout]]] = {}
    for name, one in applied.items():
        own = replace(target, folder=target.folder / name)
        output, layout = planned(one.merged, own, **written_of(one, models, own, {}))
        if output is not None:
            alone = name if METHODS[one.merged.method].whole_matrix else ""
            tensors = [(name, info.shape, info.slots.get("weight")) for name, info in one.merged.infos.items()]
            groups.setdefault((alone, repr(layout), repr(tensors)), []).append((output, layout))
    count = sum(map(len, groups.values()))
    if count < len(applied):
        yield f"{len(applied) - count} of {len(applied)} are there and whole"
    for outputs in groups.values():
        for start in range(0, len(outputs), AT_ONCE):
            part = outputs[start : start + AT_ONCE]
            write_checkpoints([output for output, _ in part], part[0][1], workers=target.processes)


def _notes(one: Applied) -> list[str]:
    return [f"note: {_without_place(note, one.recipe)}" for note in one.merged.notes]


def _without_place(line: str, recipe: Recipe) -> str:
    """Return a message without the line of a recipe that nobody has written."""
    place, _, rest = line.removeprefix(f"{recipe.file}:").partition(": ")
    return rest if place.isdigit() else line


def _from_there(models: Models, folder: Path) -> Callable[[str], str]:
    """Return how a model is found from a folder."""

    def place(name: str) -> str:
        places = zip(parts_of(models.file, name), models.folders[name], strict=True)
        # What is on the Hub, or anywhere by its whole path, is found from everywhere.
        return "+".join(
            part if Path(part).is_absolute() or not is_folder(models.file, part) else os.path.relpath(place, folder)
            for part, place in places
        )

    return place


def _told(merge: Merge) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in merge.parameters.items())
    return f"{merge.name}: {merge.method} of {', '.join(merge.models)}" + (f" ({parameters})" if parameters else "")


def _entry(merge: Merge, seed: int) -> dict[str, Any]:
    about = {"name": merge.name, "method": merge.method, "models": list(merge.models), "seed": seed}
    return {**about, "parameters": dict(merge.parameters), **merge.group}
