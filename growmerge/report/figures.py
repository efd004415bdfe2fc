"""The report's figures, as elements of the page and for files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context

from growmerge.report import curves, graph_figure, heat, matched_figures
from growmerge.report.colours import DATA, GREY, INK
from growmerge.report.drawing import STYLE, Drawing, beside_axes, elements, mark, panel, slug
from growmerge.report.study import Study

RUNS = 6
"""Losses in a panel, at most, where no study says which belong together."""


def learning(results: Mapping[str, Any], axis: str = "tokens") -> list[str]:
    """Return the learning curves for the page, a panel a language, by tokens, flops or time."""
    return elements(curves.drawings(results, axis))


def charts(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the other figures of the page by their section."""
    parts = {
        "matched": matched_figures.drawings,
        "losses": losses,
        "searches": searches,
        "graph": graph_figure.drawings,
    }
    return {name: elements(drawn(results)) for name, drawn in parts.items()}


def drawings(results: Mapping[str, Any]) -> list[Drawing]:
    """Return every figure, for files."""
    drawn = [one for axis in curves.AXES for one in curves.drawings(results, axis)]
    drawn += [*matched_figures.drawings(results), *losses(results), *searches(results)]
    return [*drawn, *heat.drawings(results), *graph_figure.drawings(results)]


def legend(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (setup or run, colour as CSS, marker as a character) of what the learning curves' lines stand for."""
    return [(name, *mark(i)) for i, name in enumerate(curves.names(results))]


def losses(results: Mapping[str, Any]) -> list[Drawing]:
    """Return panels of training loss by step: with a study, one a kind of run with its setups; else in order."""
    found = {stage: curve for stage, curve in results.get("losses", {}).items() if curve}
    panels: dict[str, list[tuple[str, int]]] = {}
    study = Study(results) if results.get("study") else None
    places = study.members() if study else {}
    for n, stage in enumerate(found):
        setup, part = places.get(stage, (None, "base" if study else str(n // RUNS)))
        place = study.setups.index(setup) if study and setup else -1 if study else n % RUNS
        panels.setdefault(part, []).append((stage, place))
    titles = {"base": "seed and bases", "joint": "joint"}
    drawn = []
    for n, (part, stages) in enumerate(panels.items(), 1):
        with rc_context(STYLE):
            title = (titles.get(part) or study.name(part)) if study else ", ".join(stage for stage, _ in stages)
            figure, axes = panel(title if study else "", "step", "nats a token", (340, 225))
            for stage, i in stages:
                steps, values = _binned(found[stage])
                axes.plot(steps, values, color=DATA[i % 6] if i >= 0 else INK, linewidth=1.2, label=stage)
            axes.legend(fontsize=8.5, frameon=False)
        said = "; ".join(f"{stage} ends at {found[stage][-1][1]:.3f}" for stage, _ in stages)
        label = f"Training loss by step, {title}: {said}"
        drawn.append(Drawing(name=f"loss-{n}-{slug(title)}".rstrip("-"), label=label, figure=figure))
    return drawn


def _binned(curve: Sequence[Sequence[float]], bins: int = 120) -> tuple[list[float], list[float]]:
    """Average neighbouring steps, so that a long run stays a small figure and a readable line."""
    parts = np.array_split(np.asarray(curve, dtype=float), min(bins, len(curve)))
    return [float(part[:, 0].mean()) for part in parts], [float(part[:, 1].mean()) for part in parts]


def searches(results: Mapping[str, Any]) -> list[Drawing]:
    """Return a panel a search: the mean bits per byte of each merge that was tried, and the best so far."""
    drawn = []
    for n, (stage, one) in enumerate((results.get("searches") or {}).items(), 1):
        tries, start = np.asarray(one["curve"], dtype=float), one["start"]["mean"]
        at = np.arange(1, len(tries) + 1)
        best = np.minimum.accumulate(tries)
        with rc_context(STYLE):
            figure, axes = panel(stage, "merges tried", "mean bits per byte", (400, 225), right=84)
            axes.axhline(start, color=GREY, linewidth=1, linestyle=(0, (6, 3)), zorder=1)
            axes.plot(at, tries, "o", color=DATA[5], markersize=3.5, label="a merge")
            axes.plot(at, best, color=DATA[1], linewidth=1.8, drawstyle="steps-post", label="best so far")
            beside_axes(axes, f" start {start:.3f}", start)
            # Merges that went wrong lie far above the others and would flatten them.
            low, high = float(best[-1]), max(float(np.percentile(tries, 95)), start)
            axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1))
            axes.legend(fontsize=8.5, frameon=False)
        label = (
            f"Search for the weights of {stage}: mean bits per byte {start:.4f} at the start, "
            f"{one['best']['mean']:.4f} at merge {int(np.argmin(tries)) + 1} of {len(tries)}"
        )
        drawn.append(Drawing(name=f"search-{n}-{slug(stage)}".rstrip("-"), label=label, figure=figure))
    return drawn
