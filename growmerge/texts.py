"""Text, tokens and acceptability pairs: what the stages read, made once."""

import shutil
from dataclasses import asdict
from pathlib import Path

from checkpoint.files import read_json, write_json
from eval.pairs import Pair, make_pairs
from growmerge.context import Context
from growmerge.tasks import Task
from train.data.corpus import build_corpora, read_corpus, write_corpora
from train.data.packages import default_cache
from train.data.readers import Document
from train.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from train.data.tokens import write_tokens


def do_text(context: Context, task: Task) -> None:
    texts = build_corpora(
        context.pipeline.corpora,
        context.pipeline.heldout,
        seed=context.pipeline.seed,
        cache=default_cache(),
        base_dir=context.base,
    )
    write_corpora(texts, task.folder)


def do_tokens(context: Context, task: Task) -> None:
    pipeline = context.pipeline
    names = list(dict.fromkeys(name for mixture in pipeline.mixtures.values() for name in mixture))
    corpora = {language: read_corpus(context.folder("text"), language) for language in pipeline.corpora}
    target = task.folder / "tokenizer"

    def make_tokenizer() -> None:
        if pipeline.tokenizer.path is not None:
            shutil.copytree(context.base / pipeline.tokenizer.path, target)
            return
        languages = pipeline.tokenizer.train_on or tuple(corpora)
        texts = [document.text for language in languages for document in corpora[language].training]
        train_tokenizer(texts, vocab_size=pipeline.tokenizer.vocab_size, folder=target)

    context.once(make_tokenizer)
    tokenizer = load_tokenizer(target)
    for name in names[context.ranks.rank :: context.ranks.world_size]:
        language, _, split = name.partition(".")
        documents = corpora[language].part(split or None)
        write_tokens([document.text for document in documents], tokenizer, task.folder / name)
    context.ranks.barrier()


def do_pairs(context: Context, task: Task) -> None:
    def action() -> None:
        found = {}
        for language in context.pipeline.corpora:
            corpus = read_corpus(context.folder("text"), language)
            texts = [document.text for document in [*corpus.training, *corpus.heldout]]
            pairs = make_pairs(corpus.heldout, count=task.config["pairs"], seed=task.config["seed"], corpus=texts)
            found[language] = [asdict(pair) for pair in pairs]
        write_json(task.folder / "pairs.json", found)

    context.once(action)


def read_pairs(folder: Path) -> dict[str, list[Pair]]:
    return {language: [Pair(**pair) for pair in pairs] for language, pairs in read_json(folder / "pairs.json").items()}


def heldout_documents(context: Context) -> dict[str, tuple[Document, ...]]:
    folder = context.folder("text")
    return {language: read_corpus(folder, language).heldout for language in context.pipeline.corpora}


def tokenizer_of(context: Context) -> TextTokenizer:
    return load_tokenizer(context.folder("tokens") / "tokenizer")
