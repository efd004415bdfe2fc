"""Pairs: what may be corrupted, what is kept, and that word order is all a swap measures."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from eval.pairs import PairScore, accuracy, drops, is_word, make_pairs, score_pairs, sentences, swaps, wilson


def split(text):
    return text.split()


WORDS = split("katt hund räv älg uggla varg björn sitter springer sover äter under över bredvid stora gamla trötta")


def synthetic(count, seed=0):
    """Sentences of 6 to 12 random words, the first with a capital, the last with a full stop."""
    rng = np.random.Generator(np.random.Philox(seed))
    made = [" ".join(rng.choice(WORDS, size=rng.integers(6, 13))) for _ in range(count)]
    return [sentence.capitalize() + "." for sentence in made]


@dataclass(frozen=True)
class Bpe:
    """A byte-level BPE that never joins across blanks."""

    inner: Tokenizer
    bos: int = 0
    eos: int | None = None

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        return self.inner.decode(tokens)


@pytest.fixture(scope="module")
def bpe():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        synthetic(500), trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], show_progress=False)
    )
    return Bpe(inner)


def test_sentences_are_cut_at_lines_and_punctuation():
    text = 'One two three four five. Too short.  Six  seven eight nine "ten eleven." Is this the last one?\nA b c d e'
    assert sentences(text) == [
        "One two three four five.",
        'Six seven eight nine "ten eleven."',
        "Is this the last one?",
        "A b c d e",
    ]
    assert sentences(" ".join(["w"] * 30)) and not sentences(" ".join(["w"] * 31))


def test_words_are_words_of_any_script():
    for word in ("räv", "don't", "semi-final", "می\u200cشود", "हिन्दी", "ÕUN"):
        assert is_word(word), word
    for other in ("5", "räv,", "(räv", "{name}", "a1", "-", "<b>", "_"):
        assert not is_word(other), other


def test_swap_touches_neither_first_word_nor_punctuation_nor_equal_words():
    assert swaps(split("Now the fox, very Very old 3 sleeps here.")) == [
        split("Now the fox, very old Very 3 sleeps here.")
    ]
    assert swaps(split("A b c d e")) == [split("A c b d e"), split("A b d c e"), split("A b c e d")]


def test_drop_spares_first_last_and_punctuated_words():
    assert drops(split("Now the fox, very old sleeps")) == [
        split("Now fox, very old sleeps"),
        split("Now the fox, old sleeps"),
        split("Now the fox, very sleeps"),
    ]


def test_pairs_are_corrupted_as_their_kind_says(texts):
    documents = texts(*(" ".join(synthetic(3, seed=seed)) for seed in range(20)))
    pairs = make_pairs(documents, count=25, seed=1, corpus=[])
    assert [pair.kind for pair in pairs] == ["swap"] * 25 + ["drop"] * 25
    everything = " ".join(document.text for document in documents)
    for pair in pairs:
        good, bad = pair.good.split(), pair.bad.split()
        assert pair.good in everything and pair.bad not in everything
        assert good[0] == bad[0] and good[-1] == bad[-1]
        if pair.kind == "swap":
            assert sorted(good) == sorted(bad) and len(pair.good) == len(pair.bad)
            changed = [at for at in range(len(good)) if good[at] != bad[at]]
            assert len(changed) == 2 and changed[1] == changed[0] + 1
        else:
            assert len(bad) == len(good) - 1
    for kind in ("swap", "drop"):
        assert len({pair.good for pair in pairs if pair.kind == kind}) == 25, "one pair a sentence"


def test_pairs_depend_on_the_seed_and_not_on_the_order_of_documents(texts):
    documents = texts(*synthetic(60))
    pairs = make_pairs(documents, count=20, seed=1, corpus=[])
    assert make_pairs(documents[::-1], count=20, seed=1, corpus=[]) == pairs
    assert make_pairs(documents, count=20, seed=2, corpus=[]) != pairs
    assert len(make_pairs(documents[:7], count=20, seed=1, corpus=[])) == 14, "no more than there are sentences"


def test_what_the_corpus_holds_is_no_corruption(texts):
    documents = texts("Well 1 old foxes 2 3")
    (swap, drop) = make_pairs(documents, count=5, seed=0, corpus=[])
    assert swap.bad == "Well 1 foxes old 2 3"
    kept = make_pairs(documents, count=5, seed=0, corpus=["They said: WELL 1 foxes\n old 2 3 times"])
    assert kept == [drop]
    heldout = texts("Well 1 old foxes 2 3", "well 1 foxes old 2 3.")
    assert [pair.good for pair in make_pairs(heldout, count=5, seed=0, corpus=[]) if pair.kind == "swap"] == []


def unigram_llama(llama, vocab):
    """A real Llama that cannot see its input: one embedding for all tokens, blocks that write nothing."""
    model = llama(vocab_size=vocab, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0].clone()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def test_a_unigram_model_is_at_chance_on_swaps(llama, bpe, texts):
    """Order-free tokens tie exactly: strictly all wrong, and half right where a tie counts as half."""
    documents = texts(*synthetic(300))
    pairs = [pair for pair in make_pairs(documents, count=300, seed=0, corpus=[]) if pair.kind == "swap"]
    scores = score_pairs(unigram_llama(llama, bpe.inner.get_vocab_size()), pairs, bpe, batch_tokens=1000)
    assert len(scores) > 250
    assert len({score.good_sum for score in scores}) > 250, "sentences differ in probability"
    found = accuracy(scores, per_token=False)
    assert (found.correct, found.ties, found.count) == (0, len(scores), len(scores))
    share = (found.correct + found.ties / 2) / found.count
    assert abs(share - 0.5) < 1.96 * math.sqrt(0.25 / found.count)


def test_a_model_that_sees_order_but_knows_nothing_is_at_chance(llama, bpe, texts):
    """Random weights: within the binomial bound of one half, without ties."""
    documents = texts(*synthetic(300))
    pairs = [pair for pair in make_pairs(documents, count=300, seed=0, corpus=[]) if pair.kind == "swap"]
    model = llama(vocab_size=bpe.inner.get_vocab_size())
    found = accuracy(score_pairs(model, pairs, bpe, batch_tokens=1000), per_token=False)
    assert found.ties == 0
    assert abs(found.value - 0.5) < 2.58 * math.sqrt(0.25 / found.count)


def test_a_model_that_learnt_the_order_is_right(llama, bpe, texts):
    """Sentences that follow one fixed order of words; a few steps of training suffice."""
    made = [" ".join(["Se", *WORDS[start : start + size]]) for size in range(5, 9) for start in range(17 - size)]
    documents = texts(*made)
    model = llama(vocab_size=bpe.inner.get_vocab_size())
    pairs = [pair for pair in make_pairs(documents, count=40, seed=0, corpus=[]) if pair.kind == "swap"]
    before = accuracy(score_pairs(model, pairs, bpe, batch_tokens=1000), per_token=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        tokens = torch.tensor([[bpe.bos, *bpe.encode(made[step % len(made)])]])
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = accuracy(score_pairs(model, pairs, bpe, batch_tokens=1000), per_token=False)
    assert after.value > 0.9 > 0.8 > before.value


def test_every_token_counts_and_lengths_are_kept(llama, tokenizer, texts):
    """Against transformers' own loss, BOS in front."""
    model = llama().double()
    pairs = make_pairs(texts(*synthetic(6)), count=6, seed=0, corpus=[])
    for pair, score in zip(pairs, score_pairs(model, pairs, tokenizer, batch_tokens=300), strict=True):
        for text, summed, count in (
            (pair.good, score.good_sum, score.good_tokens),
            (pair.bad, score.bad_sum, score.bad_tokens),
        ):
            tokens = torch.tensor([[256, *text.encode()]])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(tokens).logits[0, :-1], dim=-1)
            assert count == len(text.encode())
            assert summed == pytest.approx(logprobs[torch.arange(count), tokens[0, 1:]].sum().item(), abs=1e-9)
        assert score.kind == pair.kind


def test_ties_are_wrong_and_means_are_per_token():
    def score(good, bad, good_tokens=4, bad_tokens=4):
        return PairScore(good_sum=good, bad_sum=bad, good_tokens=good_tokens, bad_tokens=bad_tokens, kind="swap")

    scores = [score(-1, -2), score(-3, -3), score(-5, -4), score(-8, -7, 4, 3)]
    by_sum = accuracy(scores, per_token=False)
    assert (by_sum.value, by_sum.correct, by_sum.ties, by_sum.count) == (0.25, 1, 1, 4)
    assert accuracy(scores, per_token=True).correct == 2


def test_wilson_against_published_values():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for successes, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, count) == pytest.approx((low, high), abs=6e-5)
    assert wilson(20, 20)[1] == 1.0
    narrow, wide = wilson(50, 100, confidence=0.5), wilson(50, 100, confidence=0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
