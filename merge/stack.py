"""One tensor of all the models, as a method sees it: boxes of values and of task vectors, settings, statistics."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from checkpoint.source import Box, Map, row_major_tiles
from merge import sparsify
from merge.reads import Operand, Reads
from merge.sparsify import Kept, Sparsifier
from merge.sums import Summed
from merge.threshold import WINDOW, windows
from parallel.errors import InputError
from parallel.rows import Kind

if TYPE_CHECKING:  # it takes seconds to import
    from merge.gram import Gram

PASS = 8
"""Models of a sweep that a pass over a tensor looks at, at most: of each it holds what it counts."""
CHUNK = 1024
"""Products summed in float32 before they are added up in float64."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """How one tensor of the merged model is made."""

    operands: tuple[Operand, ...]
    """The models' tensors, in the order that they are summed in; the base is not among them."""
    base: Operand | None
    shared: Mapping[str, Any]
    """Values of the method's parameters."""
    each: Mapping[str, tuple[Any, ...]]
    """Values of those that every model has of its own, one an operand."""
    fishers: tuple[Operand, ...] = ()
    """Of fisher: the tensor of each model's diagonal Fisher, one an operand."""
    grams: "tuple[Gram, ...]" = ()
    """Of regmean: where each operand's Gram matrix is; none if the tensor is no linear layer's weight."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A tensor of the merged model, and those that it is made from."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    order: Order
    reads: Reads
    inner: Mapping[Operand, Any]
    seed: int
    check: bool
    """Whether all values have to be looked at: one that is not finite may be lost on the way to the merged ones."""

    @property
    def tiles(self) -> Sequence[Box]:
        return row_major_tiles(self.shape)

    @property
    def count(self) -> int:
        return len(self.order.operands)

    @property
    def weights(self) -> tuple[float, ...]:
        return self.order.each["weight"]

    def label(self, number: int) -> str:
        return self.reads.labels[self.order.operands[number].model]

    def random_key(self, number: int) -> str:
        """Return what the random numbers of a model depend on beside tensor and element."""
        return self._random_key(self.order.operands[number])

    def _random_key(self, operand: Operand) -> str:
        return f"{self.seed}/{self.reads.identity(operand.model)}"

    def look_at(self, boxes: Sequence[Box], also: Sequence[Operand] = ()) -> None:
        """Refuse a value that is not finite in what the tensor is made from; with the model's name."""
        base = [self.order.base] if self.order.base else []
        for operand in dict.fromkeys((*self.order.operands, *base, *self.order.fishers, *also)):
            for box in boxes:
                self.reads.fresh(operand, box, self.inner[operand])

    def error(self, problem: str) -> InputError:
        return InputError(f"{self.name}: {problem}")

    def value(self, number: int, box: Box) -> torch.Tensor:
        """Return a box of a model in float32; not to be changed."""
        return self._read(self.order.operands[number], box)

    def _read(self, operand: Operand, box: Box) -> torch.Tensor:
        known = self.inner[operand]
        if self.reads.together or operand == self.order.base:  # what is asked for more than once
            return self.reads.read(self.name, operand, box, known, check=self.check)
        return self.reads.fresh(operand, box, known, check=self.check)

    def values(self, box: Box) -> list[torch.Tensor]:
        return [self.value(number, box) for number in range(self.count)]

    def base(self, box: Box) -> torch.Tensor:
        """Return a box of the base in float32; not to be changed."""
        assert self.order.base is not None, f"{self.name} has no base"
        return self._read(self.order.base, box)

    def fishers(self, box: Box) -> list[torch.Tensor]:
        """Return a box of each model's diagonal Fisher in float32; not to be changed."""
        return [self._read(one, box) for one in self.order.fishers]

    def whole(self, operand: Operand) -> torch.Tensor:
        """Return a whole tensor in float32: for methods whose working set is a matrix."""
        values = torch.empty(self.shape)
        for tile in self.tiles:
            values[tile] = self.reads.fresh(operand, tile, self.inner[operand]).cpu()
        return values

    def delta(self, number: int, box: Box) -> torch.Tensor:
        """Return a box of what a model adds to the base; not to be changed."""
        return self._delta(self.order.operands[number], box)

    def _delta(self, operand: Operand, box: Box) -> torch.Tensor:
        def make() -> torch.Tensor:
            known = self.inner[operand]
            return self.reads.less(self.name, operand, self.base(box), box, known, check=self.check)

        return self._once_a_sweep(box, (operand, self.order.base), make)

    def _once_a_sweep(self, box: Box, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what merges side by side ask for in turn; a single one asks once."""
        return self.reads.once_a_box(self.name, box, key, make) if self.reads.together else make()

    def deltas(self, box: Box) -> list[torch.Tensor]:
        return [self.delta(number, box) for number in range(self.count)]

    def directions(self, box: Box) -> list[torch.Tensor]:
        """Return task vectors if there is a base, else the models themselves."""
        return self.values(box) if self.order.base is None else self.deltas(box)

    def collect_kept(self, sparsifiers: Sequence[Sparsifier], spread: Map) -> list[Kept]:
        """Find what the models' sparsifiers need to know of their task vectors, of PASS models in one pass."""
        own = [*zip(self.order.operands, sparsifiers, strict=True)]
        known = self.reads.of_tensor(self.name)
        if any(self._key(*one) not in known for one in own):
            asked = dict(own)
            alike = {replace(one, key="") for one in sparsifiers}
            if len(alike) == 1:  # in a sweep, as they will be asked for of every model
                (like,) = alike
                for one in self._asked():
                    asked.setdefault(one, replace(like, key=sparsifiers[0].key and self._random_key(one)))
            left = [one for one in asked.items() if self._key(*one) not in known]
            for start in range(0, len(left), PASS):
                part = left[start : start + PASS]
                known.update(zip([self._key(*one) for one in part], self._collect(part, spread), strict=True))
        return [known[self._key(*one)] for one in own]

    def _collect(self, asked: Sequence[tuple[Operand, Sparsifier]], spread: Map) -> list[Kept]:
        unchecked = replace(self, check=False)  # `Kept.finite` says what is known
        return sparsify.collect(
            [sparsifier for _, sparsifier in asked],
            self.name,
            lambda box, numbers: [unchecked._delta(asked[number][0], box) for number in numbers],
            self.shape,
            self.tiles,
            spread,
        )

    def _key(self, operand: Operand, sparsifier: Sparsifier) -> Any:
        return operand, self.order.base, sparsifier

    def kept(self, number: int, sparsifier: Sparsifier, kept: Kept, box: Box) -> torch.Tensor:
        """Return a box of a sparse task vector, not yet times `kept.factor`; not to be changed."""

        def make() -> torch.Tensor:
            rows, inside = sparsify.whole_rows(box, self.shape)
            if not sparsifier.whole or rows == box:
                return sparsify.keep(sparsifier, self.name, self.delta(number, box), kept, self.shape, box)
            # Past what is remembered: reading another box would make it forget this one.
            operand, base = self.order.operands[number], self.order.base
            assert base is not None, f"{self.name} has no base"
            delta = self.reads.fresh(operand, rows, self.inner[operand])
            delta -= self.reads.fresh(base, rows, self.inner[base])
            return sparsify.keep(sparsifier, self.name, delta, kept, self.shape, rows)[inside]

        return self._once_a_sweep(box, self._key(self.order.operands[number], sparsifier), make)

    def gram(
        self,
        spread: Map,
        *,
        along: Literal["all", "rows", "columns"] = "all",
        of: Literal["directions", "base and models"] = "directions",
    ) -> np.ndarray:
        """Return inner products, float64: [N, N], or [rows or columns, N, N]; of a vector, [1, N, N] for either."""
        asked = self._asked()
        own = [asked.index(one) + (of != "directions") for one in self.order.operands]
        if of != "directions":
            own = [0, *own]
        size = 1
        if along != "all" and len(self.shape) > 1:
            size = math.prod(self.shape[:-1]) if along == "rows" else self.shape[-1]

        def products(tile: Box) -> tuple[slice, np.ndarray]:
            vectors = [self._read(one, tile) for one in asked]
            if of != "directions":
                vectors = [self.base(tile), *vectors]
            elif self.order.base is not None:
                vectors = [self._delta(one, tile) for one in asked]
            part = slice(0, 1) if size == 1 else tile[-1] if along == "columns" else tile[0]
            return part, _inner(vectors, "all" if size == 1 else along)

        def make() -> np.ndarray:
            count = len(asked) + (of != "directions")
            total = np.zeros((size, count, count))
            for part, found in windows(products, self.tiles, spread, 4 * WINDOW):
                total[part] += found
            if not np.isfinite(total).all():
                self.look_at(self.tiles, also=asked)
                raise self.error("its values are too large for inner products in float32")
            return total

        total = self.reads.once_a_tensor(self.name, ("gram", of, along, asked, self.order.base), make)
        chosen = total[:, own][:, :, own]
        return chosen[0] if along == "all" else chosen

    def _asked(self) -> tuple[Operand, ...]:
        """Return what Gram matrices are made of: in a sweep all models at once, of which every merge takes its part."""
        common = self.reads.everyone(self.name)
        return common if set(self.order.operands) <= set(common) else self.order.operands


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What reading a merged tensor needs to know of it first."""

    stack: Stack
    method: Any = None
    """The method's; None if it needs nothing."""
    summed: Summed | None = None
    """How it is merged, if that is a sum."""


def _inner(vectors: Sequence[torch.Tensor], along: str) -> np.ndarray:
    """Return the inner products of N tensors of one shape, [1, N, N] or [rows or columns, N, N].

    Each pair by itself, so that it does not depend on what else is there.
    """
    count = len(vectors)
    product: Callable[[int, int], np.ndarray]
    if along == "all":
        parts = [_chunks(vector.flatten()) for vector in vectors]

        def product(i: int, j: int) -> np.ndarray:
            return np.array([sum(_dots(one, other) for one, other in zip(parts[i], parts[j], strict=True))])
    else:

        def product(i: int, j: int) -> np.ndarray:
            both = vectors[i] * vectors[j]
            return both.sum(dim=1 if along == "rows" else 0, dtype=torch.float64).cpu().numpy()

    pairs = {(i, j): product(i, j) for i in range(count) for j in range(i, count)}
    found = np.zeros((len(pairs[0, 0]), count, count))
    for (i, j), values in pairs.items():
        found[:, i, j] = found[:, j, i] = values
    return found


def _chunks(vector: torch.Tensor) -> list[Any]:
    """Return rows of CHUNK elements, and a row of what is left; arrays of numpy, if it can have them."""
    whole = len(vector) // CHUNK * CHUNK
    parts = [vector[:whole].view(-1, CHUNK), vector[None, whole:]]
    return [part.numpy() for part in parts] if vector.device.type == "cpu" else parts


def _dots(rows: Any, others: Any) -> np.float64:
    """Return the inner product of rows of each other: of each in float32, of all in float64."""
    if isinstance(rows, np.ndarray):  # without the products in memory: a third of the time
        return np.vecdot(rows, others).sum(dtype=np.float64)
    return np.float64(torch.linalg.vecdot(rows, others).double().sum().item())
