"""The matched comparison in words."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from growmerge.report.estimates import FEWEST
from growmerge.report.tables import NONE, si

Found = Mapping[str, Any]
"""A crossing, as `growmerge.report.matched` has it."""

UNITS = {"tokens": "tokens", "flops": "FLOPs"}
"""What is counted."""
SHARES = {
    "always ahead": "ahead throughout",
    "gets ahead": "getting ahead",
    "falls behind": "falling behind",
    "never ahead": "never ahead",
}
LAWS = {"always ahead": "always pays", "never ahead": "never pays", "falls behind": "pays at first alone"}
"""What a law says of growing."""


def note(results: Mapping[str, Any]) -> str:
    """Return how the comparison is made, in words."""
    found = results.get("matched")
    if not found:
        return ""
    seeds = "One seed a point: intervals are over held-out documents alone, and another seed may answer differently."
    if between := found["between"]:
        seeds = (
            "Intervals are over held-out documents and seeds: documents are resampled, the same for all models, on the "
            f"mean of a point's repeats (up to {found['repeats']}); runs that differ in their seed alone differ by "
            f"{100 * between['value']:.2f} % of the loss (standard deviation, {between['freedom']} degrees of freedom, "
            "pooled over setups and languages), and a setup's whole curve is moved by Student's t with as many."
        )
    return (
        "Every point is a model of its own, decayed to the end after that many tokens. Equal tokens are tokens of the "
        "training on the language; equal FLOPs are those of that training alone, not of the bases. Between points a "
        "curve is monotone over the logarithm (PCHIP); beyond them only the fitted laws speak, up to "
        f"{found['reach']:g} times, their intervals wider by how far points lie from them. "
        f"Text that is seen again counts like new text: repetition is not modelled. {seeds}"
    )


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Return what was found, a sentence for each language and two setups."""
    said = []
    for code, one in (results.get("matched") or {"languages": {}})["languages"].items():
        name = results["languages"].get(code, code)
        several = results["matched"]["between"] is not None
        said += [_sentence(name, pair, several) for pair in one["pairs"]]
        if one["documents"] < FEWEST:
            said.append(f"On {name}: there are too few held-out documents for intervals.")
        elif not one["pairs"]:
            said.append(f"On {name}: this run has no scores of two setups to compare.")
    return said


def _sentence(language: str, pair: Mapping[str, Any], several: bool) -> str:
    """Return what was found of two setups.

    Args:
        several: whether there are repeats with other seeds: then more text alone may resolve nothing.
    """
    first, second = f"the {pair['first']} model", f"the {pair['second']} model"
    parts = [f"at equal tokens {_outcome(pair['tokens'], first, second, 'tokens', several)}"]
    if not pair["same_size"]:
        parts.append(f"at equal FLOPs {_outcome(pair['flops'], 'it', 'that one', 'FLOPs', several)}")
    parts += [_needs(pair, second), *_by_law(pair)]
    return f"On {language}, {'; '.join(parts)}."


def _outcome(found: Found | None, first: str, second: str, unit: str, several: bool) -> str:
    """Return what is said of a model against another one at equal tokens or FLOPs."""
    if found is None:
        return f"nothing was measured of both {first} and {second}"
    within = f"{si(found['start'])} to {si(found['end'])} {unit}"
    if found["outcome"] == "gets ahead":
        return f"{first} gets ahead of {second} at {span(found)} {unit} ({within} measured)"
    if found["outcome"] == "falls behind":
        return f"{first} is ahead of {second} at first and falls behind at {span(found)} {unit} ({within} measured)"
    if found["outcome"] in ("always ahead", "never ahead"):
        return f"{first} is {found['outcome'].partition(' ')[0]} ahead of {second} ({within} measured)"
    parts = ", ".join(f"{SHARES[name]} in {100 * share:.0f} %" for name, share in found["shares"].items() if share)
    end = found["difference"]
    size = f"{end['value']:+z.3f} [{end['low']:+z.3f}, {end['high']:+z.3f}] bits per byte at the end"
    times = ((end["high"] - end["low"]) / 2 / end["value"]) ** 2 if end["value"] else 0
    if times > 1 and not several:
        size += f", which about {ceil(times):,} times the held-out text would resolve"
    known = f"{within} measured: {parts} of resamples; {size}"
    return f"it is not resolved whether {first} gets ahead of {second} ({known})"


def _needs(pair: Mapping[str, Any], second: str) -> str:
    """Return what share of the other model's tokens and FLOPs a model needs for its last loss."""
    said = []
    for axis, unit in UNITS.items():
        found = pair["needed"][axis]
        low, value, high = shares(found)
        if found["outcome"] == "gets ahead":
            share = f"{_percent(value)} % [{_percent(low)}, {_percent(high)}]"
        elif found["outcome"] == "always ahead" or (high is not None and low is None):
            share = f"at most {_percent(high or found['start'] / found['of'])} %"
        elif found["outcome"] != "not resolved" or low is not None:
            share = f"more than {_percent(low or found['end'] / found['of'])} %"
        else:
            share = "an unresolved share"
        if not (pair["same_size"] and axis == "flops"):
            said.append(f"{share} of the {unit}")
    last = f"that one's last {pair['needed']['loss']:.3f} bits per byte"
    return f"it needs {' and '.join(said)} that {second} had, for {last}"


def shares(needed: Found) -> list[float | None]:
    """Return the low end, the value and the high end of what a model needs, as shares of what another one had."""
    return [None if (at := needed[key]) is None else at / needed["of"] for key in ("low", "value", "high")]


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f}"


def _by_law(pair: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the laws say of the text that a language needs before growing pays at equal FLOPs."""
    found = pair["law"].get("flops")
    if pair["same_size"]:
        return
    if not found:
        yield f"no law says from how much text on growing pays ({pair['law']['why'] or 'too far apart'})"
        return
    text = pair["law"]["text"]
    within = f"{si(text['start'])} to {si(text['end'])} tokens of text"
    if found["outcome"] == "gets ahead":
        seen = pair["flops"]
        far = "" if seen and seen["start"] <= found["value"] <= seen["end"] else ", beyond what was measured of both"
        yield f"by the fitted laws growing pays at equal FLOPs from {span(text)} tokens of text on (of {within}{far})"
    elif found["outcome"] == "not resolved":
        yield f"by the fitted laws it is not resolved from how much text on growing pays at equal FLOPs ({within})"
    else:
        yield f"by the fitted laws growing {LAWS[found['outcome']]} at equal FLOPs ({within})"


def span(found: Mapping[str, Any]) -> str:
    """Return a place with its interval in short: `1.20 M [1.10 M, 1.40 M]`."""
    return f"{si(found['value'])} [{si(found['low'])}, {si(found['high'])}]"
