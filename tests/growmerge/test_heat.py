"""Heat maps of merges: which rows there are, in which groups, with which numbers."""

from typing import Any

import report_data

from growmerge import heat
from growmerge.findings import asked


def test_merges_of_a_study_by_the_languages_of_their_models() -> None:
    raw = report_data.raw()
    (found,) = heat.of_pipeline(raw)
    assert found["columns"] == ["Swedish", "Estonian", "English"]
    assert [(row["group"], row["label"]) for row in found["rows"]] == [
        ("", f"{method}, {setup}: Swedish + Estonian")
        for setup in ("1x", "1x-cloned", "2x")
        for method in ("linear", "ties")
    ]
    rows = raw["scores"]["2x-ties"]["swe"]
    assert found["rows"][-1]["values"][0] == sum(row[1] for row in rows) / sum(row[2] for row in rows)
    del raw["scores"]["2x-ties"]  # not evaluated yet
    assert len(heat.of_pipeline(raw)[0]["rows"]) == 5
    raw["scores"] = {}
    assert heat.of_pipeline(raw) == []


def verdict(provenance: dict[str, Any], bits: float) -> dict[str, Any]:
    task = {
        "kind": "text",
        "language": "swe",
        "domain": "",
        "bits_per_byte": {"value": bits, "low": None, "high": None},
    }
    return {"model": {"provenance": provenance}, "tasks": {"news": task}}


TEXT = "merge_method: linear\nbase_model: runs/base/model\nmodels: [{model: runs/swe/model}, {model: runs/est/model}]\n"
BOTH = {
    "verb": "merge",
    "recipe": {"method": "linear", "text": TEXT},
    "models": ["runs/swe/model", "runs/est/model", "runs/base/model"],
}


def test_merges_that_were_evaluated_are_known_by_their_provenance() -> None:
    one = {"verb": "merge", "recipe": {"method": "ties"}, "parents": [{"name": "runs/swe/model"}, {"name": "fao"}]}
    verdicts = {
        "swe": verdict({"verb": "train"}, 1.0),
        "both": verdict(BOTH, 1.5),
        "both-2": verdict(BOTH, 1.6),
        "other": verdict(one, 1.7),
    }
    (found,) = heat.of_verdicts(verdicts, asked(verdicts))
    assert (found["unit"], found["columns"], found["less_is_better"]) == ("bits per byte", ["news"], True)
    assert found["rows"] == [
        {"label": "swe/model + est/model (both)", "group": "linear", "values": [1.5]},
        {"label": "swe/model + est/model (both-2)", "group": "linear", "values": [1.6]},
        {"label": "swe/model + fao", "group": "ties", "values": [1.7]},
    ]
    assert heat.of_verdicts({"swe": verdicts["swe"]}, asked({"swe": verdicts["swe"]})) == []


def test_labels_are_the_shortest_ends_that_differ() -> None:
    assert heat.labels(["a/swe", "a/est"]) == {"a/swe": "swe", "a/est": "est"}
    assert heat.labels(["x/swe/model", "x/est/model"]) == {"x/swe/model": "swe/model", "x/est/model": "est/model"}
    assert heat.labels(["model"]) == {"model": "model"}
    assert heat.labels([]) == {}
