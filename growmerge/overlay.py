"""Pipeline files laid over one another: `extends: other.yaml` and, chosen by `--scale`, the keys under `scales`.

    extends: study.yaml              # all of that file, but for what stands here
    training: {lr: 3.0e-4}
    scales:
      tiny:                          # growmerge run FILE --scale tiny: all of this file, but for what stands here
        model: {hidden_size: 64}

Mappings are laid over one another key by key; anything else, a list too, takes the place of what was there.
"""

from dataclasses import replace
from pathlib import Path

from parallel.document import Item, read_document
from parallel.errors import InputError, one_of

EXTENDS = "extends"
SCALES = "scales"
NAME = "name"


def read_layers(path: Path, scale: str | None = None) -> Item:
    """Read a pipeline file, what it extends below it and a scale of it above.

    A scale that gives no `name` adds its own to that of the file, so that its run has a folder of its own. Paths in all
    of them are relative to `path`'s folder.

    Raises:
        InputError: a file cannot be read or extends itself; there is no such scale.
    """
    root = _extended(path, ())
    keys = dict(_keys(root))
    scales = keys.pop(SCALES, None)
    whole = replace(root, value=keys)
    if scale is None:
        return whole
    if scales is None or not isinstance(scales.value, dict) or scale not in scales.value:
        known = scales.value if scales is not None and isinstance(scales.value, dict) else {}
        if not known:
            raise InputError(f"{path}: has no {SCALES}, so no --scale {scale}")
        raise InputError(f"{path}: {one_of('scale', scale, known)}")
    above = scales.value[scale]
    if not isinstance(above.value, dict):
        raise InputError(f"{above.place}: {SCALES}.{scale}: {above.given} is given; allowed is a mapping")
    found = dict(_keys(laid_over(whole, above)))
    if NAME not in above.value and NAME in found and isinstance(found[NAME].value, str):
        found[NAME] = replace(found[NAME], value=f"{found[NAME].value}-{scale}")
    return replace(whole, value=found)


def laid_over(below: Item, above: Item) -> Item:
    """Return a value with another one over it."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    both = {name: laid_over(below.value[name], part) if name in below.value else part for name, part in _keys(above)}
    return replace(above, value={**below.value, **both})


def _extended(path: Path, above: tuple[Path, ...]) -> Item:
    if path.resolve() in above:
        raise InputError(f"{path}: extends itself, by way of {', '.join(other.name for other in above)}")
    root = read_document(path)
    keys = dict(_keys(root))
    other = keys.pop(EXTENDS, None)
    if other is None:
        return root
    if not isinstance(other.value, str) or other.tag != "str":
        raise InputError(f"{other.place}: {EXTENDS}: {other.given} is given; allowed is a file, relative to this one")
    below = path.parent / other.value
    if not below.is_file():
        raise InputError(f"{other.place}: {EXTENDS}: {below}: no such file")
    return laid_over(_extended(below, (*above, path.resolve())), replace(root, value=keys))


def _keys(item: Item) -> list[tuple[str, Item]]:
    return list(item.value.items()) if isinstance(item.value, dict) else []
