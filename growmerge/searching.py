"""`merge_method: search`: the weights that make the languages' texts cheapest, and a plain recipe of them."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval.bits_per_byte import document_requests
from growmerge.merging import Models
from growmerge.tokenizer_report import read_text
from merge.apply import Applied
from merge.merge import MergedSource
from merge.recipe import plain
from merge.search import Found, Text, Try, groups_of, search_weights, with_factors
from merge.search_settings import Search
from parallel.document import read_document
from parallel.errors import InputError
from train.data.tokenizer import TextTokenizer, load_tokenizer

RESULT = "search.json"
EVERY_S = 15.0
"""Seconds between plain lines."""


def find_weights(applied: Applied, models: Models) -> tuple[Applied, dict[str, bytes], str]:
    """Search as a recipe asks for it; return the merge with the weights found, files to go with it, and what to say.

    Raises:
        InputError: no text, no tokenizer, or a recipe of slices; with the recipe's line.
    """
    recipe = applied.recipe
    search = recipe.search
    assert search is not None, "nothing to search for"
    at = recipe.at("search")
    if not recipe.whole:
        raise InputError(f"{at}: a search is for whole models: list them under `models`")
    try:
        texts = _texts(search, models)
        with _Progress(search.evaluations) as progress:
            found = search_weights(applied.merged, search, texts, progress.tell)
    except InputError as error:
        raise InputError(f"{at}: {error}") from error
    except ModuleNotFoundError:
        raise InputError(f"{at}: cma is not installed: pip install 'growmerge[search]'") from None
    merged = with_factors(applied.merged, groups_of(applied.merged, search), found.best.factors)
    text = plain_recipe(recipe.file, merged, [*applied.merged.reads.labels])
    merged = replace(merged, recipe={**applied.merged.recipe, "found": text})
    done = replace(applied, merged=merged, recipe=replace(recipe, text=text))
    files = {RESULT: (json.dumps(_result(search, found), indent=1, ensure_ascii=False) + "\n").encode()}
    seconds = sum(one.seconds for one in found.tries)
    return (
        done,
        files,
        (
            f"searched: {found.start.mean:.4f} -> {found.best.mean:.4f} bits per byte on the development texts, "
            f"{len(found.tries)} merges in {seconds:.0f} s"
        ),
    )


def _texts(search: Search, models: Models) -> dict[str, Text]:
    first = models.folders[models.recipe.models[0]][0]
    tokenizer = load_tokenizer(first)
    return {language: _text(models.place_file(name), tokenizer, search) for language, name in search.texts.items()}


def _text(path: Path, tokenizer: TextTokenizer, search: Search) -> Text:
    """Return so many tokens of a file's documents, the last one cut behind a character."""
    requests, left, size = [], search.tokens, 0
    length = search.sequence_length
    for document in read_text(path):
        text = _first_tokens(document.text, tokenizer, left)
        if not text:
            break
        piece = replace(document, passages=(text,))
        own = document_requests(piece, tokenizer, window=length, stride=length // 2)
        left -= sum(len(request.tokens) - request.context for request in own)
        size += len(text.encode())
        requests += own
    return Text(requests=tuple(requests), bytes=size)


def _first_tokens(text: str, tokenizer: TextTokenizer, most: int) -> str:
    """Return the longest beginning of a text that has so many tokens at most."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(tokenizer.encode(text[:middle])) <= most else (low, middle - 1)
    return text[:low]


def plain_recipe(file: Path, merged: MergedSource, labels: list[str]) -> str:
    """Return the recipe of a search's outcome: mergekit's YAML, whose filters give each tensor its weights."""
    recipe: dict[str, Any] = plain(read_document(file))
    recipe["merge_method"] = merged.method
    del recipe["search"]
    recipe.get("parameters", {}).pop("weight", None)
    order = next(iter(merged.orders.values()))
    numbers = {labels[operand.model]: place for place, operand in enumerate(order.operands)}
    for entry in recipe["models"]:
        place = numbers.get(entry["model"])
        if place is not None:  # the base's weight changes nothing
            weights = {name: one.each["weight"][place] for name, one in merged.orders.items()}
            entry.setdefault("parameters", {})["weight"] = _filters(weights)
    return str(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def _filters(weights: Mapping[str, float]) -> Any:
    """Return a value for all tensors, or one for each layer or part of one that has its own."""
    if len({*weights.values()}) == 1:
        return next(iter(weights.values()))
    found: list[dict[str, Any]] = []
    left = dict(weights)
    parts = [_part(name, depth) for depth in (3, 4) for name in weights if name.startswith("model.layers.")]
    for part in dict.fromkeys(parts):
        own = {name: value for name, value in left.items() if name.startswith(part)}
        if own and len({*own.values()}) == 1:
            found.append({"filter": part, "value": next(iter(own.values()))})
            left = {name: value for name, value in left.items() if name not in own}
    return [*found, *({"filter": name, "value": value} for name, value in left.items())]


def _part(name: str, depth: int) -> str:
    """Return the beginning of a tensor's name with so many of its parts, closed by a dot."""
    return ".".join(name.split(".")[:depth]) + "."


def _result(search: Search, found: Found) -> dict[str, Any]:
    return {
        "search": asdict(search),
        "start": _told(found.start),
        "best": _told(found.best),
        "curve": [round(one.mean, 6) for one in found.tries],
        "merges": len(found.tries),
        "seconds": round(sum(one.seconds for one in found.tries), 1),
    }


def _told(one: Try) -> dict[str, Any]:
    factors = {group: list(values) for group, values in one.factors.items()}
    return {"mean": one.mean, "bits_per_byte": dict(one.bits_per_byte), "factors": factors}


@dataclass
class _Progress:
    """How far a search is: a bar on a terminal, plain lines in a log."""

    total: int

    def __enter__(self) -> "_Progress":
        self._best = float("inf")
        self._told = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}"), TimeElapsedColumn())
            self._bar = Progress(TextColumn("[bold]search"), *columns, TimeRemainingColumn(), transient=True)
            self._task = self._bar.add_task("search", total=self.total, best="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def tell(self, number: int, one: Try) -> None:
        self._best = min(self._best, one.mean)
        best = f"{self._best:.4f} bits per byte"
        if self._bar:
            self._bar.update(self._task, completed=number, best=best)
        elif time.monotonic() > self._told + EVERY_S:
            self._told = time.monotonic()
            self._console.print(f"search: {number} of {self.total} merges, best {best}", highlight=False)
