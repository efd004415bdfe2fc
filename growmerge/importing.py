"""`growmerge import hyperllama`: the models of "Grow Up and Merge" (arXiv 2512.10772) as plain Llama folders.

What their authors' exporter writes (HyperLlama, or a plain Llama where nothing was cloned) and what their trainer saves
(nanotron) is read by `checkpoint`, which folds the divided head; no code of a repository is fetched, run or kept. Here
are the rest: token ids that the training configs have set to 0, tokenizers, where a model comes from, and the proof.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import read_json
from checkpoint.hyperllama import FACTOR, FoldedHead, plain_config
from checkpoint.open import format_of, open_checkpoint
from checkpoint.source import Source, WithoutState, Wrapped
from growmerge.convert import COMPANIONS, DTYPES, Target, record_of, write_target
from growmerge.import_check import difference
from growmerge.import_origin import Origin, described
from growmerge.token_roles import Named, check_rows, read_tokenizer
from growmerge.verify import EXACT
from parallel.errors import InputError

FORMATS = ("hyperllama", "nanotron", "safetensors")
"""What is imported."""
GENERATION = "generation_config.json"
SETTINGS = "tokenizer_config.json"
FAST = "PreTrainedTokenizerFast"
"""transformers' class of any tokenizer.json, in place of a class that a repository brings along."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """How models are imported."""

    out: Path
    """Each model goes to a folder of its own in it."""
    dtype: str | None = None
    """Of the weights; their own by default."""
    tokenizer: Path | None = None
    """A folder whose tokenizer goes with models that have none."""
    verify: bool = True
    """Whether each model's logits are compared with those of the divided head."""
    workers: int | None = None
    """Processes; by default as many as there are cores and memory for."""


@dataclass(frozen=True)
class _Configured(Wrapped):
    """A source with another config."""

    own: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.own


def import_models(names: Sequence[str], options: Import) -> Iterator[tuple[str, bool]]:
    """Import models, one after the other; yield what is said, and whether all is well with it.

    Args:
        names: folders, or names on the Hub with or without `hub:`.

    Raises:
        InputError: no such model, or one that is not read; a place that is taken. What was imported before stays.
    """
    origins = [Origin.of(name) for name in names]
    for number, origin in enumerate(origins):
        if same := [other.given for other in origins[:number] if other.name == origin.name]:
            raise InputError(
                f"{same[0]} and {origin.given} are both called {origin.name}: import one of them into another folder"
            )
    if options.tokenizer and not (options.tokenizer / "tokenizer.json").is_file():
        raise InputError(f"--tokenizer {options.tokenizer}: holds no tokenizer.json")
    for origin in origins:
        yield from _import(origin, options)


def _import(origin: Origin, options: Import) -> Iterator[tuple[str, bool]]:
    folder, target = origin.place(), options.out / origin.name
    opened = open_llama(folder)
    beside = folder if (folder / "tokenizer.json").is_file() else options.tokenizer or folder
    known, said = _tokenizer(beside, folder, opened.config)
    ids, notes = named_ids(opened.config, known)
    record = record_of(folder)
    written = write_target(
        _Configured(WithoutState(opened), {**plain_config(opened.config), **ids}),
        Target(folder=target, format="safetensors", dtype=options.dtype, workers=options.workers),
        made={
            "verb": "import",
            "recipe": {"token_ids": ids, "tokenizer": known.sha256 if known else None},
            **described(origin, folder),
        },
        parents=[{**record, "name": record.get("name", origin.name)}],
        inputs=[folder],
        files=_files(folder, beside, ids),
    )
    yield from ((f"note: {origin.name}: {note}", True) for note in (*said, *notes))
    if not options.verify:
        yield written, True
        return
    found = difference(opened, target)
    by = f"differ from the published model's by {found:.1e} of the largest"
    same = "are the published model's, bit for bit"
    stored = next(info.slots["weight"] for info in opened.infos.values() if info.tied_to is None)
    rounded = options.dtype is not None and torch.finfo(DTYPES[options.dtype]).eps > torch.finfo(stored).eps
    fine = found <= EXACT or rounded
    yield f"{written}; its logits {by if found else same}{f': rounded to {options.dtype}' if rounded else ''}", fine
    if not fine:
        yield f"note: {origin.name}: {EXACT:g} is what float32 explains; {_why(opened, options.dtype)}", False


