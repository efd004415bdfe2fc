"""`growmerge compare`: differences on the same items, and what is said of them."""

import json

import pytest
from test_evaluating import folder, made  # noqa: F401
from test_merging import told

from eval.significance import accuracy_difference, bits_difference, holm


def verdict(place, name, tasks):
    """A verdict and its scores, as `growmerge eval` leaves them."""
    about = {}
    for task, (called, data, rows) in tasks.items():
        scores = f"scores/{name}-{task}.jsonl"
        (place / "scores").mkdir(parents=True, exist_ok=True)
        (place / scores).write_text(json.dumps({"from": 0, "rows": rows}) + "\n")
        number = {"value": 0.5, "low": 0.4, "high": 0.6}
        shown = {"bits_per_byte": number, "documents": len(rows)}
        if called == "pairs":
            shown = {"sum": {"macro": number, "micro": number, "phenomena": {"verb": number}}, "pairs": len(rows)}
        about[task] = {"kind": called, "data": data, "scores": scores, **shown}
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
    assert (swe["c"]["why"], verbs["c"]["why"]) == ("other data or another window", "not asked")
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
    shown = told("compare", str(out), "--base", "b", "--task", "verbs").stdout
    assert "against b" in shown and "worse" in shown and "-25.0" in shown and "swe" not in shown


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{out}/a.json"], "one model alone; a comparison is of two or more"),
        (["{out}/scores"], "no verdict of growmerge eval is there"),
        (["{out}", "--base", "d"], "unknown model 'd': allowed are a, b, c"),
        (["{out}", "--task", "est"], "a: unknown task 'est': allowed are swe, verbs, eng"),
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
    assert [*tasks["text"]["models"]] == ["est", "out/swe", "again/swe"]
    same = told("compare", "out/swe.json", "again/swe.json", "--json")
    for task in json.loads(same.stdout)["tasks"].values():
        entry = task["models"]["again/swe"]
        assert (entry["difference"]["value"], entry["p"], entry["outcome"]) == (0, 1, "not resolved")
