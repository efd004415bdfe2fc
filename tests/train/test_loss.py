"""Token losses in chunks are those of whole logits, gradients too, for heads that divide or cap as well."""

import pytest
import torch
from tiny import tiny_config

import parallel.sizes
import train.loss
from checkpoint.memory import ScratchSource
from eval.model import load_model

B, T, V = 3, 7, 131


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    monkeypatch.setattr(parallel.sizes, "CHUNK", 4 * V * 5)  # five tokens


def losses_and_gradients(model, **targets):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, T + 1), generator=generator)
    weights = torch.rand(B, T, generator=generator)
    if targets:
        found = model(input_ids=ids[:, :-1], targets=ids[:, 1:])
    else:
        logits = model(input_ids=ids[:, :-1]).logits
        found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found = found.view(B, T)
    (found * weights).sum().backward()
    return found.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (tiny_config(), -(-B * T // 5)),
        (tiny_config(tie_word_embeddings=False), -(-B * T // 5)),
        (tiny_config(model_type="granite", logits_scaling=3.0), -(-B * T // 5)),
    ],
    ids=["tied", "untied", "granite"],
)
def test_chunks_give_the_same_losses_and_gradients(config, heads):
    source = ScratchSource(config=config, seed=1)
    expected, wanted = losses_and_gradients(load_model(source))
    model = load_model(source)
    train.loss.give_losses(model, config)
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda module, given, logits: sizes.append(logits.shape[-2]))
    found, gradients = losses_and_gradients(model, targets=True)
    hook.remove()
    assert len(sizes) == 2 * heads  # once, and once more in the backward pass
    assert max(sizes) == 5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_few_logits_are_computed_whole(monkeypatch):
    monkeypatch.setattr(parallel.sizes, "CHUNK", 4 * V * B * T)
    source = ScratchSource(config=tiny_config(), seed=1)
    model = load_model(source)
    train.loss.give_losses(model, source.config)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, given, logits: sizes.append(tuple(logits.shape)))
    losses_and_gradients(model, targets=True)
    assert sizes == [(B, T, V)]


@pytest.mark.parametrize(
    ("vocab", "tokens", "expected"),
    [(49_152, 2048, 2048), (128_256, 8 * 4096, 523), (262_144, 4096, 256), (10**9, 7, 1)],
)
def test_a_chunk_of_logits_is_a_quarter_of_a_gigabyte(monkeypatch, vocab, tokens, expected):
    monkeypatch.undo()
    assert parallel.sizes.tokens_a_chunk(vocab, tokens) == expected
