"""The report without its figures as GitHub's markdown: the same numbers as the page."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from growmerge.report.tables import Table


def markdown(content: Mapping[str, Any]) -> str:
    """Return what the page shows, as `growmerge.report.page.content` has it, in lines of markdown."""
    facts = " · ".join(f"{name}: {_plain(value)}" for name, value in content["facts"])
    lines = [f"# {_plain(content['title'])}", "", facts, ""]
    lines += [f"- **{one['id']} {_plain(one['question'])}** {_plain(one['sentence'])}" for one in content["questions"]]
    lines += ["", content["caveat"], ""] if content["caveat"] else [""]
    for table in content["overview"]:
        lines += _table(table)
    for section in content["sections"]:
        tables = [*section["tables"], *(table for heat in section["heat"] for table in heat["tables"])]
        if tables:
            lines += [f"## {section['title']}", ""] + ([section["note"], ""] if section["note"] else [])
            lines += [line for said in section["sentences"] for line in (_plain(said), "")]
            lines += [line for table in tables for line in _table(table)]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    lines = [f"**{_plain(table.caption)}**", "", _line([_plain(head) for head in table.heads])]
    lines.append(_line([":--" if i in table.words else "--:" for i in range(len(table.columns))]))
    for row in table.rows:
        texts = [f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text) for cell in row]
        lines.append(
            _line([text for cell, text in zip(row, texts, strict=True) for text in [text] + [""] * (cell.span - 1)])
        )
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Return text that markdown shows as it is, in one line: no HTML, link, emphasis, or end of a table's cell."""
    safe = re.sub(r"([\\`*|])", r"\\\1", escape(" ".join(text.split()), quote=False))
    return safe.replace("](", "]\\(")
