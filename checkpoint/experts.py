"""How Hugging Face files spell what the running model has in one tensor: experts, whose every matrix is an entry.

E experts, R rows and C columns of one; a family's `spelled` table says which names stand for which rows.

Facts of transformers 5.23 (conversion_mapping.py; core_model_loading.py, `revert_weight_conversion`): in the running
model `experts.gate_up_proj` [E, 2F, D] has of each expert its gate [F, D] and below it its up [F, D], and
`experts.down_proj` is [E, D, F]. Files have an entry for each of those matrices: `block_sparse_moe.experts.0.w1`, `w3`
and `w2` of Mixtral, whose router is `block_sparse_moe.gate`; `mlp.experts.0.gate_proj`, `up_proj` and `down_proj` of
Qwen. An entry under the running model's own name is loaded as well.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from checkpoint.source import Box, full_box
from parallel.family import Family

EXPERT = "{expert}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of a file, and what of a tensor it is."""

    name: str
    shape: tuple[int, ...]
    box: Box
    """In the running model's tensor, of which dims before the entry's own are 1 long."""


def entries_of(family: Family, name: str, shape: tuple[int, ...]) -> list[Entry]:
    """Return the entries that a tensor of the running model is in files, in row-major order; most are one."""
    general = re.sub(r"\blayers\.\d+\.", "layers.{layer}.", name, count=1) if family.spelled else name
    names = family.spelled.get(general)
    if names is None:
        return [Entry(name=name, shape=shape, box=full_box(shape))]
    found = re.search(r"\blayers\.(\d+)\.", name)
    layer = found[1] if found else ""
    if EXPERT not in names[0]:
        return [Entry(name=names[0].format(layer=layer), shape=shape, box=full_box(shape))]
    experts, rows, columns = shape
    part = rows // len(names)
    return [
        Entry(
            name=spelled.format(layer=layer, expert=expert),
            shape=(part, columns),
            box=(slice(expert, expert + 1), slice(at * part, (at + 1) * part), slice(0, columns)),
        )
        for expert in range(experts)
        for at, spelled in enumerate(names)
    ]


def spelled_in(family: Family, shapes: Mapping[str, tuple[int, ...]], stored: Iterable[str]) -> dict[str, list[Entry]]:
    """Return the entries of the tensors that a folder spells otherwise than the running model, by tensor.

    Args:
        shapes: of the model's tensors, by name.
        stored: names in the folder's files.
    """
    if not family.spelled:
        return {}
    there = set(stored)
    found = {name: entries_of(family, name, shape) for name, shape in shapes.items() if name not in there}
    return {name: entries for name, entries in found.items() if entries[0].name != name}


def unknown_expert(family: Family, known: Iterable[Sequence[Entry]], stored: Iterable[str]) -> str | None:
    """Return the first name in files that spells an expert which the model has not; None if there is none."""
    names = {entry.name for entries in known for entry in entries}
    patterns = [
        re.compile(re.sub(r"\\{(layer|expert)\\}", r"\\d+", re.escape(name)))
        for spelled in family.spelled.values()
        for name in spelled
        if EXPERT in name
    ]
    strange = (name for name in stored if name not in names and any(one.fullmatch(name) for one in patterns))
    return next(strange, None)


def overlaps(entries: Sequence[Entry], box: Box) -> Iterator[tuple[str, Box, Box]]:
    """Return the entries that a box of a tensor has something of: name, where in the entry, and where in the box."""
    if len(entries) > 1:
        each = len(entries) // entries[-1].box[0].stop  # of an expert
        entries = entries[box[0].start * each : box[0].stop * each]
    for entry in entries:
        common = [
            slice(max(one.start, other.start), min(one.stop, other.stop))
            for one, other in zip(entry.box, box, strict=True)
        ]
        if all(part.start < part.stop for part in common):
            inside = _within(common, entry.box)[len(box) - len(entry.shape) :]
            yield entry.name, inside, _within(common, box)


def _within(common: Sequence[slice], box: Box) -> Box:
    """Return where in a box a part of it is."""
    return tuple(slice(part.start - at.start, part.stop - at.start) for part, at in zip(common, box, strict=True))
