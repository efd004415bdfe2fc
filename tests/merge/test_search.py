"""Searching for weights: what a group is, and that the best of the tries is found and is what it says."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import model

from checkpoint.source import read_tensor
from eval.model import load_model
from eval.score import Request
from merge.merge import merge
from merge.search import Text, bits_per_byte, groups_of, search_weights, with_factors
from merge.search_settings import Search, search_of
from parallel.errors import InputError

SEARCH = Search(method="linear", texts={"swe": "swe.txt"}, evaluations=30)


def samples(source, rows=8):
    """Text that a model itself draws: nothing is cheaper under it than under another."""
    drawn = load_model(source)
    torch.manual_seed(0)
    tokens = torch.full((rows, 1), 3)
    for _ in range(24):
        with torch.no_grad():
            probabilities = torch.softmax(drawn(tokens).logits[:, -1], dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], dim=1)
    requests = [Request(name=f"row {number}", tokens=row.tolist(), context=1) for number, row in enumerate(tokens)]
    return Text(requests=tuple(requests), bytes=rows * 24)


def spread(seed):
    """Models that are far apart, so that a text tells them."""
    source = model(seed, max_position_embeddings=64)
    return replace(source, tensors={name: value * 2 for name, value in source.tensors.items()})


def test_groups():
    merged = merge([model(1, num_hidden_layers=4), model(2, num_hidden_layers=4)], "linear")
    assert {*groups_of(merged, SEARCH).values()} == {"all"}
    blocks = groups_of(merged, replace(SEARCH, blocks=2))
    assert blocks["model.layers.1.mlp.up_proj.weight"] == "block 1"
    assert blocks["model.layers.2.input_layernorm.weight"] == "block 2"
    assert blocks["model.embed_tokens.weight"] == blocks["model.norm.weight"] == "outside"
    kinds = groups_of(merged, replace(SEARCH, kinds=True))
    assert {*kinds.values()} == {"outside", "layers, attention", "layers, feed-forward", "layers, norms"}
    both = groups_of(merged, replace(SEARCH, blocks=4, kinds=True))
    assert both["model.layers.3.self_attn.q_proj.weight"] == "block 4, attention"
    assert len({*both.values()}) == 13


def test_factors_multiply_the_weights_of_their_group():
    merged = merge([model(1), model(2)], "linear", weights=[1, 3], parameters={"normalize": False})
    kinds = groups_of(merged, replace(SEARCH, kinds=True))
    factors = dict.fromkeys(kinds.values(), (1.0, 1.0)) | {"layers, attention": (0.5, 2.0)}
    changed = with_factors(merged, kinds, factors)
    for name, (first, second) in {
        "model.layers.0.self_attn.k_proj.weight": (0.5, 6),
        "model.layers.0.mlp.gate_proj.weight": (1, 3),
    }.items():
        wanted = first * read_tensor(model(1), name) + second * read_tensor(model(2), name)
        assert torch.equal(read_tensor(changed, name), wanted)


def test_the_model_that_has_written_the_text_is_found():
    sources = [spread(1), spread(2), spread(3)]
    text = samples(sources[1])
    told = []
    found = search_weights(merge(sources, "linear"), SEARCH, {"swe": text}, lambda number, one: told.append(number))
    assert told == [*range(1, 31)] and len(found.tries) == 30
    (weights,) = found.best.factors.values()
    assert np.argmax(weights) == 1 and weights[1] > 1.3 * max(weights[0], weights[2])
    assert found.best.mean < found.start.mean - 0.05
    assert found.start.factors == {"all": (1.0, 1.0, 1.0)}
    merged = with_factors(merge(sources, "linear"), groups_of(merge(sources, "linear"), SEARCH), found.best.factors)
    assert bits_per_byte(load_model(merged), text) == pytest.approx(found.best.bits_per_byte["swe"], rel=1e-6)


def test_a_search_is_the_same_again():
    sources = [spread(1), spread(2)]
    text = samples(sources[0], rows=2)
    search = replace(SEARCH, evaluations=12, blocks=2)

    def curve():
        found = search_weights(merge(sources, "linear"), search, {"swe": text}, lambda number, one: None)
        return [one.mean for one in found.tries]

    assert curve() == curve()
    other = search_weights(merge(sources, "linear"), replace(search, seed=1), {"swe": text}, lambda number, one: None)
    assert [one.mean for one in other.tries] != curve()


def test_bits_per_byte_is_that_of_the_probabilities():
    source = spread(1)
    text = samples(source, rows=1)
    (request,) = text.requests
    logits = load_model(source)(torch.tensor([request.tokens])).logits[0].double()
    logs = torch.log_softmax(logits, dim=-1)
    wanted = -sum(logs[place, token].item() for place, token in enumerate(request.tokens[1:])) / math.log(2) / 24
    assert bits_per_byte(load_model(source), text) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"texts": {"a": "b"}}, "the key method is missing"),
        ({"method": "linear"}, "the key texts is missing"),
        ({"method": "slerp", "texts": {"a": "b"}}, "unknown method with weights 'slerp': allowed are linear, *"),
        ({"method": "linear", "texts": {}}, "texts: a mapping of languages to files is needed"),
        ({"method": "linear", "texts": {"a": "b"}, "blocks": 0}, "blocks is 0: allowed are whole numbers from 1 on"),
        ({"method": "linear", "texts": {"a": "b"}, "kinds": 1}, "kinds is 1: true or false is needed"),
        ({"method": "linear", "texts": {"a": "b"}, "step": 0}, "step is 0: allowed are numbers above 0, up to 10"),
    ],
)
def test_settings_that_make_no_sense(given, line):
    from fnmatch import fnmatchcase

    with pytest.raises(InputError) as error:
        search_of(given)
    assert fnmatchcase(str(error.value), line)


def test_tries_that_are_known_are_not_made_again(monkeypatch):
    sources, made = [spread(1), spread(2)], []
    texts = {"swe": samples(sources[0], rows=2)}
    search = replace(SEARCH, evaluations=14)
    monkeypatch.setattr("merge.search.bits_per_byte", lambda *given: made.append(1) or bits_per_byte(*given))

    def searched(known=()):
        made.clear()
        return search_weights(merge(sources, "linear"), search, texts, lambda number, one: None, known)

    whole = searched()
    assert len(made) == 14
    again = searched(whole.tries[:9])
    assert len(made) == 5 and again.tries[:9] == whole.tries[:9]
    assert [(one.factors, one.bits_per_byte) for one in again.tries] == [
        (one.factors, one.bits_per_byte) for one in whole.tries
    ]
    monkeypatch.setattr("merge.search.load_model", None)  # not needed
    assert searched(whole.tries) == whole and not made
    monkeypatch.undo()
    other = replace(whole.tries[3], factors={"all": (1.0, 2.0)}, bits_per_byte={"swe": 0.0})
    mended = searched((*whole.tries[:3], other, *whole.tries[4:]))
    assert [one.mean for one in mended.tries] == [one.mean for one in whole.tries]
