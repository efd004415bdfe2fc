"""Evaluation of every model of a pipeline, and the yardsticks that know the text alone."""

from collections.abc import Mapping
from typing import Any

from checkpoint.files import write_json
from eval.baselines import score_baselines, xz_bits
from eval.pairs import SHORTENED
from eval.tasks import PairsTask, TextTask
from growmerge.context import Context
from growmerge.eval_rows import Kept
from growmerge.eval_tasks import Asked, Prompts, read_task
from growmerge.evaluating import Evaluator, Options
from growmerge.schema import OWN_TASKS
from growmerge.schema_eval import EvalConfig, EvalTask, TaskKind
from growmerge.subjects import checkpoint
from growmerge.tasks import EVALUATION, Task
from growmerge.texts import heldout_documents, read_pairs, tokenizer_of
from parallel.errors import InputError
from parallel.ranks import device
from train.data.corpus import read_corpus
from train.data.tokenizer import TextTokenizer

PROMPT = 24
"""Tokens of a sample's prompt at most: six words may be six paragraphs where no blanks are written."""


def do_evaluate(context: Context, task: Task) -> None:
    stage = context.tasks[task.inputs[0]]
    subject = checkpoint(stage.name, [stage.folder / "model"])
    room = int(subject.source.config["max_position_embeddings"]) - PROMPT - 8
    tasks = _tasks(context, task, tokenizer_of(context), room)
    evaluation = context.pipeline.evaluation
    config = EvalConfig(
        tasks={name: asked for name, (asked, _) in tasks.items()},
        seed=task.config["seed"],
        resamples=evaluation.resamples,
        confidence=evaluation.confidence,
    )
    # Its stage is done by one job at a time.
    options = Options(folder=context.workdir / EVALUATION, device=str(device()), lease=False)
    read = {name: content for name, (_, content) in tasks.items()}
    verdict = Evaluator(config, read, options, context.ranks).verdict(subject)

    def action() -> None:
        found = verdict["tasks"]

        def rows(kind: str, language: str) -> list[list[Any]]:
            about = found.get(f"{OWN_TASKS[kind]}-{language}")
            return Kept(options.folder / about["scores"]).rows if about else []

        languages = {
            language: {"documents": rows("text", language), "pairs": rows("corrupt", language)}
            for language in context.pipeline.corpora
        }
        samples = [
            {"stage": stage.name, "language": about["language"], "prompt": one["prompt"], "text": one["text"]}
            for about in found.values()
            for one in about.get("samples", ())
        ]
        write_json(task.folder / "scores.json", {"languages": languages, "samples": samples})
        write_json(task.folder / "verdict.json", verdict)

    context.once(action)


def _tasks(context: Context, task: Task, tokenizer: TextTokenizer, room: int) -> dict[str, tuple[EvalTask, Asked]]:
    """Return what a model is asked: of every language its held-out text, pairs and a sample, and the file's tasks.

    Args:
        room: tokens that a model has positions for behind a prompt.
    """
    how = task.config["evaluation"]
    pairs = read_pairs(context.folder("pairs"))
    found: dict[str, tuple[EvalTask, Asked]] = {}
    for language, documents in heldout_documents(context).items():
        start = tokenizer.encode(" ".join(documents[0].text.split()[:6]))[:PROMPT]
        prompt = tokenizer.decode(start).rstrip("\ufffd")
        window = {"window": how["window"], "stride": how["stride"]}
        drawn = {"tokens": max(0, min(how["sample_tokens"], room)), "temperature": 0.8}
        own: dict[TaskKind, tuple[Asked, dict[str, Any]]] = {
            "text": (TextTask(documents=documents, **window), window),
            "samples": (Prompts(prompts=(prompt,), seed=task.config["seed"], **drawn), {"prompts": (prompt,), **drawn}),
        }
        if pairs[language]:
            own["corrupt"] = (PairsTask(pairs=pairs[language], shortened=SHORTENED), {})
        for kind, (content, settings) in own.items():
            found[f"{OWN_TASKS[kind]}-{language}"] = (EvalTask(kind=kind, language=language, **settings), content)
    for name, asked in context.pipeline.evaluation.tasks.items():
        try:
            found[name] = (asked, read_task(asked, context.base, seed=task.config["seed"]))
        except InputError as error:
            raise InputError(f"evaluation.tasks.{name}: {error}") from error
    return found


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
