"""The questions that the paper asks (arXiv 2512.10772), answered by this run: a number, its interval and a verdict.

Every answer is a difference between two sides, in bits per byte, on the same held-out documents. A verdict is yes
or no only if the interval of the difference excludes 0.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from growmerge.report.estimates import Estimator, Side, Term, mean, minus
from growmerge.report.study import Study

YES, NO, UNRESOLVED = "yes", "no", "not resolved by this run"
UNIT = "bits per byte"

Wanted = Literal["less", "more", "differs"]
"""Which difference of the two sides means yes: below 0, above 0, or either."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sides that one answer compares; a side is None where this run has no scores for it."""

    part: str = ""
    """What the answer is about, such as `swe`; empty for the answer over all parts."""
    label: str = ""
    """The part in words, such as `Swedish`."""
    where: str
    """How the sentence begins, such as `On Swedish`."""
    first: str
    """The first side, such as `the 2x model`."""
    verb: str = "reaches"
    a: Side | None
    second: str
    """The second side, such as `the 1x model`."""
    b: Side | None
    detail: Mapping[str, Any] = field(default_factory=dict)


def verdict(low: float, high: float, wanted: Wanted) -> str:
    """Return what the interval of a difference says: never yes or no while it holds 0."""
    if low <= 0 <= high:
        return UNRESOLVED
    return YES if wanted == "differs" or (high < 0) == (wanted == "less") else NO


def answers(raw: Mapping[str, Any], estimate: Estimator) -> list[dict[str, Any]]:
    """Return an entry a question and part: id, question, label, sentence, verdict, value, low, high, unit, detail.

    `estimate(side)` gives value, low and high of a side. `Q1` is the answer over all parts, `Q1.swe` that of a part.
    A question whose models this run lacks is not resolved and has no numbers. Without a study there are no questions.
    """
    if not raw.get("study"):
        return []
    study = Study(raw)
    return [
        {"id": f"{code}.{pair.part}" if pair.part else code, "question": text.format(source=study.name(study.source))}
        | _answer(pair, wanted, estimate)
        for code, (text, wanted, compare) in QUESTIONS.items()
        for pair in compare(study)
    ]


def _answer(pair: Comparison, wanted: Wanted, estimate: Estimator) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": pair.label, "unit": UNIT, "detail": dict(pair.detail)}
    difference = minus(pair.a, pair.b)
    if pair.a is None or difference is None:
        words = f"{pair.where}: this run has no scores of {pair.second if pair.a else pair.first}."
        return entry | {"sentence": words, "verdict": UNRESOLVED, "value": None, "low": None, "high": None}
    level, found = estimate(pair.a)["value"], estimate(difference)
    sign, word = (-1, "less") if found["value"] < 0 else (1, "more")
    low, high = sorted((sign * found["low"], sign * found["high"]))
    answer = verdict(found["low"], found["high"], wanted)
    words = (
        f"{pair.where} {pair.first} {pair.verb} {level:.3f} {UNIT}, {abs(found['value']):.3f} {word} "
        f"[{low:.3f}, {high:.3f}] than {pair.second}: {answer}."
    )
    entry["detail"]["level"] = level
    return entry | {"sentence": words, "verdict": answer, **found}


def _over_languages(study: Study, setup: str, words: Mapping[str, Any], sides: Mapping[str, Any]) -> Iterator[Comparison]:
    """Compare on average over the languages, then on each; parts of setups after the first grown one carry its name."""
    prefix = "" if setup == study.grown[0] else setup
    everywhere = "On average over " + listed(study.name(code) for code in study.languages)
    yield Comparison(
        part=prefix,
        label=prefix,
        where=everywhere,
        a=mean(a for a, _ in sides.values()),
        b=mean(b for _, b in sides.values()),
        **words,
    )
    for code, (a, b) in sides.items():
        part, label = f"{prefix}.{code}".strip("."), f"{prefix} {study.name(code)}".strip()
        yield Comparison(part=part, label=label, where=f"On {study.name(code)}", a=a, b=b, **words)


def same_text(study: Study) -> Iterator[Comparison]:
    """Q1: each grown setup against the small one, after the same training text."""
    for setup in study.grown:
        sides = {code: (study.new(setup, code), study.new(study.small, code)) for code in study.languages}
        words = {"first": f"the {setup} model", "second": f"the {study.small} model"}
        yield from _over_languages(study, setup, words, sides)


def same_compute(study: Study) -> Iterator[Comparison]:
    """Q2: each grown setup, where it has used no more compute than the small one's whole run, against that run's end."""
    for setup in study.grown:
        points = {code: study.equal_compute(setup, code) for code in study.languages}
        sides: dict[str, tuple[Side | None, Side | None]] = {}
        for code, point in points.items():
            at: Side | None = [Term(factor=1.0, language=code, rows=point["scores"][code])] if point else None
            sides[code] = (at, study.new(study.small, code))
        found = {code: {k: point[k] for k in POINT} for code, point in points.items() if point}
        first = f"the {setup} model within the compute of {study.small}"
        if found:
            text, flops = (_percent(point[key] for point in found.values()) for key in ("share", "flops_share"))
            first = f"the {setup} model, after {text} of the text and {flops} of the compute and not yet decayed,"
        words = {"first": first, "second": f"the {study.small} model at its end", "detail": {"points": found}}
        yield from _over_languages(study, setup, words, sides)


def forgetting(study: Study) -> Iterator[Comparison]:
    """Q3: what each grown setup forgets of the source language against what the small one forgets."""
    for setup in study.grown:
        sides = {
            code: tuple(study.forgot(one, study.adapted(one, code)) for one in (setup, study.small))
            for code in study.languages
        }
        words = {
            "first": f"the {setup} model",
            "verb": f"loses, in {study.name(study.source)},",
            "second": f"the {study.small} model",
        }
        for pair in _over_languages(study, setup, words, sides):
            yield replace(pair, where=pair.where.replace("On ", "After training on ") if "average" not in pair.where else pair.where)
