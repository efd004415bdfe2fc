"""The shape of every stage's model, worked out from the file alone: nothing is trained or loaded to know it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from growmerge.config import merged_training
from growmerge.graph import Node
from growmerge.hub import place
from growmerge.rules import merge_method
from growmerge.schema import GrowStage, MergeStage, ModelConfig, Pipeline, TrainStage
from growmerge.schema_text import VOCABULARY
from merge.search_settings import SEARCH
from merge.table import statistic_of
from parallel.errors import InputError
from parallel.families import family_of
from upscale.factors import Recipe, axis_growths, grown_config

MOST_PARAMETERS = 10**18
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")

Config = Mapping[str, Any]
"""A Hugging Face config: what of it decides a model's shape."""


def model_configs(pipeline: Pipeline, nodes: Mapping[str, Node], *, base: Path) -> dict[str, Config]:
    """Return the Hugging Face config of each stage's model, by the stage's name.

    From scratch it is that of `model:`; growing multiplies hidden size, heads and ffn and keeps head_dim; training and
    merging keep it; a checkpoint's is read from its config.json.

    Args:
        nodes: stages, each after those that it reads from.
        base: the folder of the pipeline file.

    Raises:
        InputError: a checkpoint without a readable config, or of a family without a table; models of different shapes
            in one merge; samples longer than the model allows; a tokenizer larger than the model's vocabulary.
    """
    entries = vocabulary(pipeline, base)
    configs: dict[str, Config] = {}
    for node in nodes.values():
        try:
            configs[node.name] = _config(pipeline, node, configs, base, entries)
        except InputError as error:
            raise InputError(f"{node.where}: stage {node.name}: {error}") from None
    return configs


def _config(pipeline: Pipeline, node: Node, configs: Mapping[str, Config], base: Path, entries: int) -> Config:
    def of(name: str) -> Config:
        return configs[name] if name in configs else read_config(place(base, name))

    stage = node.stage
    if isinstance(stage, TrainStage):
        config = _scratch(pipeline.model, entries) if stage.from_ == "scratch" else of(stage.from_)
        _check_training(pipeline, stage, config, entries)
    elif isinstance(stage, GrowStage):
        recipe, small = recipe_of(stage, pipeline.seed), of(stage.from_)
        axis_growths(recipe, small)  # refuses what cannot be grown
        config = grown_config(recipe, small)
    else:
        config = _merged({name: of(name) for name in (*stage.from_, stage.base) if name})
        _check_windows(stage, config)
    if (count := parameters(config)) > MOST_PARAMETERS:
        raise InputError(f"the model comes to {count} parameters; allowed are {MOST_PARAMETERS}")
    return config


def recipe_of(stage: GrowStage, seed: int) -> Recipe:
    """Return how a stage grows.

    Args:
        seed: the pipeline's.
    """
    own = asdict(stage)
    given = {key: value for key, value in own.items() if key not in ("from_", "optimizer", "width", "seed")}
    else_grown = stage.depth or stage.experts or any(value for key, value in given.items() if key.startswith("to_"))
    width = (1 if else_grown else 2) if stage.width is None else stage.width
    return Recipe(width=width, state=stage.optimizer, seed=seed + own.get("seed", 0), **given)


def parameters(config: Config) -> int:
    """Return the number of a model's parameters; a tied tensor counts once."""
    return family_of(config).parameters(config)


def multiplied(config: Config) -> int:
    """Return the number of parameters that each token is multiplied with: the head, but no look-up of an embedding.

    Of experts those that it is sent to.
    """
    family = family_of(config)
    lookup = 0 if family.is_tied(config) else config["vocab_size"] * config["hidden_size"]
    return parameters(config) - lookup - family.idle(config)


def vocabulary(pipeline: Pipeline, base: Path) -> int:
    """Return the tokenizer's number of entries: what is asked for, or those of an existing one's tokenizer.json.

    Raises:
        InputError: an existing tokenizer that cannot be read, or has not as many entries as the file says.
    """
    asked = pipeline.tokenizer.vocab_size
    if pipeline.tokenizer.path is None:
        return asked or VOCABULARY
    try:
        path = place(base, pipeline.tokenizer.path, tokenizer=True) / "tokenizer.json"
        entries = _entries(path)
    except InputError:
        if asked is None:
            raise
        return asked  # it is not there yet
    if asked not in (None, entries):
        raise InputError(f"{path}: has {entries} entries, tokenizer.vocab_size says {asked}")
    return entries


def _entries(path: Path) -> int:
    data = _read_json(path)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = data.get("added_tokens", [])
    if not isinstance(vocab, (dict, list)) or not isinstance(added, list):
        raise InputError(f"{path}: not a tokenizer: it has no model.vocab")
    names = vocab if isinstance(vocab, dict) else [entry[0] for entry in vocab if isinstance(entry, list) and entry]
    return len(
        {str(name) for name in names} | {str(token.get("content")) for token in added if isinstance(token, dict)}
    )


def read_config(folder: Path) -> Config:
    """Return a checkpoint's Hugging Face config.

    Raises:
        InputError: no config.json, or one without the sizes of a known family.
    """
    path = folder / "config.json"
    config = _read_json(path)
    try:
        family_of(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for key in (*SIZES, *OPTIONAL_SIZES):
        size = config.get(key)
        if size is None and key in OPTIONAL_SIZES:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**63:
            raise InputError(f"{path}: {key} is {size!r}; a positive whole number is needed")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object")
    return data


def _scratch(model: ModelConfig | None, entries: int) -> Config:
    assert model is not None, "expand lets nobody start from scratch without a model"
    shape = {key: value for key, value in asdict(model).items() if key != "family"}
    head_dim = model.hidden_size // model.num_attention_heads
    return {"model_type": model.family, **shape, "head_dim": head_dim, "vocab_size": entries}


def _check_training(pipeline: Pipeline, stage: TrainStage, config: Config, entries: int) -> None:
    length, longest = merged_training(pipeline, stage).sequence_length, config["max_position_embeddings"]
    if length > longest:
        raise InputError(f"sequence_length {length} is more than the model's max_position_embeddings, {longest}")
    window = pipeline.evaluation.window or pipeline.training.sequence_length
    if window > longest:
        raise InputError(f"evaluation.window {window} is more than the model's max_position_embeddings, {longest}")
    if entries > config["vocab_size"]:
        raise InputError(f"the tokenizer has {entries} entries, the model {stage.from_!r} only {config['vocab_size']}")


def _check_windows(stage: MergeStage, config: Config) -> None:
    longest = config["max_position_embeddings"]
    counted = stage.statistics if statistic_of(merge_method(stage)) else None
    for key, how in (("statistics", counted), ("search", stage.search if stage.method == SEARCH else None)):
        if how and how.sequence_length and how.sequence_length > longest:
            line = f"{key}.sequence_length {how.sequence_length} is more than the model's max_position_embeddings"
            raise InputError(f"{line}, {longest}")


def _merged(configs: Mapping[str, Config]) -> Config:
    """Return the config of a merge's result: that of its first model, which all the others have to equal in shape."""
    (first, config), *others = configs.items()
    wanted = _shape(config)
    for name, other in others:
        for key, size in _shape(other).items():
            if size != wanted[key]:
                raise InputError(f"{name!r} has {key} {size}, {first!r} has {wanted[key]}: they cannot be merged")
    return config


def _shape(config: Config) -> dict[str, Any]:
    tied = family_of(config).is_tied(config)
    sizes = {"num_hidden_layers": config["num_hidden_layers"], "tie_word_embeddings": tied}
    return {"family": family_of(config).name, **sizes, **family_of(config).axes(config)}
