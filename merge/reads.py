"""Boxes of several models in float32, each read once however many merges ask for it."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from checkpoint.source import Box, Map, Source, empty_box
from merge.statistics_files import digest
from parallel.errors import InputError

Made = TypeVar("Made")
KNOWN = 8
"""Tensors whose statistics are remembered."""


class Operand(NamedTuple):
    """A tensor that a merge reads. (A tuple: as a key it is looked up many times a box.)"""

    model: int
    """Number of the model among the sources."""
    name: str
    """Its name there: the layers of a merged model may come from elsewhere."""


class Reads:
    """Models that are read together, box by box."""

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Sequence[str],
        together: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """Take the models, what messages call them, the numbers of those of which a sweep merges subsets, and where it
        is computed."""
        self.device = torch.device(device)
        self.together = tuple(together)
        self.sources = tuple(sources)
        self.labels = tuple(labels)
        self._of_box = threading.local()
        self._of_tensor: dict[str, dict[Any, Any]] = {}
        self._identities: dict[int, str] = {}
        self._lock = threading.Lock()

    def with_more(self, sources: Sequence[Source], labels: Sequence[str]) -> "Reads":
        """Return a reading of more models behind these; this one, shared as it may be, if there are none."""
        if not sources:
            return self
        return Reads((*self.sources, *sources), (*self.labels, *labels), self.together, self.device)

    def everyone(self, name: str) -> tuple[Operand, ...]:
        """Return a tensor of all models of which a sweep merges subsets; of one that has it by another name, that."""
        return tuple(
            Operand(model=number, name=self.sources[number].infos[name].tied_to or name)
            for number in self.together
            if name in self.sources[number].infos
        )

    def identity(self, number: int) -> str:
        """Return what a model is known by in random numbers' keys: its weights, wherever it lies in whatever format."""
        if number not in self._identities:
            source: Any = self.sources[number]
            # Over another vocabulary it is still the model that it was.
            self._identities[number] = digest(source.source if hasattr(source, "vocabulary") else source)
        return self._identities[number]

    def once_a_tensor(self, name: str, key: Any, make: Callable[[], Made]) -> Made:
        """Return what was made for this key while the same tensor was merged, or make it.

        The lock is not held meanwhile: what is made may wait for threads that ask here themselves.
        """
        known = self.of_tensor(name)
        if key not in known:
            known[key] = make()
        found: Made = known[key]
        return found

    def of_tensor(self, name: str) -> dict[Any, Any]:
        """Return what is remembered while the same tensor is merged, to add to."""
        with self._lock:
            if name not in self._of_tensor:
                while len(self._of_tensor) >= KNOWN:
                    del self._of_tensor[next(iter(self._of_tensor))]
                self._of_tensor[name] = {}
            return self._of_tensor[name]

    def once_a_box(self, name: str, box: Box, key: Any, make: Callable[[], Made]) -> Made:
        """Return what this thread made for this key when it was last at the same box, or make it.

        What is returned must not be changed.
        """
        known = self._known(name, box)
        if key not in known:
            known[key] = make()
        found: Made = known[key]
        return found

    def _known(self, name: str, box: Box) -> dict[Any, Any]:
        if getattr(self._of_box, "box", None) != box or self._of_box.name != name:
            self._of_box.name, self._of_box.box, self._of_box.known = name, box, {}
        known: dict[Any, Any] = self._of_box.known
        return known

    def collect(self, name: str, operand: Operand, spread: Map) -> Any:
        """Return what reading a tensor needs to know of it first."""
        return self.once_a_tensor(name, operand, lambda: self.sources[operand.model].collect(operand.name, spread))

    def read(self, name: str, operand: Operand, box: Box, stats: Any, *, check: bool) -> torch.Tensor:
        """Return a box of a tensor in float32, for the merged tensor of a name; not to be changed."""
        return self.once_a_box(name, box, operand, lambda: self.fresh(operand, box, stats, check=check))

    def less(
        self, name: str, operand: Operand, base: torch.Tensor, box: Box, stats: Any, *, check: bool
    ) -> torch.Tensor:
        """Return a box of a tensor less the base's, which is what most merges ask for: in place if nobody has it."""
        known = self._known(name, box).get(operand)
        return self.fresh(operand, box, stats, check=check).sub_(base) if known is None else known - base

    def fresh(self, operand: Operand, box: Box, stats: Any, *, check: bool = True) -> torch.Tensor:
        """Return a box of a tensor in float32, which nobody else has, on the device.

        Args:
            check: whether its values have to be finite.

        Raises:
            InputError: a weight is not finite.
        """
        tensor = empty_box(box)
        self.sources[operand.model].read(operand.name, box, {"weight": tensor}, stats)
        if check and not all_finite(tensor):
            who = self.labels[operand.model]
            raise InputError(f"{who}: {operand.name} holds a value that is not finite; such a model cannot be merged")
        return tensor.to(self.device)


def all_finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite."""
    if values.dtype not in _INFINITY or values.device.type != "cpu" or not values.numel():
        return bool(torch.isfinite(values).all())
    # As integers infinity and NaN come last: with a sign above all unsigned ones, without it above all signed ones. Of
    # bfloat16 that takes a third of the time of a sum.
    bits, unsigned, infinity, negative = _INFINITY[values.dtype]
    whole = values.view(bits).numpy()
    highest = np.maximum.reduce(whole, None), np.maximum.reduce(whole.view(unsigned), None)
    return bool(highest[0] < infinity and highest[1] < negative)


_INFINITY = {
    torch.float32: (torch.int32, np.uint32, 0x7F800000, 0xFF800000),
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float16: (torch.int16, np.uint16, 0x7C00, 0xFC00),
}
"""Dtypes of as many bits, and the bits of infinity and of -infinity."""
