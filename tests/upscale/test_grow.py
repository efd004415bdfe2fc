"""The grown model is the small model's function, whatever is grown, read in whatever boxes."""

from dataclasses import dataclass, replace

import pytest
import torch
from grown_models import loaded, random_source, tied_in_turn

from checkpoint.memory import MemorySource
from checkpoint.safetensors import SafetensorsLayout, open_safetensors
from checkpoint.source import Group, Info, RunState, Source, full_box, read_tensor, row_major_tiles
from checkpoint.writer import write_checkpoint
from parallel.errors import InputError
from upscale.factors import Recipe
from upscale.grow import grow
from upscale.verify import clone_asymmetry, compare

IDS = torch.randint(0, 40, (3, 17), generator=torch.Generator().manual_seed(9))
RECIPES = {
    "double": Recipe(width=2),
    "triple": Recipe(width=3),
    "triple-symmetric": Recipe(width=3, method="symmetric"),
    "ffn": Recipe(ffn=3),
    "hidden-and-heads": Recipe(hidden=2, heads=3, kv_heads=3),
    "hidden": Recipe(hidden=3),
    "heads-alone": Recipe(hidden=2, heads=4, kv_heads=1),
    "heads-more-than-kv": Recipe(width=2, heads=4),
}


@dataclass(frozen=True, kw_only=True)
class Mastered(MemorySource):
    """Weights in bfloat16 with the float32 masters that they were rounded from, and a moment."""

    @property
    def infos(self) -> dict[str, Info]:
        slots = {"weight": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float32}
        return {
            name: info if info.tied_to else replace(info, slots=slots, group="decay")
            for name, info in super().infos.items()
        }

    def read(self, name, box, out, stats=None) -> None:
        for slot, target in out.items():
            value = self.tensors[name][box]
            target.copy_(value.bfloat16() if slot == "weight" else value)


FAMILIES = {
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "olmo2": {"model_type": "olmo2"},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 2 / 3},
    "gpt_neox-in-turn": {"model_type": "gpt_neox", "use_parallel_residual": False, "attention_bias": False},
    "gemma2": {"model_type": "gemma2", "final_logit_softcapping": 30.0, "attn_logit_softcapping": 5.0},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 5},
    "granite": {
        "model_type": "granite",
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
}
VARIANTS = {
    "exact-split": Recipe(width=3),
    "symmetric": Recipe(width=3, method="symmetric"),
    "diagonal": Recipe(width=2, ffn=3, method="diagonal"),
    "noisy-symmetric": Recipe(width=3, method="symmetric", noise_db=10),
    "noisy-diagonal": Recipe(width=2, method="diagonal", noise_db=10),
    "queries-alone": Recipe(hidden=2, heads=4, kv_heads=1, ffn=1),
}
FUSED = {
    "phi3": "q, kv, kv are one matrix in this family and grow alike",
    "gpt_neox": "hidden 2, heads 4 and kv_heads 1: they have to be equal in the gpt_neox family",
}


@pytest.mark.parametrize(("family", "variant", "tied"), tied_in_turn(["llama", *FAMILIES], VARIANTS))
def test_every_variant_keeps_every_family(family: str, variant: str, tied: bool) -> None:
    small = random_source(tied, **FAMILIES.get(family, {}))
    fused = next((why for name, why in FUSED.items() if family.startswith(name)), None)
    if fused and variant == "queries-alone":
        with pytest.raises(InputError, match=fused):
            grow(small, VARIANTS[variant])
        return
    found = compare(loaded(small), loaded(grow(small, VARIANTS[variant])), [IDS])
    assert found.relative <= 1e-5
    assert found.argmax_agreement == 1


def test_diagonal_blocks_are_the_matrix_or_nothing() -> None:
    small = random_source()
    name = "model.layers.0.self_attn.q_proj.weight"
    blocks = read_tensor(grow(small, Recipe(width=3, method="diagonal")), name).view(3, 24, 3, 24)
    for out in range(3):
        for into in range(3):
            wanted = small.tensors[name] if out == into else torch.zeros(24, 24)
            assert torch.equal(blocks[out, :, into], wanted)


def test_noise_has_the_power_asked_for_and_cancels() -> None:
    small = random_source()
    name = "model.layers.0.mlp.up_proj.weight"
    grown = grow(small, Recipe(width=3, method="symmetric", noise_db=10))
    noise = read_tensor(grown, name).double().view(3, 20, 3, 24) - small.tensors[name].double()[:, None] / 3
    assert noise.sum(2).abs().max() < 1e-6
    assert noise[:, :, 2].abs().max() < 1e-7  # an odd last copy has none
    signal = (small.tensors[name].double() / 3).square().mean()
    assert 10 * torch.log10(signal / noise[:, :, :2].square().mean()) == pytest.approx(10, abs=0.6)
    assert torch.corrcoef(torch.stack([noise[0, :, 0].flatten(), noise[1, :, 0].flatten()]))[0, 1].abs() < 0.2
    head = read_tensor(grown, "model.embed_tokens.weight")
    assert torch.equal(head, small.tensors["model.embed_tokens.weight"].repeat(1, 3))


