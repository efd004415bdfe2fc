"""Where the models and files that a YAML file names are: beside it, in the current folder or on the Hub."""

import glob
from pathlib import Path

from growmerge import hub
from parallel.errors import InputError

NOWHERE = "no such folder, neither beside the recipe nor here"


def is_folder(recipe: Path, name: str) -> bool:
    """Whether a name is a folder, beside the recipe or here."""
    return any((base / name).is_dir() for base in (recipe.parent, Path()))


def parts_of(recipe: Path, name: str) -> list[str]:
    """Return the model that a name stands for, and its adapter if it has one; a folder's own name may hold a +."""
    model, _, adapter = (name, "", "") if is_folder(recipe, name) else name.partition("+")
    return [model, adapter] if adapter else [model]


def folder_of(recipe: Path, name: str, *, download: bool = False) -> Path:
    """Return the folder of a model or adapter.

    Args:
        download: fetch what is missing of it from the Hub, instead of looking into the cache alone.

    Raises:
        InputError: there is none, or the Hub's is not in the cache.
    """
    for base in (recipe.parent, Path()):
        if (base / name).is_dir():
            return base / name
    named = name if name.startswith(hub.PREFIX) else hub.PREFIX + name
    if not hub.NAME.fullmatch(named):
        raise InputError(NOWHERE)
    try:
        return hub.fetch(named) if download else hub.place(recipe.parent, named, recipe)
    except InputError as error:
        raise InputError(f"{NOWHERE}; {error}") from error


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
