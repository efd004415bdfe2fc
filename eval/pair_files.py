"""Minimal pairs from files and data sets, whose columns may have any names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.pairs import Pair
from eval.records import Record, records_of
from parallel.errors import InputError, one_of

SIDES = (("sentence_good", "sentence_bad"), ("sen", "wrong_sen"), ("good", "bad"))
"""Columns of BLiMP, of MultiBLiMP and of our own: what is looked for where none are named."""
GROUPS = ("UID", "phenomenon")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns hold what."""

    good: str | None = None
    bad: str | None = None
    phenomenon: str | None = None
    """What a pair is counted under; the file's name where there is no such column."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Rows that count: those with these values, such as `{language: swe}`."""


def read_pair_files(paths: Iterable[Path], columns: Columns) -> list[Pair]:
    """Read the pairs of files, in their order.

    Raises:
        InputError: a file that cannot be read, a column that it lacks, a cell that holds no text, or no row at all.
    """
    return [pair for path in paths for pair in pairs_of(records_of(path), columns, name=path.stem, where=str(path))]


def pairs_of(records: Iterable[Record], columns: Columns, *, name: str, where: str) -> list[Pair]:
    """Make pairs of rows.

    Args:
        name: what pairs are counted under where no column says it.
        where: what messages call the rows as a whole.

    Raises:
        InputError: as `read_pair_files`.
    """
    found: list[Pair] = []
    seen: dict[str, set[str]] = {column: set() for column in columns.where}
    rows = 0
    for place, record in records:
        rows += 1
        if rows == 1:
            good, bad, group = _chosen(columns, record, place)
        for column in columns.where:
            seen[column].add(str(record.get(column)))
        if any(str(record.get(column)) != value for column, value in columns.where.items()):
            continue
        kind = name if group is None else str(record.get(group))
        pair = Pair(good=_text(record, good, place), bad=_text(record, bad, place), kind=kind)
        if pair.good == pair.bad:
            raise InputError(f"{place}: {good} and {bad} are the same sentence")
        found.append(pair)
    if not rows:
        raise InputError(f"{where}: holds no pairs")
    if not found:
        for column, value in columns.where.items():
            if value not in seen[column]:
                raise InputError(f"{where}: {one_of(column, value, sorted(seen[column]))}")
        raise InputError(f"{where}: no row is all of {dict(columns.where)}")
    return found


def _chosen(columns: Columns, record: Mapping[str, Any], place: str) -> tuple[str, str, str | None]:
    """Return the columns of both sentences and of the phenomenon."""
    names = [*record]
    asked = [columns.good, columns.bad, columns.phenomenon, *columns.where]
    for name in asked:
        if name is not None and name not in record:
            raise InputError(f"{place}: {one_of('column', name, names)}")
    good, bad = columns.good, columns.bad
    if good is None or bad is None:
        sides = next((pair for pair in SIDES if {*pair} <= record.keys()), None)
        if sides is None:
            known = ", ".join(" and ".join(pair) for pair in SIDES)
            raise InputError(
                f"{place}: which columns hold the sentences? Name them as good and bad: there are {', '.join(names)} "
                f"(found by themselves are {known})"
            )
        good, bad = good or sides[0], bad or sides[1]
    return good, bad, columns.phenomenon or next((name for name in GROUPS if name in record), None)


def _text(record: Mapping[str, Any], column: str, place: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {column} holds no text ({value!r})")
    return value