def test_noise_on_an_exact_split_is_refused() -> None:
    with pytest.raises(InputError, match="noise of 10 dB with method exact-split: allowed is 0 to 200"):
        grow(random_source(), Recipe(width=2, noise_db=10))
    with pytest.raises(InputError, match="noise of -7 dB with method diagonal: allowed is 0 to 200"):
        grow(random_source(), Recipe(width=2, method="diagonal", noise_db=-7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_do_not_change(name: str, tied: bool, dtype: torch.dtype) -> None:
    if name == "triple-symmetric" and dtype == torch.bfloat16:
        pytest.skip("a third of a bfloat16 number is none: equal parts are not exact")
    small = random_source(tied, dtype)
    grown = grow(small, RECIPES[name])
    stored = {key: read_tensor(grown, key, dtype=dtype) for key, info in grown.infos.items() if info.tied_to is None}
    found = compare(loaded(small), loaded(MemorySource(config=grown.config, tensors=stored)), [IDS])
    assert found.relative <= 1e-5
    assert found.loss_difference <= 1e-5 and found.mean_kl <= 1e-6
    with torch.no_grad():
        assert loaded(small)(input_ids=IDS).logits.std() > 1  # The models say something.


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_in_bfloat16_is_exact_but_for_the_norms_that_the_stream_is_scaled_by(family: str, factor: int) -> None:
    small = random_source(dtype=torch.bfloat16, model_type=family)
    grown = grow(small, Recipe(width=factor))
    rounded, fine = {}, {}
    for name, info in grown.infos.items():
        if info.tied_to is None:
            rounded[name] = read_tensor(grown, name, dtype=torch.bfloat16)
            scaled = "post_attention" in name or "post_feedforward" in name
            wanted = (small.tensors[name].float() + 1) * factor**0.5 - 1 if scaled else None
            fine[name] = rounded[name] if wanted is None else wanted.repeat(factor)
            if wanted is not None:
                # Rounded in turn: the mean over copies is nearer than any one of them can be.
                off = (rounded[name].double().view(factor, -1).mean(0) - wanted).abs()
                assert (off <= 2.0**-8 / factor * wanted.abs() + 1e-6).all()
    exact = compare(loaded(small), loaded(MemorySource(config=grown.config, tensors=fine)), [IDS])
    assert exact.relative <= 1e-5
    found = compare(loaded(small), loaded(MemorySource(config=grown.config, tensors=rounded)), [IDS])
    assert found.relative <= 2**-8
    norm = rounded["model.norm.weight"].double().view(factor, -1)
    assert torch.equal((1 + norm).sum(0), 1 + small.tensors["model.norm.weight"].double())
    assert len({tuple(row.tolist()) for row in norm}) == factor


def test_copies_without_division_are_noticed() -> None:
    """What the comparison finds if the tied final norm is tiled and not divided."""
    small = random_source()
    grown = grow(small, Recipe(width=2))
    tensors = {name: read_tensor(grown, name) for name, info in grown.infos.items() if info.tied_to is None}
    tensors["model.norm.weight"] = small.tensors["model.norm.weight"].repeat(2)
    found = compare(loaded(small), loaded(MemorySource(config=grown.config, tensors=tensors)), [IDS])
    assert found.relative == pytest.approx(1, rel=1e-3) and found.mean_kl > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_symmetric_is_hypercloning_bit_for_bit(dtype: torch.dtype) -> None:
    small = random_source(False, dtype)
    grown = grow(small, Recipe(width=3, ffn=2, method="symmetric"))
    n, m = 3, 2
    layer = "model.layers.1."
    wanted = {
        "model.embed_tokens.weight": lambda w: w.repeat(1, n),
        "lm_head.weight": lambda w: w.repeat(1, n) / n,
        "model.norm.weight": lambda w: w.repeat(n),
        layer + "input_layernorm.weight": lambda w: w.repeat(n),
        layer + "self_attn.q_proj.weight": lambda w: w.repeat(n, n) / n,
        layer + "self_attn.k_proj.weight": lambda w: w.repeat(n, n) / n,
        layer + "self_attn.o_proj.weight": lambda w: w.repeat(n, n) / n,
        layer + "mlp.gate_proj.weight": lambda w: w.repeat(m, n) / n,
        layer + "mlp.down_proj.weight": lambda w: w.repeat(n, m) / m,
    }
    for name, formula in wanted.items():
        assert torch.equal(read_tensor(grown, name, dtype=dtype), formula(small.tensors[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_symmetric_is_nanotrons_rule_bit_for_bit(dtype: torch.dtype) -> None:
    """The paper's fork: fused tensors grown part by part, tied embeddings copied, the head divided as it is used."""
    small = random_source(True, dtype)
    n = 2
    grown = grow(small, Recipe(width=n, method="symmetric"))

    def fused(source: Source, *names: str) -> torch.Tensor:
        return torch.cat([read_tensor(source, f"model.layers.1.{name}.weight", dtype=dtype) for name in names])

    def tiled(matrix: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return torch.cat([part.repeat(n, n) / n for part in matrix.split(sizes)])

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert torch.equal(fused(grown, *qkv), tiled(fused(small, *qkv), [24, 12, 12]))
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    assert torch.equal(fused(grown, *gate_up), tiled(fused(small, *gate_up), [20, 20]))
    embedding = small.tensors["model.embed_tokens.weight"].repeat(1, n)
    assert torch.equal(read_tensor(grown, "model.embed_tokens.weight", dtype=dtype), embedding)
    # Theirs divides the head by n in every pass and leaves the final norm; ours divides the norm: the same products.
    norm = small.tensors["model.norm.weight"].repeat(n)
    hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    theirs = torch.nn.functional.linear(hidden * norm, embedding / n)
    ours = torch.nn.functional.linear(hidden * read_tensor(grown, "model.norm.weight", dtype=dtype), embedding)
    assert torch.equal(ours, theirs)


def test_tied_final_norm_is_divided() -> None:
    small = random_source()
    for recipe in (Recipe(width=3), Recipe(width=3, method="symmetric")):
        found = read_tensor(grow(small, recipe), "model.norm.weight").double().view(3, -1)
        torch.testing.assert_close(found.sum(0), small.tensors["model.norm.weight"].double(), rtol=1e-7, atol=0)
        assert (recipe.method == "symmetric") == torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_split_adds_up_in_every_block_row(dtype: torch.dtype) -> None:
    small = random_source(dtype=dtype)
    name = "model.layers.0.mlp.down_proj.weight"
    blocks = read_tensor(grow(small, Recipe(width=2, ffn=3)), name, dtype=dtype).double().view(2, 24, 3, 20)
    for block in blocks:
        assert torch.equal(block.sum(1), small.tensors[name].double())
    assert not torch.equal(blocks[0], blocks[1])


def test_output_in_a_narrower_dtype_adds_up_too() -> None:
    small = random_source()
    name = "model.layers.0.self_attn.q_proj.weight"
    found = read_tensor(grow(small, Recipe(width=3)), name, dtype=torch.bfloat16).double().view(3, 24, 3, 24)
    assert torch.equal(found.sum(2), small.tensors[name].bfloat16().double().expand(3, 24, 24))


@pytest.mark.parametrize("recipe", [*VARIANTS.values(), Recipe(width=2, heads=4)])
def test_boxes_do_not_matter(recipe: Recipe) -> None:
    grown = grow(random_source(), recipe)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        shape = grown.infos[name].shape
        whole = torch.empty(shape)
        grown.read(name, full_box(shape), {"weight": whole})
        for size in (7, 50, 1000):
            pieces = torch.full(shape, torch.nan)
            for box in reversed(row_major_tiles(shape, size)):
                grown.read(name, box, {"weight": pieces[box]})
            assert torch.equal(pieces, whole)
        columns = torch.full(shape, torch.nan)
        for start in range(0, shape[-1], 5):
            box = (*full_box(shape[:-1]), slice(start, min(start + 5, shape[-1])))
            grown.read(name, box, {"weight": columns[box]})
        assert torch.equal(columns, whole)


def test_seed_decides_the_shares_and_nothing_else_does() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    first, again, other = (read_tensor(grow(random_source(), Recipe(width=2, seed=seed)), name) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    other_layer = read_tensor(grow(random_source(), Recipe(width=2, seed=1)), name.replace("0", "1"))
    small = random_source().tensors
    ratio, other_ratio = (
        (grown[:20, :24] / small[key]) for grown, key in ((first, name), (other_layer, name.replace("0", "1")))
    )
    assert abs(torch.corrcoef(torch.stack([ratio.flatten(), other_ratio.flatten()]))[0, 1]) < 0.2


@pytest.mark.parametrize("recipe", [Recipe(width=2), Recipe(width=2, heads=4)], ids=["tile", "grouped"])
def test_copies_differ_after_the_exact_split_and_are_equal_after_the_symmetric_one(recipe: Recipe) -> None:
    for name in ("q_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        split, equal = grow(random_source(), recipe), grow(random_source(), replace(recipe, method="symmetric"))
        assert clone_asymmetry(read_tensor(equal, name), equal.growths(name)) == 0
        assert 0.2 < clone_asymmetry(read_tensor(split, name), split.growths(name)) < 0.6
    embedding = "model.embed_tokens.weight"
    assert clone_asymmetry(read_tensor(split, embedding), split.growths(embedding)) == 0


def test_asymmetry_is_the_spread_of_copies_around_their_mean() -> None:
    grown = grow(random_source(), Recipe(width=2))
    tensor = torch.cat([torch.full((24,), 3.0), torch.full((24,), 5.0)])
    assert clone_asymmetry(tensor, grown.growths("model.norm.weight")) == pytest.approx(1 / 4)
    assert clone_asymmetry(torch.zeros(48), grown.growths("model.norm.weight")) == 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_growing_twice(tied: bool) -> None:
    small = random_source(tied)
    twice = grow(grow(small, Recipe(width=2)), Recipe(width=3, ffn=1))
    assert twice.config["hidden_size"] == 24 * 6 and twice.config["intermediate_size"] == 40
    assert compare(loaded(small), loaded(twice), [IDS]).relative <= 1e-5


def test_a_second_growth_has_shares_of_its_own() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    small = random_source()
    once = grow(small, Recipe(width=2))
    twice = grow(once, Recipe(width=2))
    first, second, third = small.tensors[name], read_tensor(once, name), read_tensor(twice, name)
    assert abs(second[0, 0] / first[0, 0] - third[0, 0] / second[0, 0]) > 1e-3


def test_master_rounds_to_the_weight_and_keeps_the_function() -> None:
    small = random_source()
    source = Mastered(config=small.config, tensors=small.tensors)
    grown = grow(source, Recipe(width=2))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert set(grown.infos[name].slots) == {"weight", "master"}
    shape = grown.infos[name].shape
    both = {"weight": torch.empty(shape, dtype=torch.bfloat16), "master": torch.empty(shape)}
    grown.read(name, full_box(shape), both)
    assert torch.equal(both["master"].bfloat16(), both["weight"])
    assert torch.equal(read_tensor(grown, name, "master"), both["master"])
    assert torch.equal(read_tensor(grown, name, dtype=torch.bfloat16), both["weight"])
    masters = {key: read_tensor(grown, key, "master") for key, info in grown.infos.items() if info.tied_to is None}
    found = compare(loaded(small), loaded(MemorySource(config=grown.config, tensors=masters)), [IDS])
    rounded = compare(loaded(small), loaded(source), [IDS])
    assert found.relative < 0.1 * rounded.relative


def test_written_by_any_number_of_workers_and_loaded_again(tmp_path, monkeypatch) -> None:
    grown: Source = grow(random_source(), Recipe(width=2))
    one = write_checkpoint(grown, tmp_path / "one", SafetensorsLayout(), workers=1)
    two = write_checkpoint(grown, tmp_path / "two", SafetensorsLayout(), workers=2)
    assert one == two
    again = open_safetensors(tmp_path / "one")
    assert dict(again.config) == {**grown.config, "dtype": "float32"}
    assert compare(loaded(random_source()), loaded(again), [IDS]).relative <= 1e-5


def test_what_a_grown_source_says_of_itself() -> None:
    small = random_source()
    source = Mastered(
        config=small.config,
        tensors=small.tensors,
        groups={"decay": Group(step=7, weight_decay=0.1)},
        run=RunState(tokens=5, provenance={"name": "seed", "hash": "b", "ancestors": ["a"]}),
    )
    grown = grow(source, Recipe(width=2, seed=4))
    assert grown.groups == {"decay": Group(step=0, weight_decay=0.1)}
    assert grown.infos["model.norm.weight"].group == "decay"
    assert grown.infos["lm_head.weight"] == Info(shape=(40, 48), slots={}, tied_to="model.embed_tokens.weight")
    assert list(grown.infos) == list(small.infos)
    assert grown.run.tokens == 5
    assert grown.run.provenance == {
        "verb": "grow",
        "recipe": {
            "hidden": 2,
            "heads": 2,
            "kv_heads": 2,
            "ffn": 2,
            "method": "exact-split",
            "noise_db": None,
            "state": "reset",
            "seed": 4,
        },
        "parents": [{"name": "seed", "hash": "b"}],
        "ancestors": ["a", "b"],
    }


def test_bad_recipe_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="growth factor of hidden is -1"):
        grow(random_source(), Recipe(width=-1))


def test_weights_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(InputError) as error:
        grow(random_source(dtype=torch.float64), Recipe(width=2))
    assert str(error.value) == (
        "model.embed_tokens.weight: unknown dtype to grow torch.float64: "
        "allowed are torch.float32, torch.bfloat16, torch.float16; did you mean 'torch.float16'?"
    )
