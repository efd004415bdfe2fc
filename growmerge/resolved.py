"""A mixture with all that it names filled in: what a run's key holds of it, and which corpora it reads.

Nothing is read here, and numpy is not needed: sizes come in with `growmerge.mixtures`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from growmerge.schema_mixture import AnyMixture, MixtureConfig, Replay, long_form


def resolved(name: str, mixtures: Mapping[str, AnyMixture]) -> dict[str, Any]:
    """Return a mixture as plain data that its order of samples follows from, the mixtures that it names filled in.

    A short form is its weights as they stand, which is what keys of pipeline files had before there was another.
    """
    mixture = mixtures[name]
    return _filled(mixture, mixtures) if isinstance(mixture, MixtureConfig) else dict(mixture)


def _filled(mixture: MixtureConfig, mixtures: Mapping[str, AnyMixture]) -> dict[str, Any]:
    # What is not given is left out: a key that mixtures get later changes none that do not use it.
    found: dict[str, Any] = _given(asdict(mixture))
    if mixture.weights:
        found["corpora"] = list(mixture.weights)  # a hash sorts keys, and the order of samples goes by theirs
    if mixture.part_of is not None:
        found["part_of"] = _filled(long_form(mixtures[mixture.part_of]), mixtures)
    if mixture.stages:
        found["stages"] = [
            {"from_step": stage.from_step, "mixture": _filled(long_form(mixtures[stage.mixture]), mixtures)}
            for stage in mixture.stages
        ]
    return found


def _given(value: Any) -> Any:
    """Return a value without the keys that are None or empty, at any depth; 0 is given."""
    if isinstance(value, Mapping):
        return {key: _given(part) for key, part in value.items() if part is not None and part not in ({}, (), [])}
    return [_given(part) for part in value] if isinstance(value, (list, tuple)) else value


def corpora_of(name: str, mixtures: Mapping[str, AnyMixture], *, steps: int | None = None) -> tuple[str, ...]:
    """Return the corpora and splits that a run on a mixture reads, replay included, in order of first use.

    Args:
        steps: of the run; what begins after its end is not read. All of it by default.
    """
    mixture = long_form(mixtures[name])
    if mixture.stages:
        begun = [stage for stage in mixture.stages if steps is None or stage.from_step < steps]
        return _once(corpus for stage in begun for corpus in corpora_of(stage.mixture, mixtures))
    whole = long_form(mixtures[mixture.part_of]) if mixture.part_of is not None else mixture
    text = mixture.corpora or tuple(mixture.weights)
    return _once((*text, *(replay.corpus for replay in whole.replay if _goes_beside(replay, text))))


def _goes_beside(replay: Replay, text: Iterable[str]) -> bool:
    """Return whether any of it is taken beside some corpus."""
    return any(replay.shares.get(corpus, 1) > 0 for corpus in text)


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
