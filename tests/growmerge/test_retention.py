"""Forgetting and retention: which models are compared by their roles, and what comes of it."""

import json

import pytest
from scipy.stats import binomtest
from test_comparing import pairs, texts, verdict
from test_evaluating import CONFIG, SWEEP, folder, made  # noqa: F401
from test_merging import told

from eval.significance import bits_difference, holm
from growmerge.retention import role_comparisons
from growmerge.roles import read_roles, study_roles

DOCUMENT = [80.0 + 3 * at for at in range(20)]
SETUP = {
    "base": "base",
    "specialised": {"swe": "swe", "est": "est"},
    "joint": "joint",
    "models": ["base", "swe", "ties"],
}
ROLES = {"source_language": "eng", "setups": [SETUP]}
WORSE = {"base": 0, "swe": 8, "est": 6, "joint": 1, "ties": 3}
"""Bits a document that a model is worse by than the best."""


@pytest.fixture
def out(tmp_path):
    for name, worse in WORSE.items():
        rows = texts(*(one + worse + (at % 2 if worse else 0) for at, one in enumerate(DOCUMENT)))
        right = [True] * (70 - worse) + [False] * (30 + worse)
        tasks = {"eng": ("text", "e", rows), "swe-pairs": ("pairs", "p", pairs(right)), "fin": ("text", "f", rows)}
        tasks |= {"swe-samples": ("samples", "s", []), "est-theirs": ("harness", "h", [])}
        tasks["est-own"] = ("text", "old" if name == "joint" else "new", rows)
        verdict(tmp_path, name, tasks)
    return tmp_path


def read(out):
    return {name: json.loads((out / f"{name}.json").read_text()) for name in WORSE}


def test_each_role_has_its_comparisons(out):
    found = role_comparisons(read(out), ROLES, out)
    keys = [(one["kind"], one["task"], one["model"], one["against"]) for one in found]
    forgetting = [("forgetting", "eng", name, "base") for name in ("swe", "est", "joint", "ties")]
    tasks = {"swe-pairs": "swe", "swe-samples": "swe", "est-theirs": "est", "est-own": "est"}
    retention = [("retention", task, "ties", other) for task, one in tasks.items() for other in (one, "joint")]
    assert keys == forgetting + retention  # nothing of fin, to which no model is adapted
    by_key = dict(zip(keys, found, strict=True))

    swe = by_key[forgetting[0]]
    expected = bits_difference([one + 8 + at % 2 for at, one in enumerate(DOCUMENT)], DOCUMENT, [100] * 20)
    assert (swe["unit"], swe["language"], swe["why"]) == ("bits per byte", "eng", None)
    assert (swe["value"], swe["low"], swe["high"], swe["p"]) == (*vars(expected.difference).values(), expected.p)
    assert swe["value"] == pytest.approx(0.085)
    kept = by_key["retention", "swe-pairs", "ties", "joint"]
    assert (kept["unit"], kept["value"]) == ("accuracy", pytest.approx(-0.02))
    assert kept["p"] == pytest.approx(binomtest(0, 2, 0.5).pvalue)

    tested = [one for one in found if one["p"] is not None]
    assert len(tested) == 4 + 2 + 1
    assert [one["adjusted"] for one in tested] == holm([one["p"] for one in tested])
    outcomes = {key[2:]: by_key[key]["outcome"] for key in keys if key[1] in ("eng", "swe-pairs", "est-own")}
    assert outcomes["swe", "base"] == "worse" and outcomes["ties", "est"] == "better"
    assert outcomes["ties", "swe"] == "not resolved" and outcomes["ties", "joint"] is None
    why = {key[1:]: by_key[key]["why"] for key in keys if by_key[key]["value"] is None}
    assert why == {
        ("swe-samples", "ties", "swe"): "no number",
        ("swe-samples", "ties", "joint"): "no number",
        ("est-theirs", "ties", "est"): "lm-eval keeps no items",
        ("est-theirs", "ties", "joint"): "lm-eval keeps no items",
        ("est-own", "ties", "joint"): "other data or another window",
    }


