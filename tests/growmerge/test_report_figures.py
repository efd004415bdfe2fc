"""The figures: curves by every axis, the graph of an unfinished run, colours on light and dark."""

import copy
import re
from typing import Any

import pytest
import report_data

from growmerge.report import analyse, curves, graph_figure, render
from growmerge.report.colours import SCHEME, contrast
from growmerge.report.graph_figure import edges, layers


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return analyse(report_data.raw())


@pytest.mark.parametrize("gone", [[], ["flops"], ["timings"], ["flops", "timings"]])
def test_curves_where_there_is_data(gone: list[str]) -> None:
    raw = report_data.raw()
    for points in raw["curves"].values():
        for point in points:
            point |= {"flops": None} if "flops" in gone else {}
    if "timings" in gone:
        del raw["timings"]["curves"]
    results = analyse(raw)
    tokens = [step * report_data.TOKENS_A_STEP for step in report_data.STEPS]
    assert curves.curve(results, "2x-swe", "swe", "tokens")[0] == tokens
    # 6ND of the 2x model; where the points lack it, in proportion to the model's own.
    assert curves.curve(results, "2x-swe", "swe", "flops")[0] == pytest.approx([6 * 1_700_000 * n for n in tokens])
    seconds = [] if "timings" in gone else [0.8 * step for step in report_data.STEPS]
    assert curves.curve(results, "2x-swe", "swe", "time")[0] == pytest.approx(seconds)
    radios = re.findall(r'<input type="radio" name="axis" value="(\w+)"( checked)?>', render(results)[0])
    axes = [axis for axis, _ in radios]
    assert axes == (["tokens", "flops"] if "timings" in gone else ["tokens", "flops", "time"])
    assert [axis for axis, checked in radios if checked] == ["tokens"]


def test_time_is_in_a_unit_that_fits(results: dict[str, Any]) -> None:
    for factor, unit, last in ((1, "min", 4), (0.1, "s", 24), (100, "h", 6.6667), (10_000, "days", 27.7778)):
        changed = copy.deepcopy(results)
        for points in changed["timings"]["curves"].values():
            points[:] = [[step, factor * seconds] for step, seconds in points]
        (axes,) = curves.drawings(changed, "time")[0].figure.axes
        assert axes.get_xlabel() == f"training time ({unit})"
        assert max(max(line.get_xdata()) for line in axes.lines) == pytest.approx(last, rel=1e-4)


def test_unfinished_run() -> None:
    results = analyse(report_data.unfinished(done=9))
    html, markdown = render(results)
    assert "unfinished: 9 of 20 stages" in markdown
    assert "OSError: no space left on device" in html
    assert "OSError: no space left on device" in markdown
    (graph,) = graph_figure.drawings(results)
    dashed = [box for box in graph.figure.axes[0].patches if box.get_linestyle() == "--" or _dashes(box)]
    assert len(dashed) == 20 - 9
    assert "1x-cloned-est (train, running)" in graph.label
    texts = {text.get_text() for text in graph.figure.axes[0].texts}
    assert {"running", "failed", "stopped", "waiting"} <= texts
    (done,) = graph_figure.drawings(analyse(report_data.raw()))
    assert not any(map(_dashes, done.figure.axes[0].patches))


def _dashes(patch: Any) -> bool:
    return bool(patch._dash_pattern[1])


def test_colours_have_contrast_on_light_and_dark(results: dict[str, Any]) -> None:
    """WCAG 2.2: 4.5 for text, 3 for lines and marks."""
    for scheme in (0, 1):
        paper = SCHEME["page"][scheme]
        lines = [name for name in SCHEME if name.startswith("data-")]
        assert len(lines) == 6
        assert all(contrast(SCHEME[name][scheme], paper) >= 3 for name in [*lines, "focus"])
        assert all(contrast(SCHEME[name][scheme], paper) >= 4.5 for name in ("ink", "label", "soft", "grey"))
        assert all(contrast(SCHEME["ink"][scheme], SCHEME[name][scheme]) >= 4.5 for name in ("page", "faint"))
        assert contrast(SCHEME["no"][scheme], SCHEME["no-page"][scheme]) >= 4.5
        assert contrast("#ffffff", SCHEME["yes"][scheme]) >= 4.5
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    light = [light for light, _ in SCHEME.values()]
    assert len({*light}) == len(light)
    # Nothing in the page's figures has a colour of its own: all are variables.
    figures = "".join(re.findall(r"<svg.*?</svg>", render(results)[0], flags=re.DOTALL))
    assert "var(--data-1)" in figures
    assert not re.findall(r"(?:fill|stroke): ?#", figures)


def test_graph_layers_and_edges() -> None:
    graph = [
        {"name": "seed", "verb": "train", "inputs": ["/a/checkpoint"]},
        {"name": "base", "verb": "train", "inputs": ["seed"]},
        {"name": "a", "verb": "train", "inputs": ["base"]},
        {"name": "b", "verb": "train", "inputs": ["base", "seed"]},
        {"name": "merge", "verb": "merge", "inputs": ["a", "b", "base"]},
    ]
    assert layers(graph) == [["seed"], ["base"], ["a", "b"], ["merge"]]
    assert edges(graph) == [("seed", "base"), ("base", "a"), ("base", "b"), ("a", "merge"), ("b", "merge")]
    assert layers([]) == []
