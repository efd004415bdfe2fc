"""What the keys of `growmerge data prepare` can be, and what they owe each other; as `growmerge.rules`."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from growmerge import rules
from growmerge.rules import FROM_0, FROM_1, Problem, Range
from growmerge.schema_clean import Clean
from growmerge.schema_data import DataConfig, DataCorpus, DataHeldOut, DataSource

RANGES: Mapping[type, Mapping[str, Range]] = {
    DataSource: {"min_words": FROM_1},
    DataHeldOut: {"share": Range(at_least=0, below=1), "max_bytes": FROM_1},
    DataConfig: {"seed": FROM_0, "workers": FROM_1},
}


def source(source: DataSource) -> Iterator[Problem]:
    if source.hub is None:
        if source.files is None and source.package is None:
            yield "", "no text: it needs `hub`, `files` (a glob) or `package`"
        yield from rules.text_source(source)
        for name in ("config", "revision", "data_files"):
            if getattr(source, name):
                yield name, "has a meaning for a `hub` source alone"
        return
    for name in ("files", "package", "reader", "untranslated", "sha256", "python_version"):
        if getattr(source, name) is not None:
            yield name, "has no meaning beside `hub`: a source is one of hub, files, package"


def corpus(corpus: DataCorpus) -> Iterator[Problem]:
    yield from rules.corpus(corpus)  # type: ignore[arg-type]  # it has the same fields


def config(config: DataConfig) -> Iterator[Problem]:
    if not config.corpora:
        yield "corpora", "none is given"
    for language in config.corpora:
        if not re.fullmatch(r"[\w-]+", language):
            yield f"corpora.{language}", f"{language!r} cannot be a language's code: use letters, digits, - and _"


def clean(options: Clean) -> Iterator[Problem]:
    from train.data.clean import problems  # numpy, which a pipeline file is read without

    yield from problems(options)


RULES: Mapping[type, Callable[[Any], Iterator[Problem]]] = {
    DataSource: source,
    DataCorpus: corpus,
    DataConfig: config,
    Clean: clean,
}
