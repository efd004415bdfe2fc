"""The models that "Grow Up and Merge" (arXiv 2512.10772) publishes, by name: what each is and what it started from.

The names are those of the 21 training configs of github.com/liu-nlp/multilingual-scaling (f09b274, training_configs/),
and follow one rule, HyperLlama-SIZE-LANGUAGE-SETUP; sizes and starts are what these configs say. The Hub itself was not
to be seen: that a name is there is known where the merge recipes (mergekit_configs/) load it, and inferred elsewhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ORGANISATION = "liu-nlp"
SAID_BY = "its training config in liu-nlp/multilingual-scaling"
PARAMETERS = {"180M": 180_078_912, "572M": 572_494_464}
LANGUAGES = ("swedish", "persian", "estonian", "icelandic", "faroese", "multilingual")
SETUPS: Mapping[str, tuple[str, str, bool]] = {
    "1x": ("180M", "HyperLlama-180M-english-1x", False),
    "1x-cloned": ("572M", "HyperLlama-180M-english-1x", True),
    "2x": ("572M", "HyperLlama-572M-english-2x", False),
}
"""Setup -> size, the English model that it went on from, and whether that was grown first. The configs of 2x call
theirs HyperLlama-572M-english-1x-cloned, step 3572; english-2x is the one 572M English run, and ends at that step."""
UNKNOWN = "HyperLlama-572M-english-1x-cloned"
"""What most recipes name as the base of both 572M setups: the name of no training config, so which model it is, and
whether it is on the Hub, is not known."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One of the models."""

    name: str
    parameters: int
    what: str
    started_from: str | None = None
    """None if it was trained from scratch."""
    grown: bool = False
    """Whether that was grown first (HyperCloning, twice as wide)."""
    in_recipes: bool = True
    """Whether merge recipes load it from the Hub by this name."""

    def start(self) -> dict[str, Any] | None:
        """Return what provenance holds of its start (`checkpoint.provenance.by_name`)."""
        if self.started_from is None:
            return None
        return {"name": self.started_from, "grown": self.grown, "said_by": SAID_BY}


def _models() -> Iterator[Published]:
    small, large = PARAMETERS["180M"], PARAMETERS["572M"]
    seed, base = "HyperLlama-180M-english-1x-base", "HyperLlama-180M-english-1x"
    yield Published(name=seed, parameters=small, what="code, then English (80 %) and code", in_recipes=False)
    yield Published(name=base, parameters=small, what="English, the other 20 %", started_from=seed)
    name = "HyperLlama-572M-english-2x"
    yield Published(name=name, parameters=large, what="English, the other 20 %", started_from=seed, grown=True)
    for setup, (size, start, grown) in SETUPS.items():
        for language in LANGUAGES:
            yield Published(
                name=f"HyperLlama-{size}-{language}-{setup}",
                parameters=PARAMETERS[size],
                what="all five languages" if language == "multilingual" else language.capitalize(),
                started_from=start,
                grown=grown,
                in_recipes=language != "multilingual",
            )


PUBLISHED: Mapping[str, Published] = {one.name: one for one in _models()}
"""By name, the bases first."""


def table() -> str:
    """Return the models as lines of text, and what is known of their names."""
    head = ("name", "parameters", "trained on", "started from", "name is of")
    rows = [
        (
            one.name,
            f"{one.parameters:,}",
            one.what,
            (one.started_from or "scratch") + (", grown" if one.grown else ""),
            "a recipe" if one.in_recipes else "a training config",
        )
        for one in PUBLISHED.values()
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"On the Hub: {ORGANISATION}/NAME, as the recipes load them; inferred of those that are only in a config.",
            f"{UNKNOWN}, the base of most 572M recipes, is the name of no training config.",
        ]
    )
