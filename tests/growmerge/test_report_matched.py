"""The comparison at equal tokens and equal FLOPs: from raw results with known curves to the page."""

import copy
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import report_data
from test_report_page import HOSTILE, Page

from growmerge.report import analyse, files, matched_tables, render
from growmerge.report.matched_figures import drawings
from growmerge.report.matched_words import note, sentences

TOKENS = (1, 2, 4, 8, 16, 32)
"""Millions."""
LAWS = {"1x": (1.2, 20), "1x-cloned": (1.4, 28), "2x": (1.0, 28)}
"""E and B of E + B / D^0.22: 2x gets ahead of 1x at 19.15 million tokens, 1x-cloned never does."""
CROSSING = 19.15e6


def branched(
    *,
    laws: Mapping[str, tuple[float, float]] = LAWS,
    tokens: Sequence[float] = TOKENS,
    repeats: int = 1,
    between: float = 0.0,
    documents: int = report_data.DOCUMENTS,
    languages: Sequence[str] = ("swe", "est"),
) -> dict[str, Any]:
    """The study with decay branches: the same documents, whose losses follow known laws."""
    raw = report_data.raw()
    raw["study"]["branches"] = {code: {setup: [] for setup in laws} for code in languages}
    for code in languages:
        for setup, (e, b) in laws.items():
            for count in tokens:
                for seed in range(repeats):
                    name = f"{setup}-{code}-{count}m-{seed}"
                    size = raw["models"][f"{setup}-{code}"]["parameters"]
                    amount = round(count * 1e6)
                    raw["models"][name] = {
                        **raw["models"][f"{setup}-{code}"],
                        "adaptation_tokens": amount,
                        "adaptation_flops": 6.0 * size * amount,
                    }
                    run = np.random.default_rng([ord(letter) for letter in f"{setup}-{code}-{seed}"]).normal()
                    level = (e + b / amount**0.22) * (1 + between * run)
                    rows = report_data.rows(level, code, name, noise=0.02, documents=documents)
                    raw["scores"][name] = {code: exactly(rows, level)}
                    raw["study"]["branches"][code][setup].append(name)
    return raw


def exactly(rows: list[list[Any]], level: float) -> list[list[Any]]:
    """The same documents, so that their bits per byte are a level."""
    by = level / (sum(row[1] for row in rows) / sum(row[2] for row in rows))
    return [[name, bits * by, *rest] for name, bits, *rest in rows]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return analyse(branched())


@pytest.fixture(scope="module")
def rendered(results: dict[str, Any]) -> tuple[str, str]:
    return render(results)


def pair(results: dict[str, Any], first: str, second: str = "1x", code: str = "swe") -> dict[str, Any]:
    found = results["matched"]["languages"][code]["pairs"]
    return next(one for one in found if (one["first"], one["second"]) == (first, second))


def said(results: dict[str, Any], first: str, second: str = "1x") -> str:
    """The sentence on Swedish about two setups."""
    names = (f"the {first} model", f"the {second} model")
    (found,) = [
        one for one in sentences(results) if one.startswith("On Swedish") and all(name in one for name in names)
    ]
    return found


def test_crossings_are_where_they_were_put(results: dict[str, Any]) -> None:
    found = pair(results, "2x")
    assert found["tokens"]["outcome"] == "gets ahead"
    assert found["tokens"]["low"] < CROSSING < found["tokens"]["high"]
    assert found["tokens"]["value"] == pytest.approx(CROSSING, rel=0.01)
    assert (found["tokens"]["start"], found["tokens"]["end"]) == pytest.approx((1e6, 32e6))
    # At 3.4 times the FLOPs a token the 2x model's first point stands where the 1x model has had 3.4 million tokens.
    assert found["flops"]["outcome"] == "never ahead"
    assert (found["flops"]["start"], found["flops"]["end"]) == pytest.approx((6e6 * 1.7e6, 6 * 0.5e6 * 32e6))
    assert pair(results, "1x-cloned")["tokens"]["outcome"] == "never ahead"
    assert pair(results, "2x", "1x-cloned")["tokens"]["outcome"] == "always ahead"
    assert [one["second"] for one in results["matched"]["languages"]["est"]["pairs"]] == ["1x", "1x", "1x-cloned"]


