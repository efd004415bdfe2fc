"""The tokenizers of models that are merged, as they lie in the models' folders; read without transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from checkpoint.files import read_json
from parallel.errors import InputError

SETTINGS = ("special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja")
"""Files beside tokenizer.json that hold for a tokenizer with more tokens, too. Of the first two, the second wins."""
ROLES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """A model's tokenizer, as far as the model has rows for its tokens."""

    name: str
    """The model, as the recipe names it."""
    rows: int
    """Rows of its embedding."""
    tokenizer: Tokenizer
    files: Mapping[str, bytes]
    roles: Mapping[str, str]
    """One of ROLES -> its token, if the tokenizer has it."""

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Every token's id, added ones included, in the order of the ids."""
        return dict(sorted(self.tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))

    @cached_property
    def added(self) -> Mapping[str, AddedToken]:
        """The tokens that are looked for in text before all else, in the order of their ids."""
        found = self.tokenizer.get_added_tokens_decoder()
        return {found[number].content: found[number] for number in sorted(found)}


def read_tokenizer(name: str, folder: Path, rows: int) -> ModelTokenizer:
    """Read the tokenizer of a model with so many rows of embeddings; added tokens without a row are left out.

    Raises:
        InputError: there is no tokenizer.json, it is none, or one of its own tokens has no row in the model.
    """
    path = folder / "tokenizer.json"
    try:
        data = path.read_bytes()
        tokenizer = Tokenizer.from_str(data.decode())
    except OSError:
        raise InputError(f"{folder}: holds no tokenizer.json (a fast Hugging Face tokenizer is needed)") from None
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    files = {key: (folder / key).read_bytes() for key in SETTINGS if (folder / key).is_file()}
    settings = {key: read_json(folder / key) for key in SETTINGS[:2] if key in files}
    found = tokenizer.get_added_tokens_decoder()
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number >= rows and number not in found:
            raise InputError(
                f"{path}: has a token {token!r} with id {number}, but {name} has {rows} rows of embeddings: "
                "it is another model's tokenizer"
            )
    dropped = {token.content for number, token in found.items() if number >= rows}
    if dropped:
        tokenizer = _shortened(tokenizer, dropped, rows)
        data = tokenizer.to_str(pretty=True).encode()
        settings = {key: _without(value, dropped) for key, value in settings.items()}
        files |= {key: (json.dumps(value, indent=2) + "\n").encode() for key, value in settings.items()}
    stated = {key: value for part in settings.values() for key, value in part.items()}
    names = {role: _content(stated.get(f"{role}_token")) for role in ROLES}
    return ModelTokenizer(
        name=name,
        rows=rows,
        tokenizer=tokenizer,
        files={**files, "tokenizer.json": data},
        roles={role: token for role, token in names.items() if token and tokenizer.token_to_id(token) is not None},
    )


def _shortened(tokenizer: Tokenizer, dropped: set[str], rows: int) -> Tokenizer:
    """Return a tokenizer without its last added tokens, which its own words and merges may hold, too."""
    plain = json.loads(tokenizer.to_str())
    model = plain["model"]
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] not in dropped]
    words = model["vocab"]  # of a unigram model, a list
    model["vocab"] = words[:rows] if isinstance(words, list) else {word: n for word, n in words.items() if n < rows}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not dropped & {*pair, "".join(pair)}]
    return Tokenizer.from_str(json.dumps(plain))


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _without(value: Any, dropped: set[str]) -> Any:
    """Return settings that name no dropped token: transformers would add it again."""

    def names(part: Any) -> bool:
        return isinstance(content := _content(part), str) and content in dropped

    if isinstance(value, dict):
        return {key: _without(part, dropped) for key, part in value.items() if not names(part)}
    return [_without(part, dropped) for part in value if not names(part)] if isinstance(value, list) else value
