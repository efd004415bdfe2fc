"""Sizes that are no multiples: the function stays, what is new can learn, and moments are where they belong."""

import math
from dataclasses import replace

import pytest
import torch
from grown_models import loaded, random_source, tied_in_turn
from test_depth import Trained
from test_grow import FAMILIES, IDS

from checkpoint.source import Group, full_box, read_tensor
from parallel.errors import InputError
from upscale.factors import Recipe
from upscale.grow import grow
from upscale.pad import pad
from upscale.sizes import Sizes
from upscale.verify import compare
from upscale.vocabulary import rows_of, with_vocabulary

RECIPES = {
    "hidden": {"to_hidden": 32},
    "ffn": {"to_ffn": 27},
    "heads": {"to_heads": 6, "to_kv_heads": 3},
    "queries": {"to_heads": 6},
    "all": {"to_hidden": 36, "to_heads": 6, "to_kv_heads": 3, "to_ffn": 33},
    "head_dim": {"to_head_dim": 18},
    "all and head_dim": {"to_hidden": 36, "to_heads": 6, "to_kv_heads": 3, "to_ffn": 33, "to_head_dim": 12},
    "factors, then sizes": {"width": 2, "to_hidden": 56, "to_ffn": 41},
}
HEAD_NORMS = ("qwen3", "gemma3", "olmo2")
"""Their eps is that of the other norms."""
NEW = {"llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0
}}, "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}}  # fmt: skip


