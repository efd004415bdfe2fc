"""The answers: against hand-made scores whose differences are known."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import report_data

from growmerge.report import analyse
from growmerge.report.estimates import Term, estimator, mean, minus, wilson
from growmerge.report.figures import learning
from growmerge.report.questions import NO, UNRESOLVED, YES, verdict


def shifted(rows: list[list[Any]], by: float, *, noise: float = 0.0) -> list[list[Any]]:
    """The same documents, each `by` bits per byte harder, with noise between documents."""
    own = np.random.default_rng(5).normal(0, 1, len(rows))
    own -= sum(own * [row[2] for row in rows]) / sum(row[2] for row in rows)
    return [[i, b + (by + noise * e) * n, n, t] for (i, b, n, t), e in zip(rows, own, strict=True)]


def asked(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {question["id"]: question for question in analyse(raw)["questions"]}


@pytest.fixture
def raw() -> dict[str, Any]:
    return report_data.raw()


@pytest.mark.parametrize(
    ("by", "noise", "answer", "word"),
    [(-0.08, 0.05, YES, "less"), (0.08, 0.05, NO, "more"), (-0.001, 0.5, UNRESOLVED, "less")],
)
def test_grown_against_small(raw: dict[str, Any], by: float, noise: float, answer: str, word: str) -> None:
    small = raw["scores"]["1x-swe"]["swe"]
    raw["scores"]["2x-swe"]["swe"] = shifted(small, by, noise=noise)
    found = asked(raw)["Q1/swe"]
    level = sum(row[1] for row in small) / sum(row[2] for row in small) + by
    assert found["verdict"] == answer
    assert found["value"] == pytest.approx(by, abs=1e-9)
    assert found["low"] < by < found["high"]
    near, far = sorted(abs(found[end]) if answer != UNRESOLVED else -found[end] for end in ("low", "high"))
    assert found["sentence"] == (
        f"On Swedish the 2x model reaches {level:.3f} bits per byte, {abs(by):.3f} {word} [{near:.3f}, {far:.3f}] "
        f"than the 1x model: {answer}."
    )


def test_equal_models_are_not_resolved(raw: dict[str, Any]) -> None:
    for language in ("swe", "est"):
        raw["scores"][f"2x-{language}"][language] = raw["scores"][f"1x-{language}"][language]
    found = asked(raw)
    for key in ("Q1", "Q1/swe", "Q1/est"):
        assert (found[key]["value"], found[key]["low"], found[key]["high"]) == (0, 0, 0)
        assert found[key]["verdict"] == UNRESOLVED


def test_forgetting_is_the_difference_to_the_own_base(raw: dict[str, Any]) -> None:
    english = raw["scores"]["base-1x"]["eng"]
    scores = {"base-2x": -0.3, "1x-swe": 0.5, "2x-swe": 0.3}  # 2x is better at English but has lost more: 0.6
    for stage, by in scores.items():
        raw["scores"][stage]["eng"] = shifted(english, by)
    results = analyse(raw)
    found = {question["id"]: question for question in results["questions"]}["Q3/swe"]
    assert results["forgetting"]["1x-swe"]["value"] == pytest.approx(0.5)
    assert results["forgetting"]["2x-swe"]["value"] == pytest.approx(0.6)
    assert found["value"] == pytest.approx(0.1)
    assert found["verdict"] == NO
    assert found["sentence"].startswith(
        "Trained on Swedish the 2x model forgets English by 0.600 bits per byte, 0.100 more"
    )
    assert not {"base-1x", "base-2x", "seed"} & set(results["forgetting"])


def test_merges_against_joint_and_one_another(raw: dict[str, Any]) -> None:
    for language in ("swe", "est"):
        joint = raw["scores"]["1x-joint"][language]
        for setup, by in {"1x": 0.0, "1x-cloned": -0.1, "2x": -0.2}.items():
            raw["scores"][f"{setup}-joint"][language] = shifted(joint, by)
            raw["scores"][f"{setup}-linear"][language] = shifted(joint, by + 0.4)
            raw["scores"][f"{setup}-ties"][language] = shifted(joint, by + {"swe": 0.2, "est": -0.3}[language])
    found = asked(raw)
    expected = {
        "Q4": ((0.4 - 0.05) / 2, YES),
        "Q4/linear": (0.4, YES),
        "Q4/ties": (-0.05, NO),
        "Q4/ties/2x": (-0.05, NO),
        "Q5": (-0.2, YES),
        "Q5/linear": (-0.2, YES),
        "Q5/1x-cloned/ties": (-0.1, YES),
        "Q6": (-0.45, YES),
        "Q6/1x-cloned": (-0.45, YES),
    }
    for key, (value, answer) in expected.items():
        assert found[key]["value"] == pytest.approx(value), key
        assert found[key]["verdict"] == answer, key


def test_each_of_several_methods_against_the_first(raw: dict[str, Any]) -> None:
    assert "Q6/ties" not in asked(raw)  # it is Q6 itself
    raw["study"]["methods"] = ["linear", "ties", "dare_ties"]
    for setup in report_data.SETUPS:
        raw["study"]["merged"][setup]["dare_ties"] = f"{setup}-dare"
        linear = raw["scores"][f"{setup}-linear"]
        raw["scores"][f"{setup}-ties"] = {code: shifted(rows, -0.1) for code, rows in linear.items()}
        raw["scores"][f"{setup}-dare"] = {code: shifted(rows, 0.3) for code, rows in linear.items()}
    found = asked(raw)
    assert found["Q6"]["value"] == pytest.approx(0.1)
    assert found["Q6/ties"]["value"] == pytest.approx(-0.1)
    assert found["Q6/dare_ties"]["value"] == pytest.approx(0.3)
    assert found["Q6/dare_ties"]["sentence"].startswith("Over both languages the dare_ties merges of all setups reach")


def test_before_or_after_takes_the_setup_whose_base_was_grown_as_late(raw: dict[str, Any]) -> None:
    late = raw["scores"]["1x-cloned-est"]["est"]
    raw["scores"]["2x-est"]["est"] = shifted(late, 0.25)
    found = asked(raw)["Q7/est"]
    assert found["value"] == pytest.approx(0.25)
    assert found["verdict"] == YES
    assert "the 2x model, grown before it" in found["sentence"]
    raw["study"]["setups"] = ["1x", "2x", "1x-cloned"]
    assert asked(raw)["Q7/est"]["value"] == pytest.approx(0.25)


def test_equal_compute_point(raw: dict[str, Any]) -> None:
    """2x has 3.4 times the FLOPs a token: step 75 of 300 is 85 % of the 1x run's compute, step 150 is too much."""
    small = raw["scores"]["1x-swe"]["swe"]
    for point in raw["curves"]["2x-swe"]:
        point["scores"]["swe"] = shifted(small, {0: 9.0, 75: 0.11, 150: -0.2, 225: -0.3, 300: -0.4}[point["step"]])
    found = asked(raw)["Q2/swe"]
    assert found["value"] == pytest.approx(0.11)
    assert found["verdict"] == NO
    point = found["detail"]["points"]["swe"]
    assert (point["step"], point["tokens"], point["share"]) == (75, 76_800, 0.25)
    assert point["flops_share"] == pytest.approx(3.4 / 4)
    assert "at 25 % of the text and 85 % of the adaptation's compute, reaches" in found["sentence"]
    raw["models"]["2x-swe"]["flops"] *= 1.2  # now step 75 is above it too, and step 0 is no training
    assert asked(raw)["Q2/swe"]["value"] is None


