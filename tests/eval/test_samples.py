"""Samples: the same for the same seed, drawn from what the model says, nothing special in them."""

import dataclasses

import pytest
import torch

from eval.samples import continue_text
from parallel.errors import InputError


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Tokens as written numbers."""

    bos: int | None = 256
    eos: int | None = 257

    def encode(self, text):
        return [int(part) for part in text.split()]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def greedy(model, tokens, count, never):
    """Argmax without a cache, the whole sequence anew each time."""
    start = len(tokens)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[never] = -torch.inf
        tokens = [*tokens, int(logits.argmax())]
    return " ".join(map(str, tokens[start:]))


def test_top_1_is_greedy(llama):
    model = llama()
    found = continue_text(model, Numbers(eos=None), "5 6 7", tokens=20, seed=0, top_k=1)
    assert found == greedy(model, [256, 5, 6, 7], 20, never=[256])


def test_the_same_seed_gives_the_same_text_and_another_another(llama):
    model = llama()
    state = torch.random.get_rng_state()
    first = continue_text(model, Numbers(), "5 6 7", tokens=20, seed=1)
    assert continue_text(model, Numbers(), "5 6 7", tokens=20, seed=1) == first
    assert continue_text(model, Numbers(), "5 6 7", tokens=20, seed=2) != first
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not touched"


def test_draws_follow_temperature_and_top_k(llama):
    model = llama()
    with torch.no_grad():
        logits = model(torch.tensor([[256, 9]])).logits[0, -1]
    logits[[256, 257]] = -torch.inf
    best = logits.topk(3)
    expected = dict(zip(best.indices.tolist(), torch.softmax(best.values / 1.5, dim=0).tolist(), strict=True))
    drawn = [
        int(continue_text(model, Numbers(eos=None), "9", tokens=1, seed=seed, temperature=1.5, top_k=3, banned=[257]))
        for seed in range(400)
    ]
    assert set(drawn) == set(expected)
    for token, share in expected.items():
        assert drawn.count(token) / 400 == pytest.approx(share, abs=4 * (share * (1 - share) / 400) ** 0.5)


def test_ends_at_eos_and_never_writes_bos_or_banned(llama):
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[[256, 99]] = 50 * model.lm_head.weight[[256, 99]]
    written = continue_text(model, Numbers(eos=None), "1", tokens=40, seed=3, banned=[99]).split()
    assert len(written) == 40 and not {"256", "99"} & set(written)
    at = written.index(written[20])
    ended = continue_text(model, Numbers(eos=int(written[20])), "1", tokens=40, seed=3, banned=[99])
    assert ended.split() == written[:at], "EOS stops the text and is not part of it"


def test_bad_arguments(llama):
    with pytest.raises(InputError, match=r"^temperature 0 and top_k 40: both have to be above 0$"):
        continue_text(llama(), Numbers(), "1", tokens=3, seed=0, temperature=0)
    with pytest.raises(InputError, match=r"^temperature 0.8 and top_k 0: both have to be above 0$"):
        continue_text(llama(), Numbers(), "1", tokens=3, seed=0, top_k=0)
    with pytest.raises(InputError, match=r"^a prompt of 2 tokens and 127 new ones exceed the model's 128 positions$"):
        continue_text(llama(), Numbers(), "1", tokens=127, seed=0)
