"""Text, tokens and acceptability pairs: what the stages read, made once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.files import read_json, write_bytes, write_json
from growmerge.context import Context
from growmerge.hub import place
from growmerge.prepared import prepared_text
from growmerge.references import is_path
from growmerge.rules_pipeline import parts
from growmerge.schema_text import VOCABULARY
from growmerge.tasks import LABELS, Task
from growmerge.tokenizer_report import read_text
from parallel.errors import InputError
from train.data.corpus import build_corpora, read_corpus, write_corpora
from train.data.packages import default_cache
from train.data.readers import Document
from train.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from train.data.tokens import write_tokens

if TYPE_CHECKING:
    from eval.pairs import Pair


def do_text(context: Context, task: Task) -> None:
    corpora = context.pipeline.corpora
    texts = build_corpora(
        {language: corpus for language, corpus in corpora.items() if corpus.sources},
        context.pipeline.heldout,
        seed=context.pipeline.seed,
        cache=default_cache(),
        base_dir=context.base,
    )
    for language in [language for language, corpus in corpora.items() if not corpus.sources]:
        texts[language] = prepared_text(context.pipeline, language, context.base)
    for language, text in texts.items():
        if len(text.heldout) < 2:
            raise InputError(
                f"language {language} has 1 held-out document: intervals need 2 or more, and a document is held out "
                "as a whole; raise heldout.share or heldout.max_bytes"
            )
    write_corpora(texts, task.folder)


def do_tokens(context: Context, task: Task) -> None:
    pipeline = context.pipeline
    # All of them, used or not: what a mixture names does not belong to this task's key. Those prepared stay there.
    names = [name for name in parts(pipeline) if pipeline.corpora[name.partition(".")[0]].sources]
    corpora = {language: read_corpus(context.folder("text"), language) for language in pipeline.corpora}
    target = task.folder / "tokenizer"

    def make_tokenizer() -> None:
        if pipeline.tokenizer.path is not None:
            copy_tokenizer(place(context.base, pipeline.tokenizer.path, tokenizer=True), target)
            return
        languages = pipeline.tokenizer.train_on or tuple(corpora)
        texts = [document.text for language in languages for document in corpora[language].training]
        train_tokenizer(texts, vocab_size=pipeline.tokenizer.vocab_size or VOCABULARY, folder=target)

    context.once(make_tokenizer)
    tokenizer = load_tokenizer(target)
    changed = irreversible(tokenizer, heldout_documents(context)) if context.ranks.first else None
    if changed:
        context.report({"event": "warning", "stage": task.name, "text": changed})
    for name in names[context.ranks.rank :: context.ranks.world_size]:
        language, _, split = name.partition(".")
        documents = corpora[language].part(split or None)
        write_tokens([document.text for document in documents], tokenizer, task.folder / name)
    context.ranks.barrier()


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja"),
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer out of a folder that may hold a model, too."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            write_bytes(target / name, (source / name).read_bytes())


def irreversible(tokenizer: TextTokenizer, heldout: Mapping[str, Sequence[Document]]) -> str | None:
    """Return a line on the first held-out document that a tokenizer does not give back as it was, if there is one.

    One that normalises or drops characters scores another text than the one whose bytes are counted.
    """
    for language, documents in heldout.items():
        for document in documents:
            back = tokenizer.decode(tokenizer.encode(document.text))
            if back != document.text:
                pairs = enumerate(zip(document.text, back, strict=False))
                at = next((at for at, (one, other) in pairs if one != other), len(back))
                return (
                    "the tokenizer does not give text back as it was, so bits per byte are of another text: "
                    f"{language}, document {document.id!r}: {document.text[at : at + 20]!r} becomes "
                    f"{back[at : at + 20]!r}"
                )
    return None


def do_pairs(context: Context, task: Task) -> None:
    from eval.pairs import make_pairs  # and with it transformers, which fetching text needs not

    def action() -> None:
        found = {}
        for language in context.pipeline.corpora:
            corpus = read_corpus(context.folder("text"), language)
            texts = [document.text for document in [*corpus.training, *corpus.heldout]]
            pairs = make_pairs(corpus.heldout, count=task.config["pairs"], seed=task.config["seed"], corpus=texts)
            found[language] = [asdict(pair) for pair in pairs]
        write_json(task.folder / "pairs.json", found)

    context.once(action)


def read_pairs(folder: Path) -> "dict[str, list[Pair]]":
    from eval.pairs import Pair

    return {language: [Pair(**pair) for pair in pairs] for language, pairs in read_json(folder / "pairs.json").items()}


def described(context: Context, language: str) -> dict[str, Any]:
    """Return what is kept of a corpus, with the labels that the pipeline file gives its sources now."""
    corpus = context.pipeline.corpora[language]
    metadata = read_corpus(context.folder("text"), language).metadata
    if not corpus.sources:
        return {**metadata, "name": corpus.name}
    labels = [{key: getattr(source, key) for key in LABELS} for source in corpus.sources]
    sources = [{**found, **label} for found, label in zip(metadata["sources"], labels, strict=True)]
    return {**metadata, "name": corpus.name, "sources": sources}


def documents_of(context: Context, text: str) -> Sequence[Document]:
    """Return the documents of a text that the file names: a corpus' training text, a split's (`eng.first`), a file's.

    Raises:
        InputError: no such file, or one without text; a split without documents.
    """
    if is_path(text):
        return read_text(context.base / text)
    language, _, split = text.partition(".")
    return read_corpus(context.folder("text"), language).part(split or None)


def heldout_documents(context: Context) -> dict[str, tuple[Document, ...]]:
    folder = context.folder("text")
    return {language: read_corpus(folder, language).heldout for language in context.pipeline.corpora}


def tokenizer_of(context: Context) -> TextTokenizer:
    return load_tokenizer(context.folder("tokens") / "tokenizer")
