"""How long a run is that sees all that its mixture comes to, from the sizes of prepared corpora.

What needs numpy is imported where it is used: most pipelines have no prepared corpora, and a mistake is told at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from growmerge.resolved import corpora_of
from growmerge.rules_pipeline import parts
from growmerge.schema import Pipeline
from growmerge.schema_mixture import CorpusSize, long_form
from growmerge.schema_training import Training

if TYPE_CHECKING:
    from train.data.mixing import Size


def with_sizes(pipeline: Pipeline, base: Path) -> Pipeline:
    """Return a pipeline whose prepared corpora have the sizes that they have in their folder; those given otherwise.

    Args:
        base: the folder of the pipeline file.
    """
    prepared = pipeline.prepared
    if prepared is None or not (base / prepared.folder).is_dir():
        return pipeline
    from growmerge.mixtures import prepared_sizes

    there = prepared_sizes(base / prepared.folder)
    sizes = {name: CorpusSize(**asdict(there[name])) for name in prepared_parts(pipeline) if name in there}
    return replace(pipeline, prepared=replace(prepared, sizes={**prepared.sizes, **sizes}))


def prepared_parts(pipeline: Pipeline) -> list[str]:
    """Return the corpora and splits that are in the prepared folder, or will be: those without sources of their own."""
    return [name for name in parts(pipeline) if not pipeline.corpora[name.partition(".")[0]].sources]


def known_sizes(pipeline: Pipeline) -> Mapping[str, "Size"]:
    """Return the sizes of prepared corpora and splits by name."""
    from train.data.mixing import Size

    prepared = pipeline.prepared
    return {name: Size(**asdict(size)) for name, size in prepared.sizes.items()} if prepared else {}


def steps_of(pipeline: Pipeline, name: str, training: Training) -> int | None:
    """Return the steps of a run that sees a mixture once, as often as it repeats its corpora; None if sizes lack."""
    from growmerge.mixtures import parts_of
    from train.data import component

    sizes = known_sizes(pipeline)
    if name not in pipeline.mixtures or any(corpus not in sizes for corpus in _needed(name, pipeline)):
        return None
    a_step = training.global_batch * training.sequence_length
    found = parts_of(name, pipeline.mixtures, sizes, a_step=a_step)
    return component.steps(found, training.sequence_length, training.global_batch)


def _needed(name: str, pipeline: Pipeline) -> set[str]:
    """Return the corpora whose sizes a mixture goes by: those that it reads, and those of a mixture that it is of."""
    mixture = long_form(pipeline.mixtures[name])
    others = [stage.mixture for stage in mixture.stages] + ([mixture.part_of] if mixture.part_of else [])
    return {*corpora_of(name, pipeline.mixtures)}.union(*(_needed(other, pipeline) for other in others))
