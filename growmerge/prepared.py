"""Corpora that `growmerge data prepare` has made, as a pipeline takes them: tokens where they are, text by a sample."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from growmerge.context import Context
from growmerge.hub import place
from growmerge.lengths import known_sizes, prepared_parts
from growmerge.mixtures import prepared_sizes
from growmerge.schema import Pipeline
from parallel.errors import InputError
from train.data.corpus import CorpusText, sizes
from train.data.mixing import Size
from train.data.readers import Document
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.data.tokens import TokenFile, open_tokens


def prepared_text(pipeline: Pipeline, language: str, base: Path) -> CorpusText:
    """Return a prepared corpus: its held-out documents, and some of its training documents, from all over it.

    Raises:
        InputError: it is not there, has no held-out text, or was made with another tokenizer.
    """
    prepared, path = pipeline.prepared, pipeline.tokenizer.path
    assert prepared is not None and path is not None, "the file's rules ask for both"
    folder = base / prepared.folder
    tokenizer = load_tokenizer(place(base, path, tokenizer=True))
    about = read_json(folder / f"{language}.json")
    if about["tokenizer"] != tokenizer.sha256:
        raise InputError(f"{folder / language}.json: prepared with another tokenizer than {path}")
    heldout = folder / f"{language}.heldout.jsonl"
    if not heldout.is_file():
        raise InputError(f"{heldout}: language {language} has no held-out text: prepare it with a heldout.share")
    wanted = list(pipeline.corpora[language].splits) or [""]
    documents: list[Document] = []
    splits: dict[str, str] = {}
    for split in wanted:
        name = f"{language}.{split}" if split else language
        found = [*_sample(open_tokens(folder / name), tokenizer, name, prepared.sample_bytes)]
        documents += found
        splits |= {document.id: split for document in found if split}
    held = read_documents(heldout)
    dropped = {reason: counts["documents"] for reason, counts in about["cleaned"]["dropped"].items()}
    metadata: dict[str, Any] = {
        "name": pipeline.corpora[language].name,
        "sources": about["sources"],
        "dropped_passages": dropped,
        "training": {key: about[key] for key in ("documents", "bytes")},
        "heldout": sizes(held),
        "parallel_documents": 0,
        "sample": sizes(documents),
    }
    return CorpusText(
        language=language, training=tuple(documents), heldout=held, parallel=(), splits=splits, metadata=metadata
    )


def read_documents(path: Path) -> tuple[Document, ...]:
    """Return the documents of a JSONL file that `growmerge data prepare` wrote (id, text)."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return tuple(Document(id=record["id"], passages=tuple(record["text"].split("\n"))) for record in records)


def _sample(file: TokenFile, tokenizer: TextTokenizer, name: str, most: int) -> Iterator[Document]:
    """Yield documents at even distances, as many as come to about `most` bytes, decoded."""
    count, size = file.metadata["documents"], file.metadata["bytes"]
    wanted = max(1, min(count, most * count // max(1, size)))
    special = {file.metadata.get("bos"), file.metadata.get("eos")}
    for number in range(wanted):
        document = number * count // wanted
        ids = [int(one) for one in file.tokens[int(file.offsets[document]) : int(file.offsets[document + 1])]]
        text = tokenizer.decode(_without_ends(ids, special))
        yield Document(id=f"{name}/{document}", passages=tuple(text.split("\n")))


def _without_ends(ids: Sequence[int], special: set[int | None]) -> Sequence[int]:
    """Return the tokens of a document's text, without the BOS and EOS that it lies between."""
    first = 1 if ids and ids[0] in special else 0
    last = len(ids) - 1 if len(ids) > first and ids[-1] in special else len(ids)
    return ids[first:last]


def token_file(context: Context, name: str) -> TokenFile:
    """Open the token file of a corpus or split: where it was prepared, or where the pipeline made it."""
    prepared = context.pipeline.prepared
    if prepared is not None and name in prepared_parts(context.pipeline):
        return open_tokens(context.base / prepared.folder / name)
    return open_tokens(context.folder("tokens") / name)


def corpus_sizes(context: Context) -> dict[str, Size]:
    """Return the sizes of all corpora and splits by name."""
    return {**prepared_sizes(context.folder("tokens")), **known_sizes(context.pipeline)}
