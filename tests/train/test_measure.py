"""What a log record measures, against torch's own gradients and counters, and the definitions it is built on."""

import math
import re
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from checkpoint.memory import ScratchSource
from checkpoint.source import box_shape
from growmerge.shapes import multiplied
from parallel.errors import InputError
from parallel.families import family_of
from train.data.order import Mixture
from train.measure import (
    PEAK_FLOPS,
    block_norms,
    blocks,
    bytes_seen,
    clone_asymmetries,
    flops_per_token,
    growths_of,
    language_losses,
    language_sums,
    peak_flops,
    peak_memory,
    speed,
)
from upscale.factors import Recipe
from upscale.grow import grow
from upscale.verify import clone_asymmetry

SMOL = {  # SmolLM2-135M
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_norms_of_blocks_are_those_of_their_gradients(tied, family):
    extra = {"model_type": family, "attention_bias": True} if family == "qwen3" else {}
    config = tiny_config(tie_word_embeddings=tied, **extra)
    model = tiny_model(tie_word_embeddings=tied) if family == "llama" else qwen(config)
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = block_norms({name: float(grad.square().sum()) for name, grad in gradients.items()}, blocks(config))

    def norm(pattern):
        parts = [grad.flatten() for name, grad in gradients.items() if re.search(pattern, name)]
        return pytest.approx(float(torch.cat(parts).norm()), rel=1e-5)

    layers = {
        f"layers/{layer}/{part}": norm(rf"\.{layer}\.{module}\.[^.]*_proj\.")
        for layer in (0, 1)
        for part, module in (("attention", "self_attn"), ("mlp", "mlp"))
    }
    head = {} if tied else {"head": norm("lm_head")}
    assert found == {"embedding": norm("embed_tokens"), **layers, "norms": norm("norm"), **head}
    assert math.hypot(*found.values()) == norm("")


def qwen(config):
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)


def test_a_norm_that_is_not_finite_stays_in_its_block():
    squares = {"model.embed_tokens.weight": math.inf, "model.norm.weight": math.nan, "lm_head.weight": 4.0}
    found = block_norms(squares, blocks(tiny_config(tie_word_embeddings=False)))
    assert found["embedding"] == math.inf
    assert math.isnan(found["norms"])
    assert found["head"] == 2.0


def test_flops_of_a_token_are_what_torch_counts():
    for tied in (True, False):
        config = tiny_config(tie_word_embeddings=tied)
        model = tiny_model(tie_word_embeddings=tied)
        model.config._attn_implementation = "eager"
        ids = torch.zeros(2, 16, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        family = family_of(config)
        norms = sum(math.prod(t.shape) for t in family.tensors(config).values() if "norm" in t.name)
        # torch counts products of matrices alone: no norms, but the rotary embedding's angles.
        ours = (flops_per_token(config, 16) - 6 * norms) * ids.numel()
        assert ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_flops_of_a_token_are_the_papers_formula():
    count = 134_515_008  # parameters; the head is the embedding, so each is multiplied with
    assert flops_per_token(SMOL, 2048) == 6 * count + 12 * 30 * 9 * 64 * 2048
    for changes in ({}, {"tie_word_embeddings": False}):
        config = {**SMOL, **changes}
        assert flops_per_token(config, 0) == 6 * multiplied(config)


@pytest.mark.parametrize(
    ("changes", "spans"),
    [
        ({"model_type": "llama", "sliding_window": 100}, [512] * 4),
        ({"model_type": "mistral", "sliding_window": 100}, [100] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [512] * 4),
        ({"model_type": "qwen2", "sliding_window": 100, "max_window_layers": 2}, [512] * 4),
        (
            {"model_type": "qwen2", "sliding_window": 100, "max_window_layers": 2, "use_sliding_window": True},
            [512, 512, 100, 100],
        ),
        ({"model_type": "gemma2", "sliding_window": 100}, [100, 512, 100, 512]),
        ({"model_type": "gemma3_text", "sliding_window": 100, "sliding_window_pattern": 4}, [100, 100, 100, 512]),
        ({"model_type": "gemma2", "sliding_window": 4096}, [512] * 4),
    ],
)
def test_a_sliding_window_bounds_what_attention_spans(changes, spans):
    """By what transformers itself makes of a config, as a checkpoint's config.json holds it."""
    config = AutoConfig.for_model(**tiny_config(num_hidden_layers=4, **changes)).to_dict()
    q = family_of(config).axes(config)["q"]
    assert flops_per_token(config, 512) - flops_per_token(config, 0) == 12 * q * sum(spans)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("AMD Instinct MI300X", 1307e12),
        ("AMD Instinct MI250X", 383e12 / 2),
        ("NVIDIA GeForce GTX 1080", None),
        ("", None),
        (None, None),
    ],
)
def test_peaks_by_the_names_that_devices_have(name, peak):
    assert peak_flops(name) == peak


def test_every_key_of_the_table_is_found():
    for key, peak in PEAK_FLOPS.items():
        assert peak_flops(f"Vendor {key.replace(' ', ' 96GB-')}") == peak