def test_of_a_run_that_is_not_done(out):
    verdicts = {name: one for name, one in read(out).items() if name not in ("joint", "est")}
    found = role_comparisons(verdicts, ROLES, out)
    assert {(one["model"], one["against"]) for one in found} == {("swe", "base"), ("ties", "base"), ("ties", "swe")}


def test_roles_of_a_study():
    study = {
        "source_language": "eng",
        "languages": ["swe"],
        "setups": ["1x", "2x"],
        "base": {"1x": "base-1x", "2x": "base-2x"},
        "adapted": {"1x": {"swe": "1x-swe"}, "2x": {"swe": "2x-swe"}},
        "joint": {"1x": "1x-joint"},
        "merged": {"2x": {"ties": "2x-ties"}},
    }
    small = {"base": "base-1x", "specialised": {"swe": "1x-swe"}, "joint": "1x-joint", "models": []}
    large = {"base": "base-2x", "specialised": {"swe": "2x-swe"}, "joint": None, "models": ["2x-ties"]}
    assert study_roles(study) == {"source_language": "eng", "setups": [small, large]}


TASKS = """\
tasks:
  eng: {kind: text, files: text.jsonl, language: eng}
  swe: {kind: pairs, files: pairs.tsv, language: swe}
"""
SETUPS = """\
models: {base-1x: a, base-2x: a, 1x-swe: a, 1x-joint: a, 1x-ties: a, 1x-cloned-swe: a, 1x-cloned-ties: a, other: a,
  base-1x-cloned: a}
roles:
  source_language: eng
  setups: [1x, 1x-cloned]
  base: base-{setup}
  specialised: {swe: "{setup}-swe"}
  joint: "{setup}-joint"
"""


def roles_of(tmp_path, text):
    (tmp_path / "eval.yaml").write_text(text + TASKS)
    return read_roles(tmp_path / "eval.yaml")


def test_setups_share_their_templates(tmp_path):
    _, roles = roles_of(tmp_path, SETUPS)
    small, cloned = roles["setups"]
    assert small == {
        "base": "base-1x",
        "specialised": {"swe": "1x-swe"},
        "joint": "1x-joint",
        "models": ["1x-swe", "1x-joint", "1x-ties"],
    }
    # the longest name that fits; this one has no joint model
    models = ["1x-cloned-swe", "1x-cloned-ties"]
    assert cloned == {
        "base": "base-1x-cloned",
        "specialised": {"swe": "1x-cloned-swe"},
        "joint": None,
        "models": models,
    }
    _, roles = roles_of(tmp_path, SETUPS + '  models: "*{setup}-ties"\n')
    assert [one["models"] for one in roles["setups"]] == [["1x-ties"], ["1x-cloned-ties"]]
    assert roles_of(tmp_path, SETUPS.partition("roles:")[0]) is None


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("base: base-{setup}", "base: bass-{setup}"), 6, "roles.base: unknown model 'bass-1x': allowed are base-1x, "),
        (("base: base-{setup}", "base: base-{set}"), 6, "roles.base: unknown variable 'set': allowed are setup"),
        (('"{setup}-joint"', '"{setup}-join"'), 8, "roles.joint: unknown model '1x-join': allowed are "),
        (('swe: "{setup}-swe"', 'est: "{setup}-swe"'), 7, "roles.specialised.est: no task is of it: unknown language"),
        (('swe: "{setup}-swe"', 'swe: "{setup}-est"'), 7, "roles.specialised.swe: unknown model '1x-est': allowed are"),
        (("language: eng\n", "language: en\n"), 4, "roles.source_language: no task is of it: unknown language 'en'"),
        (("  source_language: eng\n", ""), 5, "roles.base: needs `source_language`"),
        (("  base: base-{setup}\n", ""), 4, "roles.source_language: needs `base`"),
        (('  specialised: {swe: "{setup}-swe"}\n', ""), 7, "roles.joint: needs `specialised`"),
        (("[1x, 1x-cloned]", "[1x, 3x]"), 6, "roles.base: unknown model 'base-3x': allowed are"),
        (("[1x, 1x-cloned]", "[1x, a/b]"), 5, "roles.setups.1: 'a/b' cannot be part of a name"),
        (("setups: [1x, 1x-cloned]", "setup: [1x]"), 5, "roles: unknown key 'setup': allowed are source_language"),
        (("other: a", "comparisons: a"), 3, "roles: a model is called 'comparisons', as the file that they are"),
        (("  joint:", "  models: ties\n  joint:"), 8, "roles.models: unknown model 'ties': allowed are base-1x"),
    ],
)
def test_what_is_wrong_is_one_line(change, line, said, tmp_path):
    assert change[0] in SETUPS
    (tmp_path / "eval.yaml").write_text(SETUPS.replace(*change) + TASKS)
    found = told("eval", str(tmp_path / "eval.yaml"), str(tmp_path / "out"))
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith(f"growmerge: {tmp_path}/eval.yaml:{line}: {said}")
    assert found.stderr.count("\n") == 1


