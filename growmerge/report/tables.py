"""What a table of the report is: the page, the markdown and the CSV files show the same cells."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

NONE = "–"
TALL = 40
"""Rows above which a table scrolls under its header."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    text: str
    value: float | None = None
    """The number that the text is short for."""
    low: float | None = None
    high: float | None = None
    """The ends of its interval."""
    best: bool = False
    span: int = 1
    """Columns that the cell takes."""
    level: int | None = None
    """Its colour in a heat map (`growmerge.report.colours.heat`)."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under a header; the first cell of a row is its header."""

    name: str
    """Of its file: lower-case letters, digits and hyphens; no other table's."""
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    groups: Sequence[tuple[str, int]] = ()
    """A line above the header: a text and the columns that it takes."""
    breaks: frozenset[int] = frozenset()
    """Rows that begin a new part of the table."""
    words: frozenset[int] = frozenset({0})
    """Columns that hold words; the others hold numbers."""

    @property
    def starts(self) -> set[int]:
        """Columns that begin a group."""
        return {sum(span for _, span in self.groups[:i]) for i in range(1, len(self.groups))}

    @property
    def parts(self) -> list[Sequence[Sequence[Cell]]]:
        """The rows of each part: sorting leaves them in it."""
        cuts = [0, *sorted(at for at in self.breaks if 0 < at < len(self.rows)), len(self.rows)]
        return [self.rows[start:end] for start, end in pairwise(cuts)]

    @property
    def heads(self) -> list[str]:
        """The columns' names with those of their groups."""
        groups = [text for text, span in self.groups for _ in range(span)] or [""] * len(self.columns)
        return [f"{group} {column}" if group else column for group, column in zip(groups, self.columns, strict=True)]

    @property
    def heat(self) -> bool:
        return any(cell.level is not None for row in self.rows for cell in row)

    @property
    def tall(self) -> bool:
        return len(self.rows) > TALL


def rows(found: Iterable[Iterable[str | Cell]]) -> list[list[Cell]]:
    """Return rows whose texts are cells, too."""
    return [[Cell(text=one) if isinstance(one, str) else one for one in row] for row in found]


def number(value: float | None, form: str = ",.0f") -> Cell:
    """Return a cell with a number in a format of Python's."""
    return Cell(text=NONE) if value is None else Cell(text=format(value, form), value=value)


def bits(found: Mapping[str, Any] | None, *, best: bool = False, span: int = 1) -> Cell:
    """Return a cell with an estimate without its interval."""
    if found is None:
        return Cell(text=NONE, span=span)
    return Cell(text=f"{found['value']:z.3f}", value=found["value"], best=best, span=span)


def estimate(
    found: Mapping[str, Any] | None, digits: int = 3, *, factor: float = 1, sign: bool = False, best: bool = False
) -> Cell:
    """Return a cell with an estimate: `2.314 [2.290, 2.338]`, or the value alone where it has no interval."""
    if found is None or found["value"] is None:
        return Cell(text=NONE)
    value, low, high = (None if (end := found.get(key)) is None else factor * end for key in ("value", "low", "high"))
    form = f"{'+' if sign else ''}z.{digits}f"
    text = format(value, form)
    if low is not None and high is not None:
        text += f" [{format(low, form)}, {format(high, form)}]"
    return Cell(text=text, value=value, low=low, high=high, best=best)


def percent(found: Mapping[str, Any] | None, **also: Any) -> Cell:
    """Return a cell with a share as percent, with its interval."""
    return estimate(found, 1, factor=100, **also)


def least(found: Iterable[Mapping[str, Any] | None]) -> float | None:
    """Return the least value of estimates; None if there is none."""
    return min((one["value"] for one in found if one is not None), default=None)


def count(value: float | None) -> str:
    return number(value).text


def si(value: float) -> str:
    """Return a large number in short: `1.2e+15` as `1.20 P`."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {prefix}"
    return f"{value:.0f}"


def short(value: float | None) -> Cell:
    """Return a cell with a large number in short."""
    return Cell(text=NONE) if value is None else Cell(text=si(value), value=value)


def csv_file(table: Table) -> bytes:
    """Return a table as CSV (RFC 4180): numbers in full, and the ends of intervals in columns of their own."""
    spread = [[cell for cell in row for _ in range(cell.span)] for row in table.rows]
    ends = [any(row[i].low is not None for row in spread) for i in range(len(table.columns))]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    suffixes = [("", " low", " high") if wide else ("",) for wide in ends]
    writer.writerow([_safe(head) + end for head, own in zip(table.heads, suffixes, strict=True) for end in own])
    for row in spread:
        found: list[float | str] = []
        for cell, wide in zip(row, ends, strict=True):
            found.append(_safe(cell.text) if cell.value is None else cell.value)
            found += ["" if end is None else end for end in ((cell.low, cell.high) if wide else ())]
        writer.writerow(found)
    return out.getvalue().encode()


def _safe(text: str) -> str:
    """Return text that no spreadsheet takes for a formula."""
    if text == NONE:
        return ""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
