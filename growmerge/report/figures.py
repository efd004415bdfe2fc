"""The report's figures, as inline SVG: bits per byte by tokens, training loss, and the graph of what was run."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from growmerge.report.study import Study
from growmerge.report.tables import si

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, in the order of the study's setups (jfly.uni-koeln.de/color)."""
GREY = "#6b7280"
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "growmerge",
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelcolor": "#374151",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "axes.grid": True,
    "grid.color": "#eceff3",
    "grid.linewidth": 0.8,
}
PX = 1 / 72
"""Inches: one unit of a figure is one CSS pixel of its SVG at full size."""


def svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an SVG element for a page: no metadata, no namespace addresses, its own ids, and a label."""
    out = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"<]*", r"font: \1 system-ui, sans-serif", body)
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box, head
    width, height = box[1].split()[2:]
    return (
        f'<svg viewBox="{box[1]}" width="{width}" height="{height}" role="img" aria-label="{_attribute(label)}">{body}'
    )


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def _panel(title: str, x: str, y: str, width: int = 440, height: int = 212) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width * PX, height * PX), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value).replace(".00", "") if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def legend(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (setup, colour, marker as a character) of the study's setups."""
    setups = results["study"]["setups"] if results.get("study") else []
    return [(setup, COLOURS[i % 6], "●■▲◆▼⬟"[i % 6]) for i, setup in enumerate(setups)]


def learning(results: Mapping[str, Any]) -> list[str]:
    """Return a panel a language: bits per byte by training tokens of each setup, with the baselines as lines."""
    if not results.get("study"):
        return []
    study = Study(results)
    panels: list[str] = []
    for language in [*study.languages, study.source]:
        runs = [
            (setup, data, curve)
            for setup in study.setups
            for data in ([language] if language != study.source else study.languages)
            if (curve := _curve(results, study.adapted(setup, data), language))
        ]
        if runs:
            panels.append(_learning(results, study, language, runs, f"learning-{len(panels)}"))
    return panels


def _learning(
    results: Mapping[str, Any], study: Study, language: str, runs: Sequence[tuple[str, str, Any]], element: str
) -> str:
    name = study.name(language)
    with rc_context(STYLE):
        title = name
        if language == study.source:
            styles = ("solid", "dashed", "dotted", "dash-dotted")
            trained = (f"{study.name(code)} ({styles[i % 4]})" for i, code in enumerate(study.languages))
            title = f"{name}, while training on {', '.join(trained)}"
        figure, axes = _panel(title, "training tokens", "bits per byte")
        for setup, data, (tokens, values) in runs:
            i = study.setups.index(setup)
            dash = DASHES[study.languages.index(data) % len(DASHES)] if language == study.source else "-"
            axes.plot(
                tokens,
                values,
                color=COLOURS[i % 6],
                marker=MARKERS[i % 6],
                markersize=4.5,
                linewidth=1.6,
                linestyle=dash,
            )
            point = study.equal_compute(setup, data) if setup != study.small and language == data else None
            if point:
                y = float(np.interp(point["tokens"], tokens, values))
                axes.plot([point["tokens"]], [y], "o", markersize=11, fillstyle="none", color=COLOURS[i % 6])
        baselines = results["baselines_summary"].get(language, {})
        shown = [found["value"] for found in baselines.values()]
        # The start lies far above what follows and would flatten it: the line comes in from above.
        shown += [y for _, _, (xs, ys) in runs for x, y in zip(xs, ys, strict=True) if x or language == study.source]
        margin = 0.06 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        _baselines(axes, baselines)
    ends = (f"{setup} trained on {study.name(data)} ends at {values[-1]:.3f}" for setup, data, (_, values) in runs)
    return svg(figure, element, f"Bits per byte on {name} by training tokens: " + "; ".join(ends))


def _baselines(axes: Axes, baselines: Mapping[str, Any]) -> None:
    """Draw each baseline as a grey line, its name at the right edge, names kept apart."""
    names = {"unigram": "unigram", "ngram5": "5-gram", "xz": "xz"}
    dashes = {"unigram": (0, (6, 3)), "ngram5": (0, (2, 2)), "xz": (0, (6, 2, 1, 2))}
    for name, found in baselines.items():
        axes.axhline(found["value"], color=GREY, linewidth=1, linestyle=dashes.get(name, "-"), zorder=1)
    low, high = axes.get_ylim()
    at = -np.inf
    for name, found in sorted(baselines.items(), key=lambda item: item[1]["value"]):
        at = max(found["value"], at + 0.055 * (high - low))
        axes.annotate(
            f" {names.get(name, name)} {found['value']:.2f}", (1, at), xycoords=("axes fraction", "data"),
            color=GREY, fontsize=9, va="center",
        )  # fmt: skip


def _curve(results: Mapping[str, Any], stage: str | None, language: str) -> tuple[list[int], list[float]] | None:
    points = [point for point in results.get("curves", {}).get(stage, []) if language in point["scores"]]
    values = [
        sum(row[1] for row in p["scores"][language]) / sum(row[2] for row in p["scores"][language]) for p in points
    ]
    return ([point["tokens"] for point in points], values) if points else None


def losses(results: Mapping[str, Any]) -> list[str]:
    """Return panels of training loss by step: with a study, one a kind of run with its setups; else one for all."""
    found = {stage: curve for stage, curve in results.get("losses", {}).items() if curve}
    if not found:
        return []
    panels: dict[str, list[tuple[str, int]]] = {}
    study = Study(results) if results.get("study") else None
    places = study.members() if study else {}
    for stage in found:
        setup, part = places.get(stage, (None, "base" if study else "all"))
        group = panels.setdefault(part, [])
        group.append((stage, study.setups.index(setup) if study and setup else len(group) if not study else -1))
    titles = {"base": "seed and bases", "joint": "joint", "all": "all runs"}
    drawn = []
    for n, (part, stages) in enumerate(panels.items()):
        with rc_context(STYLE):
            title = titles.get(part) or (study.name(part) if study else part)
            figure, axes = _panel(title, "step", "nats a token", height=225, width=340)
            for stage, i in stages:
                steps, values = _binned(found[stage])
                axes.plot(steps, values, color=COLOURS[i % 6] if i >= 0 else "#111827", linewidth=1.2, label=stage)
            axes.legend(fontsize=8.5, frameon=False)
        ends = "; ".join(f"{stage} ends at {found[stage][-1][1]:.3f}" for stage, _ in stages)
        drawn.append(svg(figure, f"loss-{n}", f"Training loss by step, {title}: {ends}"))
    return drawn


def _binned(curve: Sequence[Sequence[float]], bins: int = 120) -> tuple[list[float], list[float]]:
    """Average neighbouring steps, so that a long run stays a small figure and a readable line."""
    parts = np.array_split(np.asarray(curve, dtype=float), min(bins, len(curve)))
    return [float(part[:, 0].mean()) for part in parts], [float(part[:, 1].mean()) for part in parts]
