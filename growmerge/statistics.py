"""`growmerge stats`: passes over text for the merges that need data, which go on where a killed one stopped."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from checkpoint import manifest
from checkpoint.files import disk_errors, read_json, write_json
from checkpoint.finite import Finite
from checkpoint.memory import MemorySource
from checkpoint.open import open_checkpoint
from checkpoint.provenance import descend
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Source
from checkpoint.writer import write_checkpoint
from eval.bits_per_byte import check_window
from eval.model import load_model
from eval.score import Request
from growmerge import __version__
from growmerge.statistics_show import Show
from growmerge.tokenizer_report import read_text
from growmerge.windows import batched, cut
from merge.gram import gram_sums, shared_inputs, write_gram
from merge.statistics import Labels, check_tokens, fisher, fisher_sums, gram
from merge.statistics_files import STATE, Sums, digest, load_sums, save_sums
from parallel.errors import InputError
from parallel.faults import point
from parallel.memory import available_memory
from slurm.lease import Lease
from train.data.readers import Document
from train.data.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 1024
"""Tokens of a window where none are given, or the model's positions if they are fewer; it moves by half."""
BATCH = 4096
"""Tokens of a batch at most, padding included; a longer sequence is one of its own."""
ABOUT = ".statistics.json"
"""What an unfinished folder will be; gone once the manifest is there."""
DECISIVE = ("verb", "recipe", "statistic")
"""Keys of the record that say whether two passes are the same."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What is counted, of which model on which text, and where it goes."""

    statistic: Literal["fisher", "gram"]
    model: Path
    """A checkpoint of any format, with its tokenizer.json."""
    texts: tuple[Path, ...]
    """.jsonl and .parquet by their field `text`, all else as plain text."""
    documents: Mapping[str, Sequence[Document]] = field(default_factory=dict)
    """Further texts, read already, by name."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; the model's by default."""
    folder: Path
    tokens: int | None = None
    """Tokens that are scored at most, from the first text's start; all of them by default."""
    sequence_length: int | None = None
    """Tokens of a window; min(WINDOW, the model's positions) by default."""
    labels: Labels = "text"
    """fisher: whose likelihood it is of, the text's or that of labels drawn from the model."""
    seed: int = 0
    """fisher: decides the draws."""
    every: int = 20
    """Batches between saves; results do not depend on it."""
    patience: float = 0.0
    """How long to wait for somebody else who holds the folder (seconds)."""


