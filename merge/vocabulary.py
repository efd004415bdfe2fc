"""Models over one vocabulary, as sources: a row of the embedding and the head for each token of the merge's output.

V rows of the output, T of them tokens' (ids up to the highest), D columns, N models. A row is the model's own where the
model has the token. Else, as in mergekit 0.1.5: what the recipe gives for the token; the base's row if the base has it;
the mean of the rows of all models that have it, which is the one's if only one has. With `force`, what the recipe gives
is the row in all models. Rows of padding are the mean of all tokens' rows of the aligned model.

Where this differs from mergekit: means are taken in float32 (float64 of float64 models) and rounded once, there in the
models' dtype after each model; a model whose head is its embedding gives the embedding's rows to heads of others, there
that is an error; and token ids in the config follow their tokens, there they stay what they were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from checkpoint.source import Box, Info, Map, Source, Wrapped, empty_box, row_major_tiles
from merge.tokenizers import MergedVocabulary
from parallel.errors import InputError


def aligned(name: str, sources: Mapping[str, Source], vocabulary: MergedVocabulary) -> "AlignedSource":
    """Return one of the models that are merged, weights alone, over the output's vocabulary; nothing is read yet.

    Its provenance is the model's own: what is merged descends from the models, and the vocabulary is the merge's.

    Args:
        name: the model.
        sources: all models by the names that the vocabulary has them under; rows are read from any.
        vocabulary: of `merge.tokenizers.merged_vocabulary`.

    Raises:
        InputError: a model that gives rows lacks the tensor, or has other columns or fewer rows.
    """
    assert name in sources and sources.keys() == vocabulary.ids.keys(), (name, [*sources], [*vocabulary.ids])
    found = AlignedSource(sources[name], name=name, sources=sources, vocabulary=vocabulary)
    for tensor in found.changed:
        for donor, rows in found.needed.items():
            owner = _owner(sources[donor], tensor)
            if owner is None:
                raise InputError(f"{donor} lacks the tensor {tensor}, which rows of {name} come from")
            (height, width), wanted = sources[donor].infos[owner].shape, found.infos[tensor].shape[1]
            if width != wanted:
                raise InputError(f"{donor}: {owner} has {width} columns, in {name} it has {wanted}")
            if rows > height:
                raise InputError(f"{donor}: {owner} has {height} rows, but its tokenizer has a token {rows - 1}")
    return found


def moved_ids(config: Mapping[str, Any], vocabulary: MergedVocabulary, name: str) -> dict[str, Any]:
    """Return the token ids (`eos_token_id` and so on) of a model's config or generation config in the output.

    A role that another token plays in the output's tokenizer gets that token's id. Else an id follows its token; it is
    None if that is no more. BOS and EOS are set if the tokenizer has them, whether or not the config did.
    """
    ids, before = vocabulary.ids[name], vocabulary.model_roles[name]

    def move(number: int) -> int | None:
        there = np.flatnonzero(ids == number)
        return number if number < 0 else int(there[0]) if len(there) else None

    found: dict[str, Any] = {}
    stated = [key for key in config if key.endswith("_token_id")]
    for key in dict.fromkeys([*stated, "bos_token_id", "eos_token_id"]):
        role, value = key.removesuffix("_token_id"), config.get(key)
        now = vocabulary.roles.get(role)
        if now is not None and (now != before.get(role) or key not in config):
            found[key] = vocabulary.tokens[now]
        elif isinstance(value, list):
            found[key] = [number for number in map(move, value) if number is not None] or None
        elif isinstance(value, int):
            found[key] = move(value)
    return found


@dataclass(frozen=True, eq=False)
class AlignedSource(Wrapped):
    """A model and the vocabulary that it is brought to."""

    name: str
    sources: Mapping[str, Source]
    vocabulary: MergedVocabulary

    @property
    def folder(self) -> Any:
        """Where the model lies, for messages; None if it lies nowhere."""
        return getattr(self.source, "folder", None)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        old = self.source.config
        return {**old, **moved_ids(old, self.vocabulary, self.name), "vocab_size": self.vocabulary.size}

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        tensors = self.family.tensors(self.config)
        return {
            name: replace(
                info,
                shape=tensors[name].shape,
                slots={slot: dtype for slot, dtype in info.slots.items() if slot == "weight"},
            )
            for name, info in self.source.infos.items()
        }

    @cached_property
    def changed(self) -> tuple[str, ...]:
        """The tensors that have a row for each token, aliases left out."""
        tensors = self.family.tensors(self.config).values()
        names = (tensor.name for tensor in tensors if tensor.axes[0] == "vocab")
        return tuple(name for name in names if self.infos[name].tied_to is None)

    @cached_property
    def _own(self) -> np.ndarray:
        """[T]: the model's own row for each token; -1 where the row comes from elsewhere."""
        own = self.vocabulary.ids[self.name].copy()
        own[[number for number, given in self.vocabulary.given.items() if given.force]] = -1
        return own

    def _take(self, donor: str, rows: slice) -> np.ndarray:
        """Return a model's row in each of so many rows of the output; -1 where it has no part in it."""
        lent = np.where(self._own[rows] < 0, self.vocabulary.donors[donor][rows], -1)
        return np.maximum(lent, self._own[rows]) if donor == self.name else lent

    @cached_property
    def needed(self) -> Mapping[str, int]:
        """The models whose rows are read, and how many rows each has to have."""
        highest = {donor: int(self._take(donor, slice(None)).max(initial=-1)) for donor in self.sources}
        return {donor: row + 1 for donor, row in highest.items() if row >= 0}

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape) if name in self.changed else self.source.tiles(name)

    def collect(self, name: str, spread: Map) -> Any:
        """Return what each model that gives rows needs to know first, and the mean of tokens' rows [D] for padding."""
        if name not in self.changed:
            return self.source.collect(name, spread)
        inner = {donor: self.sources[donor].collect(self._owners(name)[donor], spread) for donor in self.needed}
        named = self.vocabulary.named
        if named.sum() == self.vocabulary.size:
            return inner, None
        dtype, width = self._wide(name), self.infos[name].shape[1]

        def added_up(box: Box) -> np.ndarray:
            values = empty_box(box, dtype)
            self._read_tokens(name, box, values, inner)
            return values[torch.from_numpy(named[box[0]])].double().sum(0).numpy()

        total = torch.zeros(width, dtype=torch.float64)
        tiles = row_major_tiles((len(named), width))
        for box, part in zip(tiles, spread(added_up, tiles), strict=True):
            total[box[1]] += torch.from_numpy(part)
        return inner, (total / int(named.sum())).to(dtype)

    def _owners(self, name: str) -> dict[str, str]:
        return {donor: _owner(self.sources[donor], name) or name for donor in self.needed}

    def _wide(self, name: str) -> torch.dtype:
        dtype = torch.float32
        for donor, owner in self._owners(name).items():
            dtype = torch.promote_types(dtype, self.sources[donor].infos[owner].slots["weight"])
        return dtype

    def read(self, name: str, box: Box, out: Mapping[Any, torch.Tensor], stats: Any = None) -> None:
        if name not in self.changed:
            return self.source.read(name, box, out, stats)
        inner, mean = stats if stats is not None else self.collect(name, map)
        rows, columns = box
        own, count = self._own[rows], rows.stop - rows.start
        if 0 < len(own) == count and own[0] >= 0 and (np.diff(own) == 1).all():
            old = (slice(int(own[0]), int(own[0]) + count), columns)
            return self.source.read(name, old, out, inner[self.name])  # most boxes of most models: no copy
        values = empty_box(box, self._wide(name))
        self._read_tokens(name, (slice(rows.start, rows.start + len(own)), columns), values[: len(own)], inner)
        if mean is not None:
            blank = np.append(~self.vocabulary.named[rows], np.ones(count - len(own), dtype=bool))
            values[torch.from_numpy(blank)] = mean[columns]
        out["weight"].copy_(values)
        return None

    def _read_tokens(self, name: str, box: Box, values: torch.Tensor, inner: Mapping[str, Any]) -> None:
        """Fill `values`, of a wide dtype, with rows of tokens: the sum of the rows that go in, by their number."""
        rows, columns = box
        values.fill_(-0.0)  # which added to any number, -0.0 itself too, is that number
        number = torch.zeros(len(values), dtype=values.dtype)
        for donor, owner in self._owners(name).items():
            take = self._take(donor, rows)
            there = torch.from_numpy(np.flatnonzero(take >= 0))
            if len(there):
                old = take[take >= 0]
                values[there] += _gather(self.sources[donor], owner, old, columns, values.dtype, inner[donor])
                number[there] += 1
        values[number == 0] = 0.0
        several = number > 1
        values[several] /= number[several, None]


def _owner(source: Source, name: str) -> str | None:
    """Return the tensor that holds what `name` names: the embedding for a tied head; None if there is none."""
    info = source.infos.get(name)
    return None if info is None else info.tied_to or name


def _gather(
    source: Source, name: str, rows: np.ndarray, columns: slice, dtype: torch.dtype, stats: Any
) -> torch.Tensor:
    """Read rows in any order, neighbours at once, none twice: [rows, columns]."""
    wanted, place = np.unique(rows, return_inverse=True)
    found = torch.empty((len(wanted), columns.stop - columns.start), dtype=dtype)
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    for first, last in pairwise([0, *breaks.tolist(), len(wanted)]):
        box = (slice(int(wanted[first]), int(wanted[first]) + last - first), columns)
        source.read(name, box, {"weight": found[first:last]}, stats)
    return found[torch.from_numpy(place)]
