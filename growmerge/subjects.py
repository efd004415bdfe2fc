"""What is evaluated: checkpoints of any format, and merges that are made in memory alone."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.lora import apply_lora
from checkpoint.open import open_checkpoint
from checkpoint.source import Source
from growmerge.convert import fingerprint, record_of
from growmerge.merging import Models, apply_file, tokenizer_folder
from growmerge.places import folder_of, parts_of
from growmerge.sweeping import applied_group
from merge.apply import Applied
from merge.sweep import read_sweep
from parallel.errors import InputError
from train.data.tokenizer import TextTokenizer, load_tokenizer

RECIPES = (".yml", ".yaml")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate."""

    name: str
    source: Source
    key: str
    """A hash of what it is: of a checkpoint's files, of a merge's recipe and models."""
    tokenizer: Callable[[], TextTokenizer]
    record: Mapping[str, Any]
    """Where it comes from: the checkpoint's provenance, or the merge's recipe."""
    notes: Sequence[str] = ()
    """What its user should know of it."""


def subjects(models: Mapping[str, str], sweep: str | None, file: Path) -> Iterator[Subject]:
    """Open what a file names, in its order.

    Args:
        file: from whose folder paths start.

    Raises:
        InputError: a model cannot be opened, two have one name; the line names it.
    """
    for name, place in models.items():
        try:
            recipe = file.parent / place
            merged = recipe.suffix in RECIPES and recipe.is_file()
            yield _merge(name, *_applied(recipe)) if merged else checkpoint(name, _folders(place, file))
        except InputError as error:
            raise InputError(f"{file}: models.{name}: {error}") from error
    if sweep is None:
        return
    spec = read_sweep(file.parent / sweep)
    for group in spec.groups:
        applied, opened = applied_group(spec, group, spec.seed or 0, allow_unrelated=False, device="cpu")
        for one in group:
            if one.name in models:
                raise InputError(f"{file}: a model and a merge of {sweep} are both called {one.name!r}")
            yield _merge(one.name, applied[one.name], opened)


def _applied(recipe: Path) -> tuple[Applied, Models]:
    applied, models = apply_file(recipe)
    if applied.recipe.search is not None:
        raise InputError(f"{recipe}: a search is made by `growmerge merge`, which leaves a plain recipe of its outcome")
    return applied, models


def _merge(name: str, applied: Applied, models: Models) -> Subject:
    folders = [folder for one in applied.recipe.models for folder in models.folders[one]]
    about = dict(applied.merged.recipe)
    parts = (about, [fingerprint(folder) for folder in (*folders, *models.statistics)])
    return Subject(
        name=name,
        source=applied.merged,
        key=hashlib.sha256(repr(parts).encode()).hexdigest(),
        tokenizer=replace(models, recipe=applied.recipe).made_tokenizer,
        record={"verb": "merge", "recipe": about, "models": list(applied.recipe.models)},
        notes=applied.merged.notes,
    )


def _folders(place: str, file: Path) -> list[Path]:
    return [folder_of(file, part) for part in parts_of(file, place)]


def checkpoint(name: str, folders: Sequence[Path]) -> Subject:
    """Open a checkpoint's folder of any format, and further ones of adapters that are applied to it.

    Raises:
        InputError: one cannot be opened, or an adapter is of another model.
    """
    source = open_checkpoint(folders[0])
    for adapter in folders[1:]:
        source = apply_lora(source, adapter)
    return Subject(
        name=name,
        source=source,
        key=hashlib.sha256(repr([fingerprint(folder) for folder in folders]).encode()).hexdigest(),
        tokenizer=lambda: load_tokenizer(tokenizer_folder(folders[0])),
        record=record_of(folders[0]),
    )
