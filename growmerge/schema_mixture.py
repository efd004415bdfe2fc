"""The keys of a mixture, as frozen dataclasses, and those of a file that `growmerge data plan` reads.

A mixture is written short, as weights by corpus (`{swe: 0.9, eng.first: 0.1}`), or long, as a `MixtureConfig`: long if
any of its keys is a key of `MixtureConfig`. So a corpus that is called like one of those keys needs the long form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Sampling = Literal["unimax", "temperature", "weights"]
Count = Literal["documents", "tokens", "characters"]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Text of an earlier stage, mixed in beside the text of each corpus of a mixture."""

    corpus: str
    """Corpus or split that it is taken from, such as `eng.first`."""
    share: float | None = None
    """Share of it that is taken: a random part, the same in every epoch and at every run of the same seed."""
    tokens: float | None = None
    """Instead of `share`: how many tokens are taken."""
    scale_by: Count | None = None
    """Which count the part goes by: the corpus with most of it has all that is taken beside it, each other one a part
    of that in proportion. All have all of it by default."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """By corpus: the share of what is taken that goes beside it, instead of what `scale_by` says; 0 for none."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """By corpus: how often what goes beside it is seen; by default as often as its text."""


@dataclass(frozen=True, kw_only=True)
class StageOfMixtures:
    """A mixture that holds from a step on."""

    from_step: int
    """First step, counted from 0."""
    mixture: str
    """Name of a mixture without stages."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """What a run is trained on: exactly one of `sampling`, `part_of` and `stages`."""

    sampling: Sampling | None = None
    """How often each corpus is seen. unimax: equal shares of a budget up to a number of epochs (arXiv 2304.09151);
    temperature: in proportion to tokens ** (1 / T); weights: as given."""
    corpora: tuple[str, ...] = ()
    """unimax, temperature: the corpora or splits. part_of: which of the other mixture's."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """weights: shares by corpus; they need not add up to 1."""
    temperature: float | None = None
    """temperature: T; 1 is in proportion to size, the larger the more even."""
    budget_characters: float | None = None
    """unimax: characters that are seen in all, repetitions counted, replay not."""
    max_epochs: float | None = None
    """unimax: how often a corpus is seen at most."""
    budget_tokens: float | None = None
    """temperature, weights: tokens that are seen in all, replay not counted; by default as many as the corpora have."""
    replay: tuple[Replay, ...] = ()
    """Text of earlier stages, seen beside that of the corpora."""
    part_of: str | None = None
    """Another mixture, of which only some `corpora` are taken: seen as often as there, with their replay."""
    stages: tuple[StageOfMixtures, ...] = ()
    """Mixtures that start at a step, the first at 0."""


AnyMixture = Mapping[str, float] | MixtureConfig
"""A mixture in the short or the long form."""


def long_form(mixture: AnyMixture) -> MixtureConfig:
    """Return a mixture in its long form."""
    if isinstance(mixture, MixtureConfig):
        return mixture
    return MixtureConfig(sampling="weights", weights=mixture)


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """How large a corpus is that is not prepared yet."""

    tokens: int
    characters: int | None = None
    """Needed by unimax."""
    documents: int | None = None
    """Needed by `scale_by: documents`."""


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """A file for `growmerge data plan`."""

    folder: str | None = None
    """Folder of prepared corpora, relative to this file; sizes are those in its `<corpus>.json` files."""
    sizes: Mapping[str, CorpusSize] = field(default_factory=dict)
    """Sizes of corpora (`swe`) and splits (`eng.first`) that are not in the folder; they go before the folder's."""
    mixtures: Mapping[str, AnyMixture]
    """Mixtures by name, long or short."""
    sequence_length: int = 2048
    """Tokens in a sample."""
    global_batch: int = 8
    """Samples a step, over all ranks."""
