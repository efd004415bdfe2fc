"""Heat maps of merges by languages: coloured tables of the page, and figures for files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from growmerge.report import colours
from growmerge.report.colours import LEVELS
from growmerge.report.drawing import LETTER, PX, STYLE, Drawing, slug
from growmerge.report.tables import Cell, Table, rows
from growmerge.report.task_tables import best_of, shown, unit_name

WIDE, HIGH = 58, 20
"""A cell of a figure (CSS pixels)."""


def heat(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each heat map: title, the texts at both ends of its colours, and a table a group of its rows.

    The colours end at the 2nd and 98th percentile, so that a merge that failed does not make all others alike; they
    are the same in all groups. The best of a column in a group is bold.
    """
    found = []
    for n, one in enumerate(results.get("heat") or [], 1):
        low, high = ends(one)
        worst, best = (high, low) if one["less_is_better"] else (low, high)
        title = _title(one)
        about = {"title": title[:1].upper() + title[1:]}
        about |= {"worst": _in_unit(one, worst).text, "best": _in_unit(one, best).text}
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in one["rows"]:
            groups.setdefault(row["group"], []).append(row)
        tables = [
            _heat_table(one, group, members, f"heat-{n}-{i}") for i, (group, members) in enumerate(groups.items(), 1)
        ]
        found.append({**about, "tables": tables})
    return found


def _title(one: Mapping[str, Any]) -> str:
    """Return what a heat map shows, with the unit where the title does not begin with it."""
    title, unit = one["title"], one["unit"]
    return f"{unit_name(unit)}{title[len(unit) :]}" if title.startswith(unit) else f"{title}: {unit_name(unit)}"


def ends(one: Mapping[str, Any]) -> tuple[float, float]:
    """Return the values at which a heat map's colours end, the lower first."""
    known = [value for row in one["rows"] for value in row["values"] if value is not None]
    low, high = np.percentile(known, (2, 98)) if known else (0, 0)
    return float(low), float(high)


def level(one: Mapping[str, Any], value: float, low: float, high: float) -> int:
    """Return the colour of a value of a heat map, 0 the worst."""
    share = min(max((value - low) / (high - low), 0), 1) if high > low else 0.5
    return round((1 - share if one["less_is_better"] else share) * (LEVELS - 1))


def _in_unit(one: Mapping[str, Any], value: float | None, **also: Any) -> Cell:
    return shown(one["unit"], None if value is None else {"value": value}, **also)


def _heat_table(one: Mapping[str, Any], group: str, members: Sequence[Mapping[str, Any]], name: str) -> Table:
    low, high = ends(one)
    columns = [
        best_of(column, one["less_is_better"]) for column in zip(*(row["values"] for row in members), strict=True)
    ]
    found = []
    for row in members:
        cells = []
        for value, top in zip(row["values"], columns, strict=True):
            cell = _in_unit(one, value, best=value is not None and value == top)
            shade = None if value is None else level(one, value, low, high)
            cells.append(Cell(text=cell.text, value=cell.value, best=cell.best, level=shade))
        found.append([row["label"], *cells])
    return Table(
        name=f"{name}-{slug(group)}".rstrip("-"),
        caption=f"{group}: {_title(one)}" if group else _title(one),
        columns=["merge of", *one["columns"]],
        rows=rows(found),
    )


def drawings(results: Mapping[str, Any]) -> list[Drawing]:
    """Return a figure of each table of `heat`, of the same name."""
    return [_drawing(table) for one in heat(results) for table in one["tables"]]


def _drawing(table: Table) -> Drawing:
    cells = [row[1:] for row in table.rows]
    labels, columns = [row[0].text for row in table.rows], table.columns[1:]
    left = 16 + LETTER * max(map(len, labels))
    top = 34 + 16 + 0.6 * LETTER * max(map(len, columns))
    width, height = left + WIDE * len(columns) + 60, top + HIGH * len(cells) + 10
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(width * PX, height * PX))
        inside = (left / width, 10 / height, WIDE * len(columns) / width, HIGH * len(cells) / height)
        axes = figure.add_axes(inside)
        levels = [[np.nan if cell.level is None else cell.level for cell in row] for row in cells]
        palette = ListedColormap([colour for colour, _ in colours.heat()])
        axes.pcolormesh(np.array(levels), cmap=palette, vmin=-0.5, vmax=LEVELS - 0.5, edgecolors="white", linewidth=1)
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=35, ha="left", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(cells)) + 0.5, labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.text(8 / width, 1 - 18 / height, table.caption, fontsize=11)
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                ink = colours.INK if cell.level is None else colours.heat()[cell.level][1]
                weight = "bold" if cell.best else "normal"
                axes.text(x + 0.5, y + 0.5, cell.text, color=ink, ha="center", va="center", fontsize=9, weight=weight)
    best = "; ".join(
        f"{column}: {labels[y]} {row[x].text}"
        for x, column in enumerate(columns)
        for y, row in enumerate(cells)
        if row[x].best
    )
    return Drawing(name=table.name, label=f"Heat map, {table.caption}. The best by column: {best}", figure=figure)
