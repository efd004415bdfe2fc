"""`growmerge compare`: differences on the same items, and what is said of them."""

import json
import re

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from test_evaluating import folder, made  # noqa: F401
from test_merging import told

from eval.significance import accuracy_difference, bits_difference, holm


def verdict(place, name, tasks):
    """A verdict and its scores, as `growmerge eval` leaves them; a task's language is the beginning of its name."""
    about = {}
    for task, (called, data, rows) in tasks.items():
        scores = f"scores/{name}-{task}.jsonl"
        (place / "scores").mkdir(parents=True, exist_ok=True)
        (place / scores).write_text(json.dumps({"from": 0, "rows": rows}) + "\n")
        number = {"value": 0.5, "low": 0.4, "high": 0.6}
        shown = {"bits_per_byte": number, "documents": len(rows)}
        if called == "pairs":
            count = sum(row[4] == "verb" for row in rows)
            found = {"macro": number, "micro": number, "phenomena": {"verb": {**number, "count": count}}}
            shown = {"sum": found, "pairs": len(rows)}
        elif called == "harness":
            shown = {"results": {task: {"acc,none": 0.5, "acc_stderr,none": 0.1}}}
        elif called == "samples":
            shown = {"samples": rows}
        about[task] = {"kind": called, "language": task[:3], "data": data, "scores": scores, **shown}
    how = {"resamples": 2000, "confidence": 0.95, "seed": 0}
    (place / f"{name}.json").write_text(json.dumps({"format": 1, "model": {"name": name}, **how, "tasks": about}))


def pairs(right):
    """Pairs of which so many are right, and one of a kind that is not counted by sums."""
    return [*([-1.0, -2.0 if one else -0.5, 4, 4, "verb"] for one in right), [-1.0, -2.0, 4, 3, "drop"]]


def texts(*bits):
    return [[f"d{at}", one, 100, 30, 20] for at, one in enumerate(bits)]


@pytest.fixture
def out(tmp_path):
    base = [True] * 40 + [False] * 60
    better = [True] * 65 + [False] * 35
    document = [80.0 + 3 * at for at in range(20)]
    swe = ("text", "t1", texts(*document))
    verdict(tmp_path, "a", {"swe": swe, "verbs": ("pairs", "p1", pairs(base)), "eng": ("text", "e1", texts(*document))})
    worse = texts(*(one + 5 + at % 2 for at, one in enumerate(document)))
    same = texts(*(one + (2 if at % 2 else -2) for at, one in enumerate(document)))
    tasks = {"swe": ("text", "t1", same), "verbs": ("pairs", "p1", pairs(better)), "eng": ("text", "e1", worse)}
    verdict(tmp_path, "b", tasks)
    verdict(tmp_path, "c", {"swe": ("text", "other", texts(*document))})
    return tmp_path


def test_each_against_the_first(out):
    found = told("compare", str(out), "--json")
    assert found.exit_code == 0, found.output
    table = json.loads(found.stdout)
    assert table["base"] == "a"
    swe, verbs, eng = (table["tasks"][task]["models"] for task in ("swe", "verbs", "eng"))
    assert [one["b"]["outcome"] for one in (swe, verbs, eng)] == ["not resolved", "better", "worse"]
    assert (swe["c"]["why"], verbs["c"]["why"]) == ("other data or another window", "c was not asked")
    assert all(one["b"]["against"] == "a" for one in (swe, verbs, eng))
    document = [80.0 + 3 * at for at in range(20)]
    expected = [
        bits_difference([one + (2 if at % 2 else -2) for at, one in enumerate(document)], document, [100] * 20),
        accuracy_difference([True] * 65 + [False] * 35, [True] * 40 + [False] * 60),
        bits_difference([one + 5 + at % 2 for at, one in enumerate(document)], document, [100] * 20),
    ]
    assert [one["b"]["p"] for one in (swe, verbs, eng)] == [one.p for one in expected]
    assert [one["b"]["adjusted"] for one in (swe, verbs, eng)] == holm([one.p for one in expected])
    assert verbs["b"]["difference"]["value"] == pytest.approx(0.25)
    assert eng["b"]["difference"]["value"] == pytest.approx((5 + 0.5) / 100)
    shown = told("compare", str(out), "--base", "b", "--task", "v*").stdout
    (row,) = (line for line in shown.splitlines() if " a " in line)
    assert re.search(r" b +-25\.0 \[.*\] +\S+ +worse \*\*\* *$", row) and "swe" not in shown
    assert "for all 1 differences" in shown


