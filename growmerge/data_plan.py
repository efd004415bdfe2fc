"""`growmerge data plan`: what each mixture of a file comes to, in tokens, epochs, sequences and steps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from growmerge.config import Marks, load_file, load_pipeline
from growmerge.lengths import with_sizes
from growmerge.mixtures import parts_of, read_sizes
from growmerge.overlay import EXTENDS
from growmerge.schema_mixture import DataPlan, MixtureConfig, long_form
from parallel.document import read_document
from parallel.errors import InputError
from train.data import component
from train.data.component import Component
from train.data.mixing import Size

WIDTH = 1000
"""Columns that a table may have, whatever the terminal: nothing of it is cut."""
EVERYTHING = "all"
"""The row that sums a mixture up."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a corpus of a mixture comes to, the replay beside it included; or all of the mixture."""

    characters: int | None
    """In the corpus, each counted once; None where they are not known."""
    unique: int
    """Tokens in the corpus, each counted once."""
    epochs: float | None
    """How often it is seen; None for all of several corpora."""
    seen: int
    """Tokens seen of it."""
    replay: Mapping[str, int]
    """Tokens seen of earlier text beside it, by corpus."""
    replay_share: float
    """Share of the replay in all tokens seen."""
    sequences: int
    """Seen in all, replay included."""
    steps: int
    """What sees them, the last batch filled up."""
    steps_by_epoch: int | None
    """The same if the last batch of every epoch is filled up; None for several corpora and for stages."""


def print_data_plan(path: Path, *, as_json: bool) -> None:
    """Print what the mixtures of a file come to, as tables or as JSON.

    Raises:
        InputError: a wrong file, or mixtures that cannot be; the line names file and line.
    """
    plan, marks = load_data_plan(path)
    found = plan_mixtures(plan, marks, base=path.absolute().parent)
    if as_json:
        mixtures = {name: {row: asdict(rows[row]) for row in rows} for name, rows in found.items()}
        about = {"sequence_length": plan.sequence_length, "global_batch": plan.global_batch}
        print(json.dumps({**about, "mixtures": mixtures}, indent=1, ensure_ascii=False))
        return
    console = Console(width=WIDTH, markup=False, highlight=False, emoji=False)
    for name, rows in found.items():
        console.print(_table(name, rows))
    a_step = f"{plan.global_batch:,} sequences of {plan.sequence_length:,} tokens"
    console.print(f"A step has {a_step}. By epoch: the steps if every epoch's last batch is filled up.")


def load_data_plan(path: Path) -> tuple[DataPlan, Marks]:
    """Read a file for `growmerge data plan`, or what a pipeline file says of the same.

    Raises:
        InputError: a wrong file, with its line.
    """
    keys = read_document(path).value
    if not isinstance(keys, dict) or keys.keys().isdisjoint(("stages", EXTENDS)):
        return load_file(DataPlan, path)
    pipeline, marks = load_pipeline(path)
    if pipeline.prepared is None:
        raise InputError(f"{path}: has no `prepared`: the sizes of its corpora are not known before the run")
    pipeline = with_sizes(pipeline, path.absolute().parent)
    training = pipeline.training
    return DataPlan(
        sizes=pipeline.prepared.sizes if pipeline.prepared else {},
        mixtures=pipeline.mixtures,
        sequence_length=training.sequence_length,
        global_batch=training.global_batch,
    ), marks


def plan_mixtures(plan: DataPlan, marks: Marks, *, base: Path) -> dict[str, dict[str, Row]]:
    """Return the rows of each mixture by corpus, `all` last.

    Args:
        base: the folder of the file, which `folder` in it is relative to.

    Raises:
        InputError: an unknown corpus, a size that is needed and not known, a mixture too small for one sequence.
    """
    sizes = read_sizes(plan, marks, base)
    found = {}
    for name, mixture in plan.mixtures.items():
        with marks.within(f"mixtures.{name}"):
            parts = parts_of(name, plan.mixtures, sizes, a_step=plan.global_batch * plan.sequence_length)
        if long_form(mixture).sampling is not None:
            _check_large_enough(name, long_form(mixture), parts, plan.sequence_length, marks)
        found[name] = _rows(parts, sizes, plan, staged=bool(long_form(mixture).stages))
    return found


