"""Acceptability pairs from held-out text of any language that writes spaces, how a model scores them, how often right.

`swap` exchanges two neighbouring words (the method of ScaLA, arXiv 2304.00906); `drop` leaves one out.
"""

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

import numpy as np

from eval.score import Request, token_logprobs, total
from eval.text import Document, Tokenizer, prefix_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORDS = range(5, 31)
"""Words that a sentence may have."""
_CLOSING = """.!?…؟۔。"'”’»)]"""
_INSIDE_WORDS = "'’-\u200c\u200d"
"""Apostrophes, the hyphen, and the joiners of Arabic and Indic scripts."""
_SENTENCE_END = re.compile(r"""\n+|(?<=[.!?…؟۔。])\s+|(?<=[.!?…؟۔。]["'”’»)\]])\s+""")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A sentence as it was written, and corrupted."""

    good: str
    bad: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """Summed log-probabilities (nats) of a pair's sentences and their lengths (tokens)."""

    good_sum: float
    bad_sum: float
    good_tokens: int
    bad_tokens: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of pairs in which the good sentence wins, with its Wilson interval."""

    value: float
    low: float
    high: float
    correct: int
    ties: int
    """Pairs with equal scores; they count as wrong."""
    count: int


def is_word(token: str) -> bool:
    """Whether a blank-separated token is a word alone, so that moving it moves no punctuation, digits or markup."""
    kinds = {unicodedata.category(char)[0] for char in token if char not in _INSIDE_WORDS}
    return "L" in kinds and kinds <= {"L", "M"}


def swaps(words: Sequence[str]) -> list[list[str]]:
    """Return every swap of two different neighbouring words; the first, which may carry the capital, stays."""
    return [
        [*words[:at], words[at + 1], words[at], *words[at + 2 :]]
        for at in range(1, len(words) - 1)
        if is_word(words[at]) and is_word(words[at + 1]) and words[at].casefold() != words[at + 1].casefold()
    ]


def drops(words: Sequence[str]) -> list[list[str]]:
    """Return every way to leave out one word, but the first and the last."""
    return [[*words[:at], *words[at + 1 :]] for at in range(1, len(words) - 1) if is_word(words[at])]


KINDS: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {"swap": swaps, "drop": drops}
SHORTENED = frozenset({"drop"})
"""Kinds that leave a sentence shorter, which a sum of log-probabilities rewards."""


def sentences(text: str) -> list[str]:
    """Cut text at line ends and behind sentence punctuation; keep those of 5 to 30 words, blanks made single."""
    pieces = (piece.split() for piece in _SENTENCE_END.split(text))
    return [" ".join(words) for words in pieces if len(words) in WORDS]


def make_pairs(documents: Sequence[Document], *, count: int, seed: int, corpus: Iterable[str]) -> list[Pair]:
    """Return up to `count` pairs of each kind, one a sentence and kind; fewer where the text gives no more.

    A pair is kept only if the whole corrupted sentence is a substring of no text of `corpus` (the training text) and of
    no document; letter case, the amount of white space and closing punctuation are ignored. Which sentences and which
    words is decided by hashes of seed, kind and sentence: the order of the documents does not matter.
    """
    everything = "\n".join(_plain(text) for text in [*corpus, *(document.text for document in documents)])
    distinct = {_plain(sentence): sentence for document in documents for sentence in sentences(document.text)}
    pairs = []
    for kind, corrupt in KINDS.items():
        keyed = sorted((_draw(seed, kind, sentence), sentence) for sentence in distinct.values())
        kept = 0
        for number, sentence in keyed:
            if kept == count:
                break
            choices = corrupt(sentence.split())
            if not choices:
                continue
            bad = " ".join(choices[number % len(choices)])
            if _plain(bad).rstrip(_CLOSING) not in everything:
                pairs.append(Pair(good=sentence, bad=bad, kind=kind))
                kept += 1
    return pairs


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _draw(seed: int, kind: str, sentence: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{kind}/{sentence}".encode(), digest_size=16).digest())


def pair_requests(pairs: Sequence[Pair], tokenizer: Tokenizer, first: int = 0) -> list[Request]:
    """Return two requests a pair, the good sentence first, each behind BOS (else EOS), so that all its tokens count.

    Args:
        first: the number by which messages call the first of them.
    """
    prefix = prefix_token(tokenizer)
    return [
        Request(name=f"{pair.kind} pair {index} ({side})", tokens=[prefix, *tokenizer.encode(text)])
        for index, pair in enumerate(pairs, start=first)
        for side, text in (("good", pair.good), ("bad", pair.bad))
    ]


def score_pairs(
    model: "PreTrainedModel", pairs: Sequence[Pair], tokenizer: Tokenizer, *, batch_tokens: int
) -> list[PairScore]:
    """Score each sentence of each pair by itself: sum of ln p of all its tokens, given BOS (else EOS).

    Raises:
        InputError: see `token_logprobs`; a score that is not a number is an error, never a wrong answer.
    """
    return pair_scores(pairs, token_logprobs(model, pair_requests(pairs, tokenizer), batch_tokens=batch_tokens))


def pair_scores(pairs: Sequence[Pair], logprobs: Sequence[np.ndarray]) -> list[PairScore]:
    """Combine the log-probabilities (nats) of the sentences that `pair_requests` listed."""
    return [
        PairScore(good_sum=total(good), bad_sum=total(bad), good_tokens=len(good), bad_tokens=len(bad), kind=pair.kind)
        for pair, good, bad in zip(pairs, logprobs[::2], logprobs[1::2], strict=True)
    ]


def accuracy(scores: Sequence[PairScore], *, per_token: bool, confidence: float = 0.95) -> Accuracy:
    """Return how often good > bad, strictly, by sums of log-probabilities or, `per_token`, by their means.

    A swap keeps the sentence's length, so sums are fair; a drop shortens it, so only means are. A model without word
    order (a unigram) ties on every swap whose tokens stay the same, as they do where a token never spans a blank.
    """
    margins = [
        score.good_sum / score.good_tokens - score.bad_sum / score.bad_tokens
        if per_token
        else score.good_sum - score.bad_sum
        for score in scores
    ]
    correct = sum(margin > 0 for margin in margins)
    ties = sum(margin == 0 for margin in margins)
    low, high = wilson(correct, len(scores), confidence=confidence)
    return Accuracy(value=correct / len(scores), low=low, high=high, correct=correct, ties=ties, count=len(scores))


def wilson(successes: int, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (Wilson 1927): honest near 0 and 1, and never outside them."""
    assert 0 <= successes <= count > 0, (successes, count)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def macro(parts: Sequence[Accuracy]) -> tuple[float, float, float]:
    """Return the mean of accuracies that each count alike, and its interval: (value, low, high).

    The interval is made of those of the parts, which are taken as independent: the method of variance estimates
    recovery (Zou and Donner 2008, Statistics in Medicine 27, equations 3 and 4).
    """
    value = fmean(part.value for part in parts)
    below = math.fsum((part.value - part.low) ** 2 for part in parts) ** 0.5 / len(parts)
    above = math.fsum((part.high - part.value) ** 2 for part in parts) ** 0.5 / len(parts)
    return value, value - below, value + above
