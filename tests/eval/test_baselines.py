"""Baselines against hand-made counts and a slow Kneser-Ney that follows the formula literally."""

import math
from collections import Counter

import numpy as np
import pytest

from eval.baselines import kneser_ney, ngram5, score_baselines, unigram, xz_bits
from parallel.errors import InputError

V = 12


def markov(length, seed):
    """Tokens 0-9, each likely followed by its successor."""
    rng = np.random.Generator(np.random.Philox(seed))
    tokens = [0]
    while len(tokens) < length:
        tokens.append((tokens[-1] + 1) % 10 if rng.random() < 0.6 else int(rng.integers(10) ** 2 / 10))
    return tokens


TRAINING = [markov(150, seed) for seed in range(8)] + [[3], []]


def test_unigram_by_hand():
    logprobs = unigram([[0, 0, 1], [2]], vocab=4)
    np.testing.assert_allclose(np.exp(logprobs([0, 1, 2, 3])), [3 / 8, 2 / 8, 2 / 8, 1 / 8])


class SlowKneserNey:
    """Chen and Goodman 1999, equations 15 to 17, with dicts."""

    def __init__(self, training, vocab, order):
        self.vocab, self.order = vocab, order
        events = set()
        counts = Counter()
        for tokens in training:
            padded = ["pad"] * (order - 1) + list(tokens)
            for at in range(order - 1, len(padded)):
                counts[tuple(padded[at - order + 1 : at + 1])] += 1
                events |= {tuple(padded[at - k + 1 : at + 1]) for k in range(1, order + 1)}
        self.counts = {order: counts}
        for k in range(order - 1, 0, -1):
            self.counts[k] = Counter(gram[1:] for gram in events if len(gram) == k + 1)
        self.discounts = {}
        for k in range(1, order + 1):
            n = Counter(self.counts[k].values())
            y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0
            if min(n[1], n[2], n[3]) > 0:
                found = [0] + [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
            if min(n[1], n[2], n[3]) == 0 or min(found[1:]) <= 0:
                found = [0, 0.5, 1, 1.5]
            self.discounts[k] = found

    def p(self, context, token):
        if len(context) == self.order:
            context = context[1:]
        k = len(context) + 1
        lower = 1 / self.vocab if k == 1 else self.p(context[1:], token)
        followers = {gram: c for gram, c in self.counts[k].items() if gram[:-1] == context}
        if not followers:
            return lower
        discount = self.discounts[k]
        freed = sum(discount[min(c, 3)] for c in followers.values())
        count = self.counts[k][(*context, token)]
        return (count - discount[min(count, 3)] + freed * lower) / sum(followers.values())


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_equals_the_formula(order):
    slow = SlowKneserNey(TRAINING, V, order)
    if order == 3:
        assert slow.discounts[3] != [0, 0.5, 1, 1.5], "the estimated discounts are tested, not just the fallback"
    logprobs = kneser_ney(TRAINING, vocab=V, order=order)
    for tokens in (markov(40, 99), [11, 10, 11, 3, 4], [5]):
        padded = ("pad",) * (order - 1) + tuple(tokens)
        expected = [math.log(slow.p(padded[at : at + order - 1], token)) for at, token in enumerate(tokens)]
        np.testing.assert_allclose(logprobs(tokens), expected, rtol=1e-12)


@pytest.mark.parametrize("context", [[], [0], [0, 1, 2, 3], [4, 5, 6, 7, 8, 9], [11, 11, 11, 11], [0, 1, 11, 2]])
def test_ngram5_sums_to_one(context):
    logprobs = ngram5(TRAINING, vocab=V)
    assert sum(math.exp(logprobs([*context, token])[-1]) for token in range(V)) == pytest.approx(1, abs=1e-12)


def test_documents_do_not_run_into_each_other():
    apart = ngram5([[1, 2, 3], [4, 5, 6]], vocab=V)
    joined = ngram5([[1, 2, 3, 4, 5, 6]], vocab=V)
    assert apart([1, 2, 3, 4])[-1] < joined([1, 2, 3, 4])[-1] - 0.5


def test_no_training_text():
    with pytest.raises(InputError, match=r"^no training text: an n-gram model cannot be fitted$"):
        ngram5([[], []], vocab=V)


def test_scores_have_the_shape_of_a_models(tokenizer, texts):
    training = ["the cat sat on the mat. " * 20, "a dog sat on the räv. " * 20]
    documents = texts("the räv sat on a cat.", "zzz")
    scores = score_baselines(documents, tokenizer, training=training, vocab=258)
    assert list(scores) == ["unigram", "ngram5"]
    for found in scores.values():
        assert [(score.id, score.bytes, score.tokens) for score in found] == [("d0", 22, 22), ("d1", 3, 3)]
    assert scores["unigram"][1].bits == pytest.approx(3 * math.log2(sum(len(t.encode()) for t in training) + 258))
    assert scores["ngram5"][0].bits < scores["unigram"][0].bits / 1.5


def test_xz_uses_the_training_text():
    rng = np.random.Generator(np.random.Philox(4))
    noise = ["".join(rng.choice(list("abcdefghijklmnop"), size=2000)) for _ in range(20)]
    fresh = xz_bits(noise[1:], noise[:1])
    assert 0.9 * 4 * 2000 < fresh < 1.3 * 4 * 2000, "four bits a letter, what 16 equal letters hold"
    assert xz_bits(noise, noise[:1]) < 0.1 * fresh, "the dictionary reaches back to the very first text"
