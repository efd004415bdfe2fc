"""Tables of the matched comparison."""

from collections.abc import Mapping
from typing import Any

from growmerge.report.matched_words import UNITS, Found, shares, span
from growmerge.report.tables import NONE, Cell, Table, bits, count, estimate, number, rows, short, si


def _place(found: Found | None, factor: float = 1.0) -> Cell:
    """Return a cell with an outcome, and where it is one."""
    if found is None:
        return Cell(text="not measured")
    if found["outcome"] in ("gets ahead", "falls behind"):
        value, low, high = (factor * found[key] for key in ("value", "low", "high"))
        text = span({"value": value, "low": low, "high": high})
        return Cell(text=f"{found['outcome']} at {text}", value=value, low=low, high=high)
    if found["outcome"] == "not resolved":
        if found["low"] is found["high"] is None:
            return Cell(text="not resolved")
        ends = [NONE if found[key] is None else si(factor * found[key]) for key in ("low", "high")]
        return Cell(text=f"not resolved [{ends[0]}, {ends[1]}]")
    return Cell(text=found["outcome"])


def _share(found: Mapping[str, Any]) -> Cell:
    """Return a cell with what a model needs, as a share of what another one had."""
    low, value, high = shares(found)
    if value is None:
        return Cell(text=found["outcome"] if found["outcome"] == "not resolved" else NONE)
    ends = ", ".join(NONE if end is None else f"{end:.2f}" for end in (low, high))
    return Cell(text=f"{value:.2f} [{ends}]", value=value, low=low, high=high)


def crossings(results: Mapping[str, Any]) -> Table | None:
    """From where on one setup is ahead of another one, and what it needs for the other one's last loss."""
    found: list[list[str | Cell]] = []
    for code, one in (results.get("matched") or {"languages": {}})["languages"].items():
        for pair in one["pairs"]:
            name, models = results["languages"].get(code, code), f"{pair['first']} against {pair['second']}"
            cells: list[str | Cell] = [name, models]
            for axis in UNITS:
                end = pair[axis]["difference"] if pair[axis] else None
                cells += [_place(pair[axis]), estimate(end, sign=True)]
            cells += [_share(pair["needed"][axis]) for axis in UNITS]
            law = pair["law"]
            text = law.get("flops") and _place(law["flops"], law["text"]["end"] / law["flops"]["end"])
            found.append([*cells, text or NONE])
    if not found:
        return None
    measured = ["from where on", "bits per byte at the end"]
    return Table(
        name="matched",
        caption="One setup against another on each language; the difference is first minus second, at the largest "
        "count measured of both; what it needs for the other one's last loss, as a share of what that one had",
        groups=[("", 2), ("equal tokens", 2), ("equal FLOPs", 2), ("needed", 2), ("law, equal FLOPs", 1)],
        columns=["language", "models", *measured, *measured, "tokens", "FLOPs", "tokens of text"],
        rows=rows(found),
        words=frozenset({0, 1, 2, 4, 8}),
    )


def points(results: Mapping[str, Any]) -> Table | None:
    """Every decayed model's loss by language, setup and token count."""
    found: list[list[str | Cell]] = []
    starts = set()
    for code, one in (results.get("matched") or {"languages": {}})["languages"].items():
        starts.add(len(found))
        for setup, measured in one["setups"].items():
            for point in measured:
                about = [results["languages"].get(code, code), setup, number(point["parameters"])]
                spent = [number(point["tokens"]), short(point["flops"]), number(len(point["stages"]))]
                found.append([*about, *spent, estimate(point)])
    if not found:
        return None
    return Table(
        name="matched-points",
        caption="Models decayed after so many tokens",
        columns=["language", "setup", "parameters", "tokens", "FLOPs", "seeds", "bits per byte"],
        rows=rows(found),
        breaks=frozenset(starts),
        words=frozenset({0, 1}),
    )


def tables(results: Mapping[str, Any]) -> list[Table | None]:
    """Return the section's tables."""
    return [crossings(results), points(results), laws(results)]


NUMBERS = {"E": 3, "A": 2, "a": 3, "B": 2, "b": 3}
"""Of a law: digits."""


def laws(results: Mapping[str, Any]) -> Table | None:
    """The fitted laws, or why there is none."""
    found: list[list[str | Cell]] = []
    for code, one in (results.get("matched") or {"languages": {}})["languages"].items():
        for law in one["laws"]:
            numbers = law.get("numbers", {})
            cells = [_number(numbers.get(name), digits) for name, digits in NUMBERS.items()]
            far = law.get("residuals")
            most = number(None if far is None else 100 * max(map(abs, far)), ".2f")
            about = [results["languages"].get(code, code), ", ".join(law["setups"]), law["why"] or "fitted"]
            found.append([*about, count(len(far)) if far else NONE, *cells, most])
    if not found:
        return None
    return Table(
        name="matched-laws",
        caption="Laws of the loss in bits per byte, E + A / N^a + B / D^b of N parameters and D tokens, or E + B / D^b "
        "of one size; the largest distance of a point from its law in % of the loss",
        columns=["language", "of", "law", "points", *NUMBERS, "distance, %"],
        rows=rows(found),
        words=frozenset({0, 1, 2}),
    )


def _number(found: Mapping[str, Any] | None, digits: int) -> Cell:
    """Return a cell with a number of a law; A and B may be of any size."""
    if found is None:
        return bits(None)
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if max(value, high) < 1000:
        return estimate(found, digits)
    return Cell(text=f"{value:.2e} [{low:.2e}, {high:.2e}]", value=value, low=low, high=high)
