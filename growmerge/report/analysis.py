"""A run's raw results with what follows from them: intervals, forgetting, the answers to the paper's questions."""

from collections.abc import Mapping
from typing import Any

from growmerge.report.estimates import NO_INTERVAL, Rows, Term, estimator, wilson
from growmerge.report.matched import matched
from growmerge.report.questions import answers
from growmerge.report.study import Study


def analyse(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return `raw` and, computed from it:

    `bits_per_byte[stage][language]`, `forgetting[stage]` (of the source language, against the base of the stage's
    setup), `accuracy[stage][language][kind]`, `baselines_summary[language][baseline]`, each with value, low and high
    (None where nothing is random: xz); `questions`; and `matched`, if the study has branches (None without them).
    Timings stay in their own part.
    """
    estimate = estimator(resamples=raw["resamples"], confidence=raw["confidence"], seed=raw["seed"])

    def bits(rows: Rows, language: str) -> dict[str, Any]:
        return dict(estimate([Term(factor=1.0, language=language, rows=rows)]))

    forgot = {}
    if raw.get("study"):
        study = Study(raw)
        parts = {stage: setup for stage, (setup, part) in study.members().items() if part != "base"}
        forgot = {stage: study.forgot(setup, stage) for stage, setup in parts.items()}
    return {
        **raw,
        "bits_per_byte": {
            stage: {language: bits(rows, language) for language, rows in scores.items()}
            for stage, scores in raw["scores"].items()
        },
        "forgetting": {stage: estimate(side) for stage, side in forgot.items() if side},
        "accuracy": {
            stage: {
                language: {
                    kind: wilson(found["correct"], found["n"], raw["confidence"])
                    for kind, found in kinds.items()
                    if found["n"]
                }
                for language, kinds in pairs.items()
            }
            for stage, pairs in raw.get("pairs", {}).items()
        },
        "baselines_summary": {
            language: {
                name: {"value": found, **NO_INTERVAL} if isinstance(found, (int, float)) else bits(found, language)
                for name, found in baselines.items()
            }
            for language, baselines in raw.get("baselines", {}).items()
        },
        "questions": answers(raw, estimate),
        "matched": matched(raw) if raw.get("study") else None,
    }
