"""The mixtures of a file: sizes of their corpora, what each consists of, and the order of samples that it gives."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from growmerge import rules_mixture
from growmerge.config import Marks
from growmerge.schema_mixture import AnyMixture, DataPlan, MixtureConfig, long_form
from train.data import component, mixing
from train.data.component import Component
from train.data.mixing import Size
from train.data.order import Mixture
from train.data.staged import Staged
from train.data.tokens import open_tokens


def read_sizes(plan: DataPlan, marks: Marks, base: Path) -> dict[str, Size]:
    """Return the sizes of corpora: those given in the file, then those prepared; all that the mixtures name.

    Raises:
        InputError: there is no such folder, or a corpus that is neither here nor there.
    """
    sizes: dict[str, Size] = {}
    if plan.folder is not None:
        folder = base / plan.folder
        if not folder.is_dir():
            raise marks.error("folder", f"no folder {plan.folder!r} in {base}: prepare the corpora, or give `sizes`")
        sizes = prepared_sizes(folder)
    sizes |= {name: Size(**asdict(size)) for name, size in plan.sizes.items()}
    for key, problem in rules_mixture.unknown(plan.mixtures, sizes):
        raise marks.error(key, problem)
    return sizes


def prepared_sizes(folder: Path) -> dict[str, Size]:
    """Return the sizes of the corpora in a folder by name, from what stands in their `<name>.json`.

    One of Megatron's tools has none: its index says the tokens and documents.

    Raises:
        InputError: a file that cannot be read.
    """
    sizes = {}
    for path in sorted(folder.glob("*.json")):
        about = read_json(path)
        # A corpus that was split has a file too, but is not there whole.
        if isinstance(about, dict) and isinstance(about.get("tokens"), int) and not about.get("splits"):
            sizes[path.stem] = _size(about)
    for path in sorted(folder.glob("*.idx")):
        if not path.with_suffix(".json").exists():
            sizes[path.stem] = _size(open_tokens(path.with_suffix("")).metadata)
    return sizes


def _size(about: Mapping[str, Any]) -> Size:
    return Size(tokens=about["tokens"], characters=about.get("characters"), documents=about.get("documents"))


def parts_of(
    name: str, mixtures: Mapping[str, AnyMixture], sizes: Mapping[str, Size], *, a_step: int
) -> tuple[Component, ...]:
    """Return what a mixture consists of, stages taken together.

    Args:
        a_step: tokens in a step, which stages are counted in.
    """
    mixture = long_form(mixtures[name])
    if mixture.stages:
        return component.one_after_the_other(stage_parts(mixture, mixtures, sizes, a_step=a_step))
    if mixture.part_of is not None:
        whole = parts_of(mixture.part_of, mixtures, sizes, a_step=a_step)
        return component.beside(whole, mixture.corpora)
    return mixing.components(mixture, sizes)


def stage_parts(
    mixture: MixtureConfig, mixtures: Mapping[str, AnyMixture], sizes: Mapping[str, Size], *, a_step: int
) -> list[tuple[Component, ...]]:
    """Return what each stage consists of; all but the last end where the next one starts."""
    parts = [parts_of(stage.mixture, mixtures, sizes, a_step=a_step) for stage in mixture.stages]
    for number, (stage, following) in enumerate(pairwise(mixture.stages)):
        parts[number] = component.for_tokens(parts[number], (following.from_step - stage.from_step) * a_step)
    return parts


def training_order(
    name: str,
    mixtures: Mapping[str, AnyMixture],
    sizes: Mapping[str, Size],
    wholes: Mapping[str, int],
    *,
    seed: int,
    global_batch: int,
) -> Mixture | Staged:
    """Return the order of samples of a mixture, long or short.

    Args:
        wholes: sequences that each corpus has, by name.

    Raises:
        InputError: see `train.data.component.order`.
    """
    mixture = long_form(mixtures[name])
    if not mixture.stages:
        return component.order(parts_of(name, mixtures, sizes, a_step=1), wholes, seed=seed)
    parts = stage_parts(mixture, mixtures, sizes, a_step=1)
    return Staged(
        starts=tuple(stage.from_step * global_batch for stage in mixture.stages),
        mixtures=tuple(component.order(one, wholes, seed=seed) for one in parts),
    )


def pipeline_order(
    name: str,
    mixtures: Mapping[str, AnyMixture],
    sizes: Mapping[str, Size],
    wholes: Mapping[str, int],
    *,
    seed: int,
    global_batch: int,
) -> Mixture | Staged:
    """Return the order of samples of a mixture of a pipeline file.

    Here it is decided that a short form keeps the default period, however small a share is, and its weights to the
    last bit: so it was before pipeline files had long forms, and what was trained then is still up to date.

    Args:
        wholes: sequences that each corpus has, by name.

    Raises:
        InputError: see `training_order`.
    """
    mixture = mixtures[name]
    if isinstance(mixture, MixtureConfig):
        return training_order(name, mixtures, sizes, wholes, seed=seed, global_batch=global_batch)
    counts = tuple(wholes[corpus] for corpus in mixture)
    return Mixture(names=tuple(mixture), weights=tuple(mixture.values()), sizes=counts, seed=seed)