def test_less_text_for_the_small_models_last_loss(results: dict[str, Any]) -> None:
    """1.0 + 28 / D^0.22 = 1.2 + 20 / (32 million)^0.22 where D is 27.47 million."""
    found = pair(results, "2x")["needed"]
    assert found["tokens"]["value"] == pytest.approx(27.47e6, rel=0.01)
    assert found["tokens"]["of"] == 32e6
    assert found["flops"]["value"] / found["flops"]["of"] == pytest.approx(3.4 * 27.47 / 32, rel=0.01)
    assert found["loss"] == pytest.approx(1.2 + 20 / 32e6**0.22)
    low, high = (100 * found["tokens"][end] / 32e6 for end in ("low", "high"))
    assert f"it needs 86 % [{low:.0f}, {high:.0f}] of the tokens and 292 % [" in said(results, "2x")
    assert "more than 100 % of the tokens and more than 340 % of the FLOPs" in said(results, "1x-cloned")


def test_laws_say_from_how_much_text_on_growing_pays() -> None:
    """At equal FLOPs: 1.2 + 20 / D^0.22 = 1.0 + 23.1 (3.4 / D)^0.22, which the largest run has not had yet."""
    results = analyse(branched(laws={"1x": (1.2, 20), "2x": (1.0, 23.1)}, languages=["swe"]))
    found = pair(results, "2x")
    known = ((23.1 * 3.4**0.22 - 20) / 0.2) ** (1 / 0.22)
    assert found["flops"]["outcome"] == "never ahead"
    assert 32e6 < known < 4 * 32e6
    text = found["law"]["text"]
    assert text["value"] == pytest.approx(known, rel=0.03)
    assert text["low"] < known < text["high"]
    assert "growing pays at equal FLOPs from " in said(results, "2x")
    assert "tokens of text, beyond what was measured of both)." in said(results, "2x")


def test_laws_are_those_of_the_points(results: dict[str, Any]) -> None:
    laws = {one["setups"][0]: one for one in results["matched"]["languages"]["swe"]["laws"]}
    assert all(one["setups"] == [setup] for setup, one in laws.items())
    for setup, (e, b) in LAWS.items():
        numbers = laws[setup]["numbers"]
        assert {name: one["value"] for name, one in numbers.items()} == pytest.approx({"E": e, "B": b, "b": 0.22}, 0.01)
        assert max(map(abs, laws[setup]["residuals"])) < 1e-4
        assert laws[setup]["curves"][setup][0][0] == pytest.approx(1e6 / 4)
        assert laws[setup]["curves"][setup][-1][0] == pytest.approx(32e6 * 4)


def test_one_law_of_three_sizes() -> None:
    """Setups that differ in size alone share a law, by which size pays at equal tokens everywhere."""
    raw = branched(laws=LAWS, tokens=(1, 4, 16), languages=["swe"])
    branches = raw["study"]["branches"]["swe"]
    raw["study"]["setups"] = ["1x", "2x", "4x"]
    branches["4x"] = branches.pop("1x-cloned")
    raw["study"]["base"]["4x"] = "base-2x"
    for setup, size in (("1x", 1e6), ("2x", 4e6), ("4x", 16e6)):
        for name in branches[setup]:
            model = raw["models"][name]
            tokens = model["adaptation_tokens"]
            model |= {"parameters": int(size), "adaptation_flops": 6 * size * tokens}
            raw["scores"][name]["swe"] = exactly(raw["scores"][name]["swe"], 0.8 + 180 / size**0.4 + 60 / tokens**0.3)
    results = analyse(raw)
    (law,) = results["matched"]["languages"]["swe"]["laws"]
    assert law["setups"] == ["1x", "2x", "4x"]
    assert {name: one["value"] for name, one in law["numbers"].items()} == pytest.approx(
        {"E": 0.8, "A": 180, "a": 0.4, "B": 60, "b": 0.3}, rel=0.02
    )
    found = pair(results, "4x")["law"]
    assert found["tokens"]["outcome"] == "always ahead"
    # 180 (1e6^-0.4 - 16e6^-0.4) = 60 D^-0.3 (16^0.3 - 1), D in tokens of the small model.
    known = (60 * (16**0.3 - 1) / (180 * (1e6**-0.4 - 16e6**-0.4))) ** (1 / 0.3)
    assert found["text"]["value"] == pytest.approx(known, rel=0.03)
    table = matched_tables.laws(results)
    assert table
    assert [cell.text for cell in table.rows[0]][:4] == ["Swedish", "1x, 2x, 4x", "fitted", "9"]