@pytest.mark.parametrize(("family", "name", "tied"), tied_in_turn(["llama", *FAMILIES, *NEW], RECIPES))
def test_every_size_keeps_every_family(family: str, name: str, tied: bool) -> None:
    given = {**FAMILIES, **NEW}.get(family, {})
    small, recipe = random_source(tied, **given), Recipe(**RECIPES[name])
    refused = {
        "its norms of heads would mix what is new with what is there": family in HEAD_NORMS and recipe.to_head_dim,
        "its queries and keys are in one matrix with its values": family == "phi3" and recipe.to_head_dim,
        "of gpt_neox ffn alone can be padded": family.startswith("gpt_neox") and {*recipe.sizes.given()} != {"ffn"},
        "olmo2 norms all heads together, new ones with those that are there": family == "olmo2" and recipe.to_heads,
    }
    if any(refused.values()):
        with pytest.raises(InputError, match="|".join(why for why, holds in refused.items() if holds)):
            grow(small, recipe)
        return
    before, after = loaded(small), loaded(grow(small, recipe))
    for part, key in (("hidden", "hidden_size"), ("ffn", "intermediate_size"), ("head_dim", "head_dim")):
        if size := getattr(recipe, f"to_{part}"):
            assert getattr(after.config, key) == size
    found = compare(before, after, [IDS])
    # eps 1e-5 of heads' norms beside mean squares of about 1 changes by a third.
    assert found.relative <= (1e-4 if family in HEAD_NORMS and recipe.to_hidden else 1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-biases", "gemma2", "granite"])
def test_all_that_is_new_learns(family: str) -> None:
    """After two steps of gradient descent: a new element is read by what changed in the first, or reads what did."""
    small = random_source(**FAMILIES.get(family, {}))
    recipe = Recipe(to_hidden=36, to_heads=6, to_kv_heads=3, to_ffn=33)
    model, start = loaded(grow(small, recipe)), loaded(grow(small, recipe))
    for _ in range(3):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    before = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        moved = parameter != before[name]
        if "embed_tokens" in name:  # rows of tokens that are there
            moved = moved[IDS.unique()]
        if ".k_proj.bias" in name:  # the same for all keys: softmax does not see it, but by the positions
            continue
        assert moved.float().mean() > 0.9, name


def test_old_and_new_elements_are_where_they_belong() -> None:
    small = random_source(False)
    found = grow(small, Recipe(to_hidden=36, to_heads=6, to_kv_heads=3, to_ffn=33))
    old, new = (read_tensor(source, "model.layers.1.mlp.down_proj.weight") for source in (small, found))
    assert torch.equal(new[:24, :20], old)
    assert not new[24:].any() and not new[:, 20:].any()
    old, new = (read_tensor(source, "model.layers.1.self_attn.q_proj.weight") for source in (small, found))
    assert torch.equal(new[:24, :24], old), "two heads a key/value head, as before"
    assert new[24:].std() == pytest.approx(old.square().mean().sqrt().item(), rel=0.1)
    assert new[:24, 24:].std() == pytest.approx(old.square().mean().sqrt().item(), rel=0.1)
    old, new = (read_tensor(source, "model.norm.weight") for source in (small, found))
    assert torch.allclose(new[:24], old * math.sqrt(24 / 36), rtol=1e-6)
    assert torch.allclose(new[24:], torch.tensor(math.sqrt(24 / 36)), rtol=1e-6)
    assert found.config["rms_norm_eps"] == pytest.approx(1e-5 * 24 / 36)
    wide = grow(small, Recipe(to_heads=12, to_kv_heads=4))  # three now attend to one
    new = read_tensor(wide, "model.layers.1.self_attn.q_proj.weight").view(12, 6, 24)
    old = read_tensor(small, "model.layers.1.self_attn.q_proj.weight").view(4, 6, 24)
    assert torch.equal(new[[0, 1, 3, 4]], old)


def test_head_dim_follows_the_rotary_embedding() -> None:
    """Attention of one position to another, by hand in float64: cos and sin of both models' own frequencies."""
    small = random_source(False, num_key_value_heads=4, num_hidden_layers=1)
    found = grow(small, Recipe(to_head_dim=18))
    x = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = []
    for source, dim in ((small, 6), (found, 18)):
        q, k = (
            read_tensor(source, f"model.layers.0.self_attn.{part}_proj.weight").double().view(4, dim, 24) @ x[at]
            for part, at in (("q", 0), ("k", 1))
        )
        turns = 7.0 * 10000.0 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)  # seven positions apart
        one, two = q[:, : dim // 2], q[:, dim // 2 :]
        turned = torch.cat([one * turns.cos() - two * turns.sin(), two * turns.cos() + one * turns.sin()], 1)
        scores.append((turned * k).sum(1) / math.sqrt(dim))
    assert torch.allclose(scores[1], scores[0], rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_moments_of_what_is_there_go_on_and_new_ones_start(family: str) -> None:
    plain = random_source(False, **FAMILIES.get(family, {}))
    small = Trained(config=plain.config, tensors=plain.tensors, groups={"decay": Group(lr=0.1, step=7)})
    found = grow(small, Recipe(to_hidden=36, to_ffn=33, state="scaled"))
    assert found.groups == {"decay": Group(lr=0.1, step=7)}
    for name, info in found.infos.items():
        outs = {slot: torch.empty(info.shape) for slot in info.slots}
        found.read(name, full_box(info.shape), outs, found.collect(name, map))
        weight = small.tensors[name]
        there = full_box(weight.shape)
        norm = "norm" in name
        scale = math.sqrt(24 / 36) if norm or (family == "gemma2" and "embed" in name) else 1.0
        assert torch.allclose(outs["exp_avg"][there], weight * 3 / scale, rtol=1e-6)
        assert torch.allclose(outs["exp_avg_sq"][there], weight * 5 / scale**2, rtol=1e-6)
        new = torch.ones(info.shape, dtype=torch.bool)
        new[there] = False
        assert not outs["exp_avg"][new].any()
        mean = torch.full((int(new.sum()),), float((weight * 5).double().mean() / scale**2))
        assert torch.allclose(outs["exp_avg_sq"][new], mean, rtol=1e-5)
        assert torch.equal(outs["master"], outs["weight"])


def test_bfloat16_is_exact_where_nothing_is_scaled() -> None:
    small = random_source(dtype=torch.bfloat16)
    assert compare(loaded(small), loaded(grow(small, Recipe(to_heads=8, to_ffn=33))), [IDS]).relative <= 1e-5


def test_vocabulary_then_sizes_then_depth() -> None:
    small = random_source(False)
    wide = with_vocabulary(small, rows_of([[number] for number in range(40)] + [[3, 4], []]))
    found = grow(wide, Recipe(width=2, to_hidden=56, to_ffn=47, depth="identity", layers=4))
    with torch.no_grad():
        wanted, logits = loaded(small)(input_ids=IDS).logits, loaded(found)(input_ids=IDS).logits[..., :40]
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_any_box_is_what_the_whole_has() -> None:
    found = grow(random_source(False), Recipe(to_hidden=36, to_heads=6, to_kv_heads=3, to_ffn=33, to_head_dim=12))
    boxes = [(slice(11, 31), slice(5, 34)), (slice(0, 1), slice(0, 1)), (slice(30, 33), slice(25, 30))]
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"):
        whole, stats = read_tensor(found, name), found.collect(name, map)
        for box in boxes:
            part = torch.empty([of.stop - of.start for of in box])
            found.read(name, box, {"weight": part}, stats)
            assert torch.equal(part, whole[box]), (name, box)


def test_the_same_seed_is_the_same_model() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    one, two, other = (read_tensor(grow(random_source(), Recipe(to_ffn=33, seed=seed)), name) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert pad(random_source(), Sizes(ffn=20)).infos == random_source().infos


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ({"to_hidden": 20}, {}, "size of hidden is 20: allowed are whole numbers from 24 on"),
        ({"to_ffn": 20.5}, {}, "size of ffn is 20.5: allowed are whole numbers from 20 on"),
        ({"width": 2, "to_ffn": 30}, {}, "size of ffn is 30: allowed are whole numbers from 40 on"),
        ({"to_heads": 5}, {}, "5 heads over 2 key/value heads: not a whole number each"),
        ({"to_kv_heads": 4}, {}, "4 heads over 4 key/value heads: in the model 2 attend to one"),
        ({"to_hidden": 31}, {}, "hidden size 31 and 4 heads after growth: transformers' llama allows"),
        ({"to_head_dim": 9}, {}, "head_dim 9: allowed are multiples of 6, so that rotary embeddings turn as they did"),
        (
            {"to_head_dim": 12},
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "head_dim with rotary embeddings of type 'yarn': allowed are default, linear, llama3",
        ),
        (
            {"to_head_dim": 12},
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "head_dim with rotary embeddings of type 'dynamic': allowed are default, linear, llama3",
        ),
    ],
)
def test_what_cannot_be_made_is_one_line(given: dict, more: dict, message: str) -> None:
    small = random_source()
    with pytest.raises(InputError) as error:
        grow(replace(small, config={**small.config, **more}), Recipe(**given))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
