"""The report as one HTML page that loads nothing from elsewhere, and what lies beside it."""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from growmerge.report import (
    colours,
    curves,
    figures,
    heat,
    matched_tables,
    matched_words,
    model_tables,
    run_tables,
    task_tables,
)
from growmerge.report.drawing import png, svg
from growmerge.report.markdown import markdown
from growmerge.report.questions import UNRESOLVED
from growmerge.report.tables import Table, count, csv_file

MINIATURE = 100_000_000
"""Parameters below which findings are no evidence about the models that people use."""
EXACT = 1e-5
"""Held-out loss difference (nats a token) up to which growth counts as exact."""
HERE = Path(__file__).parent

ADAPTATION_ALONE = (
    "Q2 counts the compute of the adaptation alone; what a grown base has cost before it is in the next table "
    "(FLOPs with ancestors)."
)


def render(results: Mapping[str, Any]) -> tuple[str, str]:
    """Return (html, markdown) of what `analyse` returned; the same results give the same bytes."""
    shown = content(results)
    # A figure escapes its own text; everything else is escaped by the template.
    learning = {axis: figures.learning(results, axis) for axis in curves.AXES}
    charts = {"learning": {axis: drawn for axis, drawn in learning.items() if drawn}, **figures.charts(results)}
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "report.js").read_text()
    html = environment.get_template("template.html.j2").render(
        **shown,
        charts=charts,
        axes=curves.AXES,
        legend=figures.legend(results),
        studied=bool(results.get("study")),
        baselines=any(results["baselines_summary"].values()),
        brief=brief,
        svg=Markup,
        scheme=colours.SCHEME,
        heat_colours=colours.heat(),
        style=Markup((HERE / "report.css").read_text()),
        script=Markup(script),
        # Nothing but this one script runs, whatever somebody has named a language or a model has written.
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return html, markdown(shown)


def files(results: Mapping[str, Any]) -> dict[str, bytes]:
    """Return what lies beside the page, by path: tables/*.csv, figures/*.svg and *.png; the same bytes each time."""
    shown = content(results)
    tables = list(shown["overview"])
    for section in shown["sections"]:
        tables += section["tables"]
        tables += [table for one in section["heat"] for table in one["tables"]]
    drawn = figures.drawings(results)
    for kind in ([table.name for table in tables], [drawing.name for drawing in drawn]):
        assert len({*kind}) == len(kind), f"two of a name: {kind}"
    found = {f"tables/{table.name}.csv": csv_file(table) for table in tables}
    for drawing in drawn:
        found |= {f"figures/{drawing.name}.svg": svg(drawing), f"figures/{drawing.name}.png": png(drawing)}
    return found


def content(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page and the markdown say: title, facts, caveat, questions, overview, sections."""
    overview = [table for table in (_overview(results),) if table]
    below = sections(results)
    for section in below:
        section["tables"] = [one for one in section["tables"] if one and one.name not in {t.name for t in overview}]
    return {
        "title": results["title"] or results["name"],
        "facts": facts(results),
        "caveat": caveat(results) if results["bits_per_byte"] else "",
        "questions": questions(results),
        "overview": overview,
        "sections": below,
    }


def _overview(results: Mapping[str, Any]) -> Table | None:
    """Return the first table: of the study, of the models, of the tasks; of an unbegun run how far it is."""
    table = model_tables.setups(results) if results.get("study") else None
    if table is None and results["bits_per_byte"]:
        table = model_tables.models(results)
    return table or task_tables.tasks(results) or run_tables.progress(results) or model_tables.models(results)


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader should know first, as (name, value): progress, growth, time, cost, memory, seed, scope."""
    found: list[tuple[str, str]] = []
    if progress := results.get("progress"):
        found.append(("unfinished", f"{progress['done']} of {progress['stages']} stages"))
    if results.get("growth"):
        most = max(abs(one["difference"]) for one in results["growth"])
        found.append(("growth exact" if most <= EXACT else "growth NOT exact", f"|loss difference| = {most:.1e}"))
    timings = results.get("timings", {})
    if "wall_s" in timings:
        minutes, seconds = divmod(round(timings["wall_s"]), 60)
        found.append(("time", f"{minutes} min {seconds:02d} s"))
    hours = {name: timings.get("cost", {}).get(f"{name}_hours") for name in ("gpu", "core")}
    found += [(f"{name.replace('gpu', 'GPU')}-hours", f"{spent:.2f}") for name, spent in hours.items() if spent]
    if "cores" in timings:
        found.append(("cores", str(timings["cores"])))
    if "peak_memory_gb" in timings:
        found.append(("memory", f"{timings['peak_memory_gb']:.1f} GB"))
    if results["seed"] is not None:
        found.append(("seed", str(results["seed"])))
    sizes = [model["parameters"] for model in results["models"].values() if model.get("parameters")]
    if sizes:
        found.append(("largest model", f"{count(max(sizes))} parameters"))
        if max(sizes) < MINIATURE:
            found.append(("scope", "a miniature: no evidence about large models"))
    return found


def caveat(results: Mapping[str, Any]) -> str:
    said = (
        f"One training seed: the intervals ({100 * results['confidence']:g} %, {count(results['resamples'])} bootstrap "
        "resamples, paired) are over held-out documents and not over training runs; another seed may answer "
        "differently."
    )
    verdicts = " Yes or no only where the interval of the difference excludes 0, each answer by itself."
    return said + verdicts if results["questions"] else said


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
    """Return what comes below the first screen: title, a note, sentences, the charts' name, tables, heat maps."""
    vocabulary = results.get("tokenizer", {}).get("vocab_size")
    run, models, tasks = run_tables, model_tables, task_tables
    boxes = ["in the colour of their setup"] if results.get("study") else []
    boxes += ["dashed while they are not done"] if results.get("progress") else []
    graph = f"Stages from left to right{'; boxes ' if boxes else ''}{', '.join(boxes)}."
    found: list[tuple[str, str, str, list[Table | None]]] = [
        ("Progress", "", "", [run.progress(results)]),
        ("Equal tokens, equal FLOPs", matched_words.note(results), "matched", matched_tables.tables(results)),
        ("Tasks", "", "", [tasks.tasks(results), tasks.phenomena(results)]),
        ("Differences", "", "", [tasks.comparisons(results)]),
        ("Merges of subsets", "", "heat", []),
        ("Searches", "", "searches", [*run.searches(results)]),
        ("What was run", graph, "graph", []),
        ("Training loss", "", "losses", []),
        ("Every answer", ADAPTATION_ALONE, "", [models.answers(results)]),
        ("Every model", "", "", [models.models(results)]),
        ("Growth", "", "", [models.growth(results)]),
        ("Acceptability", "", "", [models.pairs(results)]),
        ("Cost", "", "", [run.cost(results)]),
        ("Failures and requeues", "", "", [run.incidents(results)]),
        ("Samples", "", "", [tasks.samples(results)]),
        ("Tokenizer", f"{count(vocabulary)} entries." if vocabulary else "", "", [*tasks.fertility(results)]),
        ("Text", "", "", [*run.corpora(results)]),
        ("Checks", "", "", [models.checks(results)]),
        ("Stages and versions", "", "", [run.stages(results), run.versions(results)]),
    ]
    maps, said = {"heat": heat.heat(results)}, {"matched": matched_words.sentences(results)}
    return [
        {"title": title, "note": note, "charts": charts, "tables": tables}
        | {"sentences": said.get(charts, []), "heat": maps.get(charts, [])}
        for title, note, charts, tables in found
    ]