def test_too_few_points_for_a_law_are_said() -> None:
    results = analyse(branched(tokens=(1, 8, 32), languages=["swe"]))
    assert {law["why"] for law in results["matched"]["languages"]["swe"]["laws"]} == {
        "not enough points: 4 token counts are needed, 3 measured"
    }
    sentence = said(results, "2x")
    assert "no law says from how much text on growing pays (not enough points: 4 token counts are needed, 3" in sentence
    assert "gets ahead of the 1x model at" in sentence


def test_what_is_not_resolved_is_said_with_shares_and_text() -> None:
    raw = branched(laws={"1x": (1.2, 20), "2x": (1.2, 20.02)}, languages=["swe"])
    results = analyse(raw)
    found = pair(results, "2x")["tokens"]
    assert found["outcome"] == "not resolved"
    assert sum(found["shares"].values()) == pytest.approx(1)
    end = found["difference"]
    assert end["low"] < 0 < end["high"]
    sentence = said(results, "2x")
    assert "at equal tokens it is not resolved whether the 2x model gets ahead of the 1x model (1.00 M to" in sentence
    assert f"never ahead in {100 * found['shares']['never ahead']:.0f} %" in sentence
    times = int(re.search(r"which about ([\d,]+) times the held-out text would resolve", sentence)[1].replace(",", ""))
    assert times - 1 < ((end["high"] - end["low"]) / 2 / end["value"]) ** 2 <= times


def test_seeds_widen_intervals_and_are_averaged() -> None:
    """Three runs a point, whose losses differ by half a percent."""
    alike, other = (analyse(branched(repeats=3, between=by, languages=["swe"])) for by in (0.0, 0.005))
    assert alike["matched"]["between"]["value"] < 1e-9
    known = other["matched"]["between"]
    assert known["freedom"] == 2 * 3
    assert 0.002 < known["value"] < 0.01
    assert other["matched"]["repeats"] == 3
    widths = [
        (end["high"] or 32e6) / (end["low"] or 1e6) for end in (pair(one, "2x")["tokens"] for one in (alike, other))
    ]
    assert widths[1] > 1.3 * widths[0]
    text = " ".join([note(other), *sentences(other)])
    assert "differ in their seed alone differ by" in text
    assert "One seed a point" not in text
    assert "times the held-out text would" not in text, "more text would not resolve what seeds leave open"
    runs = [np.random.default_rng([ord(letter) for letter in f"1x-swe-{seed}"]).normal() for seed in range(3)]
    points = other["matched"]["languages"]["swe"]["setups"]["1x"]
    assert points[0]["value"] == pytest.approx((1.2 + 20 / 1e6**0.22) * (1 + 0.005 * np.mean(runs)))
    assert points[0]["stages"] == ["1x-swe-1m-0", "1x-swe-1m-1", "1x-swe-1m-2"]


def test_page_markdown_and_files(results: dict[str, Any], rendered: tuple[str, str]) -> None:
    html, markdown = rendered
    page = Page(html)
    words = " ".join(page.words)
    assert page.open == []
    found = pair(results, "2x")
    place = " ".join(f"{found['tokens'][end] / 1e6:.2f} M" for end in ("value", "low", "high")).split(" M ")
    crossing = f"{place[0]} M [{place[1]} M, {place[2]}]"
    for text in (words, markdown):
        assert "Equal tokens, equal FLOPs" in text
        assert f"On Swedish, at equal tokens the 2x model gets ahead of the 1x model at {crossing} tokens" in text
        assert "at equal FLOPs it is never ahead of that one (10.20 T to 96.00 T FLOPs measured)" in text
        assert "On Estonian, at equal tokens" in text
        assert "repetition is not modelled" in text
        assert "One seed a point" in text
        for one in results["matched"]["languages"]["est"]["setups"]["2x"]:
            assert f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" in text
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert sum("of decayed models by FLOPs" in label for label in labels) == 2
    given = files(results)
    rows = list(csv.DictReader(io.StringIO(given["tables/matched.csv"].decode())))
    assert float(rows[0]["equal tokens from where on low"]) == found["tokens"]["low"]
    assert rows[1]["equal tokens from where on"] == "never ahead"
    assert {
        f"figures/matched-{i}-{code}-{axis}.svg" for i, code in ((1, "swe"), (2, "est")) for axis in ("tokens", "flops")
    } <= {*given}
    assert {"tables/matched-points.csv", "tables/matched-laws.csv"} <= {*given}
    assert len(list(csv.reader(io.StringIO(given["tables/matched-points.csv"].decode())))) == 1 + 2 * 3 * 6


