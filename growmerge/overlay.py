"""Pipeline files laid over one another: `extends: other.yaml` and, chosen by `--scale`, the keys under `scales`.

    extends: study.yaml              # all of that file, but for what stands here
    training: {lr: 3.0e-4}
    scales:
      tiny:                          # growmerge run FILE --scale tiny: all of this file, but for what stands here
        model: {hidden_size: 64}

Mappings are laid over one another key by key; anything else, a list too, takes the place of what was there, and null
takes it away. A scale may extend a file, too.
"""

from dataclasses import replace
from functools import reduce
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
    files = _layers(read_document(path), path, ())
    whole = reduce(laid_over, [_without(SCALES, one) for one in files])
    if scale is None:
        return whole
    every = [scales for one in files if (scales := dict(_keys(one)).get(SCALES)) is not None]
    known = [name for scales in every for name, _ in _keys(scales)]
    if not known:
        raise InputError(f"{path}: has no {SCALES}, so no --scale {scale}")
    if scale not in known:
        raise InputError(f"{path}: {one_of('scale', scale, dict.fromkeys(known))}")
    layers: list[Item] = []
    for above in (part for scales in every for name, part in _keys(scales) if name == scale):
        if not isinstance(above.value, dict):
            raise InputError(f"{above.place}: {SCALES}.{scale}: {above.given} is given; allowed is a mapping")
        layers += _layers(above, path, ())
    found = dict(_keys(reduce(laid_over, layers, whole)))
    if not any(NAME in dict(_keys(layer)) for layer in layers) and NAME in found and isinstance(found[NAME].value, str):
        found[NAME] = replace(found[NAME], value=f"{found[NAME].value}-{scale}")
    return replace(whole, value=found)


def laid_over(below: Item, above: Item) -> Item:
    """Return a value with another one over it."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    both = {name: laid_over(below.value[name], part) if name in below.value else part for name, part in _keys(above)}
    return replace(above, value={name: part for name, part in {**below.value, **both}.items() if part.tag != "null"})


def _layers(root: Item, path: Path, above: tuple[Path, ...]) -> list[Item]:
    """Return a mapping of a file and what it extends, the lowest first."""
    keys = dict(_keys(root))
    other = keys.pop(EXTENDS, None)
    if other is None:
        return [root]
    if not isinstance(other.value, str) or other.tag != "str":
        raise InputError(f"{other.place}: {EXTENDS}: {other.given} is given; allowed is a file, relative to this one")
    below = path.parent / other.value
    if not below.is_file():
        raise InputError(f"{other.place}: {EXTENDS}: {below}: no such file")
    above = (*above, path.resolve())
    if below.resolve() in above:
        raise InputError(f"{below}: extends itself, by way of {', '.join(one.name for one in above)}")
    return [*_layers(read_document(below), below, above), replace(root, value=keys)]


def _without(name: str, item: Item) -> Item:
    return replace(item, value={key: part for key, part in _keys(item) if key != name})


def _keys(item: Item) -> list[tuple[str, Item]]:
    return list(item.value.items()) if isinstance(item.value, dict) else []
