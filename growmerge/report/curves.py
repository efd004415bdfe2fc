"""Learning curves: held-out bits per byte of runs by tokens, by FLOPs or by time, a panel a language."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from growmerge.report.colours import GREY
from growmerge.report.drawing import DASHES, LETTER, STYLE, Drawing, beside_axes, panel, slug, style
from growmerge.report.model_tables import BASELINES
from growmerge.report.study import Study

AXES = {"tokens": "training tokens", "flops": "FLOPs of the run", "time": "training time"}
"""What a curve can run by, and what it is called."""
TIMES = {"s": 1, "min": 60, "h": 3600, "days": 86400}
LINE = 62
"""Letters of a title's line at most."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A line of a panel."""

    stage: str
    place: int
    """Among what is compared: decides colour and marker."""
    dash: str
    words: str
    """What it is, for those who hear it."""
    circle: float | None = None
    """Tokens to be circled."""


def names(results: Mapping[str, Any]) -> list[str]:
    """Return what lines stand for, in the order of their colours: the study's setups, else all runs with curves."""
    if results.get("study"):
        return list(results["study"]["setups"])
    return [stage for stage, points in results.get("curves", {}).items() if points]


def drawings(results: Mapping[str, Any], axis: str = "tokens") -> list[Drawing]:
    """Return a panel a language with the baselines as lines, the run's own languages first; none without data."""
    found: list[Drawing] = []
    for language in _languages(results):
        runs = [
            (run, xs, ys)
            for run in _runs(results, language)
            if len((points := curve(results, run.stage, language, axis))[0])
            for xs, ys in [points]
        ]
        if runs:
            name = f"learning-{len(found) + 1}-{slug(language)}-{axis}"
            found.append(_panel(results, language, runs, axis, name))
    return found


def _languages(results: Mapping[str, Any]) -> list[str]:
    if results.get("study"):
        return [*results["study"]["languages"], results["study"]["source_language"]]
    seen = {c for points in results.get("curves", {}).values() for point in points for c in point["scores"]}
    known = [c for c in results["languages"] if c in seen]
    return [*known, *sorted(seen.difference(known))]


def _runs(results: Mapping[str, Any], language: str) -> list[Run]:
    """Return the runs of a panel: with a study those adapted to its language, for the source's all of them."""
    if not results.get("study"):
        stages = enumerate(names(results))
        return [Run(stage=stage, place=place, dash="solid", words=stage) for place, stage in stages]
    study, found = Study(results), []
    source = language == study.source
    for place, setup in enumerate(study.setups):
        for n, data in enumerate(study.languages):
            stage = study.adapted(setup, data)
            if stage is not None and (source or data == language):
                same = None if source or setup == study.small else study.equal_compute(setup, data)
                dash = [*DASHES][n % len(DASHES)] if source else "solid"
                words = f"{setup} trained on {study.name(data)}"
                circle = same["tokens"] if same else None
                found.append(Run(stage=stage, place=place, dash=dash, words=words, circle=circle))
    return found


def curve(results: Mapping[str, Any], stage: str, language: str, axis: str) -> tuple[list[float], list[float]]:
    """Return where a run was evaluated (tokens, FLOPs or seconds), and its bits per byte there."""
    points = [point for point in results.get("curves", {}).get(stage, []) if language in point["scores"]]
    found = [
        (x, sum(row[1] for row in rows) / sum(row[2] for row in rows))
        for point in points
        if (x := _place(results, stage, point, axis)) is not None and (rows := point["scores"][language])
    ]
    return [x for x, _ in found], [y for _, y in found]


def _place(results: Mapping[str, Any], stage: str, point: Mapping[str, Any], axis: str) -> float | None:
    if axis == "tokens":
        return float(point["tokens"])
    if axis == "time":
        return dict(results.get("timings", {}).get("curves", {}).get(stage, [])).get(point["step"])
    model = results["models"].get(stage, {})
    if point.get("flops") is None and model.get("flops") and model.get("tokens"):
        return float(point["tokens"] * model["flops"] / model["tokens"])
    return point.get("flops")


def _panel(
    results: Mapping[str, Any],
    language: str,
    runs: Sequence[tuple[Run, list[float], list[float]]],
    axis: str,
    name: str,
) -> Drawing:
    title = spoken = results["languages"].get(language, language)
    study = Study(results) if results.get("study") else None
    source = study is not None and language == study.source
    if study is not None and source:
        trained = (f"{study.name(c)} ({[*DASHES][i % len(DASHES)]})" for i, c in enumerate(study.languages))
        title = textwrap.fill(f"{title}, while training on {', '.join(trained)}", LINE)
    unit, unit_size = _time(max(xs[-1] for _, xs, _ in runs)) if axis == "time" else ("", 1)
    with rc_context(STYLE):
        label = f"{AXES[axis]} ({unit})" if unit else AXES[axis]
        baselines = _baselines(results, language)
        right = 14 + LETTER * max((len(name) + 6 for name, _, _ in baselines), default=0)
        size = (440, 212 + 15 * title.count("\n"))
        figure, axes = panel(title, label, "bits per byte", size, right)
        if unit:
            axes.xaxis.set_major_formatter("{x:g}")
        for run, xs, ys in runs:
            look = style(run.place)
            axes.plot([x / unit_size for x in xs], ys, linewidth=1.6, linestyle=DASHES[run.dash], **look)
            if run.circle is not None:
                tokens, values = curve(results, run.stage, language, "tokens")
                x, y = (float(np.interp(run.circle, tokens[-len(of) :], of)) for of in (xs, values))
                axes.plot([x / unit_size], [y], "o", markersize=11, fillstyle="none", color=look["color"])
        shown = [value for _, value, _ in baselines]
        # The start lies far above what follows and would flatten it: the line comes in from above.
        later = [y for _, xs, ys in runs for x, y in zip(xs, ys, strict=True) if x or source]
        shown += later or [y for _, _, ys in runs for y in ys]
        margin = 0.06 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        _draw_baselines(axes, baselines)
    said = "; ".join(f"{run.words} ends at {ys[-1]:.3f}" for run, _, ys in runs)
    return Drawing(name=name, label=f"Bits per byte on {spoken} by {AXES[axis]}: {said}", figure=figure)


def _time(longest: float) -> tuple[str, int]:
    """Return the largest unit in which a time is 2 or more."""
    return next(((unit, size) for unit, size in reversed(TIMES.items()) if longest >= 2 * size), ("s", 1))


def _baselines(results: Mapping[str, Any], language: str) -> list[tuple[str, float, Any]]:
    """Return name, bits per byte and dashes of each baseline."""
    dashes = {"unigram": (0, (6, 3)), "ngram5": (0, (2, 2)), "xz": (0, (6, 2, 1, 2))}
    return [
        (BASELINES.get(name, name).partition(",")[0], found["value"], dashes.get(name, "-"))
        for name, found in results["baselines_summary"].get(language, {}).items()
    ]


def _draw_baselines(axes: Axes, baselines: Sequence[tuple[str, float, Any]]) -> None:
    """Draw each baseline as a grey line, its name at the right edge, names kept apart."""
    for _, value, dash in baselines:
        axes.axhline(value, color=GREY, linewidth=1, linestyle=dash, zorder=1)
    low, high = axes.get_ylim()
    at = -np.inf
    for name, value, _ in sorted(baselines, key=lambda one: one[1]):
        at = max(value, at + 0.07 * (high - low))
        beside_axes(axes, f" {name} {value:.2f}", at)
