"""The matched comparison as figures: losses of decayed models by tokens and by FLOPs, a panel a language."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from eval.scaling import GRID, interpolate
from growmerge.report.colours import GREY
from growmerge.report.drawing import STYLE, Drawing, panel, slug, style
from growmerge.report.tables import si

AXES = {"tokens": "tokens of training on the language", "flops": "FLOPs of training on the language"}
SHADE = 0.18
"""Of an interval's band."""


def drawings(results: Mapping[str, Any]) -> list[Drawing]:
    """Return two panels a language, by tokens and by FLOPs."""
    languages = (results.get("matched") or {"languages": {}})["languages"]
    return [
        _panel(results, code, one, axis, f"matched-{n}-{slug(code)}-{axis}")
        for n, (code, one) in enumerate(languages.items(), 1)
        for axis in AXES
    ]


def _panel(results: Mapping[str, Any], code: str, one: Mapping[str, Any], axis: str, name: str) -> Drawing:
    language = results["languages"].get(code, code)
    places = {setup: i for i, setup in enumerate(results["study"]["setups"])}
    with rc_context(STYLE):
        figure, axes = panel(language, AXES[axis], "bits per byte", (440, 250))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value).replace(".00", "")))
        axes.xaxis.set_minor_formatter(NullFormatter())
        for pair in one["pairs"]:
            found = pair[axis] if pair["second"] == results["study"]["setups"][0] else None
            if found and found["outcome"] in ("gets ahead", "falls behind"):
                colour = style(places[pair["first"]])["color"]
                axes.axvspan(found["low"], found["high"], color=colour, alpha=SHADE, linewidth=0)
                axes.axvline(found["value"], color=GREY, linewidth=1, linestyle=(0, (2, 2)))
        for setup, points in one["setups"].items():
            _line(axes, setup, points, places[setup], axis)
        limits = axes.get_xlim(), axes.get_ylim()
        for law in one["laws"]:
            for setup, curve in law.get("curves", {}).items():
                rate = (
                    1.0 if axis == "tokens" else one["setups"][setup][-1]["flops"] / one["setups"][setup][-1]["tokens"]
                )
                xs, ys = np.asarray(curve).T
                look = style(places[setup])
                axes.plot(rate * xs, ys, color=look["color"], linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
        axes.set_xlim(limits[0])  # laws reach far beyond the points
        axes.set_ylim(limits[1])
        axes.legend(fontsize=8.5, frameon=False)
    said = "; ".join(
        f"{setup} from {points[0]['value']:.3f} at {si(points[0][axis])} to {points[-1]['value']:.3f} at "
        f"{si(points[-1][axis])}"
        for setup, points in one["setups"].items()
    )
    label = f"Bits per byte on {language} of decayed models by {AXES[axis]}: {said}"
    return Drawing(name=name, label=label, figure=figure)


def _line(axes: Axes, setup: str, points: list[dict[str, Any]], place: int, axis: str) -> None:
    """Draw the points of a setup with their intervals, and the curve between them."""
    look = style(place)
    xs, ys = (np.array([point[key] for point in points], dtype=float) for key in (axis, "value"))
    grid = np.geomspace(xs[0], xs[-1], GRID)
    axes.plot(grid, interpolate(np.log(xs), ys, np.log(grid)), color=look["color"], linewidth=1.6)
    for x, point in zip(xs, points, strict=True):
        if point["low"] is not None:
            axes.plot([x, x], [point["low"], point["high"]], color=look["color"], linewidth=1)
    axes.plot(xs, ys, linestyle="none", label=setup, **look)