def open_llama(folder: Path) -> Source:
    """Open what is imported.

    Raises:
        InputError: it is something else, or a Llama that says that its head is divided.
    """
    kind = format_of(folder)
    if kind not in FORMATS:
        raise InputError(f"{folder}: a checkpoint of format {kind}; imported are {', '.join(FORMATS)}, see convert")
    opened = open_checkpoint(folder)
    if opened.family.name != "llama":
        raise InputError(f"{folder}: a model of the {opened.family.name} family; the published models are Llamas")
    if kind == "safetensors" and opened.config.get(FACTOR, 1) != 1:
        raise InputError(
            f"{folder / 'config.json'}: model_type llama has no {FACTOR}, and here it is {opened.config[FACTOR]!r}: "
            "if the head is still to be divided, model_type has to be hyperllama; if it is not, remove the key"
        )
    return opened


def named_ids(config: Mapping[str, Any], tokenizer: Named | None) -> tuple[dict[str, int], list[str]]:
    """Return BOS and EOS as the tokenizer names them, where a config has 0, and what is to be said of it.

    The training configs set both to 0 whatever the tokenizer ("!" in Llama 3's), and the exporter copies that.
    """
    ids, notes = {}, []
    words = {number: token for token, number in tokenizer.vocabulary.ids.items()} if tokenizer else {}
    for role in ("bos", "eos"):
        key = f"{role}_token_id"
        if config.get(key) != 0:
            continue
        number = tokenizer.role(role) if tokenizer else None
        if number is None:
            why = f"its tokenizer names no {role.upper()}" if tokenizer else "there is no tokenizer; give --tokenizer"
            notes.append(f"{key} stays 0: {why}")
        elif number != 0:
            ids[key] = number
            notes.append(f"{key} is {number} ({words[number]}), as its tokenizer says; it was 0 ({words.get(0)})")
    return ids, notes


def _tokenizer(folder: Path, model: Path, config: Mapping[str, Any]) -> tuple[Named | None, list[str]]:
    """Return a folder's tokenizer, and what is to be said if it has none that can be read."""
    if not (folder / "tokenizer.json").is_file():
        return None, []
    try:
        found = read_tokenizer(folder)
    except InputError as error:
        return None, [f"its special tokens are not known: {error}"]
    check_rows(model, config, found)
    return found, []


def _files(folder: Path, tokenizer: Path, ids: Mapping[str, int]) -> dict[str, bytes]:
    """Return the small files that go with the weights: as they are, but for token ids and classes of a repository."""
    places = {name: folder if name == GENERATION else tokenizer for name in COMPANIONS}
    files = {name: (place / name).read_bytes() for name, place in places.items() if (place / name).is_file()}
    if GENERATION in files:
        found = read_json(folder / GENERATION)
        files[GENERATION] = _json({**found, **{key: ids[key] for key in ids if found.get(key) == 0}})
    if SETTINGS in files:
        found = read_json(tokenizer / SETTINGS)
        if found.pop("auto_map", None) is not None:
            files[SETTINGS] = _json({**found, "tokenizer_class": FAST})
    return files


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _why(opened: Source, dtype: str | None) -> str:
    """Return what may be the reason for logits that differ."""
    if isinstance(opened, FoldedHead) and math.frexp(opened.divisor)[0] != 0.5 and dtype != "float32":
        return f"a norm that is divided by {opened.divisor:g} is rounded: choose --dtype float32"
    return "this is not the published model, do not use it"
