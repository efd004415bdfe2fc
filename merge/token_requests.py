"""What a recipe says of the output's vocabulary: mergekit's `tokenizer_source`, or its `tokenizer:`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.errors import InputError, one_of

KINDS = ("model_token", "zero")
OF_MODEL = "model:"
"""What mergekit's documentation writes before a model's name."""


@dataclass(frozen=True, kw_only=True)
class TokenEntry:
    """Where a token's row comes from in models that lack the token, or in all."""

    zero: bool = False
    """A row of zeros."""
    model: str | None = None
    """The model whose row it is; None if neither zero nor a model's: the ordinary rule."""
    token: str | None = None
    """Another token of that model."""
    token_id: int | None = None
    """Or a row of it."""
    force: bool = False
    """In models that have the token, too."""


@dataclass(frozen=True, kw_only=True)
class VocabularyRequest:
    """A recipe's request."""

    source: str = "union"
    """`union`, `base` or the name of a model: what the output's tokenizer is."""
    tokens: Mapping[str, TokenEntry] = field(default_factory=dict)
    """Tokens that the output has in any case."""
    pad_to_multiple_of: int | None = None
    """Rows are filled up to a multiple of this many."""


def read_request(value: object) -> VocabularyRequest:
    """Read `tokenizer_source` (a name) or `tokenizer` (a mapping) of a recipe.

    Raises:
        InputError: a key or value that makes no sense; one line that says which, and what is allowed.
    """
    if isinstance(value, str):
        return VocabularyRequest(source=value.removeprefix(OF_MODEL))
    parts = _mapping("tokenizer", value, ("source", "tokens", "pad_to_multiple_of"))
    source, multiple = parts.get("source", "union"), parts.get("pad_to_multiple_of")
    if not isinstance(source, str):
        raise InputError(f"tokenizer: source is {source!r}: allowed are union, base and the name of a model")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise InputError(f"tokenizer: pad_to_multiple_of is {multiple!r}: allowed are whole numbers from 1 on")
    tokens = parts.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise InputError(
            f"tokenizer: tokens is {tokens!r}: a mapping of tokens to where their rows come from is needed"
        )
    return VocabularyRequest(
        source=source.removeprefix(OF_MODEL),
        tokens={_named(token): _entry(token, entry) for token, entry in tokens.items()},
        pad_to_multiple_of=multiple,
    )


def _named(token: object) -> str:
    if not isinstance(token, str) or not token:
        raise InputError(f"tokenizer: {token!r} is no token: a text is needed; put it in quotes")
    return token


def _mapping(what: str, value: object, allowed: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is {value!r}: a mapping is needed with {', '.join(allowed)}")
    for key in value:
        if key not in allowed:
            raise InputError(f"{what}: {one_of('key', key, allowed)}")
    return value


def _entry(token: str, value: object) -> TokenEntry:
    """Read one of `tokens`."""
    what = f"tokenizer: token {token!r}"
    parts = _mapping(what, {} if value is None else value, ("source", "force"))
    source, force = parts.get("source"), parts.get("force", False)
    if not isinstance(force, bool):
        raise InputError(f"{what}: force is {force!r}: allowed are true and false")
    if source is None:
        if force:
            raise InputError(f"{what}: force needs a source: a model, or a mapping with kind {' or '.join(KINDS)}")
        return TokenEntry()
    if isinstance(source, str):
        return TokenEntry(model=source, token=token, force=force)
    kind = source.get("kind") if isinstance(source, Mapping) else source
    if kind not in KINDS:
        raise InputError(f"{what}: {one_of('kind of source', kind, KINDS)}")
    if kind == "zero":
        _mapping(f"{what}: source", source, ("kind",))
        return TokenEntry(zero=True, force=force)
    parts = _mapping(f"{what}: source", source, ("kind", "model", "token", "token_id"))
    model, other, number = parts.get("model"), parts.get("token"), parts.get("token_id")
    if not isinstance(model, str):
        raise InputError(f"{what}: kind model_token needs a model: its name")
    if (other is None) == (number is None):
        raise InputError(f"{what}: kind model_token needs token or token_id, one of them")
    if number is not None and type(number) is not int:
        raise InputError(f"{what}: token_id is {number!r}: a whole number is needed")
    return TokenEntry(model=model, token=None if other is None else _named(other), token_id=number, force=force)
