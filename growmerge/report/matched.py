"""Setups compared at equal tokens and at equal FLOPs, by models that were decayed at several token counts each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from eval.bootstrap import percentiles
from eval.repeats import losses, spread
from eval.scaling import Curve, overtaking, reaching
from eval.scaling_law import scatter
from growmerge.report.estimates import FEWEST, NO_INTERVAL
from growmerge.report.matched_laws import REACH, Fitted, Setup, by_law, fitted, plain, refitted
from growmerge.report.study import Study


def matched(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the comparison, as plain JSON; None if the study has no branches, or none is scored yet.

    `between`: the spread of runs (see `eval.repeats`), None without repeats. By language: `setups`, their points;
    `pairs`: from where on the first is ahead of the second by tokens and by flops, how much it needs for the other
    one's last loss, and what the laws say; `laws`.
    """
    study = Study(raw)
    lines = {code: _setups(study, code, found) for code, found in study.roles.get("branches", {}).items()}
    lines = {code: setups for code, setups in lines.items() if setups}
    if not lines:
        return None
    known = {code: len(next(iter(setups.values())).size) >= FEWEST for code, setups in lines.items()}
    everything = [one for setups in lines.values() for one in setups.values()]
    between = spread((one.bits, one.size) for one in everything)
    how = {"resamples": int(raw["resamples"]), "seed": int(raw["seed"])}
    for number, (code, setups) in enumerate(lines.items()):
        for name, one in setups.items():
            stream = 1000 * number + study.setups.index(name)
            drawn = losses(one.bits, one.size, between=between, stream=stream, **how) if known[code] else _measured(one)
            setups[name] = replace(one, stream=stream, losses=drawn)
    laws = {code: fitted(study, setups) if known[code] else [] for code, setups in lines.items()}
    points = scatter(one.law for found in laws.values() for one in found if one.law)
    if points is not None:
        laws = {code: [refitted(one, lines[code], points, how["seed"]) for one in of] for code, of in laws.items()}
    return {
        "between": None if between is None else asdict(between),
        "repeats": max(len(bits) for one in everything for bits in one.bits),
        "scatter": None if points is None else asdict(points),
        "reach": REACH,
        "languages": {
            code: _language(study, setups, laws[code], known[code], float(raw["confidence"]))
            for code, setups in lines.items()
        },
    }


def _setups(study: Study, code: str, branches: Mapping[str, Sequence[str]]) -> dict[str, Setup]:
    """Return the setups of a language that have scores, in the study's order; all on the same documents."""
    found: dict[str, Setup] = {}
    known: dict[Any, int] = {}
    for setup in study.setups:
        by_tokens: dict[int, list[str]] = {}
        for stage in branches.get(setup, []):
            model = study.raw["models"].get(stage, {})
            counted = all(model.get(key) for key in ("adaptation_tokens", "adaptation_flops", "parameters"))
            if counted and study.raw["scores"].get(stage, {}).get(code):
                by_tokens.setdefault(model["adaptation_tokens"], []).append(stage)
        if not by_tokens:
            continue
        stages = [by_tokens[count] for count in sorted(by_tokens)]
        models = [study.raw["models"][names[0]] for names in stages]
        scores = [[study.raw["scores"][name][code] for name in names] for names in stages]
        known = known or {row[0]: row[2] for row in scores[0][0]}
        found[setup] = Setup(
            name=setup,
            parameters=models[0]["parameters"],
            tokens=np.array(sorted(by_tokens), dtype=float),
            flops=np.array([model["adaptation_flops"] for model in models], dtype=float),
            stages=stages,
            bits=[np.stack([_bits(rows, known, code) for rows in repeats]) for repeats in scores],
            size=np.array([*known.values()], dtype=float),
        )
    return found


def _bits(rows: Sequence[Sequence[Any]], known: Mapping[Any, int], code: str) -> np.ndarray:
    """Return the bits of each document, in the order of those that are known."""
    assert {row[0]: row[2] for row in rows} == known, f"scores of other documents in {code}"
    bits = {row[0]: row[1] for row in rows}
    return np.array([bits[name] for name in known], dtype=float)


def _language(
    study: Study, setups: Mapping[str, Setup], laws: Sequence[Fitted], known: bool, confidence: float
) -> dict[str, Any]:
    """Return all that is said of a language.

    Args:
        known: whether there are documents enough for intervals.
    """
    asked = [(grown, study.small) for grown in study.grown] + [(study.early, study.late)]
    pairs = [(setups[first], setups[second]) for first, second in asked if {first, second} <= {*setups}]
    return {
        "documents": len(next(iter(setups.values())).size),
        "setups": {name: [*_points(one, known, confidence)] for name, one in setups.items()},
        "pairs": [_pair(first, second, laws, confidence) for first, second in pairs] if known else [],
        "laws": [one.result(setups, confidence) for one in laws],
    }


def _measured(one: Setup) -> np.ndarray:
    """Return bits per byte by token count without resamples [1, C]."""
    return np.array([[bits.mean(axis=0).sum() / one.size.sum() for bits in one.bits]])


def _points(one: Setup, known: bool, confidence: float) -> Iterator[dict[str, Any]]:
    """Yield what was measured of a setup, a token count each."""
    for i, stages in enumerate(one.stages):
        value, drawn = float(one.losses[0, i]), one.losses[1:, i]
        estimate = asdict(percentiles(value, drawn, confidence)) if known else {"value": value, **NO_INTERVAL}
        about = {"tokens": int(one.tokens[i]), "flops": float(one.flops[i]), "parameters": one.parameters}
        yield {**about, "stages": [*stages], **estimate}


def _pair(first: Setup, second: Setup, laws: Sequence[Fitted], confidence: float) -> dict[str, Any]:
    """Return from where on the first setup is ahead of the second, and what it needs for the other one's last loss."""
    found: dict[str, Any] = {"first": first.name, "second": second.name, "needed": {}}
    for axis in ("tokens", "flops"):
        a, b = (Curve(at=getattr(one, axis), losses=one.losses) for one in (first, second))
        found[axis] = plain(overtaking(a, b, confidence))
        found["needed"][axis] = {**asdict(reaching(a, b.losses[:, -1], confidence)), "of": float(b.at[-1])}
    found["needed"]["loss"] = float(second.losses[0, -1])
    # Models of one size have equal FLOPs at equal tokens: the one says what the other says.
    found["same_size"] = bool(np.isclose(first.rate, second.rate))
    return found | {"law": by_law(first, second, laws, confidence)}
