"""The report as one HTML page that loads nothing from elsewhere, and as markdown with the same numbers."""

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from growmerge.report import figures, graph_figure, tables
from growmerge.report.questions import UNRESOLVED
from growmerge.report.tables import Table, count

MINIATURE = 100_000_000
"""Parameters below which findings are no evidence about the models that people use."""
EXACT = 1e-5
"""Held-out loss difference (nats a token) up to which growth counts as exact."""

ADAPTATION_ALONE = (
    "Q2 counts the compute of the adaptation alone; what a grown base has cost before it is in the next table "
    "(FLOPs with ancestors)."
)


def render(results: Mapping[str, Any]) -> tuple[str, str]:
    """Return (html, markdown) of what `analyse` returned; the same results give the same bytes."""
    content = {
        "title": results["title"] or results["name"],
        "facts": facts(results),
        "caveat": caveat(results),
        "questions": questions(results),
        "overview": tables.setups(results) if results.get("study") else tables.models(results),
        "sections": sections(results),
    }
    # A figure escapes its own text; everything else is escaped by the template.
    charts = {
        "learning": figures.learning(results),
        "losses": figures.losses(results),
        "graph": [graph_figure.graph(results)] if results["graph"] else [],
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("template.html.j2").render(
        **content,
        charts={name: [Markup(one) for one in drawn] for name, drawn in charts.items()},
        legend=figures.legend(results),
        brief=brief,
    )
    return html, markdown(**content)


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader should know first, as (name, value): growth, time, cores, memory, seed, scope."""
    found: list[tuple[str, str]] = []
    if results.get("growth"):
        most = max(abs(one["difference"]) for one in results["growth"])
        found.append(("growth exact" if most <= EXACT else "growth NOT exact", f"|loss difference| = {most:.1e}"))
    timings = results.get("timings", {})
    if "wall_s" in timings:
        minutes, seconds = divmod(round(timings["wall_s"]), 60)
        found.append(("time", f"{minutes} min {seconds:02d} s"))
    if "cores" in timings:
        found.append(("cores", str(timings["cores"])))
    if "peak_memory_gb" in timings:
        found.append(("memory", f"{timings['peak_memory_gb']:.1f} GB"))
    found.append(("seed", str(results["seed"])))
    largest = max((model["parameters"] for model in results["models"].values()), default=0)
    found.append(("largest model", f"{count(largest)} parameters"))
    if largest < MINIATURE:
        found.append(("scope", "a miniature: no evidence about large models"))
    return found


def caveat(results: Mapping[str, Any]) -> str:
    return (
        f"One training seed: the intervals ({100 * results['confidence']:g} %, {count(results['resamples'])} bootstrap "
        "resamples, paired) are over held-out documents and not over training runs; another seed may answer "
        "differently. Yes or no only where the interval of the difference excludes 0, each answer by itself."
    )


def questions(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the answers over all parts, each with `parts`: those one level below it, in short."""
    return [
        {
            **question,
            "parts": [part for part in results["questions"] if part["id"].rpartition("/")[0] == question["id"]],
        }
        for question in results["questions"]
        if "/" not in question["id"]
    ]


def brief(answer: Mapping[str, Any]) -> str:
    """Return a part's answer in short: `-0.080 yes`, with `?` where it is not resolved."""
    return f"{answer['value']:+z.3f} {'?' if answer['verdict'] == UNRESOLVED else answer['verdict']}"


def sections(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what comes below the first screen: title, a note, the charts' name and tables."""
    vocabulary = results.get("tokenizer", {}).get("vocab_size")
    study = bool(results.get("study"))
    found: list[tuple[str, str, str, list[Table | None]]] = [
        ("What was run", "Stages from left to right; boxes in the colour of their setup.", "graph", []),
        ("Training loss", "", "losses", []),
        ("Every answer", ADAPTATION_ALONE, "", [tables.answers(results)]),
        ("Every model", "", "", [tables.models(results) if study else None]),
        ("Growth", "", "", [tables.growth(results)]),
        ("Acceptability", "", "", [tables.pairs(results)]),
        ("Samples", "", "", [tables.samples(results)]),
        ("Text", f"Tokenizer: {count(vocabulary)} entries." if vocabulary else "", "", [*tables.corpora(results)]),
        ("Checks", "", "", [tables.checks(results)]),
        ("Stages, time and versions", "", "", [tables.stages(results), tables.versions(results)]),
    ]
    return [
        {"title": title, "note": note, "charts": charts, "tables": [table for table in many if table]}
        for title, note, charts, many in found
    ]


def markdown(
    *,
    title: str,
    facts: list[tuple[str, str]],
    caveat: str,
    questions: list[dict[str, Any]],
    overview: Table,
    sections: list[dict[str, Any]],
) -> str:
    """Return the report without its figures as GitHub's markdown."""
    lines = [f"# {_plain(title)}", "", " · ".join(f"{name}: {_plain(value)}" for name, value in facts), ""]
    lines += [f"- **{one['id']} {_plain(one['question'])}** {_plain(one['sentence'])}" for one in questions]
    lines += ["", caveat, "", *_table(overview)]
    for section in sections:
        if section["tables"]:
            lines += [f"## {section['title']}", ""] + ([section["note"], ""] if section["note"] else [])
            for table in section["tables"]:
                lines += _table(table)
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    groups = [text for text, span in table.groups for _ in range(span)] or [""] * len(table.columns)
    heads = [_plain(f"{group} {column}") for group, column in zip(groups, table.columns, strict=True)]
    lines = [f"**{_plain(table.caption)}**", "", _line(heads)]
    lines.append(_line([":--" if i in table.words else "--:" for i in range(len(heads))]))
    for row in table.rows:
        texts = [f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text) for cell in row]
        lines.append(
            _line([text for cell, text in zip(row, texts, strict=True) for text in [text] + [""] * (cell.span - 1)])
        )
    return [*lines, ""]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Return text that markdown shows as it is, in one line: no HTML, link, emphasis, or end of a table's cell."""
    safe = re.sub(r"([\\`*|])", r"\\\1", escape(" ".join(text.split()), quote=False))
    return safe.replace("](", "]\\(")
