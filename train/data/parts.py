"""Parts: what a process makes of a shard, kept with their checksums, complete once their record is there."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoint import manifest
from checkpoint.files import disk_errors, inside, read_json, write_json
from parallel.errors import InputError
from train.data.clean import CleanOptions
from train.data.heldout import rank
from train.data.indexed import Blocks
from train.data.shards import Source
from train.data.tokens import Ends


class HeldOut(Protocol):
    """What is held out; `growmerge.schema_data.DataHeldOut`."""

    @property
    def share(self) -> float: ...
    @property
    def max_bytes(self) -> int: ...


class Corpus(Protocol):
    """The text of one language; `growmerge.schema_data.DataCorpus` says what each field means."""

    @property
    def name(self) -> str: ...
    @property
    def sources(self) -> tuple[Source, ...]: ...
    @property
    def splits(self) -> Mapping[str, float]: ...
    @property
    def heldout(self) -> HeldOut: ...
    @property
    def clean(self) -> CleanOptions: ...
    @property
    def append_eos(self) -> bool: ...
    @property
    def prepend_bos(self) -> bool | None: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process knows of the corpus at work."""

    language: str
    corpus: Corpus
    seed: int
    tokenizer: Path
    """Folder."""
    ends: Ends
    base: Path
    """Folder that paths of sources are relative to."""
    cache: Path
    """Folder of wheels."""
    parts: Path
    """Folder of the parts."""

    @property
    def names(self) -> list[str]:
        """Names of the token files: the language, or the language and each split."""
        return [f"{self.language}.{split}" for split in self.corpus.splits] or [self.language]

    @property
    def scans(self) -> bool:
        """Whether all of the text has to be seen before any of it is tokenised."""
        clean = self.corpus.clean
        held = self.corpus.heldout.share > 0
        return bool(held or clean.exact_duplicates or clean.near_duplicates or clean.repeated_paragraphs)


def hashed(seed: int, purpose: str, name: str) -> int:
    """Return a number below 2**64 that depends on seed, purpose and name alone: a document's place in a shuffle."""
    return int.from_bytes(rank(seed, purpose, name)[0][:8], "big")


def part_path(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:06d}.{kind}"


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write arrays as `.npz`; return its entry for a record, by name."""
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    return save_bytes(path, data.getbuffer())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `save_arrays` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def save_bytes(path: Path, data: Any) -> dict[str, Any]:
    """Write a file in small pieces and rename it into place; return its entry for a record, by name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = Blocks(temporary)
            file.write(data)
            file.close()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return {path.name: {"size": file.size, "mtime_ns": path.stat().st_mtime_ns, "xxh3": file.hashes}}


def write_record(folder: Path, number: int, kind: str, record: dict[str, Any], files: Any) -> dict[str, Any]:
    """Declare a part complete; return its record."""
    whole = {**record, "files": files}
    write_json(part_path(folder, number, f"{kind}.json"), whole)
    return whole


def read_record(folder: Path, number: int, kind: str) -> dict[str, Any] | None:
    """Return the record of a part, or None if it is not complete."""
    path = part_path(folder, number, f"{kind}.json")
    try:
        record: dict[str, Any] = read_json(path)
        whole = all(inside(folder, name).stat().st_size == file["size"] for name, file in record["files"].items())
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def check_part(folder: Path, number: int, kind: str, record: Mapping[str, Any]) -> None:
    """Check the checksums of a part's files.

    Raises:
        InputError: one is damaged; the part's record is gone then, so that it is made anew.
    """
    for name, file in record["files"].items():
        path = inside(folder, name)
        if manifest.block_hashes(path) != file["xxh3"]:
            part_path(folder, number, f"{kind}.json").unlink(missing_ok=True)
            raise InputError(f"{path}: damaged (its checksum is another); run again to have it made anew")