ASKED = """
  english: {kind: text, files: text.jsonl, language: eng, window: 512}
roles:
  source_language: eng
  base: base
  specialised: {swe: swe}
  joint: est
"""


def test_an_evaluation_compares_by_roles(folder):  # noqa: F811
    (folder / "sweep.yaml").write_text(SWEEP.replace(", dare_ties: {density: 0.5}", ""))
    config = CONFIG.replace("models: {swe: swe", "sweep: sweep.yaml\nmodels: {base: base, swe: swe")
    (folder / "eval.yaml").write_text(config + ASKED.lstrip("\n"))
    names, roles = read_roles(folder / "eval.yaml")
    merges = names[3:]
    assert len(merges) == 3
    first = told(
        "eval", "eval.yaml", "out", *(part for name in ["swe", *merges] for part in ("--model", name)), "--json"
    )
    assert first.exit_code == 0, first.stderr
    assert json.loads(first.stdout)["comparisons"] is None
    assert "note: comparisons follow when all models of the file have verdicts in OUT" in first.stderr
    assert not (folder / "out" / "comparisons.json").exists()
    last = told("eval", "eval.yaml", "out", "--model", "base", "--model", "est", "--json")
    assert last.exit_code == 0, last.stderr
    found = json.loads(last.stdout)
    assert [one["model"]["name"] for one in found["verdicts"]] == ["base", "est"]
    about = json.loads((folder / "out" / "comparisons.json").read_text())
    written = about["comparisons"]
    assert (found["comparisons"], about["roles"]) == (written, roles)
    forgot = {one["model"]: one["value"] for one in written if one["kind"] == "forgetting"}
    numbers = {
        name: json.loads((folder / "out" / f"{name}.json").read_text())["tasks"]["english"]["bits_per_byte"]["value"]
        for name in names
    }
    assert forgot == {name: pytest.approx(numbers[name] - numbers["base"]) for name in ("swe", "est", *merges)}
    kept = {(one["task"], one["model"], one["against"]) for one in written if one["kind"] == "retention"}
    tasks = ("text", "verbs", "made")
    assert kept == {(task, name, other) for task in tasks for name in merges for other in ("swe", "est")}
    assert {one["outcome"] for one in written} <= {"better", "worse", "not resolved"}
    shown = told("eval", "eval.yaml", "out").stdout
    assert shown.index("forgetting") > shown.index("accuracy") and "retention" in shown
    # what they are written to is no verdict
    assert json.loads(told("compare", "out", "--task", "english", "--json").stdout)["base"] == "base"
