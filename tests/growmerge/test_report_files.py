"""What lies beside the page: CSV of every table, SVG and PNG of every figure; and the tables' own numbers."""

import csv
import io
import re
import struct
from typing import Any
from xml.etree import ElementTree

import pytest
import report_data

from growmerge.report import analyse, files, heat, render
from growmerge.report.colours import LEVELS, contrast
from growmerge.report.colours import heat as palette
from growmerge.report.tables import Cell, Table, csv_file

AXES = ("tokens", "flops", "time")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return analyse(report_data.raw())


@pytest.fixture(scope="module")
def found(results: dict[str, Any]) -> dict[str, bytes]:
    return files(results)


def rows(found: dict[str, bytes], name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(found[f"tables/{name}.csv"].decode())))


def test_every_table_and_figure_is_there(found: dict[str, bytes], results: dict[str, Any]) -> None:
    tables = {path.removeprefix("tables/").removesuffix(".csv") for path in found if path.startswith("tables/")}
    assert len(tables) == render(results)[0].count("<table")
    assert tables >= {"setups", "models", "answers", "tasks", "phenomena", "comparisons", "cost", "incidents"}
    assert tables >= {"searches", "search-languages", "fertility", "tokenizer", "heat-1-2-ties-2x", "stages"}
    figures = {path.removeprefix("figures/").rpartition(".")[0] for path in found if path.startswith("figures/")}
    assert figures == {
        *(f"learning-{i}-{c}-{axis}" for i, c in enumerate(("swe", "est", "eng"), 1) for axis in AXES),
        *("loss-1-seed-and-bases", "loss-2-swedish", "loss-3-estonian", "loss-4-joint", "graph"),
        *("search-1-1x-ties", "search-2-2x-ties"),
        *("heat-1-1-linear-2x", "heat-1-2-ties-2x", "heat-1-3-slerp-2x", "heat-1-4-linear-1x"),
    }
    assert len(found) == len(tables) + 2 * len(figures)


def test_figures_stand_alone(found: dict[str, bytes]) -> None:
    for path, data in found.items():
        if path.endswith(".svg"):
            root = ElementTree.fromstring(data)
            width, height = (float(root.attrib[key].removesuffix("pt")) for key in ("width", "height"))
            assert b"var(" not in data
            assert b"fill: #ffffff" in data  # the paper
            assert not [one for one in root.iter() if one.tag.endswith("}date")]
            png = found[path.replace(".svg", ".png")]
            assert png.startswith(b"\x89PNG")
            assert struct.unpack(">II", png[16:24]) == (int(2 * width), int(2 * height))


def test_the_same_results_give_the_same_files(found: dict[str, bytes], results: dict[str, Any]) -> None:
    assert files(results) == found


def test_numbers_are_in_full(found: dict[str, bytes], results: dict[str, Any]) -> None:
    models = {row["model"]: row for row in rows(found, "models")}
    estimate = results["bits_per_byte"]["2x-swe"]["swe"]
    for key, column in (("value", "Swedish"), ("low", "Swedish low"), ("high", "Swedish high")):
        assert float(models["2x-swe"][column]) == estimate[key]
    assert models["2x-swe"]["FLOPs"] == repr(results["models"]["2x-swe"]["flops"])
    assert (models["2x-ties"]["tokens"], models["xz, primed"]["Swedish low"]) == ("", "")
    setups = {row["model"]: row for row in rows(found, "setups")}
    assert float(setups["trained on Swedish"]["Swedish 2x"]) == estimate["value"]
    # What stands under all setups is said of each.
    seed = results["bits_per_byte"]["seed"]["swe"]["value"]
    assert [float(setups["seed"][f"Swedish {setup}"]) for setup in report_data.SETUPS] == [seed] * 3
    accuracy = {row["model"]: row for row in rows(found, "tasks")}["base-2x"]["accuracy, %; more is better blimp"]
    assert float(accuracy) == pytest.approx(78.1)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1"])
def test_no_text_is_a_formula(text: str) -> None:
    cells = [Cell(text=text), Cell(text="-0.500", value=-0.5), Cell(text='a, "b"=1'), Cell(text="–")]
    table = Table(name="x", caption="", columns=[text, "n", "t", "none"], rows=[cells])
    written = list(csv.reader(io.StringIO(csv_file(table).decode(), newline="")))
    assert written == [[f"'{text}", "n", "t", "none"], [f"'{text}", "-0.5", 'a, "b"=1', ""]]


def test_costs_and_their_sums(found: dict[str, bytes]) -> None:
    *stages, total = rows(found, "cost")
    assert [row["stage"] for row in stages] == [stage["name"] for stage in report_data.stages()]
    assert all((row["GPU-hours"] == "") == (row["GPUs"] == "0") != (row["core-hours"] == "") for row in stages)
    for column in ("seconds", "core-hours", "GPU-hours"):
        own = [float(row[column]) for row in stages if row[column]]
        assert float(total[column]) == pytest.approx(sum(own))
    assert total["stage"] == "all stages"