def test_no_answer_without_the_models(raw: dict[str, Any]) -> None:
    for setup in report_data.SETUPS:
        del raw["scores"][f"{setup}-joint"]
    raw["curves"] = {}
    found = asked(raw)
    for key in ("Q4", "Q4/ties/1x", "Q2"):
        assert (found[key]["value"], found[key]["verdict"]) == (None, UNRESOLVED)
    assert found["Q4"]["sentence"] == "Over both languages: this run has no scores of the joint models."
    assert found["Q1"]["value"] is not None
    raw["study"] |= {"setups": ["1x"], "methods": []}
    assert all(question["value"] is None for question in asked(raw).values())
    assert asked(raw | {"study": None}) == {}


def test_every_question_has_one_answer_over_all(raw: dict[str, Any]) -> None:
    found = asked(raw)
    assert [key for key in found if "/" not in key] == ["Q1", "Q2", "Q3", "Q4", "Q5", "Q6", "Q7"]
    for entry in found.values():
        assert set(entry) == {
            "id",
            "question",
            "label",
            "sentence",
            "verdict",
            "value",
            "low",
            "high",
            "unit",
            "detail",
        }
        assert entry["sentence"].endswith(f": {entry['verdict']}.")


@pytest.mark.parametrize(
    ("low", "high", "less", "more", "differs"),
    [(-0.2, -0.1, YES, NO, YES), (0.1, 0.2, NO, YES, YES), (-0.1, 0.1, *[UNRESOLVED] * 3), (0, 0.1, *[UNRESOLVED] * 3)],
)
def test_verdict(low: float, high: float, less: str, more: str, differs: str) -> None:
    assert [verdict(low, high, wanted) for wanted in ("less", "more", "differs")] == [less, more, differs]