def _check_large_enough(
    name: str, mixture: MixtureConfig, parts: Sequence[Component], length: int, marks: Marks
) -> None:
    """Check that what is seen of each corpus makes a sequence, which is what is drawn."""
    where, short = f"mixtures.{name}", f"less than one sequence of {length}"
    for part in parts:
        if part.replayed and part.tokens < length:
            number = [replay.corpus for replay in mixture.replay].index(part.corpus)
            what = f"{part.tokens:.0f} tokens of {part.corpus} go beside {part.beside}, {short}"
            raise marks.error(f"{where}.replay.{number}", f"{what}: take more, or none by a share of 0")
        if part.tokens < length:
            raise marks.error(where, f"{part.corpus} has {part.tokens:.0f} tokens, {short}")
        if not part.replayed and part.seen < length:
            key = "budget_characters" if mixture.sampling == "unimax" else "budget_tokens"
            given = f"{getattr(mixture, key):.12g} is too small: " if getattr(mixture, key) else ""
            raise marks.error(f"{where}.{key}", f"{given}{part.seen:.0f} tokens of {part.corpus} are seen, {short}")


def _rows(parts: Sequence[Component], sizes: Mapping[str, Size], plan: DataPlan, *, staged: bool) -> dict[str, Row]:
    names = tuple(dict.fromkeys(part.beside for part in parts))
    rows = {name: _row(component.beside(parts, [name]), sizes, plan, staged=staged) for name in names}
    if len(names) > 1:
        rows[EVERYTHING] = _row(parts, sizes, plan, staged=staged)
    return rows


def _row(parts: Sequence[Component], sizes: Mapping[str, Size], plan: DataPlan, *, staged: bool) -> Row:
    text = [part for part in parts if not part.replayed]
    replay: dict[str, float] = {}
    for part in (part for part in parts if part.replayed):
        replay[part.corpus] = replay.get(part.corpus, 0) + part.seen
    characters = [sizes[part.corpus].characters for part in text]
    alone, shape = len(text) == 1, (plan.sequence_length, plan.global_batch)
    return Row(
        characters=None if None in characters else sum(count or 0 for count in characters),
        unique=round(sum(part.tokens for part in text)),
        epochs=text[0].epochs if alone else None,
        seen=round(sum(part.seen for part in text)),
        replay={corpus: round(tokens) for corpus, tokens in replay.items()},
        replay_share=sum(replay.values()) / sum(part.seen for part in parts),
        sequences=component.sequences(parts, plan.sequence_length),
        steps=component.steps(parts, *shape),
        steps_by_epoch=component.steps_by_epoch(parts, *shape) if alone and not staged else None,
    )


def _table(name: str, rows: Mapping[str, Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    corpora = tuple(dict.fromkeys(corpus for row in rows.values() for corpus in row.replay))
    table.add_column(name, no_wrap=True)
    heads = ["characters", "unique", "epochs", "seen", *(f"replay {corpus}" for corpus in corpora)]
    for head in [*heads, *(["replay"] if corpora else []), "sequences", "steps", "by epoch"]:
        table.add_column(head, justify="right", no_wrap=True)
    for corpus, row in rows.items():
        cells: list[Any] = [_units(row.characters), _units(row.unique)]
        cells += ["" if row.epochs is None else f"{row.epochs:.3f}", _units(row.seen)]
        cells += [_units(row.replay.get(other, 0)) for other in corpora]
        cells += [f"{row.replay_share:.2%}"] if corpora else []
        cells += [f"{row.sequences:,}", f"{row.steps:,}"]
        table.add_row(corpus, *cells, "" if row.steps_by_epoch is None else f"{row.steps_by_epoch:,}")
    return table


def _units(number: int | None) -> str:
    """Return a count with three decimals: 1493719040 -> 1.494B."""
    if number is None:
        return "?"
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3f}{unit}"
    return str(number)