def make_statistics(given: Pass, tell: Callable[[int, int], None] | None = None) -> str:
    """Make a pass, or what a killed one has left of it; return what is said of the result.

    Args:
        tell: called with the tokens that are done, and all that there are to do.

    Raises:
        InputError: a file cannot be read or holds no text, the model has no tokenizer or holds a NaN, it does not fit
            into memory, a number is out of range, or the folder holds something else. Nothing is written then.
    """
    for name, number in (("--tokens", given.tokens), ("--every", given.every)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}: it has to be at least 1")
    folder = given.folder
    if folder.resolve() == given.model.resolve():
        raise InputError(f"{folder}: is the model itself; choose another folder")
    source, tokenizer = open_checkpoint(given.model), load_tokenizer(given.tokenizer or given.model)
    texts = [*map(read_text, given.texts), *given.documents.values()]
    documents = [document for text in texts for document in text]
    about = _about(given, source, tokenizer)
    if _is_done(folder, about):
        _tidy(folder)
        return f"nothing to do: {folder} is there and whole"
    count = source.family.parameters(source.config)
    _check_room(given.model, 8 * count if given.statistic == "fisher" else 4 * count)
    model = load_model(Finite(source, given.model))
    length = about["recipe"]["sequence_length"]
    check_window(model, window=length, stride=length // 2)
    sequences = tokens = 0
    for request in cut(documents, tokenizer, length=length, tokens=given.tokens):
        check_tokens(model, request)
        sequences, tokens = sequences + 1, tokens + len(request.tokens) - request.context
    if not tokens:
        raise InputError(f"{[*given.texts, *given.documents][0]}: holds no token to score")
    about |= {"counts": {"tokens": tokens, "sequences": sequences}}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Lease(folder / ".lease.json", f"growmerge stats {given.statistic}", patience=given.patience):
        requests = cut(documents, tokenizer, length=length, tokens=given.tokens)
        _run(given, source, model, batched(requests, BATCH), about, tell)
        _tidy(folder)
    size = sum(entry["size"] for entry in manifest.read_manifest(folder)["files"].values())
    return f"{folder}: {given.statistic} over {tokens:,} tokens in {sequences:,} windows, {size:,} bytes"


def _run(
    given: Pass,
    source: Source,
    model: "PreTrainedModel",
    batches: Iterator[list[Request]],
    about: Mapping[str, Any],
    tell: Callable[[int, int], None] | None,
) -> None:
    """Go on from what is saved, and write the result, the manifest last."""
    folder, counts = given.folder, about["counts"]
    write_json(folder / ABOUT, about)
    key = hashlib.sha256(json.dumps([about[name] for name in DECISIVE]).encode()).hexdigest()
    sums = load_sums(folder, key) or (fisher_sums if given.statistic == "fisher" else gram_sums)(model)
    _check_room(given.model, 0 if sums.batches else sum(tensor.nbytes for tensor in sums.tensors.values()))
    name = f"{given.statistic} of {given.model.name}"
    with Show(name, folder / ".statistics.jsonl", done=sums.tokens, total=counts["tokens"]) as show:

        def after(now: Sums) -> None:
            if now.batches % given.every == 0:
                save_sums(folder, key, now)
            show.update(now.tokens)
            if tell is not None:
                tell(now.tokens, counts["tokens"])
            point(f"stats/{now.batches}")

        rest: Iterator[Sequence[Request]] = islice(batches, sums.batches, None)
        if given.statistic == "fisher":
            found = fisher(model, rest, labels=given.labels, seed=given.seed, sums=sums, after=after)
        else:
            found = gram(model, rest, sums=sums, after=after)
    assert (sums.tokens, sums.sequences) == (counts["tokens"], counts["sequences"]), (sums.tokens, counts)
    if given.statistic == "fisher":
        result = MemorySource(config=source.config, tensors=found)
        write_checkpoint(result, folder, SafetensorsLayout(), workers=torch.get_num_threads(), about=about)
    else:
        facts = {"model": about["statistic"]["model"], **counts}
        record = (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode()
        write_gram(folder, found, shared_inputs(model), facts, {"growmerge.json": record})


def _about(given: Pass, source: Source, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return the provenance of a result, but for what is counted on the way."""
    longest = source.config.get("max_position_embeddings") or WINDOW
    recipe: dict[str, Any] = {
        "tokens": given.tokens,
        "sequence_length": min(WINDOW, longest) if given.sequence_length is None else given.sequence_length,
    }
    if given.statistic == "fisher":
        recipe |= {"labels": given.labels, "seed": given.seed if given.labels == "sampled" else None}
    record = source.run.provenance
    return {
        "format": 1,
        "name": given.folder.name,
        "verb": f"stats {given.statistic}",
        "recipe": recipe,
        "statistic": {
            "model": digest(source),
            "tokenizer": tokenizer.sha256,
            "texts": [
                *({"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in given.texts),
                *({"name": name, "sha256": _sha256(documents)} for name, documents in given.documents.items()),
            ],
        },
        **descend([{**record, "name": record.get("name", given.model.name)}]),
        "tokens": source.run.tokens,
        "versions": {"growmerge": __version__, "torch": torch.__version__},
    }


def _sha256(documents: Sequence[Document]) -> str:
    return hashlib.sha256("\n".join(document.text for document in documents).encode()).hexdigest()


def _is_done(folder: Path, about: Mapping[str, Any]) -> bool:
    """Return whether a folder holds the result; False if it is free, or the pass is unfinished.

    Raises:
        InputError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another folder")
    complete = manifest.is_complete(folder)
    path = folder / ("growmerge.json" if complete else ABOUT)
    if path.is_file():
        known = read_json(path)
        if any(known.get(key) != about[key] for key in DECISIVE):
            what = f"is {known.get('verb')}" if complete else f"is an unfinished {known.get('verb')}"
            raise InputError(f"{folder}: {what} of another model, text or options; choose another folder")
        if complete:
            manifest.check(folder)
        return complete
    if complete or (folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())):
        raise InputError(f"{folder}: is not empty; choose another folder")
    return False


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished pass needs."""
    for name in (STATE, ABOUT):
        (folder / name).unlink(missing_ok=True)


def _check_room(model: Path, need: int) -> None:
    free = available_memory()
    if need > free:
        raise InputError(f"{model}: {need / 1e9:.1f} GB of memory are needed for this, {free / 1e9:.1f} GB are free")
