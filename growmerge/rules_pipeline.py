"""What the keys of a pipeline file owe each other; in the manner of `growmerge.rules`, which it adds to."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from growmerge import rules_mixture
from growmerge.rules import NAME, Problem
from growmerge.schema import OWN_TASKS, Pipeline
from growmerge.schema_mixture import MixtureConfig, long_form
from parallel.errors import one_of


def pipeline(pipeline: Pipeline) -> Iterator[Problem]:
    if not NAME.fullmatch(pipeline.name):
        yield "name", f"{pipeline.name!r} cannot be a name: it becomes a folder; use letters, digits and . _ + -"
    for key in ("corpora", "mixtures", "stages"):
        if not getattr(pipeline, key):
            yield key, "language without text: no corpus is given" if key == "corpora" else "none is given"
    for language, corpus in pipeline.corpora.items():
        if not corpus.sources and pipeline.prepared is None:
            yield f"corpora.{language}", "language without text: no `sources`, and no `prepared` folder to find it in"
        if not re.fullmatch(r"[\w-]+", language):
            yield f"corpora.{language}", f"{language!r} cannot be a language's code: use letters, digits, - and _"
    for language in pipeline.tokenizer.train_on:
        if language not in pipeline.corpora:
            yield "tokenizer.train_on", f"language without text: {one_of('corpus', language, pipeline.corpora)}"
    yield from _mixtures(pipeline)
    if pipeline.prepared is not None and pipeline.tokenizer.path is None:
        yield "prepared", "the text is tokenised: it needs `tokenizer.path`, the tokenizer that it was prepared with"
    for name in pipeline.prepared.sizes if pipeline.prepared else ():
        if name not in (known := parts(pipeline)):
            yield f"prepared.sizes.{name}", one_of("corpus or split", name, known)
    window = pipeline.evaluation.window or pipeline.training.sequence_length
    if pipeline.evaluation.stride and pipeline.evaluation.stride >= window:
        yield "evaluation.stride", f"{pipeline.evaluation.stride} is not shorter than the window of {window} tokens"
    for name in pipeline.evaluation.tasks:
        if not NAME.fullmatch(name):
            yield f"evaluation.tasks.{name}", f"{name!r} cannot be a name: use letters, digits and . + - _"
        if name in (f"{own}-{language}" for own in OWN_TASKS.values() for language in pipeline.corpora):
            yield f"evaluation.tasks.{name}", f"{name!r} is what the pipeline itself asks: give it another name"


def _mixtures(pipeline: Pipeline) -> Iterator[Problem]:
    """What mixtures name is there: corpora, splits of them, other mixtures."""
    for name, mixture in pipeline.mixtures.items():
        if isinstance(mixture, MixtureConfig):
            yield from rules_mixture.unknown({name: mixture}, parts(pipeline))
        else:
            yield from _weights(pipeline, name, mixture)
    yield from rules_mixture.named(pipeline.mixtures)
    for name, mixture in pipeline.mixtures.items():
        if isinstance(mixture, MixtureConfig) and mixture.part_of is not None:
            whole = long_form(pipeline.mixtures[mixture.part_of])
            there = whole.corpora or tuple(whole.weights)
            for number, corpus in enumerate(mixture.corpora):
                if corpus not in there:
                    yield f"mixtures.{name}.corpora.{number}", one_of(f"corpus of {mixture.part_of}", corpus, there)


def parts(pipeline: Pipeline) -> list[str]:
    """Return all that a mixture may name as a corpus: `eng`, `eng.first`."""
    return [
        name
        for language, corpus in pipeline.corpora.items()
        for name in (language, *(f"{language}.{split}" for split in corpus.splits))
    ]


def _weights(pipeline: Pipeline, name: str, weights: Mapping[str, float]) -> Iterator[Problem]:
    """A short form's names are corpora and splits of them, its weights positive."""
    if not weights:
        yield f"mixtures.{name}", "the mixture is empty: give weights of corpora, such as {eng: 1}"
    for part, weight in weights.items():
        language, dot, split = part.partition(".")
        where = f"mixtures.{name}.{part}"
        if language not in pipeline.corpora:
            yield where, f"language without text: {one_of('corpus', language, pipeline.corpora)}"
        elif dot and split not in pipeline.corpora[language].splits:
            yield where, one_of(f"split of {language}", split, pipeline.corpora[language].splits)
        if weight <= 0:
            yield where, f"{weight:g} is not a weight: allowed is above 0"


RULES: Mapping[type, Callable[[Any], Iterator[Problem]]] = {Pipeline: pipeline}
