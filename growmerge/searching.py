"""`merge_method: search`: the weights that make the languages' texts cheapest, and a plain recipe of them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from checkpoint import manifest
from checkpoint.files import disk_errors
from eval.bits_per_byte import document_requests
from growmerge.convert import Target, fingerprint, planned, record_of
from growmerge.events import EventLog, read_events
from growmerge.merging import Models, merge_file, written_of
from growmerge.show import Bar
from growmerge.tokenizer_report import read_text
from merge.apply import Applied
from merge.merge import MergedSource
from merge.recipe import Parameters, Recipe, plain
from merge.search import Found, Text, Try, groups_of, search_weights, with_factors
from merge.search_settings import RESULT, Search
from merge.table import METHODS, Parameter
from parallel.document import Item
from parallel.errors import InputError
from train.data.readers import Document
from train.data.tokenizer import TextTokenizer


def find_and_merge(target: Target, applied: Applied, models: Models) -> str:
    """Search, and write the merge with the weights found; return what is said of it.

    The tries are noted beside the target as they come; the same command goes on from them.

    Raises:
        InputError: as `find_weights` and `growmerge.merging.merge_file`; a target that is taken, before the search.
    """
    folder = target.folder
    about = written_of(applied, models, target, {})
    known = record_of(folder) if manifest.is_complete(folder) else {}
    asked = {**applied.merged.recipe, "found": known.get("recipe", {}).get("found")}
    if known.get("recipe") == asked and known["inputs"] == [fingerprint(path) for path in about["inputs"]]:
        manifest.check(folder)
        return f"nothing to do: {folder} is there and whole"
    planned(applied.merged, target, **about)
    log = folder.parent / f".{folder.name}.search.jsonl"
    done, more, said = find_weights(applied, models, log)
    written = merge_file(target, done, models, more)
    log.unlink(missing_ok=True)
    return f"{said}\n{written}"


def find_weights(applied: Applied, models: Models, log: Path | None = None) -> tuple[Applied, dict[str, bytes], str]:
    """Search as a recipe asks for it; return the merge with the weights found, files to go with it, and what to say.

    Args:
        log: where each try is written as it comes; those of the same search that it already holds are not made again.
            Whoever calls deletes it when all is done.

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
            merged, found = searched(applied.merged, search, texts, progress.tell, log)
    except InputError as error:
        raise InputError(f"{at}: {error}") from error
    text = plain_recipe(recipe, merged)
    merged = replace(merged, recipe={**applied.merged.recipe, "found": text})
    done = replace(applied, merged=merged, recipe=replace(recipe, text=text))
    files = {RESULT: (json.dumps(result(search, found), indent=1, ensure_ascii=False) + "\n").encode()}
    return done, files, said(found)


def searched(
    merged: MergedSource,
    search: Search,
    texts: Mapping[str, Text],
    tell: Callable[[int, Try], None],
    log: Path | None = None,
) -> tuple[MergedSource, Found]:
    """Return a merge with the weights that a search has found, and what it has come to.

    Args:
        tell: called with the number and outcome of each try.
        log: as of `find_weights`.

    Raises:
        InputError: a model that cannot be read, or diverges; CMA-ES is not installed.
    """
    tries = _Tries(log, _key(merged, search, texts))

    def report(number: int, one: Try) -> None:
        tries.keep(number, one)
        tell(number, one)

    try:
        found = search_weights(merged, search, texts, report, tries.known)
    except ModuleNotFoundError:
        raise InputError("cma is not installed: pip install 'growmerge[search]'") from None
    return with_factors(merged, groups_of(merged, search), found.best.factors), found


class _Tries:
    """A search's tries in a file, by a key that is the search's own: a killed search goes on behind them."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self.known: list[Try] = []
        if path is None:
            return
        with disk_errors(path):
            found = {event["try"]: event for event in read_events(path) if event.get("search") == key}
            self._log = EventLog(path)
        while event := found.get(len(self.known) + 1):
            factors = {group: tuple(values) for group, values in event["factors"].items()}
            self.known.append(Try(factors=factors, bits_per_byte=event["bits_per_byte"], seconds=event["seconds"]))

    def keep(self, number: int, one: Try) -> None:
        """Write a try that is not yet there; the last one of a number counts."""
        if self._path is None or any(one is old for old in self.known[number - 1 : number]):
            return
        with disk_errors(self._path):
            self._log.write({"search": self._key, "try": number, **asdict(one)})


def _key(merged: MergedSource, search: Search, texts: Mapping[str, Text]) -> str:
    """Return what decides all of a search's tries, as a hash."""
    models = [merged.reads.identity(number) for number in range(len(merged.reads.sources))]
    weights = {name: order.each["weight"] for name, order in merged.orders.items()}
    parts = (search, merged.recipe, models, weights, texts)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _texts(search: Search, models: Models) -> dict[str, Text]:
    """Return the texts in the tokens of the model that is made."""
    tokenizer = models.made_tokenizer()
    files = {language: models.place_file(name) for language, name in search.texts.items()}
    return {language: development_text(read_text(path), tokenizer, search) for language, path in files.items()}


