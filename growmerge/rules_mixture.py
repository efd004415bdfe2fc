"""What the keys of mixtures can be, and what they owe each other; in the manner of `growmerge.rules`."""

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

from growmerge.rules import ABOVE_0, FROM_0, FROM_1, Problem, Range
from growmerge.schema_mixture import AnyMixture, CorpusSize, DataPlan, MixtureConfig, Replay, StageOfMixtures
from parallel.errors import one_of

SHARE = Range(above=0, at_most=1)

RANGES: Mapping[type, Mapping[str, Range]] = {
    Replay: {"share": SHARE, "tokens": FROM_1},
    StageOfMixtures: {"from_step": FROM_0},
    MixtureConfig: {
        "temperature": ABOVE_0,
        "budget_characters": ABOVE_0,
        "budget_tokens": ABOVE_0,
        "max_epochs": FROM_1,
    },
    CorpusSize: {"tokens": FROM_1, "characters": FROM_1, "documents": FROM_1},
    DataPlan: {"sequence_length": FROM_1, "global_batch": FROM_1},
}

NEEDED: Mapping[str, tuple[str, ...]] = {
    "unimax": ("corpora", "budget_characters", "max_epochs"),
    "temperature": ("corpora", "temperature"),
    "weights": ("weights",),
    "part_of": ("corpora",),
    "stages": (),
}
"""By kind of mixture: the keys that it needs."""
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "unimax": ("sampling", "replay"),
    "temperature": ("sampling", "budget_tokens", "replay"),
    "weights": ("sampling", "budget_tokens", "replay"),
    "part_of": ("part_of",),
    "stages": ("stages",),
}
"""By kind of mixture: the keys that it may have beside those."""


def replay(replay: Replay) -> Iterator[Problem]:
    if (replay.share is None) == (replay.tokens is None):
        yield "", "give either `share` or `tokens`: how much of the corpus is taken"
    for name, share in replay.shares.items():
        if not 0 <= share <= 1:
            yield f"shares.{name}", f"{share:g} is out of range: allowed is at least 0 and at most 1"
    for name, epochs in replay.epochs.items():
        if epochs <= 0:
            yield f"epochs.{name}", f"{epochs:g} is out of range: allowed is above 0"


def mixture(mixture: MixtureConfig) -> Iterator[Problem]:
    kinds = [name for name in ("sampling", "part_of", "stages") if getattr(mixture, name)]
    if len(kinds) != 1:
        yield "", f"a mixture has exactly one of sampling, part_of, stages; given: {' and '.join(kinds) or 'none'}"
        return
    kind = mixture.sampling or kinds[0]
    for name in NEEDED[kind]:
        if not getattr(mixture, name):
            yield "", f"{kind} needs `{name}`"
    for name in vars(mixture):
        if getattr(mixture, name) and name not in (*NEEDED[kind], *ALLOWED[kind]):
            yield name, f"has no meaning with {kind}"
    for number, name in enumerate(mixture.corpora):
        if name in mixture.corpora[:number]:
            yield f"corpora.{number}", f"{name} is given twice"
    yield from _weights(mixture.weights, "weights.")
    names = mixture.corpora or tuple(mixture.weights)
    for number, one in enumerate(mixture.replay):
        for key in ("shares", "epochs"):
            for name in getattr(one, key):
                if name not in names:
                    yield f"replay.{number}.{key}.{name}", one_of("corpus of the mixture", name, names)
        if one.corpus in [other.corpus for other in mixture.replay[:number]]:
            yield f"replay.{number}.corpus", f"{one.corpus} is given twice"
    if mixture.stages and mixture.stages[0].from_step != 0:
        yield "stages.0.from_step", f"{mixture.stages[0].from_step} is not the first step: the first stage starts at 0"
    for number, (before, stage) in enumerate(pairwise(mixture.stages), start=1):
        if stage.from_step <= before.from_step:
            where = f"which starts at {before.from_step}"
            yield f"stages.{number}.from_step", f"{stage.from_step} is not after the stage before it, {where}"


def plan(plan: DataPlan) -> Iterator[Problem]:
    if not plan.mixtures:
        yield "mixtures", "none is given"
    for name, one in plan.mixtures.items():
        if not isinstance(one, MixtureConfig):
            if not one:
                yield f"mixtures.{name}", "the mixture is empty: give weights of corpora, such as {eng: 1}"
            yield from _weights(one, f"mixtures.{name}.")
    yield from named(plan.mixtures)


def named(mixtures: Mapping[str, AnyMixture]) -> Iterator[Problem]:
    """Find mixtures that name others which are not there, or not of the kind that can be named."""
    for name, one in mixtures.items():
        if not isinstance(one, MixtureConfig):
            continue
        others = [(f"mixtures.{name}.stages.{i}.mixture", stage.mixture) for i, stage in enumerate(one.stages)]
        if one.part_of is not None:
            others.append((f"mixtures.{name}.part_of", one.part_of))
        for key, other in others:
            if other not in mixtures:
                yield key, one_of("mixture", other, mixtures)
                continue
            found = mixtures[other]
            if isinstance(found, MixtureConfig) and (found.stages or (found.part_of and one.part_of)):
                yield key, f"{other} is {'in stages' if found.stages else 'a part'} itself: name a mixture that is not"


def unknown(mixtures: Mapping[str, AnyMixture], known: Collection[str]) -> Iterator[Problem]:
    """Find the corpora of mixtures that are not known."""
    for name, one in mixtures.items():
        if not isinstance(one, MixtureConfig):
            places = {f"mixtures.{name}.{corpus}": corpus for corpus in one}
        else:
            places = {f"mixtures.{name}.weights.{corpus}": corpus for corpus in one.weights}
            places |= {f"mixtures.{name}.corpora.{i}": corpus for i, corpus in enumerate(one.corpora)}
            places |= {f"mixtures.{name}.replay.{i}.corpus": part.corpus for i, part in enumerate(one.replay)}
        for key, corpus in places.items():
            if corpus not in known:
                yield key, one_of("corpus", corpus, known)


def _weights(weights: Mapping[str, float], before: str) -> Iterator[Problem]:
    for name, weight in weights.items():
        if weight <= 0:
            yield f"{before}{name}", f"{weight:g} is not a weight: allowed is above 0"


RULES: Mapping[type, Callable[[Any], Iterator[Problem]]] = {Replay: replay, MixtureConfig: mixture, DataPlan: plan}
