"""Where the models and files that a YAML file names are: beside it, in the current folder or on the Hub."""

import glob
from pathlib import Path, PurePath

from growmerge import hub
from parallel.errors import InputError

NOWHERE = "no such folder, neither beside the recipe nor here"


def is_folder(recipe: Path, name: str, models: Path | None = None) -> bool:
    """Whether a name is a folder: in the folder of models, beside the recipe or here."""
    return _found(recipe, name, models) is not None


def parts_of(recipe: Path, name: str, models: Path | None = None) -> list[str]:
    """Return the model that a name stands for, and its adapter if it has one; a folder's own name may hold a +."""
    model, _, adapter = (name, "", "") if is_folder(recipe, name, models) else name.partition("+")
    return [model, adapter] if adapter else [model]


def folder_of(recipe: Path, name: str, models: Path | None = None, *, download: bool = False) -> Path:
    """Return the folder of a model or adapter.

    Args:
        models: a folder that has models under the names that files give them, or under these names' last parts.
        download: fetch what is missing of it from the Hub, instead of looking into the cache alone.

    Raises:
        InputError: there is none, or the Hub's is not in the cache.
    """
    found = _found(recipe, name, models)
    if found is not None:
        return found
    nowhere = NOWHERE if models is None else f"no such folder, neither in {models} nor beside the recipe nor here"
    named = name if name.startswith(hub.PREFIX) else hub.PREFIX + name
    if not hub.NAME.fullmatch(named):
        raise InputError(nowhere)
    try:
        return hub.fetch(named) if download else hub.place(recipe.parent, named, recipe)
    except InputError as error:
        raise InputError(f"{nowhere}; {error}") from error


def _found(recipe: Path, name: str, models: Path | None) -> Path | None:
    places = [recipe.parent / name, Path(name)]
    plain = PurePath(name.removeprefix(hub.PREFIX))
    # A path that begins with / or . means the file's own place; of no other name does a part leave the folder.
    if models is not None and not plain.is_absolute() and not name.startswith(".") and ".." not in plain.parts:
        places = [models / plain, models / plain.name, *places]
    return next((place for place in places if place.is_dir()), None)


def files_of(patterns: str | tuple[str, ...], base: Path) -> list[Path]:
    """Return the files that globs stand for, sorted, each once.

    Raises:
        InputError: a glob that no file matches.
    """
    found: dict[Path, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        names = sorted(glob.glob(pattern, root_dir=base, recursive=True))  # noqa: PTH207 (it may be absolute)
        matched = [base / name for name in names if (base / name).is_file()]
        if not matched:
            raise InputError(f"{pattern}: no such file in {base}")
        found |= dict.fromkeys(matched)
    return [*found]
