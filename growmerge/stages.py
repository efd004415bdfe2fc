"""The stages of a pipeline file: train, grow, merge, and the plain Hugging Face folder that each ends in."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint import manifest
from checkpoint.files import read_json, write_bytes, write_json
from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.provenance import descend
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Source
from checkpoint.writer import write_checkpoint
from eval.evaluate import evaluate_model
from eval.model import load_model
from growmerge import __version__
from growmerge.cards import card
from growmerge.config import merged_training
from growmerge.context import Context
from growmerge.mixtures import pipeline_order
from growmerge.prepared import corpus_sizes, token_file
from growmerge.resolved import corpora_of
from growmerge.samples import bytes_seen, samples, sequences_of
from growmerge.schema import GrowStage, TrainStage
from growmerge.shapes import recipe_of
from growmerge.starts import keeps_optimizer, kept_checkpoint, starting_source
from growmerge.tasks import TOPOLOGY, WITHOUT_RESULT, Task, trained_languages
from growmerge.texts import described, heldout_documents, tokenizer_of
from parallel.errors import InputError, Stopped
from parallel.ranks import Ranks
from train.data.tokenizer import TextTokenizer
from train.loop import train
from train.plan import RunPlan
from upscale.grow import grow
from upscale.layers import is_exact
from upscale.verify import compare

EXACT = 1e-5
"""Largest difference of held-out losses (nats a token, float32) at which growth counts as exact."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def do_train(context: Context, task: Task) -> None:
    config = task.config
    tokenizer = tokenizer_of(context)
    how: dict[str, Any] = dict(config["training"])
    chosen = merged_training(context.pipeline, context.train_stage(task.name))
    kept = (*WITHOUT_RESULT, *TOPOLOGY)
    plan = RunPlan(**{**how, "betas": tuple(how["betas"]), **{key: getattr(chosen, key) for key in kept}})
    data, mixtures, sizes = config["data"], context.pipeline.mixtures, corpus_sizes(context)
    files = {name: token_file(context, name) for name in corpora_of(data, mixtures)}
    order = pipeline_order(
        data,
        mixtures,
        sizes,
        sequences_of(files, plan.sequence_length),
        seed=config["seed"],
        global_batch=plan.global_batch,
    )
    sample, corpora = samples(order, files, length=plan.sequence_length, documents=plan.documents)
    heldout = heldout_documents(context)
    heldout = {language: heldout[language] for language in config["evaluation"]["languages"]}

    def evaluate(model: Any, readers: Ranks) -> Mapping[str, Any]:
        return evaluate_model(
            model,
            tokenizer,
            heldout,
            window=config["evaluation"]["window"],
            stride=config["evaluation"]["stride"],
            rank=readers.rank,
            world=readers.world_size,
            gather=readers.gather,
            even=True,
        )

    def start() -> Source:
        if config["from_"] == "scratch":
            return ScratchSource(config=scratch_config(config["model"], tokenizer), seed=config["seed"])
        source = starting_source(context, config["from_"], plan.dynamics)
        if source.config["vocab_size"] < tokenizer.vocab_size:
            raise InputError(
                f"{task.name}: the tokenizer has {tokenizer.vocab_size} entries, "
                f"the model {config['from_']} only {source.config['vocab_size']}"
            )
        return source

    at = config.get("at")
    branch = kept_checkpoint(context.folder(config["from_"]), at) if at is not None else None
    hf_config = dict(start().config)
    result = train(
        start,
        plan,
        sample,
        context.ranks,
        task.folder,
        seed=config["seed"],
        files={"config.json": (json.dumps(hf_config, indent=2) + "\n").encode()},
        evaluate=evaluate,
        report=lambda event: context.report({**event, "stage": task.name}),
        corpora=corpora,
        bytes_seen=bytes_seen(order, files, length=plan.sequence_length),
        keep_optimizer=keeps_optimizer(context, config["from_"]),
        branch_from=branch,
        about={"name": task.name, "training": how, "mixture": config["mixture"]},
    )
    if result.stopped is not None:
        context.report({"event": "warning", "stage": task.name, "text": f"ended early: {result.stopped}"})
    elif not result.finished:
        raise Stopped(f"{task.name}: asked to stop; saved, and the same command goes on from here")
    context.once(lambda: export(context, task, open_checkpoint(result.checkpoint)))


