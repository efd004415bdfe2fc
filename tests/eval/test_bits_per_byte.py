"""The sliding window against an oracle that asks for one token at a time, in float64."""

import dataclasses
import math

import pytest
import torch

from eval.bits_per_byte import score_documents
from parallel.errors import InputError

TEXTS = ("Grönt gräs, blå himmel, och en räv.", "", "Õunapuu õitseb mais ja lõhnab hästi; tuul on vaikne. " * 2, "x")


def one_at_a_time(model, tokens, window, stride):
    """Sum of -log2 p: for each token, find the first window that holds it, and run the model on what lies before."""
    bits, fewest = 0.0, len(tokens)
    for at in range(1, len(tokens)):
        start = 0
        while start + window <= at:
            start += stride
        assert start == 0 or at - start >= window - stride
        fewest = min(fewest, at - start)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:at]])).logits[0, -1]
        bits -= torch.log_softmax(logits, dim=-1)[tokens[at]].item() / math.log(2)
    return bits


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (2, 1), (11, 3), (128, 64)])
def test_equals_one_token_at_a_time(llama, tokenizer, texts, window, stride):
    model = llama().double()
    documents = texts(*TEXTS)
    found = score_documents(model, documents, tokenizer, window=window, stride=stride, batch_tokens=100)
    assert [score.id for score in found] == ["d0", "d1", "d2", "d3"]
    for score, text in zip(found, TEXTS, strict=True):
        assert score.bytes == score.tokens == len(text.encode())
        assert score.bits == pytest.approx(one_at_a_time(model, [256, *text.encode()], window, stride), abs=1e-9)


def test_a_window_that_covers_makes_the_stride_irrelevant(llama, tokenizer, texts):
    model = llama()
    documents = texts(*TEXTS)

    def bits(window, stride):
        return [
            score.bits
            for score in score_documents(model, documents, tokenizer, window=window, stride=stride, batch_tokens=500)
        ]

    assert bits(128, 1) == bits(128, 127)
    assert bits(16, 4)[2] != pytest.approx(bits(16, 12)[2], abs=1e-3)
    tokens = torch.tensor([[256, *TEXTS[2].encode()]])
    with torch.no_grad():
        full = model(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1) / math.log(2)
    assert bits(128, 64)[2] == pytest.approx(full, rel=1e-5)


def test_prefix_is_bos_else_eos_else_an_error(llama, tokenizer, texts):
    model = llama()
    how = {"window": 16, "stride": 8, "batch_tokens": 100}

    def bits(**tokens):
        (score,) = score_documents(model, texts("abc"), dataclasses.replace(tokenizer, **tokens), **how)
        return score.bits

    assert bits(bos=None, eos=257) == bits(bos=257, eos=None)
    assert bits(bos=256) == bits(bos=256, eos=None) != bits(bos=257)
    with pytest.raises(InputError, match=r"^the tokenizer has neither a BOS nor an EOS token"):
        bits(bos=None, eos=None)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (129, 8, "window 129 is not possible: allowed are 2 to 128 tokens (the model's positions)"),
        (1, 1, "window 1 is not possible: allowed are 2 to 128 tokens (the model's positions)"),
        (16, 16, "stride 16 is not possible: allowed are 1 to 15 tokens (window - 1)"),
        (16, 0, "stride 0 is not possible: allowed are 1 to 15 tokens (window - 1)"),
    ],
)
def test_windows_that_do_not_fit(llama, tokenizer, texts, window, stride, message):
    with pytest.raises(InputError) as caught:
        score_documents(llama(), texts("a"), tokenizer, window=window, stride=stride, batch_tokens=100)
    assert str(caught.value) == message
