"""The questions that the paper asks (arXiv 2512.10772), answered by this run: a number, its interval and a verdict.

Every answer is a difference between two sides, in bits per byte, on the same held-out documents. A verdict is yes
or no only if the interval of the difference excludes 0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from growmerge.report.estimates import NO_INTERVAL, Estimator, Side, Term, mean, minus
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

    `estimate(side)` gives value, low and high of a side. `Q1` is the answer over all parts, `Q1/swe` that of a part.
    A question whose models this run lacks is not resolved and has no numbers. Without a study there are no questions.
    """
    if not raw.get("study"):
        return []
    study = Study(raw)
    return [
        {"id": f"{code}/{pair.part}" if pair.part else code, "question": text.format(source=study.name(study.source))}
        | _answer(pair, wanted, estimate)
        for code, (text, wanted, compare) in QUESTIONS.items()
        for pair in compare(study)
    ]


def _answer(pair: Comparison, wanted: Wanted, estimate: Estimator) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": pair.label, "unit": UNIT, "detail": dict(pair.detail)}
    difference = minus(pair.a, pair.b)
    if pair.a is None or difference is None:
        words = f"{pair.where}: this run has no scores of {(pair.second if pair.a else pair.first).rstrip(',')}."
        return entry | {"sentence": words, "verdict": UNRESOLVED, "value": None, **NO_INTERVAL}
    level, found = estimate(pair.a)["value"], estimate(difference)
    if found["low"] is None:
        words = f"{pair.where}: there are too few held-out documents for an interval."
        return entry | {"sentence": words, "verdict": UNRESOLVED, **found}
    sign, word = (-1, "less") if found["value"] < 0 else (1, "more")
    low, high = sorted((sign * found["low"], sign * found["high"]))
    answer = verdict(found["low"], found["high"], wanted)
    words = (
        f"{pair.where} {pair.first} {pair.verb} {level:z.3f} {UNIT}, {abs(found['value']):.3f} {word} "
        f"[{low:z.3f}, {high:z.3f}] than {pair.second}: {answer}."
    )
    entry["detail"]["level"] = level
    return entry | {"sentence": words, "verdict": answer, **found}


Sides = Mapping[str, tuple[Side | None, Side | None]]
"""The two sides by language."""


def _over_languages(study: Study, setup: str, sides: Sides, *, on: str = "On", **words: Any) -> Iterator[Comparison]:
    """Compare on average over the languages, then on each; parts of setups after the first grown one carry its name."""
    prefix = "" if setup == study.grown[0] else setup
    a, b = mean(a for a, _ in sides.values()), mean(b for _, b in sides.values())
    yield Comparison(part=prefix, label=prefix, where=_everywhere(study), a=a, b=b, **words)
    for code, (a, b) in sides.items():
        name = study.name(code)
        part, label = (f"{prefix}/{code}", f"{prefix} {name}") if prefix else (code, name)
        yield Comparison(part=part, label=label, where=f"{on} {name}", a=a, b=b, **words)


def _everywhere(study: Study) -> str:
    n = len(study.languages)
    return {1: "Over the one language", 2: "Over both languages"}.get(n, f"Over all {n} languages")


def same_text(study: Study) -> Iterator[Comparison]:
    """Q1: each grown setup against the small one, after the same training text."""
    for setup in study.grown:
        sides = {code: (study.new(setup, code), study.new(study.small, code)) for code in study.languages}
        yield from _over_languages(study, setup, sides, first=f"the {setup} model", second=f"the {study.small} model")


def same_compute(study: Study) -> Iterator[Comparison]:
    """Q2: each grown setup, while within the compute of the small one's whole adaptation, against its end."""
    for setup in study.grown:
        points = {code: study.equal_compute(setup, code) for code in study.languages}
        sides = {code: (_at(point, code), study.end(study.small, code)) for code, point in points.items()}
        found = {code: {key: point[key] for key in POINT} for code, point in points.items() if point}
        first = f"the {setup} model, within the adaptation's compute of {study.small},"
        if found:
            text, compute = (_percent([point[key] for point in found.values()]) for key in ("share", "flops_share"))
            first = f"the {setup} model, at {text} of the text and {compute} of the adaptation's compute,"
        second = f"the {study.small} model at its end"
        yield from _over_languages(study, setup, sides, first=first, second=second, detail={"points": found})


POINT = ("step", "tokens", "share", "flops", "flops_share")


def _at(point: Mapping[str, Any] | None, language: str) -> Side | None:
    return [Term(factor=1.0, language=language, rows=point["scores"][language])] if point else None


