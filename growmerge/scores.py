"""Evaluation of every model, and the yardsticks that know the text alone."""

from collections.abc import Mapping
from typing import Any

from checkpoint.files import write_json
from checkpoint.open import open_checkpoint
from eval.baselines import score_baselines, xz_bits
from eval.evaluate import evaluate_model
from eval.model import load_model
from eval.samples import continue_text
from growmerge.context import Context
from growmerge.tasks import Task
from growmerge.texts import heldout_documents, read_pairs, tokenizer_of
from parallel.ranks import device
from train.data.corpus import read_corpus

PROMPT = 24
"""Tokens of a sample's prompt at most: six words may be six paragraphs where no blanks are written."""


def do_evaluate(context: Context, task: Task) -> None:
    stage = context.tasks[task.inputs[0]]
    how = task.config["evaluation"]
    source = open_checkpoint(stage.folder / "model")
    model = load_model(source).to(device())
    tokenizer = tokenizer_of(context)
    heldout = heldout_documents(context)
    result = evaluate_model(
        model,
        tokenizer,
        heldout,
        read_pairs(context.folder("pairs")),
        window=how["window"],
        stride=how["stride"],
        rank=context.ranks.rank,
        world=context.ranks.world_size,
        gather=context.ranks.gather,
    )

    def action() -> None:
        samples = []
        for language, documents in heldout.items():
            start = tokenizer.encode(" ".join(documents[0].text.split()[:6]))[:PROMPT]
            prompt = tokenizer.decode(start).rstrip("\ufffd")
            room = model.config.max_position_embeddings - PROMPT - 8
            count = max(0, min(how["sample_tokens"], room))
            text = continue_text(model, tokenizer, prompt, tokens=count, seed=task.config["seed"], temperature=0.8)
            samples.append({"stage": stage.name, "language": language, "prompt": prompt, "text": text})
        write_json(task.folder / "scores.json", {**result, "samples": samples})

    context.once(action)


def do_baselines(context: Context, task: Task) -> None:
    tokenizer = tokenizer_of(context)
    mine: dict[str, Any] = {}
    languages = list(context.pipeline.corpora)
    for language in languages[context.ranks.rank :: context.ranks.world_size]:
        corpus = read_corpus(context.folder("text"), language)
        training = [document.text for document in corpus.training]
        scores = score_baselines(corpus.heldout, tokenizer, training=training, vocab=tokenizer.vocab_size)
        rows: Mapping[str, Any] = {
            name: [[score.id, score.bits, score.bytes, score.tokens] for score in found]
            for name, found in scores.items()
        }
        heldout = [document.text for document in corpus.heldout]
        mine[language] = {**rows, "xz": xz_bits(training, heldout) / sum(len(text.encode()) for text in heldout)}
    parts = context.ranks.gather(mine)
    found = {language: part[language] for language in languages for part in parts if language in part}
    context.once(lambda: write_json(task.folder / "baselines.json", found))