def test_a_figure_shows_points_curves_and_the_crossing(results: dict[str, Any]) -> None:
    drawn = {one.name: one for one in drawings(results)}
    (axes,) = drawn["matched-1-swe-tokens"].figure.axes
    marked = [line for line in axes.lines if line.get_label() == "2x"]
    points = results["matched"]["languages"]["swe"]["setups"]["2x"]
    assert [*marked[0].get_xdata()] == [point["tokens"] for point in points]
    assert [*marked[0].get_ydata()] == [point["value"] for point in points]
    found = pair(results, "2x")["tokens"]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((found["low"], found["high"]))
    (by_flops,) = drawn["matched-1-swe-flops"].figure.axes
    assert by_flops.get_xscale() == "log"
    assert not by_flops.patches
    assert drawn["matched-1-swe-flops"].label.startswith("Bits per byte on Swedish of decayed models by FLOPs of")


def test_results_are_plain_and_repeat(results: dict[str, Any], rendered: tuple[str, str]) -> None:
    stored = json.loads(json.dumps(results, allow_nan=False))
    assert render(stored) == rendered
    raw = branched(languages=["swe"])
    before = copy.deepcopy(raw)
    assert analyse(raw) == analyse(before)
    assert raw == before


def test_hostile_names_are_shown_not_run() -> None:
    raw = json.loads(json.dumps(branched(tokens=(1, 4))).replace('"2x', '"' + json.dumps(HOSTILE)[1:-1] + "2x"))
    raw["languages"]["swe"] = f"{HOSTILE}](javascript:x) | $x_1$"
    results = analyse(raw)
    assert pair(results, f"{HOSTILE}2x")
    html, markdown = render(results)
    assert Page(html).open == []
    assert html.count("<script") == 1
    assert f"On {HOSTILE}" in " ".join(Page(html).words)
    assert "<script" not in markdown
    assert "](javascript" not in markdown


def test_without_branches_there_is_no_section() -> None:
    for raw in (report_data.raw(), {**report_data.raw(), "study": None}):
        results = analyse(raw)
        assert results["matched"] is None
        assert not drawings(results)
        assert not sentences(results)
        assert note(results) == ""
    old = analyse(report_data.raw())
    del old["matched"]  # written by an earlier version
    html, markdown = render(old)
    assert "Equal tokens, equal FLOPs" not in html + markdown


def test_what_is_not_done_yet_is_left_out() -> None:
    raw = branched(languages=["swe"])
    for name in raw["study"]["branches"]["swe"]["2x"][3:]:
        del raw["scores"][name]
    raw["models"]["2x-swe-4m-0"] |= {"adaptation_tokens": None}
    found = analyse(raw)["matched"]["languages"]["swe"]["setups"]["2x"]
    assert [point["tokens"] for point in found] == [1_000_000, 2_000_000]
    for setup in ("2x", "1x-cloned"):
        raw["study"]["branches"]["swe"][setup] = []
    assert sentences(analyse(raw)) == ["On Swedish: this run has no scores of two setups to compare."]
    raw["study"]["branches"]["swe"]["1x"] = []
    assert analyse(raw)["matched"] is None


@pytest.mark.parametrize("documents", [1, 5])
def test_too_few_documents_have_no_intervals(documents: int) -> None:
    raw = branched(documents=documents, languages=["swe"])
    results = analyse(raw)
    found = results["matched"]["languages"]["swe"]
    assert found["pairs"] == found["laws"] == []
    point = found["setups"]["1x"][0]
    assert (point["value"], point["low"]) == (pytest.approx(1.2 + 20 / 1e6**0.22), None)
    assert sentences(results) == ["On Swedish: there are too few held-out documents for intervals."]
    assert drawings(results)
    assert matched_tables.points(results)


def test_scores_of_other_documents_are_refused() -> None:
    raw = branched(languages=["swe"])
    raw["scores"]["2x-swe-8m-0"]["swe"][3][2] += 1
    with pytest.raises(AssertionError, match="scores of other documents in swe"):
        analyse(raw)


def test_the_order_of_documents_does_not_matter() -> None:
    raw = branched(tokens=(1, 4), languages=["swe"])
    expected = analyse(raw)["matched"]
    raw["scores"]["2x-swe-4m-0"]["swe"].reverse()
    assert analyse(raw)["matched"] == expected