def test_cost_without_gpus() -> None:
    raw = report_data.raw()
    cost = raw["timings"]["cost"]
    cost["rows"] = [row | {"gpus": 0} for row in cost["rows"]]
    cost |= {"gpu_hours": None, "core_hours": 1.25}
    html, markdown = render(analyse(raw))
    assert "GPU-hours" not in html
    assert "no GPU was used" in html
    assert "core-hours: 1.25" in markdown


def test_failures_searches_and_differences(found: dict[str, bytes]) -> None:
    assert [(row["stage"], row["event"], float(row["times"])) for row in rows(found, "incidents")] == [
        ("2x-est", "error", 2),
        ("2x-est", "requeued", 2),
        ("1x-joint", "stopped", 1),
    ]
    (_, second) = rows(found, "searches")
    assert (second["merge"], second["start"], second["seconds"]) == ("2x-ties", "2.84", "70.2")
    assert float(second["change"]) == pytest.approx(-0.31)
    factors = rows(found, "search-2-factors-2x-ties")
    assert [*factors[0]] == ["tensors", "2x-swe", "2x-est"]
    assert factors[1] == {"tensors": "block 1, attention", "2x-swe": "0.9", "2x-est": str(1.4 - 0.05)}
    (worse, *_, unknown) = rows(found, "comparisons")
    assert (unknown["difference"], unknown["outcome"]) == ("", "other data or another window")
    assert (worse["model"], worse["outcome"], worse["unit"]) == ("2x-swe", "worse", "accuracy, % points")
    assert float(worse["difference low"]) == pytest.approx(-0.7)


def test_models_with_the_same_tokenizer_share_a_row() -> None:
    raw = report_data.raw()
    other = {"model": "other", "task": "swe-news", "tokens_per_word": 1.5, "bytes_per_token": None}
    raw["fertility"].append(other)
    table = rows(files(analyse(raw)), "fertility")
    assert [row["model"] for row in table] == [", ".join(report_data.TASK_MODELS), "other"]
    assert table[1] == {
        "model": "other",
        "tokens a word swe-news": "1.5",
        **dict.fromkeys(("tokens a word est-news", "bytes a token swe-news", "bytes a token est-news"), ""),
    }


def test_evaluation_without_a_pipeline() -> None:
    results = analyse(report_data.evaluation())
    html, markdown = render(results)
    captions = [part.split("</span>")[0] for part in html.split("<caption><span>")[1:]]
    assert captions[0].startswith("Tasks: ")
    assert "One training seed" not in markdown
    assert "<strong>1.318 [1.306, 1.330]</strong>" in html  # the best is the last model where less is better,
    assert "<strong>78.1 [77.5, 78.7]</strong>" in html  # and the first where it gets worse
    assert "78.1" not in html.split("accuracy a token")[0].split("less is better")[0]
    table = rows(files(results), "models")
    assert [*table[0]] == ["model", "made by", "parameters"]


def test_heat_map_of_many_merges(results: dict[str, Any]) -> None:
    (one,) = heat.heat(results)
    (first, *_), count = one["tables"], len(one["tables"])
    assert count == 4
    values = [cell for row in first.rows for cell in row[1:]]
    assert [cell.text for cell in first.rows[0][1:]] == ["2.220", "2.350", "3.380", "3.510", "3.640"]
    by_value = sorted((cell for cell in values if cell.value is not None), key=lambda cell: cell.value or 0)
    levels = [cell.level or 0 for cell in by_value]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == LEVELS - 1
    assert [cell for cell in values if cell.level is None] == [Cell(text="–")]
    best = [[row[0].text for row in first.rows if row[i].best] for i in range(1, 6)]
    assert best[3] == ["swe + est + isl + fao"]
    assert best[0] == ["swe + est", "swe + isl", "swe + fao"]
    assert not first.tall
    assert all(contrast(*level) >= 4.5 for level in palette())


def test_a_merge_that_failed_does_not_flatten_the_others(results: dict[str, Any]) -> None:
    (one,) = report_data.heat(9)
    many = one | {"rows": one["rows"] * 8}
    before = heat.level(one, 2.3, *heat.ends(many))
    many["rows"].append({"label": "failed", "group": "linear 2x", "values": [99.0] * 5})
    ends = heat.ends(many)
    assert abs(heat.level(many, 2.3, *ends) - before) <= 2
    assert heat.level(many, 99.0, *ends) == 0
    assert heat.level(many | {"less_is_better": False}, 99.0, *ends) == LEVELS - 1
    html = render({**results, "heat": [many | {"rows": [row | {"group": "all"} for row in many["rows"]]}]})[0]
    tall = re.findall(r'<div class="scroll tall" tabindex="0" role="region" aria-label="([^"]*)">', html)
    assert "all: Merges of language models: bits per byte" in tall
    assert html.count('class="n h0">') + html.count('class="n h0"') > 5
