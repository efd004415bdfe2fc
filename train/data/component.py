"""The corpora and parts that a mixture consists of: how much of each is seen, in how many steps, in which order."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from parallel.errors import InputError, one_of
from train.data.order import Mixture, Part, period_for


@dataclass(frozen=True, kw_only=True)
class Component:
    """A corpus of a mixture, or a part of one, and how often it is seen."""

    name: str
    """The corpus' own, or `eng.first for swe` where a part of it goes beside the text of `swe`."""
    corpus: str
    beside: str
    """The corpus whose text it goes with: itself, but for replay."""
    part: float
    """Share of the corpus that is taken."""
    tokens: float
    """Tokens in it, each counted once."""
    epochs: float

    @property
    def seen(self) -> float:
        """Tokens seen of it."""
        return self.tokens * self.epochs

    @property
    def replayed(self) -> bool:
        return self.name != self.beside


def beside(parts: Iterable[Component], names: Sequence[str]) -> tuple[Component, ...]:
    """Return the components that are text of some corpora, or go beside it.

    Raises:
        InputError: a corpus is not in the mixture.
    """
    parts = tuple(parts)
    known = dict.fromkeys(part.beside for part in parts)
    for name in names:
        if name not in known:
            raise InputError(one_of("corpus", name, known))
    return tuple(part for part in parts if part.beside in names)


def for_tokens(parts: Sequence[Component], tokens: float) -> tuple[Component, ...]:
    """Return a mixture as it is when it goes on for so many tokens: the same shares, other epochs."""
    factor = tokens / sum(part.seen for part in parts)
    return tuple(replace(part, epochs=part.epochs * factor) for part in parts)


def one_after_the_other(stages: Iterable[Sequence[Component]]) -> tuple[Component, ...]:
    """Return what stages come to together: the epochs of what they share are added."""
    found: dict[Component, float] = {}
    for part in (part for parts in stages for part in parts):
        same = replace(part, epochs=0)
        found[same] = found.get(same, 0) + part.epochs
    return tuple(replace(part, epochs=epochs) for part, epochs in found.items())


def sequences(parts: Iterable[Component], length: int) -> int:
    """Return how many sequences of `length` tokens are seen, of those that a part has as a whole."""
    return sum(round(round(part.tokens / length) * part.epochs) for part in parts)


def steps(parts: Iterable[Component], length: int, global_batch: int) -> int:
    """Return how many steps see all of it, the last batch filled up."""
    return math.ceil(sequences(parts, length) / global_batch)


def steps_by_epoch(parts: Sequence[Component], length: int, global_batch: int) -> int:
    """Return the steps if every epoch ends with a step, its last batch filled up (stages an epoch, as in nanotron)."""
    total = 0
    for epoch in range(math.ceil(max(part.epochs for part in parts))):
        seen = sum(round(round(part.tokens / length) * min(max(part.epochs - epoch, 0), 1)) for part in parts)
        total += math.ceil(seen / global_batch)
    return total


def order(parts: Sequence[Component], wholes: Mapping[str, int], *, seed: int, period: int | None = None) -> Mixture:
    """Return the order of samples of a mixture.

    Args:
        wholes: sequences that each corpus has, by name.
        period: samples in which every share is exact; by default as many as the smallest share needs.

    Raises:
        InputError: a corpus or part holds no whole sequence; a share is less than one sample in a period.
    """
    weights = tuple(part.seen for part in parts)
    return Mixture(
        names=tuple(part.name for part in parts),
        weights=weights,
        sizes=tuple(round(part.part * wholes[part.corpus]) for part in parts),
        seed=seed,
        parts=tuple(Part(corpus=part.corpus, whole=wholes[part.corpus]) if part.replayed else None for part in parts),
        period=period or period_for(weights),
    )
