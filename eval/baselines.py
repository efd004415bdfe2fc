"""Yardsticks that know the text alone: a token unigram, a token 5-gram, and xz primed with the training text."""

import lzma
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.bits_per_byte import DocumentScore, document_score
from eval.text import Document, Tokenizer
from parallel.errors import InputError

Tokens = Sequence[int] | np.ndarray
LogProbs = Callable[[Tokens], np.ndarray]
"""Tokens of a document -> ln p (nats) of each."""


def unigram(training: Iterable[Tokens], *, vocab: int) -> LogProbs:
    """Fit p(w) = (count(w) + 1) / (N + V): add-one smoothing over the whole vocabulary."""
    counts = np.ones(vocab)
    for tokens in training:
        counts += np.bincount(np.asarray(tokens, dtype=np.int64), minlength=vocab)
    table = np.log(counts) - math.log(counts.sum())
    return lambda tokens: table[np.asarray(tokens, dtype=np.int64)]


@dataclass(frozen=True, kw_only=True)
class Level:
    """All k-grams of one length k, by id: their rank among `keys`. A context is the id of a (k-1)-gram."""

    keys: np.ndarray
    """context * (V + 1) + token, ascending."""
    counts: np.ndarray
    """How often (longest k), or behind how many different tokens (shorter), each k-gram occurs."""
    discounts: np.ndarray
    """What is taken off counts 0, 1, 2 and 3 or more."""
    totals: np.ndarray
    """Sum of counts by context."""
    freed: np.ndarray
    """Sum of discounts by context: the mass that the next shorter context hands out."""


def ngram5(training: Iterable[Tokens], *, vocab: int) -> LogProbs:
    """Fit an interpolated modified Kneser-Ney 5-gram model, whose shortest context falls back to 1 / V."""
    return kneser_ney(training, vocab=vocab, order=5)


def kneser_ney(training: Iterable[Tokens], *, vocab: int, order: int) -> LogProbs:
    """Fit interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3): sums to 1 over the vocabulary.

    Each document stands behind order - 1 padding tokens, so that its first tokens have a full context and no k-gram
    crosses from one document to the next.

    Raises:
        InputError: there is not a single training token.
    """
    stream = _padded(training, vocab, order)
    if (stream == vocab).all():
        raise InputError("no training text: an n-gram model cannot be fitted")
    levels = _levels(stream, vocab, order)

    def logprobs(tokens: Tokens) -> np.ndarray:
        return _logprobs(levels, _padded([tokens], vocab, order), vocab)

    return logprobs


def _padded(documents: Iterable[Tokens], vocab: int, order: int) -> np.ndarray:
    """Join documents into one stream, order - 1 times the token V before each."""
    pad = np.full(order - 1, vocab, dtype=np.int64)
    parts = [part for tokens in documents for part in (pad, np.asarray(tokens, dtype=np.int64))]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _levels(stream: np.ndarray, vocab: int, order: int) -> list[Level]:
    """Count the k-grams of a stream for k = 1 .. order. A k-gram is an event if its last token is no padding."""
    ids = [np.zeros(len(stream), dtype=np.int64)]  # by k: id of the k-gram that starts at each position
    keys, firsts = [np.zeros(1, dtype=np.int64)], []
    for k in range(1, order + 1):
        grams = ids[-1][: len(stream) - k + 1] * (vocab + 1) + stream[k - 1 :]
        unique, first, inverse = np.unique(grams, return_index=True, return_inverse=True)
        ids.append(inverse)
        keys.append(unique)
        firsts.append(first)
    levels = []
    for k in range(1, order + 1):
        if k == order:
            events = ids[k][stream[k - 1 :] != vocab]
        else:
            # One occurrence of each different (k+1)-gram; behind its first token lies the k-gram.
            longer = firsts[k]
            events = ids[k][longer[stream[longer + k] != vocab] + 1]
        counts = np.bincount(events, minlength=len(keys[k]))
        contexts = keys[k] // (vocab + 1)
        discounts = _discounts(counts)
        size = len(keys[k - 1])
        levels.append(
            Level(
                keys=keys[k],
                counts=counts,
                discounts=discounts,
                totals=np.bincount(contexts, weights=counts, minlength=size),
                freed=np.bincount(contexts, weights=discounts[np.minimum(counts, 3)], minlength=size),
            )
        )
    return levels


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return what to take off counts 0, 1, 2, 3+ (Chen and Goodman 1999, equation 17).

    Where a text is too small or too regular for the estimate, 0.5, 1 and 1.5, the fallback of KenLM.
    """
    ones, twos, threes, fours = ((counts == c).sum() for c in (1, 2, 3, 4))
    if min(ones, twos, threes) > 0:
        y = ones / (ones + 2 * twos)
        found = np.array([0.0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes])
        if (found[1:] > 0).all() and (found <= [0, 1, 2, 3]).all():
            return found
    return np.array([0.0, 0.5, 1.0, 1.5])


def _logprobs(levels: Sequence[Level], stream: np.ndarray, vocab: int) -> np.ndarray:
    """Return ln p of the tokens of a padded stream that are no padding."""
    p = np.full(len(stream), 1.0 / vocab)
    ids = np.zeros(len(stream), dtype=np.int64)  # id of the (k-1)-gram that starts at each position; -1: never seen
    for k, level in enumerate(levels, start=1):
        contexts = ids[: len(stream) - k + 1]
        keys = np.where(contexts >= 0, contexts * (vocab + 1) + stream[k - 1 :], -1)
        at = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
        seen = level.keys[at] == keys
        ids = np.where(seen, at, -1)
        known = (contexts >= 0) & (level.totals[contexts] > 0)
        counts = np.where(seen, level.counts[at], 0)
        totals = np.where(known, level.totals[contexts], 1.0)
        mixed = (counts - level.discounts[np.minimum(counts, 3)] + level.freed[contexts] * p[k - 1 :]) / totals
        p[k - 1 :] = np.where(known, mixed, p[k - 1 :])
    return np.log(p[stream != vocab])


MODELS: dict[str, Callable[..., LogProbs]] = {"unigram": unigram, "ngram5": ngram5}


def score_baselines(
    documents: Sequence[Document], tokenizer: Tokenizer, *, training: Sequence[str], vocab: int
) -> dict[str, list[DocumentScore]]:
    """Fit each model on a language's training text and score its held-out documents, as a language model's are."""
    train_tokens = [np.array(tokenizer.encode(text), dtype=np.int64) for text in training]
    heldout_tokens = [tokenizer.encode(document.text) for document in documents]
    scores = {}
    for name, fit in MODELS.items():
        logprobs = fit(train_tokens, vocab=vocab)
        scores[name] = [
            document_score(document, [logprobs(tokens)])
            for document, tokens in zip(documents, heldout_tokens, strict=True)
        ]
    return scores


def xz_bits(training: Iterable[str], heldout: Iterable[str]) -> int:
    """Return 8 * (|xz(training + held-out)| - |xz(training)|): bits that the held-out text costs behind the training.

    Texts are joined by line ends. LZMA2 without container, preset 9 extreme, with a dictionary that holds everything
    (and no more: the encoder takes about ten times its size in memory).
    """
    primer = "".join(text + "\n" for text in training).encode()
    both = primer + "".join(text + "\n" for text in heldout).encode()
    return 8 * (_xz_bytes(both, len(both)) - _xz_bytes(primer, len(both)))


def _xz_bytes(data: bytes, dictionary: int) -> int:
    size = min(max(dictionary, 4096), 3 << 29)  # what LZMA2 allows
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))
