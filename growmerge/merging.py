"""`growmerge merge`: a recipe to a checkpoint in any format, straight from models in any format."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from checkpoint import manifest
from checkpoint.files import read_json
from checkpoint.lora import apply_lora
from checkpoint.open import open_checkpoint
from checkpoint.source import Source
from growmerge.convert import COMPANIONS, Target, record_of, write_target
from growmerge.places import folder_of, parts_of
from merge.apply import Applied, apply_recipe
from merge.averaging import WHERE as CHECKPOINTS
from merge.chat import chat_template
from merge.recipe import Recipe
from merge.recipe_files import read_recipe
from merge.table import METHODS
from merge.token_requests import read_request
from merge.tokenizer_files import read_tokenizer
from merge.tokenizers import MergedVocabulary, merged_vocabulary
from merge.vocabulary import aligned, moved_ids
from parallel.errors import InputError
from train.data.tokenizer import TextTokenizer, load_tokenizer

TOKENIZER = "tokenizer.json"
WRITTEN = "mergekit_config.yml"
"""The recipe beside its result, under the name that mergekit gives it."""


def tokenizer_folder(model: Path) -> Path:
    """Return where a checkpoint's tokenizer is: beside it, or for a run's checkpoints beside the run's model."""
    if not (model / TOKENIZER).is_file() and model.parent.name == CHECKPOINTS:
        return model.parent.parent / "model"
    return model


@dataclass(kw_only=True)
class Models:
    """Opens the models that a recipe names: paths from its folder or the current one, or names on the Hub."""

    file: Path
    recipe: Recipe
    folder: Path | None = None
    """Where they are looked for first, by their names or these names' last parts."""
    folders: dict[str, list[Path]] = field(default_factory=dict)
    """Of each model that was opened: its own, and its adapter's."""
    vocabulary: MergedVocabulary | None = None
    statistics: list[Path] = field(default_factory=list)
    """Folders of statistics that the recipe names."""

    def open(self, name: str) -> Source:
        """Return a model as the recipe names it, with its adapter.

        Raises:
            InputError: no such model, or one that cannot be read.
        """
        self.folders[name] = [
            folder_of(self.file, part, self.folder) for part in parts_of(self.file, name, self.folder)
        ]
        folder, *adapters = self.folders[name]
        source = open_checkpoint(folder)
        for adapter in adapters:
            source = apply_lora(source, adapter)
        return source

    def place_also(self, name: str) -> Path:
        """Return the folder of what is no model: statistics, or a run whose checkpoints are."""
        folder = folder_of(self.file, name, self.folder)
        if manifest.is_complete(folder):
            self.statistics.append(folder)
        return folder

    def place_file(self, name: str) -> Path:
        """Return a file that the recipe names."""
        for base in (self.file.parent, Path()):
            if (base / name).is_file():
                return base / name
        raise InputError(f"{name}: no such file, neither beside the recipe nor here")

    def tokenizer(self, name: str) -> Path:
        """Return where a model's tokenizer is."""
        return tokenizer_folder(self.folders[name][0])

    def made_tokenizer(self) -> TextTokenizer:
        """Return the tokenizer of what the recipe makes.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        if self.vocabulary is None:
            return load_tokenizer(self.tokenizer(self.recipe.models[0]))
        with TemporaryDirectory() as folder:
            for name, data in self.vocabulary.files.items():
                (Path(folder) / name).write_bytes(data)
            return load_tokenizer(Path(folder))

    def align(self, models: Mapping[str, Source]) -> dict[str, Source]:
        """Return the models over the output's vocabulary, if the recipe asks for one.

        Raises:
            InputError: tokenizers that are missing or do not fit, with the recipe's line.
        """
        recipe = self.recipe
        asked = recipe.tokenizer if recipe.tokenizer is not None else recipe.tokenizer_source
        if asked is None:
            return dict(models)
        try:
            request = read_request(asked)
            tokenizers = [
                read_tokenizer(name, self.tokenizer(name), source.config["vocab_size"])
                for name, source in models.items()
            ]
            self.vocabulary = merged_vocabulary(tokenizers, request, base=recipe.base)
            return {name: aligned(name, models, self.vocabulary) for name in models}
        except InputError as error:
            key = "tokenizer_source" if recipe.tokenizer is None else "tokenizer"
            raise InputError(f"{recipe.at(key)}: {error}") from None


def apply_file(
    path: Path,
    *,
    seed: int | None = None,
    lenient: bool = False,
    allow_unrelated: bool = False,
    device: str = "cpu",
    folder: Path | None = None,
) -> tuple[Applied, Models]:
    """Read a recipe and open its models.

    Args:
        folder: where its models are looked for first, by their names or these names' last parts.
        seed: of methods that draw random numbers, instead of the recipe's; 0 if neither gives one.
        device: where values are merged, as torch names it.

    Raises:
        InputError: anything wrong with it, with its line.
    """
    recipe = read_recipe(path, lenient=lenient)
    models = Models(file=path, recipe=recipe, folder=folder)
    applied = apply_recipe(
        recipe,
        models.open,
        align=models.align,
        place=models.place_also,
        seed=recipe.seed or 0 if seed is None else seed,
        allow_unrelated=allow_unrelated,
        device=checked_device(device),
    )
    models.recipe = applied.recipe
    notes = (*applied.merged.notes, *(f"{path}:{recipe.slices[0].line}: {note}" for note in different_words(models)))
    return replace(applied, merged=replace(applied.merged, notes=notes)), models


def checked_device(name: str) -> str:
    """Return the name of a device.

    Raises:
        InputError: there is none of it here.
    """
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: allowed are cpu and cuda, and a number behind it as in cuda:1")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: torch cannot use it here ({str(error).splitlines()[0]})") from None
    return name


def different_words(models: Models) -> list[str]:
    """Return a line if tokenizers differ and nothing is done about it: rows are then other tokens'."""
    found: dict[str, list[str]] = {}
    for name in models.folders:
        path = models.tokenizer(name) / TOKENIZER
        if path.is_file():
            parts = read_json(path)
            words = [parts.get("model", {}).get("vocab"), parts.get("added_tokens")]
            key = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
            found.setdefault(key, []).append(name)
    if len(found) < 2 or models.vocabulary is not None:
        return []
    kinds = "; ".join(", ".join(names) for names in found.values())
    return [f"the tokenizers differ ({kinds}): a row is not the same token in all; tokenizer_source brings them to one"]