def test_utilisation_is_the_share_of_the_devices_peak():
    found = speed(400_000, 2.0, flops_a_token=1e9, devices=4, peak=1e15)
    assert found == {"tokens_per_second": 200_000, "mfu": pytest.approx(200_000 * 1e9 / 4e15)}
    assert speed(10, 2.0, flops_a_token=1e9, devices=4, peak=None) == {"tokens_per_second": 5.0, "mfu": None}
    assert math.isnan(speed(10, 0.0, flops_a_token=1e9, devices=4, peak=1e15)["mfu"])


def test_peak_memory_never_falls_and_counts_bytes():
    before = peak_memory()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = peak_memory()
    assert before["host"] <= after["host"]
    assert after["host"] >= held.numel()
    assert after["host"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert ("device_allocated" in after) == torch.cuda.is_available()


RECIPES = (
    Recipe(width=2, method="symmetric"),
    Recipe(hidden=3, heads=4, kv_heads=2, ffn=5, method="symmetric"),
    Recipe(ffn=2),
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_growths_are_found_from_the_grown_model_alone(recipe):
    grown = grow(ScratchSource(config=tiny_config(), seed=1), recipe)
    found = growths_of(grown.run.provenance["recipe"], grown.config)
    assert found == {name: grown.growths(name) for name in grown.infos}


def test_a_model_that_the_recipe_cannot_have_made_is_one_line():
    line = "intermediate_size is 48, which growth by 5 (ffn) cannot have made"
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        growths_of({"hidden": 2, "ffn": 5}, tiny_config())


def weights(source):
    for name, info in source.infos.items():
        if info.tied_to is None:
            box = tuple(slice(0, size) for size in info.shape)
            out = torch.empty(box_shape(box))
            source.read(name, box, {"weight": out})
            yield name, out


def test_asymmetry_of_blocks_is_the_mean_of_their_tensors():
    grown = grow(ScratchSource(config=tiny_config(), seed=1), Recipe(width=2, method="symmetric"))
    names = blocks(grown.config)
    growths = growths_of(grown.run.provenance["recipe"], grown.config)
    equal = clone_asymmetries(weights(grown), growths, names)
    assert equal == {block: 0.0 for block in names.values() if block != "head"}

    moved = dict(weights(grown))
    for number, name in enumerate(("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight")):
        generator = torch.Generator().manual_seed(number)
        moved[name] = moved[name] + 0.01 * torch.randn(moved[name].shape, generator=generator)
    found = clone_asymmetries(moved.items(), growths, names)
    alone = [clone_asymmetry(moved[name], growths[name]) for name in moved if ".1.mlp." in name]
    assert found["layers/1/mlp"] == pytest.approx(sum(alone) / 3)
    assert found["layers/1/mlp"] > 0.01
    assert all(value == 0 for block, value in found.items() if block != "layers/1/mlp")


def test_loss_by_language_counts_each_token_once():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [math.nan, math.nan, math.nan]], requires_grad=True)
    sums = language_sums(losses, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2, 0, 1]), 4)
    assert sums.tolist() == [[15.0, 3.0], [0.0, 0.0], [6.0, 3.0], [0.0, 0.0]]
    assert (sums.dtype, sums.requires_grad) == (torch.float64, False)
    assert language_losses(["eng", "swe", "fin", "deu"], sums) == {"eng": 5.0, "fin": 2.0}

    # By token: a packed sample holds several languages.
    by_token = language_sums(
        losses, torch.tensor([[1.0, 0, 1], [1, 1, 1], [0, 0, 0]]), torch.tensor([[0, 0, 1], [1, 1, 0], [0, 0, 0]]), 2
    )
    assert by_token.tolist() == [[7.0, 2.0], [12.0, 3.0]]


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_loss_by_language_adds_up_over_passes_and_to_the_whole(seed, count):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(6, 7, generator=generator)
    weights = torch.randint(0, 2, (6,), generator=generator).float()
    languages = torch.randint(0, count, (6,), generator=generator)
    whole = language_sums(losses, weights, languages, count)
    parts = [language_sums(losses[at], weights[at], languages[at], count) for at in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(whole[:, 0].sum(), (losses.double() * weights[:, None]).sum())
    assert whole[:, 1].sum() == 7 * weights.sum()


def test_bytes_seen_follow_from_the_step_and_are_exact_after_an_epoch():
    mixture = Mixture(names=("eng", "swe"), weights=(3.0, 1.0), sizes=(75, 25), seed=1)
    corpora = {"eng": (75 * 16 * 4 + 3, 75 * 16), "swe": (25 * 16 * 3, 25 * 16)}
    tokens = {name: used.tokens for name, used in mixture.usage(1000, 16).items()}
    assert bytes_seen(tokens, corpora) == {"eng": 10 * corpora["eng"][0], "swe": 10 * corpora["swe"][0]}
    assert bytes_seen({"swe": 100}, corpora) == {"swe": 300}
