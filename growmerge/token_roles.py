"""A tokenizer's special tokens by their roles, and what becomes of a model's rows and token ids with another one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from parallel.errors import InputError
from train.data.spelling import Vocabulary, old_pieces, read_vocabulary
from upscale.vocabulary import Rows, rows_of

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files of a tokenizer that hold for an extended one, too; vocab.json, merges.txt and tokenizer.model do not."""
ROLES = ("bos", "eos", "pad", "unk")
PADDING = 2048
"""Rows behind its tokenizer's that a model may have: more than that are another tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A tokenizer's vocabulary, and the names of its tokens for BOS, EOS and so on."""

    vocabulary: Vocabulary
    roles: Mapping[str, str]
    """One of ROLES -> the token."""
    sha256: str
    """Of tokenizer.json."""

    def role(self, role: str) -> int | None:
        """Return the id of the token for a role."""
        return self.vocabulary.ids.get(self.roles.get(role, ""))


def read_tokenizer(folder: Path) -> Named:
    """Read a folder's tokenizer.json, and what its settings say of special tokens.

    Raises:
        InputError: there is none, or it is of an unsupported kind; the line names the file.
    """
    path = folder / "tokenizer.json"
    try:
        data = path.read_bytes()
        vocabulary = read_vocabulary(data.decode())
    except OSError:
        raise InputError(f"{folder}: holds no tokenizer.json (a fast Hugging Face tokenizer is needed)") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    settings: dict[str, Any] = {}
    for name in reversed(SETTINGS[:2]):
        settings |= read_json(folder / name) if (folder / name).is_file() else {}
    given = {role: settings.get(f"{role}_token") for role in ROLES}
    names = {role: token["content"] if isinstance(token, dict) else token for role, token in given.items()}
    return Named(
        vocabulary=vocabulary,
        roles={role: name for role, name in names.items() if name is not None and name in vocabulary.ids},
        sha256=hashlib.sha256(data).hexdigest(),
    )


def check_rows(model: Path, config: Mapping[str, Any], tokenizer: Named) -> None:
    """Check that a tokenizer is the model's own.

    Raises:
        InputError: the model lacks a row for one of its tokens (an added one may be without: Gemma 3 has such), or has
            more rows than padding explains.
    """
    rows, vocabulary = config["vocab_size"], tokenizer.vocabulary
    highest = max(number for token, number in vocabulary.ids.items() if token not in vocabulary.added)
    if highest >= rows or rows - vocabulary.size > PADDING:
        raise InputError(
            f"{model}: has {rows} rows of embeddings, and the tokenizer given as its own has ids up to "
            f"{vocabulary.size - 1}: it is another model's"
        )


def new_rows(config: Mapping[str, Any], old: Named, new: Named, *, multiple: int = 1) -> Rows:
    """Return what each row of the new vocabulary is made of, and what becomes of the config's token ids.

    Raises:
        InputError: the multiple is below 1.
    """
    same: dict[int, int] = {}
    for role, name in new.roles.items():
        before, now = old.role(role), new.role(role)
        if name not in old.vocabulary.ids and before is not None and now is not None:
            same.setdefault(now, before)
    found = old_pieces(old.vocabulary, new.vocabulary, same)
    pieces = [[number for number in row if number < config["vocab_size"]] for row in found]
    rows = rows_of(pieces, multiple=multiple)
    counts = [min(len(row), 2) for row in rows.pieces]
    about = {"tokenizer": new.sha256, "old_tokenizer": old.sha256, "init": "mean", "multiple": multiple}
    about |= {name: counts.count(number) for number, name in enumerate(("unknown", "kept", "means"))}
    return replace(rows, config=moved_ids(config, old, new), about=about)


def moved_ids(config: Mapping[str, Any], old: Named, new: Named) -> dict[str, Any]:
    """Return a config's token ids (`eos_token_id` and so on) for a new tokenizer, and its BOS and EOS.

    A role that another token plays now gets that token's id. Else a token keeps its name; one that is no more is None.
    """
    names = {number: token for token, number in old.vocabulary.ids.items()}

    def move(number: int) -> int | None:
        return new.vocabulary.ids.get(names.get(number, ""))

    found: dict[str, Any] = {}
    for key in dict.fromkeys([*config, "bos_token_id", "eos_token_id"]):
        role, ending, _ = key.partition("_token_id")
        if not ending:
            continue
        value = config.get(key)
        if role in new.roles and new.roles[role] != old.roles.get(role):
            found[key] = new.role(role)
        elif isinstance(value, list):
            found[key] = [number for number in map(move, value) if number is not None] or None
        elif isinstance(value, int):
            found[key] = move(value)
    return found
