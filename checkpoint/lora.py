"""A PEFT LoRA adapter as a source: any box of a model with the adapter merged into it; no merged copy is made.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`). A linear weight W [O, I]
becomes W + s B A with A [r, I], B [O, r] and s = lora_alpha / r (arXiv 2106.09685, section 4.1), or with use_rslora
lora_alpha / sqrt(r) (arXiv 2312.03732); an embedding [V, D] becomes W + s (B A)^T with A [r, V], B [D, r]. DoRA then
gives each row of a linear weight, or each column of an embedding, the norm that it learned (arXiv 2402.09353, eq. 5).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.adapter import Adapter, Change
from checkpoint.adapter_files import read_config
from checkpoint.files import read_json
from checkpoint.provenance import descend
from checkpoint.source import TILE, Box, Info, Map, RunState, Slot, Source, WithoutState, box_shape, empty_box


def apply_lora(source: Source, folder: Path) -> "LoraSource":
    """Return a model with a LoRA adapter merged into its weights: no tensor of the model is read yet.

    A merged weight is computed in float32 (float64 of a float64 model) and rounded once. Masters and Adam's moments
    belong to the weights before, and are left out.

    Where the head is the embedding and the adapter changes them differently, the result is an untied model, which is
    what the adapted model computes. (peft's merge_and_unload adds a LoRA of either one to both of them.)

    Raises:
        InputError: a file is missing or damaged; the adapter is no LoRA, or one that is not the same as other weights;
            it does not fit the model; it lacks a tensor that its config says it has.
    """
    folder = Path(folder)
    adapter = Adapter(folder=folder, config=read_config(folder), source=source)
    changes, untied = adapter.changes()
    about = read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {}
    return LoraSource(source, changes, untied, {**about, "name": folder.resolve().name})


@dataclass(frozen=True)
class LoraSource(WithoutState):
    """A source and what becomes of its tensors, by name."""

    changes: Mapping[str, Change]
    untied: bool
    """The aliases are tensors of their own from here on."""
    adapter: Mapping[str, Any]
    """The adapter's record."""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return {**self.source.config, "tie_word_embeddings": False} if self.untied else self.source.config

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, info in self.source.infos.items():
            if info.tied_to and self.untied:
                info = self.source.infos[info.tied_to]
            infos[name] = replace(info, slots={slot: info.slots[slot] for slot in info.slots if slot == "weight"})
        return infos

    @property
    def run(self) -> RunState:
        recipe = {"adapter": self.adapter["name"]}
        parents = descend([self.source.run.provenance, self.adapter])
        return RunState(provenance={"verb": "lora", "recipe": recipe, **parents})

    def _owner(self, name: str) -> str:
        return self.source.infos[name].tied_to or name

    def tiles(self, name: str) -> Sequence[Box]:
        return self.source.tiles(self._owner(name))

    def collect(self, name: str, spread: Map) -> Any:
        """Return what the base needs to know first, and the norms of all columns [I] for DoRA of an embedding."""
        change = self.changes.get(name, Change())
        inner = None if change.whole is not None else self.source.collect(self._owner(name), spread)
        if not change.by_column:
            return inner, None

        def squares(box: Box) -> np.ndarray:
            total = torch.zeros(box_shape(box)[1], dtype=torch.float64)
            for _, values in self._sums(name, box, inner):
                total += values.double().square_().sum(0)
            return total.numpy()

        total = torch.zeros(self.infos[name].shape[1], dtype=torch.float64)
        tiles = self.tiles(name)
        for box, part in zip(tiles, spread(squares, tiles), strict=True):
            total[box[1]] += torch.from_numpy(part)
        return inner, total.sqrt()

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        inner, norms = stats if stats is not None else self.collect(name, map)
        if name not in self.changes:
            return self.source.read(self._owner(name), box, out, inner)
        change = self.changes[name]
        # The norm of a row takes all of it, whatever part is asked for.
        wide = (box[0], slice(0, self.infos[name].shape[1])) if change.by_row else box
        for rows, values in self._sums(name, wide, inner):
            if change.magnitude is not None:
                part = box[1] if change.by_column else rows
                lengths = norms[part] if change.by_column else torch.linalg.vector_norm(values.double(), dim=1)
                factor = (change.magnitude[part].double() / lengths).to(values.dtype)
                values *= factor if change.by_column else factor[:, None]
            for target in out.values():
                there = slice(rows.start - box[0].start, rows.stop - box[0].start)
                target[there].copy_(values[:, box[1]] if change.by_row else values)
        return None

    def _sums(self, name: str, box: Box, stats: Any) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the base plus what is added to it, some rows of a box at a time, no more than a tile or one row.

        Products are taken of the same whole rows always, so that a value does not depend on the box that it is in.
        """
        change, shape = self.changes[name], self.infos[name].shape
        dtype = torch.promote_types(self.infos[name].slots["weight"], torch.float32)
        step = max(1, TILE // math.prod(shape[1:]))
        for start in range(box[0].start // step * step, box[0].stop, step):
            group = slice(start, min(start + step, shape[0]))
            rows = slice(max(start, box[0].start), min(group.stop, box[0].stop))
            here = (rows, *box[1:])
            values = empty_box(here, dtype)
            if change.whole is not None:
                values.copy_(change.whole[here])
            else:
                self.source.read(self._owner(name), here, {"weight": values}, stats)
            if change.left is not None:
                values += change.added(group, dtype)[(slice(rows.start - start, rows.stop - start), *box[1:])]
            yield rows, values
