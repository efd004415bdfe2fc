"""How a tokenizer's tokens spell text, and which tokens of another one a token is made of. Pure functions.

Two kinds are known: byte-level vocabularies, whose symbols stand for bytes (GPT-2, Llama 3, Qwen, SmolLM2), and
SentencePiece's, whose symbols are characters, a space being `▁`, with tokens <0x00> to <0xFF> for what has none
(Llama 2, Mistral, Gemma).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from parallel.errors import InputError

Kind = Literal["byte-level", "sentencepiece"]

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")

_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
SYMBOLS = {**{byte: chr(byte) for byte in _PRINTED}, **{byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}}
"""Byte -> the character that stands for it in a byte-level vocabulary (GPT-2's table)."""
_BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer.json, read."""

    kind: Kind
    data: Mapping[str, Any]
    """The file as `tokenizers` writes it today."""
    tokenizer: Tokenizer
    ids: Mapping[str, int]
    """Every token's id, added ones included."""
    added: Mapping[str, int]
    """The tokens that are looked for in text before all else."""
    special: frozenset[str]
    """Those of them that stand for no text."""

    @property
    def size(self) -> int:
        """Rows that an embedding needs: one more than the highest id."""
        return max(self.ids.values()) + 1


def read_vocabulary(text: str) -> Vocabulary:
    """Read a tokenizer.json.

    Raises:
        InputError: it is none, or neither byte-level nor SentencePiece's.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"not a tokenizer ({error})") from error
    data = json.loads(tokenizer.to_str())
    tokens = data["added_tokens"]
    return Vocabulary(
        kind=_kind(data),
        data=data,
        tokenizer=tokenizer,
        ids=tokenizer.get_vocab(with_added_tokens=True),
        added={token["content"]: token["id"] for token in tokens},
        special=frozenset(token["content"] for token in tokens if token["special"]),
    )


def _kind(data: Mapping[str, Any]) -> Kind:
    model = data["model"]["type"]
    steps = [*_steps(data["pre_tokenizer"]), *_steps(data["normalizer"])]
    kinds = sorted({step["type"] for step in steps})
    if model == "BPE" and "ByteLevel" in kinds:
        return "byte-level"
    spaced = "Metaspace" in kinds or any(step.get("content") == SPACE for step in steps)
    if model in ("BPE", "Unigram") and spaced:
        return "sentencepiece"
    raise InputError(
        f"{model} over {', '.join(kinds) or 'plain text'} is not supported: "
        "allowed are byte-level BPE and SentencePiece's tokenizers, as converted"
    )


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Return the steps of a part of a tokenizer, those of a sequence one by one."""
    if part is not None and part["type"] == "Sequence":
        for step in part.get("normalizers", part.get("pretokenizers", ())):
            yield from _steps(step)
    elif part is not None:
        yield part


def token_bytes(vocabulary: Vocabulary) -> dict[int, bytes]:
    """Return the bytes of text that each token stands for; special tokens stand for none and are left out."""
    found = {}
    for token, number in vocabulary.ids.items():
        if token not in vocabulary.special:
            plain = token in vocabulary.added and vocabulary.kind == "byte-level"
            found[number] = token.encode() if plain else _spelled(token, vocabulary.kind)
    return found


def _spelled(token: str, kind: Kind) -> bytes:
    if kind == "byte-level":
        return b"".join(bytes([_BYTES[char]]) if char in _BYTES else char.encode() for char in token)
    if found := BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace(SPACE, " ").encode()


def single_bytes(vocabulary: Vocabulary) -> frozenset[int]:
    """Return the tokens that are one byte of a longer character, or a byte that has no character's token."""
    spelled = token_bytes(vocabulary)
    if vocabulary.kind == "sentencepiece":
        return frozenset(number for token, number in vocabulary.ids.items() if BYTE.fullmatch(token))
    return frozenset(number for number, text in spelled.items() if len(text) == 1 and text[0] >= 0x80)


def cutter(vocabulary: Vocabulary) -> Callable[[bytes], list[int]]:
    """Return what cuts bytes into tokens, as merges alone do: whole characters where they are text, else bytes."""
    model, ids = vocabulary.tokenizer.model, vocabulary.ids
    unknown = ids.get(vocabulary.data["model"].get("unk_token") or "")

    def cut(spelled: bytes) -> list[int]:
        if vocabulary.kind == "byte-level":
            symbols = "".join(SYMBOLS[byte] for byte in spelled)
        else:
            try:
                symbols = spelled.decode().replace(" ", SPACE)
            except UnicodeDecodeError:
                return [ids[token] for token in map("<0x{:02X}>".format, spelled) if token in ids]
        return [token.id for token in model.tokenize(symbols) if token.id != unknown] if symbols else []

    return cut


def old_pieces(old: Vocabulary, new: Vocabulary, same: Mapping[int, int]) -> list[list[int]]:
    """Return, for each id of a new vocabulary, the old tokens that it is made of.

    One, if the old vocabulary has the token: by its name where both are of one kind, or added to both, else by its
    bytes. Else the pieces into which the old one's merges cut its bytes, or a special token's name. None where there
    are none: an id without a token, or text that the old vocabulary cannot spell.

    Args:
        same: new id -> old id of tokens that play the same part under other names, such as BOS.
    """
    # Of two tokens for the same bytes, the character's and not the byte's.
    by_bytes = {text: number for number, text in sorted(token_bytes(old).items(), reverse=True)}
    for token, number in old.ids.items():
        if old.kind == "sentencepiece" and not BYTE.fullmatch(token) and token not in old.special:
            by_bytes[_spelled(token, old.kind)] = number
    spelled, cut = token_bytes(new), cutter(old)
    pieces: list[list[int]] = [[] for _ in range(new.size)]
    for token, number in new.ids.items():
        named = old.ids.get(token) if old.kind == new.kind or (token in old.added and token in new.added) else None
        text = spelled.get(number, token.encode())
        if number in same:
            pieces[number] = [same[number]]
        elif named is not None:
            pieces[number] = [named]
        else:
            pieces[number] = [by_bytes[text]] if text in by_bytes else cut(text)
    return pieces
