"""What a mixture gives each corpus: UniMax, temperature or weights, replay beside it; tokens, epochs and shares.

Pure arithmetic on sizes: nothing is read. What comes out (`train.data.component`) can be counted and ordered.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from parallel.errors import InputError, one_of
from train.data.component import Component


class ReplayOptions(Protocol):
    """Earlier text mixed in; `growmerge.schema_mixture.Replay` says what each field means."""

    @property
    def corpus(self) -> str: ...
    @property
    def share(self) -> float | None: ...
    @property
    def tokens(self) -> float | None: ...
    @property
    def scale_by(self) -> str | None: ...
    @property
    def shares(self) -> Mapping[str, float]: ...
    @property
    def epochs(self) -> Mapping[str, float]: ...


class MixtureOptions(Protocol):
    """A mixture; `growmerge.schema_mixture.MixtureConfig` says what each field means."""

    @property
    def sampling(self) -> str | None: ...
    @property
    def corpora(self) -> Sequence[str]: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def budget_characters(self) -> float | None: ...
    @property
    def budget_tokens(self) -> float | None: ...
    @property
    def max_epochs(self) -> float | None: ...
    @property
    def replay(self) -> Sequence[ReplayOptions]: ...


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a corpus is; what is not known is None."""

    tokens: int
    characters: int | None = None
    documents: int | None = None


def unimax(characters: Mapping[str, float], budget: float, max_epochs: float) -> dict[str, float]:
    """Return the epochs of each corpus: equal shares of a budget, but none repeated more than `max_epochs` times.

    From the smallest corpus on, each gets the rest of the budget divided by the corpora that are left, or
    `max_epochs` times its size if that is less (UniMax: arXiv 2304.09151, algorithm 1).

    Args:
        characters: sizes by corpus.
        budget: characters seen in all, repetitions counted.

    Raises:
        InputError: a size or the budget is not above 0, or `max_epochs` is below 1.
    """
    if not budget > 0:
        raise InputError(f"a budget of {budget:.12g} characters: it has to be above 0")
    if not max_epochs >= 1:
        raise InputError(f"max_epochs is {max_epochs:g}: it has to be at least 1")
    _check_positive(characters, "characters")
    epochs, left = {}, budget
    for done, name in enumerate(sorted(characters, key=lambda name: characters[name])):
        given = min(left / (len(characters) - done), max_epochs * characters[name])
        epochs[name] = given / characters[name]
        left -= given
    return {name: epochs[name] for name in characters}


def temperature(sizes: Mapping[str, float], degree: float) -> dict[str, float]:
    """Return the shares p_i ~ n_i ** (1 / T): T of 1 is in proportion to size, the larger T the more even.

    Raises:
        InputError: a size or T is not above 0.
    """
    if not degree > 0:
        raise InputError(f"temperature is {degree:g}: it has to be above 0")
    _check_positive(sizes, "size")
    largest = max(sizes.values())
    return weighted({name: (size / largest) ** (1 / degree) for name, size in sizes.items()})


def weighted(weights: Mapping[str, float]) -> dict[str, float]:
    """Return weights as shares that add up to 1.

    Raises:
        InputError: a weight is not above 0.
    """
    _check_positive(weights, "weight")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def components(options: MixtureOptions, sizes: Mapping[str, Size]) -> tuple[Component, ...]:
    """Return what a mixture consists of: each corpus, then for each replay the part beside each corpus.

    Raises:
        InputError: a corpus without a size, or without the count that the sampling goes by; see also the functions
            above.
    """
    names = tuple(options.corpora) or tuple(options.weights)
    for name in (*names, *(replay.corpus for replay in options.replay)):
        if name not in sizes:
            raise InputError(one_of("corpus", name, sizes))
    epochs = SAMPLINGS[options.sampling or "weights"](options, {name: sizes[name] for name in names})
    text = [
        Component(name=name, corpus=name, beside=name, part=1, tokens=sizes[name].tokens, epochs=epochs[name])
        for name in names
    ]
    replayed = (part for replay in options.replay for part in _replay(replay, epochs, sizes))
    return (*text, *replayed)


def _by_unimax(options: MixtureOptions, sizes: Mapping[str, Size]) -> dict[str, float]:
    assert options.budget_characters is not None and options.max_epochs is not None, "the file's rules ask for both"
    return unimax(_counts(sizes, "characters", "unimax"), options.budget_characters, options.max_epochs)


def _by_temperature(options: MixtureOptions, sizes: Mapping[str, Size]) -> dict[str, float]:
    assert options.temperature is not None, "the file's rules ask for it"
    return _epochs(temperature(_counts(sizes, "tokens", "temperature"), options.temperature), options, sizes)


def _by_weights(options: MixtureOptions, sizes: Mapping[str, Size]) -> dict[str, float]:
    return _epochs(weighted(options.weights), options, sizes)


SAMPLINGS: Mapping[str, Callable[[MixtureOptions, Mapping[str, Size]], dict[str, float]]] = {
    "unimax": _by_unimax,
    "temperature": _by_temperature,
    "weights": _by_weights,
}
"""By name: (mixture, sizes of its corpora) -> epochs of each."""


def _epochs(shares: Mapping[str, float], options: MixtureOptions, sizes: Mapping[str, Size]) -> dict[str, float]:
    total = options.budget_tokens or sum(size.tokens for size in sizes.values())
    return {name: share * total / sizes[name].tokens for name, share in shares.items()}


def _replay(replay: ReplayOptions, epochs: Mapping[str, float], sizes: Mapping[str, Size]) -> list[Component]:
    """Return the part of an earlier corpus that goes beside each corpus of `epochs`."""
    whole = sizes[replay.corpus].tokens
    taken = replay.share if replay.share is not None else (replay.tokens or whole) / whole
    if taken > 1:
        raise InputError(f"replay of {replay.tokens:.12g} tokens: {replay.corpus} has only {whole}")
    factors = dict.fromkeys(epochs, 1.0)
    if replay.scale_by is not None:
        counts = _counts({name: sizes[name] for name in epochs}, replay.scale_by, f"scale_by: {replay.scale_by}")
        factors = {name: count / max(counts.values()) for name, count in counts.items()}
    factors.update(replay.shares)
    return [
        Component(
            name=f"{replay.corpus} for {name}",
            corpus=replay.corpus,
            beside=name,
            part=taken * factors[name],
            tokens=whole * taken * factors[name],
            epochs=replay.epochs.get(name, epochs[name]),
        )
        for name in epochs
        if factors[name] > 0
    ]


def _counts(sizes: Mapping[str, Size], what: str, why: str) -> dict[str, float]:
    counts = {}
    for name, size in sizes.items():
        count = getattr(size, what)
        if count is None:
            raise InputError(f"the {what} of {name} are not known, and {why} needs them: give them in `sizes`")
        counts[name] = float(count)
    return counts


def _check_positive(numbers: Mapping[str, float], what: str) -> None:
    if not numbers:
        raise InputError("the mixture is empty")
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise InputError(f"{what} {number:g} of {name}: it has to be above 0")