def development_text(documents: Sequence[Document], tokenizer: TextTokenizer, search: Search) -> Text:
    """Return so many tokens of documents, the last one cut behind a character."""
    requests, left, size = [], search.tokens, 0
    length = search.sequence_length
    for document in documents:
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


def plain_recipe(recipe: Recipe, merged: MergedSource) -> str:
    """Return the recipe of a search's outcome: mergekit's YAML, with an entry for each model that is summed.

    Args:
        recipe: what was applied, of whole models.
        merged: what came of it.
    """
    orders = merged.orders
    inputs = {one.model: one.parameters for one in recipe.slices[0].inputs}
    entries = []
    for place, operand in enumerate(next(iter(orders.values())).operands):
        name = merged.reads.labels[operand.model]  # not listed: a base that is summed like the others
        weight = _filters({tensor: order.each["weight"][place] for tensor, order in orders.items()})
        entries.append({"model": name, "parameters": {"weight": weight, **_parameters(recipe, inputs.get(name, {}))}})
    also = {
        "base_model": recipe.base,
        "parameters": _parameters(recipe, recipe.module, recipe.parameters) or None,
        "dtype": recipe.dtype,
        "tokenizer_source": recipe.tokenizer_source,
        "tokenizer": recipe.tokenizer,
        "chat_template": recipe.chat_template,
    }
    found: dict[str, Any] = {"models": entries, "merge_method": recipe.method}
    found |= {key: value for key, value in also.items() if value is not None}
    return str(yaml.safe_dump(found, sort_keys=False, allow_unicode=True))


def _parameters(recipe: Recipe, *places: Parameters) -> dict[str, Any]:
    """Return what is given for all parameters but the weight, as a recipe has it: the first place goes first."""
    takes = METHODS[recipe.method].parameters
    found = {}
    for name in dict.fromkeys(name for place in places for name in place if name != "weight"):
        settings = [setting for place in places if name in place for setting in place[name].settings]
        values = []
        for setting in settings:
            parts = [_written(item, takes[name]) for item in setting.values]
            value = parts if setting.gradient else parts[0]
            values.append({"value": value} if setting.filter is None else {"filter": setting.filter, "value": value})
            if setting.filter is None:  # nothing is left for those behind it
                break
        found[name] = values[0]["value"] if "filter" not in values[0] else values
    return found


def _written(item: Item, parameter: Parameter) -> Any:
    """Return a value of which the recipe's reader makes what it has made of an item."""
    if parameter.kind is str and item.tag != "null":
        return item.value
    try:
        return plain(item)
    except ValueError:  # a number to YAML alone, such as 1:30; the reader takes it for text
        return item.value


def _filters(weights: Mapping[str, float]) -> Any:
    """Return a value for all tensors, or one for each layer or part of one that has its own."""
    if len({*weights.values()}) == 1:
        return next(iter(weights.values()))
    found: list[dict[str, Any]] = []
    left = dict(weights)
    parts = [_part(name, depth) for depth in (3, 4) for name in weights if ".layers." in name]
    for part in dict.fromkeys(parts):
        own = {name: value for name, value in left.items() if name.startswith(part)}
        if own and len({*own.values()}) == 1:
            found.append({"filter": part, "value": next(iter(own.values()))})
            left = {name: value for name, value in left.items() if name not in own}
    return [*found, *({"filter": name, "value": value} for name, value in left.items())]


def _part(name: str, depth: int) -> str:
    """Return the beginning of a tensor's name with so many of its parts, closed by a dot."""
    return ".".join(name.split(".")[:depth]) + "."


def said(found: Found) -> str:
    """Return a search's outcome in a line."""
    return (
        f"searched: {found.start.mean:.4f} -> {found.best.mean:.4f} bits per byte on the development texts, "
        f"{len(found.tries)} merges in {sum(one.seconds for one in found.tries):.0f} s"
    )


def result(search: Search, found: Found) -> dict[str, Any]:
    """Return what is kept of a search, as plain data."""
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


class _Progress(Bar):
    """Shows the tries of a search, and the best so far."""

    def __init__(self, total: int) -> None:
        super().__init__("search", total)
        self._best = float("inf")

    def tell(self, number: int, one: Try) -> None:
        self._best = min(self._best, one.mean)
        self.update(number, f"{number} of {self._total} merges, best {self._best:.4f} bits per byte")
