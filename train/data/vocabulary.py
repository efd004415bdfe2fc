"""Continued BPE: new tokens for a tokenizer, learned from text on top of its merges. Pure functions on a vocabulary."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from parallel.errors import InputError
from train.data.pairs import Words, learn, pair_key
from train.data.spelling import BYTE, SPACE, Vocabulary

COVERAGE = 0.9995
"""Share of a text's characters that SentencePiece's vocabularies have a token for after `extend`, the rarest left to
bytes; its own default."""
LONGEST = 16
"""Characters of a new token of SentencePiece's at most; its own default."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A tokenizer with new tokens, and what became of the text that it learned from."""

    data: Mapping[str, Any]
    """The new tokenizer.json."""
    tokens: tuple[str, ...]
    """The new tokens, in the order of their ids."""
    merges: int
    """New merges: one for each token but single characters, more where merges give an old token."""
    before: int
    """Tokens of the text before."""
    after: int
    """Tokens of it after."""


def count_words(vocabulary: Vocabulary, texts: Iterable[str]) -> Counter[str]:
    """Count the words that merges work in: what the tokenizer's own normaliser and pre-tokenizer make of texts.

    Most of SentencePiece's see a whole text as one word. As in its own training, a new token shall be made of letters,
    of digits or of other characters alone, with a space before it at most; of one digit, if the vocabulary has no token
    of more.
    """
    tokenizer = vocabulary.tokenizer
    steps = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer is not None else []
    if vocabulary.kind == "sentencepiece":
        numbers = any(re.fullmatch(rf"{SPACE}?\d\d+", token) for token in vocabulary.ids)
        number = rf"{SPACE}?\p{{N}}+" if numbers else r"\p{N}"
        parts = rf"{SPACE}?[\p{{L}}\p{{M}}]+|{number}|{SPACE}?[^{SPACE}\s\p{{L}}\p{{M}}\p{{N}}]+|\s"
        steps.append(pre_tokenizers.Split(Regex(parts), "isolated"))
    cut = pre_tokenizers.Sequence(steps)
    counts: Counter[str] = Counter()
    for text in texts:
        clean = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
        counts.update(word for word, _ in cut.pre_tokenize_str(clean))
    return counts


def extend(vocabulary: Vocabulary, words: Mapping[str, int], add: int, *, min_count: int = 2) -> Extension:
    """Learn `add` new tokens from a text's words, starting from the merges that there are.

    Old tokens keep their ids, merges and ranks; new ids follow the highest one, new merges the last one: text in which
    no new merge applies is encoded as before. First come characters without a token: in byte-level vocabularies all,
    in SentencePiece's the most frequent ones up to `COVERAGE`. Then the rule of `pairs.learn`: in a byte-level
    vocabulary, what training from scratch would have gone on with.

    Args:
        words: what `count_words` gives.
        min_count: a pair that occurs less often makes no token.

    Raises:
        InputError: not a BPE, nothing to add, or fewer than `add` tokens to be found in the text.
    """
    data, model = vocabulary.data, vocabulary.data["model"]
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise InputError(f"{model['type']} cannot be extended: allowed is BPE without marks of a word's inside or end")
    if add < 1:
        raise InputError(f"{add} tokens to add: allowed are whole numbers from 1 on")
    pieces = vocabulary.kind == "sentencepiece"
    new = _Growing(vocabulary, room=add, longest=LONGEST if pieces else None)
    for char in _missing(words, vocabulary.ids, COVERAGE if pieces else 1.0)[:add]:
        new.number(char)
    characters = len(new.tokens)
    merges = {
        pair_key(new.ids[left], new.ids[right]): (rank, new.ids[left + right])
        for rank, (left, right) in enumerate(model["merges"])
    }
    found = segment(_with(data, vocab=new.ids), words)
    before = segment(data, words) if characters else found
    closed = new.closed(model["unk_token"]) if pieces else frozenset()
    runs = [(word, run) for word, symbols in found.items() for run in _runs(symbols, closed) if len(run) > 1]
    # Symbols of which none can merge count as they are.
    alone = _total(found, words) - sum(words[word] * len(run) for word, run in runs)
    segments = Words([run for _, run in runs], [words[word] for word, _ in runs])
    learned = learn(segments, merges, new.token_of, min_count=min_count)
    if not new.tokens:
        raise InputError("nothing to add: no pair of tokens occurs twice within a word of this text")
    if len(new.tokens) < add:
        raise InputError(f"{add} tokens to add are too many for this text: it gives {len(new.tokens)}")
    pairs = [[new.names[left], new.names[right]] for left, right, _ in learned]
    made = _with(data, vocab=new.ids, merges=[*model["merges"], *pairs])
    ids = Tokenizer.from_str(json.dumps(made)).get_vocab(with_added_tokens=True)
    assert ids == new.ids, "tokenizers numbers tokens otherwise than the file that it is given"
    return Extension(
        data=made,
        tokens=tuple(new.tokens),
        merges=len(pairs),
        before=_total(before, words),
        after=alone + segments.tokens(),
    )


class _Growing:
    """A vocabulary that tokens are added to."""

    def __init__(self, vocabulary: Vocabulary, *, room: int, longest: int | None) -> None:
        # Added tokens, too: those outside of the model's vocabulary would be numbered anew, behind it, on reading.
        self.ids = dict(sorted(vocabulary.ids.items(), key=lambda item: item[1]))
        self.names = {number: token for token, number in self.ids.items()}
        self.tokens: list[str] = []
        self._taken = vocabulary.added
        self._next = vocabulary.size
        self._room = room
        self._longest = longest

    def number(self, token: str) -> int:
        """Return a token's id, a new one if need be."""
        if token not in self.ids:
            self.ids[token] = self._next + len(self.tokens)
            self.names[self.ids[token]] = token
            self.tokens.append(token)
        return self.ids[token]

    def token_of(self, left: int, right: int) -> int | None:
        """Return what a pair becomes (see `learn`); no more once there is no room for a new token."""
        if len(self.tokens) == self._room:
            raise StopIteration
        token = self.names[left] + self.names[right]
        if token in self._taken or (self._longest is not None and len(token) > self._longest):
            return None
        return self.number(token)

    def closed(self, unknown: str | None) -> frozenset[int]:
        """Return the tokens that no merge may join: bytes, which would no longer be read as such, and added ones."""
        return frozenset(
            number
            for token, number in self.ids.items()
            if BYTE.fullmatch(token) or token in self._taken or token == unknown
        )


def segment(data: Mapping[str, Any], words: Iterable[str]) -> dict[str, list[int]]:
    """Return the ids into which a tokenizer.json's merges cut each word."""
    model = Tokenizer.from_str(json.dumps(data)).model
    return {word: [token.id for token in model.tokenize(word)] for word in words}


def _with(data: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**data, "model": {**data["model"], **changes}}


def _total(found: Mapping[str, Sequence[int]], words: Mapping[str, int]) -> int:
    return sum(words[word] * len(symbols) for word, symbols in found.items())


def _runs(symbols: Sequence[int], closed: frozenset[int]) -> list[list[int]]:
    """Cut a word at the tokens that cannot be merged."""
    runs: list[list[int]] = [[]]
    for symbol in symbols:
        if symbol in closed:
            runs.append([])
        else:
            runs[-1].append(symbol)
    return runs


def _missing(words: Mapping[str, int], ids: Mapping[str, int], coverage: float) -> list[str]:
    """Return the characters without a token that a share of the text needs, the most frequent first."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    total, covered, missing = counts.total(), 0, []
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= coverage * total:
            break
        covered += count
        if char not in ids:
            missing.append(char)
    return missing
