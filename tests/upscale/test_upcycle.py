"""Dense models become mixtures of experts: the same function, routers that use all, one recipe with all the rest."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from grown_models import loaded, random_source
from test_depth import Trained
from test_grow import IDS, Mastered
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint.memory import MemorySource
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Source, full_box, read_tensor
from checkpoint.writer import write_checkpoint
from growmerge.cli import main
from growmerge.schema import GrowStage
from growmerge.shapes import recipe_of
from parallel.errors import InputError
from train.data.tokenizer import train_tokenizer
from upscale.factors import Recipe, grown_config
from upscale.grow import grow
from upscale.siblings import SIBLINGS
from upscale.verify import compare
from upscale.vocabulary import rows_of, with_vocabulary

FOUR = Recipe(experts=4)
SAME = ("rms_norm_eps", "rope_parameters", "num_key_value_heads", "head_dim", "hidden_act", "tie_word_embeddings")
ALSO = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
"""What dense and sparse models alike have in their configs."""
UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
ROUTER = "model.layers.1.mlp.gate.weight"


def dense(family: str, tied: bool = True, dtype: torch.dtype = torch.float32) -> MemorySource:
    """A model whose biases are around 0: around 1 they give all tokens much in common, and one router's choice."""
    source = random_source(tied, dtype, model_type=family)
    shifted = {name: tensor - 1 for name, tensor in source.tensors.items() if name.endswith(".bias")}
    return MemorySource(config=source.config, tensors={**source.tensors, **shifted})


def routed(model: torch.nn.Module, per_token: int) -> list[torch.Tensor]:
    """How many of the test's tokens each expert of each layer gets."""
    with torch.no_grad():
        logits = model(input_ids=IDS, output_router_logits=True).router_logits
    return [torch.bincount(one.topk(per_token).indices.flatten(), minlength=one.shape[1]) for one in logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", SIBLINGS)
def test_every_dense_family_keeps_its_function(family: str, tied: bool, dtype: torch.dtype) -> None:
    small = dense(family, tied, dtype)
    before = loaded(small)
    for recipe in (FOUR, Recipe(experts=5, experts_per_token=3), Recipe(experts=3, experts_per_token=3)):
        grown = grow(small, recipe)
        owned = [name for name, info in grown.infos.items() if info.tied_to is None]
        stored = {name: read_tensor(grown, name, dtype=dtype) for name in owned}
        assert all(info.slots["weight"] == dtype for info in grown.infos.values() if info.tied_to is None)
        after = loaded(MemorySource(config=grown.config, tensors=stored))
        found = compare(before, after, [IDS])
        assert found.relative <= 1e-5 and found.argmax_agreement == 1
        for counts in routed(after, recipe.experts_per_token or 2):
            assert len(counts) == recipe.experts and counts.min() > 0


@pytest.mark.parametrize("family", SIBLINGS)
def test_stock_transformers_loads_what_is_written(family: str, tmp_path: Path) -> None:
    """Of a config that says no more than it has to: what its keys mean when they are missing goes on."""
    plain = random_source(False, model_type=family)
    kept = {key: value for key, value in plain.config.items() if key not in ("rms_norm_eps", "max_position_embeddings")}
    small = MemorySource(config=kept, tensors=plain.tensors)
    write_checkpoint(grow(small, FOUR), tmp_path / "big", SafetensorsLayout())
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    assert type(big).__name__ == json.loads((tmp_path / "big" / "config.json").read_text())["architectures"][0]
    before = loaded(small)
    assert compare(before, big, [IDS]).relative <= 1e-5
    for key in (*SAME, *ALSO):
        assert getattr(big.config, key) == getattr(before.config, key), key
    assert getattr(big.config, "sliding_window", None) in (getattr(before.config, "sliding_window", None), 0)
    assert (big.config.num_experts_per_tok, big.model.layers[0].mlp.experts.num_experts) == (2, 4)


@pytest.mark.parametrize("rope", [{"rope_theta": 77.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 9}}])
def test_the_base_of_rotary_embeddings_goes_with_it(rope: dict) -> None:
    small = random_source(**rope)
    settings = grow(small, FOUR).config
    assert [key for key in ("rope_theta", "rope_parameters") if key in settings] == list(rope)
    theirs = AutoConfig.for_model(**settings).rope_parameters
    assert theirs == AutoConfig.for_model(**small.config).rope_parameters
    assert compare(loaded(small), loaded(grow(small, FOUR)), [IDS]).relative <= 1e-5


