"""What a recipe with `merge_method: search` searches for, and on which texts."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from merge.table import METHODS
from parallel.errors import InputError, one_of

SEARCH = "search"
RESULT = "search.json"
"""What a search leaves beside its model."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the models' weights that make texts cheapest, in bits per byte."""

    method: str
    """Whose weights are searched for."""
    texts: Mapping[str, str]
    """A file of each language: .txt, .jsonl or .parquet, of which nothing is evaluated later."""
    blocks: int = 1
    """Blocks of consecutive layers with weights of their own; what is outside of the layers is one more if above 1."""
    kinds: bool = False
    """Weights of their own for attention, feed-forward and norms."""
    evaluations: int = 100
    """Merges that are tried at most."""
    tokens: int = 8192
    """Of each text that are scored."""
    sequence_length: int = 512
    """Tokens of a window, which moves by half."""
    step: float = 0.3
    """How far the first tries go: standard deviation of the weights' logarithms."""
    seed: int = 0


def search_of(given: Mapping[str, Any]) -> Search:
    """Return what is searched for, checked.

    Raises:
        InputError: a key that is missing, or a value that makes no sense.
    """
    for name in ("method", "texts"):
        if name not in given:
            raise InputError(f"the key {name} is missing")
    found = Search(**given)
    able = [name for name, method in METHODS.items() if "weight" in method.parameters]
    if found.method not in able:
        raise InputError(one_of("method with weights", found.method, able))
    texts = found.texts
    if not isinstance(texts, Mapping) or not texts or not all(isinstance(one, str) for one in texts.values()):
        raise InputError("texts: a mapping of languages to files is needed")
    lowest = {"blocks": 1, "evaluations": 1, "tokens": 1, "sequence_length": 2, "seed": 0}
    for field in fields(Search):
        value = getattr(found, field.name)
        if field.name in lowest and (type(value) is not int or value < lowest[field.name]):
            raise InputError(f"{field.name} is {value!r}: allowed are whole numbers from {lowest[field.name]} on")
    if not isinstance(found.kinds, bool):
        raise InputError(f"kinds is {found.kinds!r}: true or false is needed")
    if isinstance(found.step, bool) or not isinstance(found.step, int | float) or not 0 < found.step <= 10:
        raise InputError(f"step is {found.step!r}: allowed are numbers above 0, up to 10")
    return found
