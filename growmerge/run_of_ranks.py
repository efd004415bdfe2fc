"""What the ranks of `growmerge train` do together: open model and data, train, leave a plain Hugging Face folder."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import write_json
from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.provenance import descend
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Source
from checkpoint.writer import write_checkpoint
from eval.evaluate import evaluate_model
from growmerge import __version__
from growmerge.hub import place
from growmerge.mixtures import prepared_sizes, training_order
from growmerge.prepared import read_documents
from growmerge.samples import bytes_seen, languages_of, open_corpora, samples, sequences_of
from growmerge.schema_train import TrainConfig
from growmerge.stages import DTYPES, scratch_config
from growmerge.starts import kept_checkpoint
from growmerge.texts import TOKENIZER_FILES
from growmerge.training import RUN, STOPPED, plan_of
from parallel.errors import InputError, one_of
from parallel.ranks import Ranks, device
from train.batch import SampleAt
from train.data.readers import Document
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.loop import train
from train.plan import RunPlan
from upscale.factors import Recipe
from upscale.grow import grow

Report = Callable[[Mapping[str, Any]], None]


def run(config: TrainConfig, base: Path, folder: Path, ranks: Ranks, report: Report) -> int:
    """Train, and export the model; all ranks together. Return the exit code: 0 finished, or STOPPED.

    Raises:
        InputError: data, tokenizer or model do not fit each other; what `train.loop.train` raises.
    """
    began = time.time()
    report({"event": "start"})
    plan = plan_of(config)
    branch = _branch(config, base)
    tokenizer = load_tokenizer(_tokenizer_folder(config, base, branch))

    def start() -> Source:
        return open_checkpoint(branch) if branch else starting_model(config, base, tokenizer)

    source = start()
    if source.config["vocab_size"] < tokenizer.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only {source.config['vocab_size']}: "
            "use the model's own tokenizer, or give it new rows by `growmerge tokenizer replace`"
        )
    sample, corpora, languages, text_bytes = run_samples(config, base, plan, source.config["vocab_size"])
    heldout = read_heldout(base / config.data.folder, config, languages)
    window = config.evaluation.window or plan.sequence_length

    def evaluate(model: Any, readers: Ranks) -> Mapping[str, Any]:
        return evaluate_model(
            model,
            tokenizer,
            heldout,
            window=window,
            stride=config.evaluation.stride or max(1, window // 2),
            rank=readers.rank,
            world=readers.world_size,
            gather=readers.gather,
            even=True,
        )

    hf_config = dict(source.config)
    del source
    result = train(
        start,
        plan,
        sample,
        ranks,
        folder,
        seed=config.seed,
        files={"config.json": (json.dumps(hf_config, indent=2) + "\n").encode()},
        evaluate=evaluate,
        report=report,
        corpora=corpora,
        bytes_seen=text_bytes,
        keep_optimizer=config.keep_optimizer or (config.grow is not None and config.grow.optimizer != "reset"),
        branch_from=branch,
        about={**asdict(config), "ranks": ranks.world_size},
    )
    if result.stopped is not None:
        report({"event": "warning", "text": f"ended early: {result.stopped}"})
    elif not result.finished:
        return STOPPED
    if ranks.first:
        export(config, plan, result.checkpoint, folder, tokenizer_files(_tokenizer_folder(config, base, branch)))
    ranks.barrier()
    used = {"ranks": ranks.world_size, "threads": torch.get_num_threads()}
    used["gpus"] = ranks.world_size if device().type == "cuda" else 0
    report({"event": "done", "seconds": round(time.time() - began, 2), **used})
    return 0


def starting_model(config: TrainConfig, base: Path, tokenizer: TextTokenizer) -> Source:
    """Return what the run starts from; nothing is read yet."""
    if config.shape is not None:
        source: Source = ScratchSource(config=scratch_config(asdict(config.shape), tokenizer), seed=config.seed)
    else:
        assert config.model is not None, "neither shape nor model"
        source = open_checkpoint(place(base, config.model))
    if config.grow is None:
        return source
    given = asdict(config.grow)
    return grow(source, Recipe(state=given.pop("optimizer"), seed=config.seed, **given))


def _branch(config: TrainConfig, base: Path) -> Path | None:
    if config.branch is None:
        return None
    return kept_checkpoint(base / config.branch.run, config.branch.step)


def _tokenizer_folder(config: TrainConfig, base: Path, branch: Path | None) -> Path:
    if config.tokenizer is not None:
        return place(base, config.tokenizer, tokenizer=True)
    if config.model is None:
        raise InputError("`tokenizer` is missing: with shape or branch the folder of one has to be given")
    return place(base, config.model)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a tokenizer that a model's folder gets."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def run_samples(
    config: TrainConfig, base: Path, plan: RunPlan, vocab_size: int
) -> tuple[SampleAt, tuple[str, ...], tuple[str, ...], Callable[[int], int] | None]:
    """Return the run's samples by number, the names of their corpora, the languages of these, and the bytes seen.

    Raises:
        InputError: a corpus that is not there, or that another tokenizer than the model's has made.
    """
    folder = base / config.data.folder
    if not folder.is_dir():
        raise InputError(f"data.folder: {folder}: no such folder; make it by `growmerge data prepare`")
    sizes = prepared_sizes(folder)
    files = open_corpora(folder, sizes, vocab_size=vocab_size)
    wholes = sequences_of(files, plan.sequence_length)
    order = training_order(
        config.data.mixture, config.mixtures, sizes, wholes, seed=config.seed, global_batch=plan.global_batch
    )
    sample, names = samples(order, files, length=plan.sequence_length, documents=plan.documents)
    return sample, names, languages_of(order.corpora), bytes_seen(order, files, length=plan.sequence_length)


def read_heldout(folder: Path, config: TrainConfig, languages: tuple[str, ...]) -> dict[str, tuple[Document, ...]]:
    """Return the held-out documents by language, those that `growmerge data prepare` left aside.

    Raises:
        InputError: a language that is named has none.
    """
    there = {path.name.removesuffix(".heldout.jsonl"): path for path in sorted(folder.glob("*.heldout.jsonl"))}
    named = config.data.heldout if config.data.heldout is not None else tuple(config.training.alarms)
    for language in named:
        if language not in there:
            raise InputError(one_of("language with held-out text", language, there))
    wanted = named if config.data.heldout is not None else dict.fromkeys((*languages, *named))
    found = {}
    for language in wanted:
        if language in there:
            found[language] = read_documents(there[language])
    return {language: documents for language, documents in found.items() if documents}


def export(config: TrainConfig, plan: RunPlan, checkpoint: Path, folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the model as a plain Hugging Face folder, and say that the run is finished."""
    source = open_checkpoint(checkpoint)
    parents = []
    if config.model is not None:
        parents = [{**source.run.provenance, "name": config.model}]
    about = {
        "format": 1,
        "name": config.name,
        "verb": "train",
        "recipe": asdict(config),
        **descend(parents),
        "tokens": source.run.tokens,
        "versions": {"growmerge": __version__, "torch": torch.__version__},
    }
    write_checkpoint(
        source,
        folder / "model",
        SafetensorsLayout(dtype=DTYPES[plan.precision]),
        workers=torch.get_num_threads(),
        about=json.loads(json.dumps(about)),
        extra_files=files,
    )
    known = json.loads((folder / RUN).read_text())
    write_json(folder / RUN, {**known, "finished": True})