def scratch_config(model: Mapping[str, Any], tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return the Hugging Face config of a model from scratch."""
    keys = {"hidden_act": "silu"} | {key: value for key, value in model.items() if key not in ("family", "rope_theta")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": model["family"],
        **keys,
        "head_dim": model["hidden_size"] // model["num_attention_heads"],
        "rope_parameters": {"rope_theta": model["rope_theta"], "rope_type": "default"},
        "vocab_size": tokenizer.vocab_size,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": None,
    }


def do_grow(context: Context, task: Task) -> None:
    config = task.config
    stage = context.nodes[task.name].stage
    assert isinstance(stage, GrowStage), f"{task.name} does not grow"
    recipe = recipe_of(stage, context.pipeline.seed)

    def action() -> None:
        small = open_checkpoint(context.model(config["from_"]))
        export(context, task, grow(small, recipe))
        grown = open_checkpoint(task.folder / "model")
        tokenizer = tokenizer_of(context)
        texts = [document.text for documents in heldout_documents(context).values() for document in documents]
        length = config_window(context, small)
        found = compare(load_model(small), load_model(grown), token_batches(texts, tokenizer, length))
        write_json(
            task.folder / "growth.json",
            {
                "stage": task.name,
                "from": config["from_"],
                "method": recipe.method,
                "optimizer": recipe.state,
                "loss_small": found.loss_small,
                "loss_grown": found.loss_grown,
                "difference": found.loss_difference,
                "max_logit_difference": found.max_logit_difference,
            },
        )
        stored = next(iter(small.infos.values())).slots["weight"]
        if is_exact(recipe.blocks(small.config)) and stored == torch.float32 and found.loss_difference > EXACT:
            raise InputError(f"{task.name}: growth is not exact: held-out loss differs by {found.loss_difference:.1e}")

    context.once(action)


def config_window(context: Context, source: Source) -> int:
    """Return the sequence length to verify with (tokens)."""
    return min(context.pipeline.training.sequence_length, source.config["max_position_embeddings"])


def token_batches(texts: Sequence[str], tokenizer: TextTokenizer, length: int, rows: int = 16) -> list[torch.Tensor]:
    """Return the texts, joined, as batches of token ids [B, T]; what does not fill a row is left out."""
    ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos]]
    length = max(2, min(length, len(ids)))
    whole = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)
    return list(whole.split(rows))


def export(
    context: Context,
    task: Task,
    source: Source,
    *,
    also: Mapping[str, Path] | None = None,
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Write a stage's model as a plain Hugging Face folder, with tokenizer, provenance and card.

    Args:
        also: folders of statistics that it comes from, by their tasks.
        more: further files.
    """
    folders = {name: context.model(name) for name in _parents(task)} | dict(also or {})
    records = [{**_provenance(folder), "name": name} for name, folder in folders.items()]
    about = {
        "format": 1,
        "name": task.name,
        "verb": task.verb,
        "recipe": dict(task.config),
        **descend(records),
        "tokens": source.run.tokens,
        "versions": {"growmerge": __version__, "torch": torch.__version__},
    }
    tokenizer = context.folder("tokens") / "tokenizer"
    files = {path.name: path.read_bytes() for path in sorted(tokenizer.iterdir()) if path.name != manifest.NAME}
    write_checkpoint(
        source,
        task.folder / "model",
        # Growth keeps the small model's dtype: rounding it would change the function.
        SafetensorsLayout(dtype=None if task.verb == "grow" else DTYPES[task.config["precision"]]),
        workers=context.resources.threads,
        about=about,
        extra_files={**files, **(more or {})},
    )
    write_card(context, task)


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / "growmerge.json"
    return read_json(path) if path.is_file() else {}


def _parents(task: Task) -> list[str]:
    """Return what a stage was made from, as the pipeline file names it."""
    start = task.config["from_"]
    named = [start] if isinstance(start, str) else list(start)
    return [name for name in [*named, task.config.get("base")] if name and name != "scratch"]


def write_card(context: Context, task: Task) -> None:
    """Write a model's card, with its results once the report has them."""
    seen = _languages_seen(context, task.name)
    path = context.folder("report") / "results.json"
    results = read_json(path) if path.is_file() else {}
    text = card(
        name=task.name,
        verb=task.verb,
        pipeline=context.pipeline.name,
        recipe={key: value for key, value in task.config.items() if key not in ("stamps", "evaluation")},
        parents=_parents(task),
        corpora={name: described(context, name) for name in context.pipeline.corpora if name in seen},
        results=results.get("bits_per_byte", {}).get(task.name, {}),
        confidence=context.pipeline.evaluation.confidence,
    )
    write_bytes(task.folder / "model" / "README.md", text.encode())


def _languages_seen(context: Context, stage: str) -> set[str]:
    """Return the languages that a stage's model or any of its ancestors was trained on."""
    node = context.nodes[stage]
    seen = trained_languages(context.pipeline, node.stage) if isinstance(node.stage, TrainStage) else set()
    for name in node.inputs:
        seen |= _languages_seen(context, name)
    return seen