def forgetting(study: Study) -> Iterator[Comparison]:
    """Q3: what each grown setup forgets of the source language against what the small one forgets."""
    verb = f"forgets {study.name(study.source)} by"
    for setup in study.grown:
        sides = {
            code: (
                study.forgot(setup, study.adapted(setup, code)),
                study.forgot(study.small, study.adapted(study.small, code)),
            )
            for code in study.languages
        }
        first, second = f"the {setup} model", f"the {study.small} model"
        yield from _over_languages(study, setup, sides, on="Trained on", first=first, verb=verb, second=second)


def merged_or_joint(study: Study) -> Iterator[Comparison]:
    """Q4: merges against the joint model of the same setup, on average over the languages."""
    where = _everywhere(study)
    joint = {setup: study.joint(setup) for setup in study.setups}
    merged = {(method, setup): study.merged(setup, method) for method in study.methods for setup in study.setups}
    yield Comparison(
        where=where,
        first="the merges of all methods and setups",
        verb="reach",
        a=mean(merged.values()),
        second="the joint models",
        b=mean(joint.values()),
    )
    for method in study.methods:
        yield Comparison(
            part=method,
            label=method,
            where=where,
            first=f"the {method} merges of all setups",
            verb="reach",
            a=mean(merged[method, setup] for setup in study.setups),
            second="the joint models",
            b=mean(joint.values()),
        )
        for setup in study.setups:
            yield Comparison(
                part=f"{method}/{setup}",
                label=f"{setup} {method}",
                where=where,
                first=f"the {method} merge of the {setup} models",
                a=merged[method, setup],
                second=f"the joint {setup} model",
                b=joint[setup],
            )


def grown_merges(study: Study) -> Iterator[Comparison]:
    """Q5: merges of grown models against merges of small ones by the same method, on average over the languages."""
    where = _everywhere(study)
    for setup in study.grown:
        prefix = "" if setup == study.grown[0] else setup
        yield Comparison(
            part=prefix,
            label=prefix,
            where=where,
            first=f"the merges of {setup} models",
            verb="reach",
            a=mean(study.merged(setup, method) for method in study.methods),
            second=f"those of {study.small} models",
            b=mean(study.merged(study.small, method) for method in study.methods),
        )
        for method in study.methods:
            yield Comparison(
                part=f"{prefix}/{method}".strip("/"),
                label=f"{prefix} {method}".strip(),
                where=where,
                first=f"the {method} merge of {setup} models",
                a=study.merged(setup, method),
                second=f"that of {study.small} models",
                b=study.merged(study.small, method),
            )


def methods(study: Study) -> Iterator[Comparison]:
    """Q6: the other merge methods against the first one, together and each, on average over the languages."""
    one, *others = study.methods or ["first"]
    asked = [("", study.setups, others), *((setup, [setup], others) for setup in study.setups)]
    asked += [(method, study.setups, [method]) for method in others if len(others) > 1]
    for part, setups, compared in asked:
        of = "all setups" if len(setups) == len(study.setups) else f"{part} models"
        yield Comparison(
            part=part,
            label=part,
            where=_everywhere(study),
            first=f"the {listed(compared) or 'other'} merges of {of}",
            verb="reach",
            a=mean(study.merged(setup, method) for setup in setups for method in compared),
            second=f"the {one} merges",
            b=mean(study.merged(setup, one) for setup in setups),
        )


def before_or_after(study: Study) -> Iterator[Comparison]:
    """Q7: grown before the last training in the source language against grown after it."""
    early, late = study.early, study.late
    sides = {code: (study.new(early, code), study.new(late, code)) for code in study.languages}
    first, second = f"the {early} model, grown before it,", f"the {late} model, grown after it"
    yield from _over_languages(study, study.grown[0], sides, first=first, second=second)


def listed(words: Iterable[str]) -> str:
    """Return words as English lists them: `a`, `a and b`, `a, b and c`."""
    *rest, last = [*words] or [""]
    return f"{', '.join(rest)} and {last}" if rest else last


def _percent(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low}-{high} %"


QUESTIONS: dict[str, tuple[str, Wanted, Callable[[Study], Iterator[Comparison]]]] = {
    "Q1": ("After the same text, is the grown model better at the new language?", "less", same_text),
    "Q2": ("Does the grown model get there with less text and no more compute?", "less", same_compute),
    "Q3": ("Does growing lessen forgetting of {source}?", "less", forgetting),
    "Q4": ("Is merging less effective than joint training?", "more", merged_or_joint),
    "Q5": ("Are merges of grown models better than merges of small ones?", "less", grown_merges),
    "Q6": ("Do merging methods differ?", "differs", methods),
    "Q7": (
        "Does it matter whether growth comes before or after the last {source} training?",
        "differs",
        before_or_after,
    ),
}
"""By id: the question, the difference that means yes, and what is compared."""
