"""What a model can be asked: held-out documents, or minimal pairs. A task knows its sequences, rows and numbers.

A row is what is kept of an item, plain JSON: of a document [id, bits, bytes, tokens, words], of a pair [good_sum,
bad_sum, good_tokens, bad_tokens, kind]. Every number of a report is made of rows: nothing is scored again for another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from eval.bits_per_byte import document_requests, document_score
from eval.bootstrap import ratio_interval
from eval.pairs import Accuracy, Pair, PairScore, accuracy, macro, pair_requests, pair_scores
from eval.score import Request
from eval.text import Document, Tokenizer

Rows = Sequence[Sequence[Any]]


class Task(Protocol):
    """Items to score, one after the other or many at once."""

    def __len__(self) -> int: ...

    def requests(self, item: int, tokenizer: Tokenizer) -> list[Request]:
        """Return the sequences of an item."""

    def row(self, item: int, logprobs: Sequence[np.ndarray]) -> list[Any]:
        """Return what is kept of an item, given the log-probabilities (nats) of its sequences."""

    def summary(self, rows: Rows, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
        """Return the numbers that the rows of all items come to, with their intervals."""


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Bits per byte of documents, by a sliding window (see `eval.bits_per_byte.score_documents`)."""

    documents: Sequence[Document]
    window: int
    """Tokens."""
    stride: int

    def __len__(self) -> int:
        return len(self.documents)

    def requests(self, item: int, tokenizer: Tokenizer) -> list[Request]:
        return document_requests(self.documents[item], tokenizer, window=self.window, stride=self.stride)

    def row(self, item: int, logprobs: Sequence[np.ndarray]) -> list[Any]:
        document = self.documents[item]
        score = document_score(document, logprobs)
        return [score.id, score.bits, score.bytes, score.tokens, len(document.text.split())]

    def summary(self, rows: Rows, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
        return summarise_documents(rows, resamples=resamples, confidence=confidence, seed=seed)


@dataclass(frozen=True, kw_only=True)
class PairsTask:
    """How often a model finds the good sentence of a pair likelier."""

    pairs: Sequence[Pair]
    shortened: frozenset[str] = frozenset()
    """Kinds whose bad sentence lacks a word, which a sum rewards: they are counted by the mean of a token alone."""

    def __len__(self) -> int:
        return len(self.pairs)

    def requests(self, item: int, tokenizer: Tokenizer) -> list[Request]:
        return pair_requests(self.pairs[item : item + 1], tokenizer, first=item)

    def row(self, item: int, logprobs: Sequence[np.ndarray]) -> list[Any]:
        (score,) = pair_scores(self.pairs[item : item + 1], logprobs)
        return [score.good_sum, score.bad_sum, score.good_tokens, score.bad_tokens, score.kind]

    def summary(self, rows: Rows, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
        return summarise_pairs(rows, shortened=self.shortened, confidence=confidence)


def summarise_documents(rows: Rows, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """Return what rows of documents come to.

    {"bits_per_byte": {value, low, high}, "token_perplexity", "documents", "bytes", "tokens", "bytes_per_token"}, and
    where rows count words "words" and "tokens_per_word"; low and high are None for a single document, of which nothing
    can be resampled.
    """
    _, bits, size, tokens, *words = zip(*rows, strict=True)
    total = sum(size)
    if len(rows) > 1:
        found = asdict(ratio_interval(bits, size, resamples=resamples, confidence=confidence, seed=seed))
    else:
        found = {"value": bits[0] / total, "low": None, "high": None}
    about = {
        "bits_per_byte": found,
        "documents": len(rows),
        "bytes": total,
        "tokens": sum(tokens),
        "bytes_per_token": total / sum(tokens),
    }
    if words:
        count = sum(words[0])
        about |= {
            "token_perplexity": 2 ** (sum(bits) / sum(tokens)),
            "words": count,
            "tokens_per_word": sum(tokens) / count if count else None,
        }
    return about


def summarise_pairs(rows: Rows, *, shortened: frozenset[str], confidence: float) -> dict[str, Any]:
    """Return how often the good sentence wins.

    {"pairs", "sum": accuracies, "per_token": accuracies}, each {"micro": {value, low, high, correct, ties, count},
    "macro": {value, low, high}, "phenomena": {kind: as micro}}: the micro average is over pairs, the macro over
    phenomena. Kinds of `shortened` have no entry under "sum", and that is left out where there are no others.
    """
    by_kind: dict[str, list[PairScore]] = {}
    for good, bad, good_tokens, bad_tokens, kind in rows:
        score = PairScore(good_sum=good, bad_sum=bad, good_tokens=good_tokens, bad_tokens=bad_tokens, kind=kind)
        by_kind.setdefault(kind, []).append(score)
    found: dict[str, Any] = {"pairs": len(rows)}
    for name, per_token in (("sum", False), ("per_token", True)):
        counted = {kind: part for kind, part in by_kind.items() if per_token or kind not in shortened}
        if counted:
            found[name] = _accuracies(counted, per_token=per_token, confidence=confidence)
    return found


def _accuracies(by_kind: Mapping[str, Sequence[PairScore]], **how: Any) -> dict[str, Any]:
    parts: dict[str, Accuracy] = {kind: accuracy(scores, **how) for kind, scores in sorted(by_kind.items())}
    everything = accuracy([score for scores in by_kind.values() for score in scores], **how)
    value, low, high = macro([*parts.values()])
    return {
        "micro": asdict(everything),
        "macro": {"value": value, "low": low, "high": high},
        "phenomena": {kind: asdict(part) for kind, part in parts.items()},
    }
