"""The keys of a file that `growmerge data prepare` reads, as frozen dataclasses; a docstring is a help text."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from growmerge.schema_clean import Clean
from growmerge.schema_text import TextSource


@dataclass(frozen=True, kw_only=True)
class DataSource(TextSource):
    """Where text comes from: exactly one of `hub`, `files` alone, and `package` with the `files` in it."""

    hub: str | None = None
    """A data set of the Hugging Face Hub (`org/name`), or a folder in such a one's form, relative to this YAML file. It
    is streamed; data sets that need code of their own are refused."""
    config: str | None = None
    """hub: configuration, such as `swe_Latn`."""
    split: str = "train"
    """hub: split of it."""
    revision: str | None = None
    """hub: commit or tag; without one, what is prepared counts as up to date whatever the Hub has now."""
    data_files: tuple[str, ...] = ()
    """hub: globs of the data set's files to read; all of them by default."""


@dataclass(frozen=True, kw_only=True)
class DataHeldOut:
    """Documents that no model is trained on."""

    share: float = 0.01
    """Share of the documents that may be held out, by a hash of their id; 0 for none. At least one is."""
    max_bytes: int = 1_000_000
    """Bytes of held-out text at most (UTF-8); what is beyond is trained on."""


@dataclass(frozen=True, kw_only=True)
class DataCorpus:
    """The text of one language."""

    name: str = ""
    """The language's name."""
    sources: tuple[DataSource, ...]
    """Where its text comes from, in this order."""
    splits: Mapping[str, float] = field(default_factory=dict)
    """Shares of the training documents, such as `{first: 0.8, rest: 0.2}`, by a hash of their id. Each becomes a token
    file (`eng.first`), and the whole then does not."""
    heldout: DataHeldOut = field(default_factory=DataHeldOut)
    clean: Clean = field(default_factory=Clean)
    """What is left out; see docs/cleaning.md."""
    append_eos: bool = True
    """End each document with the tokenizer's EOS."""
    prepend_bos: bool | None = None
    """Begin each document with the tokenizer's BOS; by default if it has one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A file for `growmerge data prepare`; paths in it are relative to it."""

    folder: str
    """Where the token files go."""
    tokenizer: str
    """Folder of a Hugging Face tokenizer (tokenizer.json), or one of the Hub that was fetched (`hub:org/name`)."""
    seed: int = 0
    """What is held out and how documents are split follow from it."""
    workers: int | None = None
    """Processes; the machine's cores by default. The result does not depend on it."""
    corpora: Mapping[str, DataCorpus]
    """Text by language code (ISO 639-3)."""