def test_what_is_asked_is_what_is_corrected_for(out):
    found = json.loads(told("compare", str(out), "--language", "eng", "--model", "b", "--json").stdout)
    assert {task: [*about["models"]] for task, about in found["tasks"].items()} == {"eng": ["a", "b"]}
    assert found["tasks"]["eng"]["models"]["b"]["adjusted"] == found["tasks"]["eng"]["models"]["b"]["p"]


def test_colours_stand_beside_words(out, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = told("compare", str(out), color=True).stdout
    assert "\x1b[32mbetter ***" in shown and "\x1b[31mworse **" in shown
    monkeypatch.delenv("FORCE_COLOR")
    plain = told("compare", str(out)).stdout
    assert "better ***" in plain and "\x1b" not in plain


def test_many_comparisons_do_not_hide_a_plain_difference(tmp_path):
    """p of 2000 resamples is 0.001 at least: of 60 comparisons none would be below 0.05."""
    document = [80.0 + 3 * at for at in range(20)]
    verdict(tmp_path, "a", {"swe": ("text", "t", texts(*document))})
    for number in range(60):
        verdict(
            tmp_path,
            f"b{number}",
            {"swe": ("text", "t", texts(*(one + 5 + at % 2 for at, one in enumerate(document))))},
        )
    models = json.loads(told("compare", str(tmp_path), "--json").stdout)["tasks"]["swe"]["models"]
    assert {one["outcome"] for name, one in models.items() if name != "a"} == {"worse"}
    assert models["b7"]["adjusted"] == pytest.approx(60 * 2 / (80 * 60 + 1))


def test_an_interval_is_that_of_scipy(out):
    table = json.loads(told("compare", str(out), "--json").stdout)["tasks"]
    base, other = (
        [row[1] for row in json.loads((out / f"scores/{one}-swe.jsonl").read_text())["rows"]] for one in "ab"
    )
    found = bootstrap(
        (np.array(other), np.array(base)),
        lambda ours, theirs, axis: (ours - theirs).sum(axis) / (100 * ours.shape[axis]),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=1,
    ).confidence_interval
    difference = table["swe"]["models"]["b"]["difference"]
    assert (difference["low"], difference["high"]) == pytest.approx((found.low, found.high), abs=1e-3)
    assert table["verbs"]["models"]["b"]["p"] == pytest.approx(binomtest(0, 25, 0.5).pvalue)


@pytest.fixture
def runs(tmp_path):
    """Workdirs of a pipeline, the second better at Swedish; each has verdicts in its folder for them."""
    document = [80.0 + 3 * at for at in range(20)]
    for run, gain in (("one", 0), ("two", 5)):
        place = tmp_path / run / "evaluation"
        for stage, worse in (("1x", 40), ("2x", 20)):
            rows = texts(*(one + worse - gain - at % 2 for at, one in enumerate(document)))
            verdict(place, stage, {"swe": ("text", "t", rows), "est": ("text", f"held out of {run}", rows)})
        (place / "comparisons.json").write_text('{"comparisons": [{"task": "swe"}]}')
        (place / "numbers.json").write_text("[1, 2]")
    verdict(tmp_path / "two" / "evaluation", "3x", {"swe": ("text", "t", texts(*document))})
    return tmp_path


def test_two_runs_of_a_pipeline_stage_by_stage(runs):
    found = told("compare", str(runs / "one"), str(runs / "two"), "--json")
    assert found.exit_code == 0, found.output
    table = json.loads(found.stdout)
    models = table["tasks"]["swe"]["models"]
    assert [*models] == ["one/1x", "two/1x", "one/2x", "two/2x", "3x"]
    against = {name: one.get("against") for name, one in models.items()}
    assert against == {"one/1x": None, "two/1x": "one/1x", "one/2x": None, "two/2x": "one/2x", "3x": None}
    assert (table["base"], models["two/1x"]["outcome"], models["two/2x"]["outcome"]) == (None, "better", "better")
    assert models["two/2x"]["difference"]["value"] == pytest.approx(-5 / 100)
    est = table["tasks"]["est"]["models"]
    assert {est[name]["why"] for name in ("two/1x", "two/2x")} == {"other data or another window"}
    shown = told("compare", str(runs / "one"), str(runs / "two")).stdout
    assert re.search(r"swe \(bits per byte\) +two/2x .* one/2x +-0\.050 .*better", shown)
    assert re.search(r"est \(bits per byte\) +two/2x .* one/2x +other data or another window", shown)


def test_one_model_of_two_runs_as_the_base(runs):
    given = ("compare", str(runs / "one"), str(runs / "two"), "--task", "swe", "--json")
    table = json.loads(told(*given, "--base", "one/1x").stdout)
    against = {name: one.get("against") for name, one in table["tasks"]["swe"]["models"].items()}
    assert against == {"one/1x": None, "one/2x": "one/1x", "two/1x": "one/1x", "two/2x": "one/1x", "3x": "one/1x"}
    assert table["tasks"]["swe"]["models"]["two/2x"]["difference"]["value"] == pytest.approx(-25 / 100)
    chosen = json.loads(told(*given, "--model", "2x").stdout)["tasks"]["swe"]["models"]
    assert [*chosen] == ["one/2x", "two/2x"]
    assert [*json.loads(told(*given, "--model", "two/2*").stdout)["tasks"]["swe"]["models"]] == ["one/2x", "two/2x"]


def test_places_of_one_name(runs, monkeypatch):
    monkeypatch.chdir(runs)
    for part in "ab":
        (runs / part).mkdir()
        (runs / ("one" if part == "a" else "two")).rename(runs / part / "run")
    models = json.loads(told("compare", "a/run", "b/run", "--task", "swe", "--json").stdout)["tasks"]["swe"]["models"]
    assert models["b/run/1x"]["against"] == "a/run/1x"
    # the same file under two names is one model
    models = json.loads(told("compare", "a/run", "a/run/evaluation/1x.json", "--json").stdout)["tasks"]["swe"]["models"]
    assert {name: one.get("against") for name, one in models.items()} == {"1x": None, "2x": "1x"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{out}/a.json"], "one model alone; a comparison is of two or more"),
        (["{out}/scores"], "scores: no verdict of growmerge eval or growmerge run is there"),
        (["{out}", "--base", "d"], "unknown model 'd': allowed are a, b, c"),
        (["{out}", "--task", "est*"], "unknown task 'est*': allowed are swe, verbs, eng"),
        (["{out}", "--model", "d*"], "unknown model 'd*': allowed are a, b, c"),
        (["{out}", "--language", "est"], "unknown language 'est': allowed are swe, ver, eng"),
        (["{out}/a.json", "{out}/torn.json"], "not valid JSON"),
    ],
)
def test_what_cannot_be_compared_is_one_line(given, said, out):
    (out / "torn.json").write_text('{"tasks": ')
    if "{out}" in given:
        (out / "torn.json").unlink()
    found = told("compare", *(one.format(out=out) for one in given))
    assert found.exit_code == 2
    assert said in found.stderr and found.stderr.count("\n") == 1


def test_scores_that_are_gone(out):
    (out / "scores" / "b-verbs.jsonl").unlink()
    found = told("compare", str(out))
    assert found.exit_code == 2
    assert "verbs: 0 of 101 scores are there; evaluate it again" in found.stderr


def test_what_an_evaluation_leaves(folder):  # noqa: F811
    assert told("eval", "eval.yaml", "out").exit_code == 0
    assert told("eval", "eval.yaml", "again", "--model", "swe").exit_code == 0
    found = told("compare", "out", "again/swe.json", "--json")
    assert found.exit_code == 0, found.output
    tasks = json.loads(found.stdout)["tasks"]
    assert set(tasks) == {"text", "verbs", "made"}
    assert {name: one.get("against") for name, one in tasks["text"]["models"].items()} == {
        "est": None,
        "out/swe": None,
        "again/swe": "out/swe",
    }
    for task in tasks.values():
        entry = task["models"]["again/swe"]
        assert (entry["difference"]["value"], entry["p"], entry["outcome"]) == (0, 1, "not resolved")