def test_estimate_over_languages_pairs_documents() -> None:
    """A difference that is the same in every document has no width, however much the documents differ."""
    a = {code: report_data.rows(2.5, code, "a") for code in ("swe", "est")}
    sides = [[Term(factor=1.0, language=code, rows=rows)] for code, rows in a.items()]
    others = [[Term(factor=1.0, language=code, rows=shifted(rows, 0.125))] for code, rows in a.items()]
    estimate = estimator(resamples=100, confidence=0.95, seed=1)
    found = estimate(minus(mean(sides), mean(others)) or [])
    assert found["value"] == pytest.approx(-0.125)
    assert found["high"] - found["low"] < 1e-9
    alone = estimate(mean(sides) or [])
    byte_means = [sum(row[1] for row in rows) / sum(row[2] for row in rows) for rows in a.values()]
    assert alone["value"] == pytest.approx(sum(byte_means) / 2)
    assert alone["high"] - alone["low"] > 0.03


def test_mean_of_unequal_languages_weighs_languages_not_bytes() -> None:
    long = [Term(factor=1.0, language="a", rows=[["x", 800.0, 100], ["y", 800.0, 100]])]
    short = [Term(factor=1.0, language="b", rows=[["x", 1.0, 1], ["z", 3.0, 1]])]
    estimate = estimator(resamples=10, confidence=0.95, seed=1)
    assert estimate(mean([long, short]) or [])["value"] == pytest.approx((8 + 2) / 2)
    assert mean([long, None]) is None
    assert mean([]) is None
    assert minus(None, long) is None


def test_one_document_has_no_interval(raw: dict[str, Any]) -> None:
    raw["curves"] = {}
    for scores in raw["scores"].values():
        scores["swe"] = scores["swe"][:1]
    results = analyse(raw)
    assert results["bits_per_byte"]["seed"]["swe"]["low"] is None
    found = next(question for question in results["questions"] if question["id"] == "Q1/swe")
    assert found["verdict"] == UNRESOLVED
    assert "too few held-out documents" in found["sentence"]


def test_scores_of_other_documents_are_refused(raw: dict[str, Any]) -> None:
    raw["scores"]["2x-swe"]["swe"] = raw["scores"]["2x-swe"]["swe"][:-1]
    with pytest.raises(AssertionError, match="other documents in swe"):
        analyse(raw)


def test_wilson() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I: 81 of 263, 15 of 148 and 0 of 20."""
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = wilson(correct, n, 0.95)
        assert (round(found["low"], 4), round(found["high"], 4)) == (low, high)
        assert found["value"] == correct / n


def test_analyse_keeps_its_input_and_repeats(raw: dict[str, Any]) -> None:
    before = copy.deepcopy(raw)
    results = analyse(raw)
    assert raw == before
    assert analyse(raw) == results
    assert results["timings"] == raw["timings"]
    rows = raw["scores"]["2x-est"]["est"]
    bits = sum(row[1] for row in rows) / sum(row[2] for row in rows)
    assert results["bits_per_byte"]["2x-est"]["est"]["value"] == pytest.approx(bits)
    assert results["baselines_summary"]["swe"]["xz"] == {"value": 1.982, "low": None, "high": None}
    assert results["accuracy"]["seed"]["eng"]["swap"]["value"] == 131 / 200


def test_curve_is_drawn_from_its_scores(raw: dict[str, Any]) -> None:
    rows = raw["curves"]["2x-swe"][-1]["scores"]["swe"]
    end = sum(row[1] for row in rows) / sum(row[2] for row in rows)
    label = re.search(r'aria-label="([^"]*)"', learning(analyse(raw))[0])
    assert label
    assert f"2x trained on Swedish ends at {end:.3f}" in label[1]