def merge_file(target: Target, applied: Applied, models: Models, more: Mapping[str, bytes] | None = None) -> str:
    """Write what a recipe comes to; return what is said of it.

    Args:
        more: further files.

    Raises:
        InputError: the target is taken or cannot be written, a model holds a value that is not finite.
    """
    return write_target(applied.merged, target, **written_of(applied, models, target, more or {}))


def written_of(applied: Applied, models: Models, target: Target, more: Mapping[str, bytes]) -> dict[str, Any]:
    """Return what `growmerge.convert.planned` has to know of a merge beside its source."""
    recipe = applied.recipe
    records = {name: applied.models[name].run.provenance for name in recipe.models}
    records |= {folder.name: record_of(folder) for folder in models.statistics}
    parents = [{**record, "name": record.get("name", name)} for name, record in records.items()]
    provenance = applied.merged.run.provenance
    return {
        "made": {key: provenance[key] for key in ("verb", "recipe")},
        "parents": parents,
        "inputs": [*(folder for name in recipe.models for folder in models.folders[name]), *models.statistics],
        "files": {**files_beside(applied, models, target), **more},
    }


def files_beside(applied: Applied, models: Models, target: Target) -> dict[str, bytes]:
    """Return the small files of a merged model: tokenizer, generation config, recipe and card."""
    recipe = applied.recipe
    first = models.tokenizer(recipe.models[0])
    found = {name: (first / name).read_bytes() for name in COMPANIONS if (first / name).is_file()}
    if models.vocabulary is not None:
        generation = found.get("generation_config.json")
        found = dict(models.vocabulary.files)
        if generation is not None:
            config = read_json(first / "generation_config.json")
            moved = {**config, **moved_ids(config, models.vocabulary, recipe.models[0])}
            found["generation_config.json"] = _json(moved)
    if recipe.chat_template is not None:
        try:
            template = chat_template(
                recipe.chat_template, {name: _template(models.tokenizer(name)) for name in recipe.models}
            )
        except InputError as error:
            raise InputError(f"{recipe.at('chat_template')}: {error}") from None
        if template is not None:
            found["chat_template.jinja"] = template.encode()
    found[WRITTEN] = recipe.text.encode()
    found["README.md"] = card(target.folder.name, applied).encode()
    return found


def _template(folder: Path) -> str | None:
    """Return a model's chat template."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    path = folder / "tokenizer_config.json"
    own = read_json(path).get("chat_template") if path.is_file() else None
    return own if isinstance(own, str) else None


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def card(name: str, applied: Applied) -> str:
    """Return a merged model's README.md."""
    recipe, merged = applied.recipe, applied.merged
    lines = [
        *("---", "library_name: transformers", "tags:", "- growmerge", "- mergekit", "- merge", "---", ""),
        *(f"# {name}", ""),
        f"Merged by growmerge with the method `{recipe.method}` ({METHODS[recipe.method].source}), seed {merged.seed}.",
        "A plain Hugging Face folder: `AutoModelForCausalLM.from_pretrained` loads it without custom code.",
        *("", "## Models", ""),
        *(f"- {one}{' (base)' if one == recipe.base else ''}" for one in recipe.models),
        *("", "## Recipe", "", "```yaml", recipe.text.strip(), "```"),
    ]
    if merged.notes:
        lines += ["", "## Notes", "", *(f"- {note.removeprefix(f'{recipe.file}:')}" for note in merged.notes)]
    return "\n".join(lines) + "\n"
