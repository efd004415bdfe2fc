"""The vocabulary of a merge: the output's tokenizer, and the row that each model has for each of its tokens.

T token ids of the output, N models. A token is the same in two models if it is written the same; what it means does not
count. Semantics are those of mergekit 0.1.5's `tokenizer_source` and `tokenizer:`. Where this differs, and why:

- A union's new tokens come model after model in the order of their ids; there, in a hash table's order, another in each
  process. All are added at once; there one by one, in quadratic time.
- Files are the donor's, byte for byte, unless its tokens change; there they are written anew by transformers.
- Added tokens that a model has no row for count as tokens that it lacks; there that is so for the base alone, and for
  others ends in a KeyError. Other tokens without a row are refused, as the tokenizer is another model's; there a BPE
  base is cut to its rows.
- A model without a tokenizer is refused; there it is taken to have the base's.
- An id without a token (a gap in a tokenizer's ids) has a row like those of padding; there it is an IndexError.
- Tokens that tokenizer_config.json names and tokenizer.json lacks are not there; transformers, and so mergekit, adds
  them behind the others when it loads a tokenizer.
- Every explicit entry is checked, used or not. One without a source follows the ordinary rule; there it is an error.

As there, rows behind a tokenizer's last token are dropped, and those of `pad_to_multiple_of` are new. As there, tokens
that a union adds are looked for in text before the base's merges: right for special ones, a makeshift for words.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import AddedToken, Tokenizer

from merge.token_requests import TokenEntry, VocabularyRequest
from merge.tokenizer_files import ModelTokenizer
from parallel.errors import InputError, one_of


@dataclass(frozen=True, kw_only=True)
class Given:
    """An explicit entry, resolved."""

    row: tuple[str, int] | None
    """Model and row; None is a row of zeros."""
    force: bool


@dataclass(frozen=True, kw_only=True)
class MergedVocabulary:
    """The output's tokenizer, and what each model has of it."""

    files: Mapping[str, bytes]
    """The tokenizer's files by name."""
    tokens: Mapping[str, int]
    size: int
    """Rows: T, and padding."""
    ids: Mapping[str, np.ndarray]
    """For each model [T] int64: output's token id -> its own; -1 if it lacks the token or there is none."""
    base: str | None
    given: Mapping[int, Given]
    roles: Mapping[str, str]
    """One of ROLES -> its token, in the output's tokenizer."""
    model_roles: Mapping[str, Mapping[str, str]]
    """The same in each model's."""

    @cached_property
    def named(self) -> np.ndarray:
        """[T] bool: whether the id has a token."""
        named = np.zeros(max(self.tokens.values()) + 1, dtype=bool)
        named[list(self.tokens.values())] = True
        return named

    @cached_property
    def donors(self) -> Mapping[str, np.ndarray]:
        """For each model [T]: its row's part in the row of models that lack the token; -1 where it has none.

        What is given; else the base's row alone if the base has the token; else all models' that have it.
        """
        donors = {name: ids.copy() for name, ids in self.ids.items()}
        for name, rows in donors.items():
            if self.base is not None and name != self.base:
                rows[self.ids[self.base] >= 0] = -1
            for number, given in self.given.items():
                rows[number] = given.row[1] if given.row is not None and given.row[0] == name else -1
        return donors


def merged_vocabulary(
    models: Sequence[ModelTokenizer], request: VocabularyRequest, *, base: str | None = None
) -> MergedVocabulary:
    """Return the vocabulary that a recipe asks for.

    Args:
        models: the tokenizers of all models that are merged, the base's among them.
        request: what the recipe says.
        base: the recipe's base model. Without one, the first model's tokenizer is what a union starts from, but its
            rows do not come before others'.

    Raises:
        InputError: the base or what the request names does not exist, no model has a token, or a tokenizer cannot
            take more tokens. One line that says which.
    """
    by_name = {model.name: model for model in models}
    if base is not None and base not in by_name:
        raise InputError(one_of("base", base, by_name))
    first = by_name[models[0].name if base is None else base]
    if request.source not in ("union", "base", *by_name):
        raise InputError(one_of("source of the tokenizer", request.source, ("union", "base", *by_name)))
    donor = by_name.get(request.source, first) if request.source not in ("union", "base") else first
    tokens, data = _extended(donor, _union(first, models) if request.source == "union" else [], request.tokens)
    values = np.fromiter(tokens.values(), dtype=np.int64, count=len(tokens))
    ids = {}
    for model in models:
        ids[model.name] = np.full(values.max() + 1, -1, dtype=np.int64)
        ids[model.name][values] = [model.ids.get(token, -1) for token in tokens]
    given = {tokens[token]: _given(token, entry, by_name) for token, entry in request.tokens.items()}
    multiple = request.pad_to_multiple_of or 1
    return MergedVocabulary(
        files={**donor.files, "tokenizer.json": data},
        tokens=tokens,
        size=-(-len(ids[first.name]) // multiple) * multiple,
        ids=ids,
        base=base,
        given={number: entry for number, entry in given.items() if entry is not None},
        roles=donor.roles,
        model_roles={model.name: model.roles for model in models},
    )


def _union(first: ModelTokenizer, models: Sequence[ModelTokenizer]) -> list[str | AddedToken]:
    """Return what a union adds to the first tokenizer: words, and then the tokens that any model has as added ones.

    Of an added token the first model's settings hold; one that is a word of the first tokenizer becomes an added one.
    """
    ordered = [first, *(model for model in models if model is not first)]
    added: dict[str, AddedToken] = {}
    words: dict[str, None] = {}
    for model in ordered:
        words |= dict.fromkeys(model.ids)
        added |= {text: token for text, token in model.added.items() if text not in added}
    plain = [word for word in words if word not in first.ids and word not in added]
    return [*plain, *(token for text, token in added.items() if text not in first.added)]


def _extended(
    donor: ModelTokenizer, union: Sequence[str | AddedToken], more: Iterable[str]
) -> tuple[dict[str, int], bytes]:
    """Return the ids of a tokenizer with more tokens, in their order, and its tokenizer.json."""
    there = {*donor.ids, *(token if isinstance(token, str) else token.content for token in union)}
    wanted = [*union, *(token for token in more if token not in there)]
    if not wanted:
        return dict(donor.ids), donor.files["tokenizer.json"]
    tokenizer = Tokenizer.from_str(donor.files["tokenizer.json"].decode())
    tokenizer.add_tokens(wanted)
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if len({number for _, number in ids}) < len(ids):
        raise InputError(f"{donor.name}: its tokenizer's ids have gaps, so that no tokens can be added to it")
    return dict(ids), tokenizer.to_str(pretty=True).encode()


def _given(token: str, entry: TokenEntry, models: Mapping[str, ModelTokenizer]) -> Given | None:
    """Find the row that an entry names; None if it leaves that to the ordinary rule."""
    what = f"tokenizer: token {token!r}"
    if entry.zero:
        return Given(row=None, force=entry.force)
    if entry.model is None:
        if not any(token in model.ids for model in models.values()):
            raise InputError(f"{what} is in no model's tokenizer: give it a source")
        return None
    if entry.model not in models:
        raise InputError(f"{what}: {one_of('model', entry.model, models)}")
    model = models[entry.model]
    row = entry.token_id if entry.token is None else model.ids.get(entry.token)
    if row is None:
        raise InputError(f"{what}: {entry.model} has no token {entry.token!r}; give another source")
    if not 0 <= row < model.rows:
        raise InputError(f"{what}: token_id is {row}, but {entry.model} has rows 0 to {model.rows - 1}")
    return Given(row=(entry.model, row), force=entry.force)
