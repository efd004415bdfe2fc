"""Models and tokenizers of the Hugging Face Hub: `hub:org/name` or `hub:org/name@revision` where a path could be.

What runs reads them from the local cache alone (HF_HOME): compute nodes have no network. `growmerge fetch` fills it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from parallel.errors import InputError

PREFIX = "hub:"
NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
TOKENIZER = (
    *("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    "chat_template*",
)
"""Files of a repository that are a tokenizer's."""
WANTED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER),
    *("adapter_config.json", "growmerge.json"),
)
"""Files of a repository that are fetched: no code, no pickles."""
WEIGHTS = {"config.json": "model.safetensors", "adapter_config.json": "adapter_model.safetensors"}
"""What says what a model or adapter is, and where its weights are if they are one file."""


def place(base: Path, name: str, file: Path | str = "FILE", *, tokenizer: bool = False) -> Path:
    """Return the folder that a name in a file stands for: one of the Hub's in the cache, or a path from `base`.

    Args:
        tokenizer: whether the tokenizer is all that is wanted.
        file: what `growmerge fetch` is to be given if the Hub's is not in the cache.

    Raises:
        InputError: the Hub's is not in the cache.
    """
    if not name.startswith(PREFIX):
        return base / name
    repository, revision = _parts(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    missing = InputError(f"{name}: not in the cache of this machine: `growmerge fetch {file}` where there is a network")
    try:
        files = [*(TOKENIZER if tokenizer else WANTED)]
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=files))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise missing from error
    if not ((folder / "tokenizer.json").is_file() if tokenizer else _whole(folder)):
        raise missing
    return folder


def _whole(folder: Path) -> bool:
    """Whether the weights of a model or adapter, where it is one, are all there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return all((folder / name).is_file() for name in {*read_json(index)["weight_map"].values()})
    kinds = [about for about in WEIGHTS if (folder / about).is_file()]
    return not kinds or any((folder / WEIGHTS[about]).is_file() for about in kinds)


def fetch(name: str, *, weights: bool = True) -> Path:
    """Download what is missing of a model, adapter or tokenizer, and return its folder.

    Args:
        weights: whether more than the tokenizer is wanted.

    Raises:
        InputError: the Hub's own words; weights that are pickles.
    """
    repository, revision = _parts(name)
    folder = _download(
        name, repo_id=repository, revision=revision, allow_patterns=[*(WANTED if weights else TOKENIZER)]
    )
    if weights and not _whole(folder):
        raise InputError(f"{name}: its weights are not there as safetensors, or not all of them; no pickle is fetched")
    return folder


def fetch_data(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """Download what is missing of a data set, or of its files that match, and return its folder.

    Raises:
        InputError: the Hub's own words.
    """
    patterns = [*files, "README.md"] if files else None
    code = ["*.py", "*.pkl", "*.pt", "*.bin"]
    about = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns, "ignore_patterns": code}
    return _download(name, repo_id=name, **about)


def _download(name: str, **about: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(**about))
    except (HfHubHTTPError, OSError, ValueError) as error:  # the cache, a proxy, no network
        raise InputError(f"{name}: {' '.join(str(error).split())[:300]}") from error


def _parts(name: str) -> tuple[str, str | None]:
    found = NAME.fullmatch(name)
    if found is None:
        raise InputError(f"{name}: a name of the Hub is hub:ORGANISATION/NAME, or hub:ORGANISATION/NAME@REVISION")
    return found[1], found[2]