@pytest.mark.parametrize("family", SIBLINGS)
def test_experts_are_copies_and_routers_small_random_numbers(family: str) -> None:
    small = random_source(False, model_type=family, initializer_range=0.05)
    grown = grow(small, Recipe(hidden=8, experts=4))
    wide = grow(small, Recipe(hidden=8))
    gate, up, down = (read_tensor(wide, f"model.layers.1.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
    for expert in range(4):
        assert torch.equal(read_tensor(grown, UP)[expert], torch.cat([gate, up]))
        assert torch.equal(read_tensor(grown, DOWN)[expert], down / 2 if family == "qwen2" else down)
    routers = [read_tensor(grown, f"model.layers.{layer}.mlp.gate.weight") for layer in (0, 1)]
    assert routers[0].shape == (4, 8 * 24)
    for router in routers:
        assert router.std() == pytest.approx(0.05, rel=0.1) and abs(router.mean()) < 0.01
    assert not torch.equal(*routers)
    other = grow(small, Recipe(hidden=8, experts=4, seed=1))
    assert not torch.equal(read_tensor(other, ROUTER), routers[1])


def test_everything_at_once_in_one_recipe() -> None:
    """A new vocabulary, then width, sizes that are no multiples, depth, and experts."""
    small = random_source(False)
    rows = rows_of([[number] for number in range(40)] + [[3, 4], []])
    recipe = Recipe(width=2, to_hidden=64, to_ffn=52, depth="identity", layers=4, experts=4, experts_per_token=3)
    after = loaded(grow(with_vocabulary(small, rows), recipe))
    had = (after.config.vocab_size, after.config.hidden_size, after.config.num_hidden_layers)
    assert (*had, after.config.intermediate_size) == (42, 64, 4, 52)
    with torch.no_grad():
        logits, wanted = after(input_ids=IDS).logits[..., :40], loaded(small)(input_ids=IDS).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert all(counts.min() > 0 for counts in routed(after, 3))


@pytest.mark.parametrize("family", SIBLINGS)
def test_what_has_experts_now_is_grown_further(family: str) -> None:
    small = random_source(model_type=family)
    twice = grow(grow(small, FOUR), Recipe(width=2, depth="identity", layers=4))
    assert compare(loaded(small), loaded(twice), [IDS]).relative <= 1e-5


@pytest.mark.parametrize("family", SIBLINGS)
def test_training_tells_experts_apart_and_nothing_is_without_a_gradient(family: str) -> None:
    model = loaded(grow(random_source(model_type=family), FOUR))
    model(input_ids=IDS, labels=IDS).loss.backward()
    first = model.get_parameter(UP).grad
    for expert in range(1, 4):
        assert (first[0] - first[expert]).norm() > 0.1 * first[0].norm()
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad / parameter.grad.norm().clamp_min(1e-9)
    model.zero_grad()
    after = model(input_ids=IDS, labels=IDS).loss
    assert after < loss
    after.backward()
    # The first gradient of a router is zero but for rounding: equal experts do the same. After a step they do not.
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm() > 1e-6, name


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = Recipe(width=2, depth="identity", layers=4, experts=4)
    grown: Source = grow(random_source(model_type="qwen2"), recipe)
    one, two = (write_checkpoint(grown, tmp_path / str(n), SafetensorsLayout(), workers=n) for n in (1, 2))
    assert one == two
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()
    again = write_checkpoint(grow(random_source(model_type="qwen2"), recipe), tmp_path / "3", SafetensorsLayout())
    assert again == one


def test_any_box_is_what_the_whole_has() -> None:
    grown = grow(random_source(False), Recipe(width=2, experts=4))
    for name in (UP, DOWN, ROUTER):
        stats = grown.collect(name, map)
        whole = torch.empty(grown.infos[name].shape)
        grown.read(name, full_box(whole.shape), {"weight": whole}, stats)
        assert torch.equal(read_tensor(grown, name), whole)
        rows = slice(1, 3) if whole.dim() == 2 else slice(31, 47)  # gate and up meet at 40
        box = (*((slice(1, 4),) if whole.dim() == 3 else ()), rows, slice(2, 39))
        part = torch.empty([one.stop - one.start for one in box])
        grown.read(name, box, {"weight": part}, stats)
        assert torch.equal(part, whole[box])


def test_masters_round_to_the_weights() -> None:
    plain = random_source()
    grown = grow(Mastered(config=plain.config, tensors=plain.tensors), Recipe(width=2, experts=4))
    for name in (UP, DOWN, ROUTER):
        info = grown.infos[name]
        assert dict(info.slots) == {"weight": torch.bfloat16, "master": torch.float32} and info.group == "decay"
        both = {"weight": torch.empty(info.shape, dtype=torch.bfloat16), "master": torch.empty(info.shape)}
        grown.read(name, full_box(info.shape), both, grown.collect(name, map))
        assert torch.equal(both["master"].bfloat16(), both["weight"])


MISTAKES = [
    ({}, {"experts": 1}, "experts is 1: allowed are whole numbers from 2 to 10000"),
    ({}, {"experts": 4.0}, "experts is 4.0: allowed are whole numbers from 2"),
    ({}, {"experts": 10**6}, "experts is 1000000: allowed are whole numbers from 2"),
    ({}, {"experts_per_token": 2}, "experts is None: allowed are whole numbers from 2"),
    ({}, {"experts": 4, "experts_per_token": 5}, "experts_per_token is 5 of 4 experts: allowed are whole numbers"),
    ({}, {"experts": 4, "experts_per_token": 1}, "of one the gate is 1 whatever the router says, which then learns"),
    ({}, {"experts": 4, "state": "scaled"}, "experts with the optimizer's state (scaled): no rule is known"),
    (
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        {"experts": 4},
        "mixtral has experts already: experts is for models of llama, mistral, qwen2, qwen3",
    ),
    ({"model_type": "gemma2"}, {"experts": 4}, "gemma2 has no sibling with experts: experts is for models of llama"),
    ({"attention_bias": True}, {"experts": 4}, "attention_bias is True: models of mixtral, which llama with experts"),
    ({"model_type": "qwen3", "use_sliding_window": True}, {"experts": 4}, "use_sliding_window is True: models of"),
    (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        {"experts": 4},
        "layer_types is ['full_attention', 'sliding_attention']: models of qwen2_moe",
    ),
]


@pytest.mark.parametrize(("model", "recipe", "message"), MISTAKES, ids=[message[:40] for *_, message in MISTAKES])
def test_what_cannot_be_made_is_one_line(model: dict, recipe: dict, message: str) -> None:
    plain = random_source(**model)
    with pytest.raises(InputError) as error:
        grow(Trained(config=plain.config, tensors=plain.tensors), Recipe(**recipe))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stage_with_experts_alone_grows_nothing_else() -> None:
    recipe = recipe_of(GrowStage(from_="seed", experts=4), 7)
    assert (recipe.width, recipe.experts, recipe.seed) == (1, 4, 7)
    assert recipe_of(GrowStage(from_="seed", experts=4, width=2), 7).width == 2
    found = grown_config(recipe, random_source().config)
    assert (found["model_type"], found["num_local_experts"], found["hidden_size"]) == ("mixtral", 4, 24)


def test_on_the_command_line_and_verified(tmp_path: Path) -> None:
    text = "Growing keeps what a model knows, and one with experts can learn more. " * 40
    small = tmp_path / "small"
    write_checkpoint(random_source(vocab_size=300), small, SafetensorsLayout())
    train_tokenizer([text], vocab_size=300, folder=small)

    def told(*arguments: str) -> tuple[int, str, str]:
        ran = CliRunner().invoke(main, arguments)
        return ran.exit_code, ran.stdout, ran.stderr

    code, _, err = told("grow", str(small), str(tmp_path / "big"), "--width", "2", "--experts", "4")
    assert code == 0, err
    recipe = json.loads((tmp_path / "big" / "growmerge.json").read_text())["recipe"]
    assert recipe["experts"] == 4 and "experts_per_token" not in recipe
    code, out, err = told("verify", str(small), str(tmp_path / "big"), "--json", "--tokens", "256")
    assert code == 0, err
    found = json.loads(out)
    assert found["preserved"] is True and found["float32"]["relative"] <= 1e-5
    assert found["gradients"] is None and found["asymmetry"] is None
    _, out, _ = told("verify", str(small), str(tmp_path / "big"), "--tokens", "64")
    assert "not checked, as sizes were padded or layers or experts added" in out
    assert "mixtral (mixtral)" in told("inspect", str(tmp_path / "big"))[1]
    write_checkpoint(open_checkpoint(tmp_path / "big"), tmp_path / "copy", SafetensorsLayout())
    ours, copy = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("big", "copy"))
    assert ours == copy
    code, _, err = told("grow", str(small), str(tmp_path / "no"), "--experts", "4", "--experts-per-token", "9")
    assert code == 2 and err.startswith("growmerge: experts_per_token is 9 of 4 experts")
    code, _, err = told("grow", str(tmp_path / "big"), str(tmp_path / "no"), "--experts", "4")
    assert code == 2 and err.startswith("growmerge: mixtral has experts already")
