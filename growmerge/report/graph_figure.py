"""What was run, drawn as a graph: stages as boxes in layers, each to the right of all that it reads from."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as BezierPath

from growmerge.report.colours import ARROW, DATA, GREY, INK, PAGE
from growmerge.report.drawing import PX, STYLE, Drawing
from growmerge.report.study import Study

WIDE, HIGH, GAP_X, GAP_Y = 178, 34, 54, 10
"""A box and the gaps between boxes (CSS pixels)."""
LETTERS = 17
"""Of a stage's name, at most, in its box."""
DONE = "done"


def layers(graph: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the stages by layer: one more than the deepest of a stage's inputs; in a layer, next to their inputs.

    A layer's order follows the mean place of each stage's inputs (one barycentre sweep, Sugiyama et al. 1981).
    Inputs that are no stage (a checkpoint's path, say) are left out. Stages come after their inputs in `graph`.
    """
    depth: dict[str, int] = {}
    for stage in graph:
        depth[stage["name"]] = 1 + max((depth[name] for name in stage["inputs"] if name in depth), default=-1)
    inputs = {stage["name"]: [name for name in stage["inputs"] if name in depth] for stage in graph}
    found: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for name, layer in depth.items():
        found[layer].append(name)
    place: dict[str, float] = {}
    for layer_names in found:
        centre = {n: sum(place[i] for i in inputs[n]) / len(inputs[n]) if inputs[n] else 0.0 for n in layer_names}
        layer_names.sort(key=centre.__getitem__)
        place |= {name: (i + 0.5) / len(layer_names) for i, name in enumerate(layer_names)}
    return found


def edges(graph: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (input, stage) of every input that no other input of the stage descends from: the others are implied."""
    above: dict[str, set[str]] = {}
    found: list[tuple[str, str]] = []
    for stage in graph:
        inputs = [name for name in stage["inputs"] if name in above]
        implied: set[str] = set().union(*(above[name] for name in inputs))
        found += [(name, stage["name"]) for name in inputs if name not in implied]
        above[stage["name"]] = implied.union(inputs)
    return found


def drawings(results: Mapping[str, Any]) -> list[Drawing]:
    """Return the graph of the run's stages: boxes in the colour of their setup, dashed while they are not done."""
    if not results.get("graph"):
        return []
    found = layers(results["graph"])
    verbs = {stage["name"]: stage["verb"] for stage in results["graph"]}
    states = {one["stage"]: one["state"] for one in (results.get("progress") or {}).get("rows", [])}
    study = Study(results) if results.get("study") else None
    places = study.members() if study else {}
    rows = max((len(layer) for layer in found), default=1)
    width, height = len(found) * (WIDE + GAP_X) - GAP_X, rows * (HIGH + GAP_Y)
    corner = {
        name: (x * (WIDE + GAP_X), height * (i + 0.5) / len(layer) - HIGH / 2)
        for x, layer in enumerate(found)
        for i, name in enumerate(layer)
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(width * PX, height * PX))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-2, width + 2), ylim=(height, 0))
        axes.axis("off")
        for start, end in edges(results["graph"]):
            _edge(axes, corner[start], corner[end])
        for name, at in corner.items():
            setup = places.get(name, ("", ""))[0]
            colour = DATA[study.setups.index(setup) % len(DATA)] if study and setup else GREY
            _box(axes, at, colour, name, verbs[name], states.get(name, DONE))
    words = "; ".join(
        f"{s['name']} ({', '.join([s['verb'], *([states[s['name']]] if s['name'] in states else [])])}) "
        f"reads {', '.join(s['inputs']) or 'nothing'}"
        for s in results["graph"]
    )
    return [Drawing(name="graph", label=f"Graph of the stages: {words}", figure=figure)]


def _box(axes: Axes, at: tuple[float, float], colour: str, name: str, verb: str, state: str) -> None:
    """Draw a stage: its name, and its verb or what keeps it from being done."""
    x, y = at
    look: dict[str, Any] = {"fc": PAGE, "ec": colour, "lw": 1.4, "ls": "-" if state == DONE else (0, (4, 3))}
    axes.add_patch(FancyBboxPatch(at, WIDE, HIGH, boxstyle="round,pad=0,rounding_size=5", **look))
    right = verb if state in (DONE, "not started") else state
    letters = LETTERS - max(0, len(right) - 5)
    shown = name if len(name) <= letters else name[: letters - 1] + "…"
    axes.text(x + 9, y + HIGH / 2, shown, fontsize=12, va="center", color=INK if state == DONE else GREY)
    axes.text(x + WIDE - 8, y + HIGH / 2, right, fontsize=10.5, va="center", ha="right", color=GREY)


def _edge(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw a curve from the right of a box to the left of another, level at both ends."""
    x0, y0, x1, y1 = start[0] + WIDE, start[1] + HIGH / 2, end[0], end[1] + HIGH / 2
    bend = (x1 - x0) / 2
    path = BezierPath([(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)], [1, 4, 4, 4])
    axes.add_patch(PathPatch(path, fc="none", ec=ARROW, lw=1, zorder=0))
