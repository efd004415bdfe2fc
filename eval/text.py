"""What evaluation needs to know of documents and tokenizers: two protocols."""

from collections.abc import Sequence
from typing import Protocol

from parallel.errors import InputError


class Document(Protocol):
    """A piece of text with a name; what the bootstrap resamples."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...


class Tokenizer(Protocol):
    """A reversible tokenizer; `encode` adds no special tokens."""

    @property
    def bos(self) -> int | None: ...

    @property
    def eos(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


def prefix_token(tokenizer: Tokenizer) -> int:
    """Return the token that every scored text is conditioned on: BOS, else EOS, so that its first token counts too.

    Raises:
        InputError: the tokenizer has neither.
    """
    token = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    if token is None:
        raise InputError("the tokenizer has neither a BOS nor an EOS token: the first token of a text cannot be scored")
    return token
