"""Layers are added: which, in which order, and whether the function stays; with width and a new vocabulary, too."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from grown_models import loaded, random_source, tied_in_turn
from test_grow import FAMILIES, IDS

from checkpoint.memory import MemorySource
from checkpoint.source import Group, Info, full_box, read_tensor
from parallel.errors import InputError
from upscale.factors import Recipe
from upscale.grow import grow
from upscale.layers import blocks_of, is_exact
from upscale.verify import compare
from upscale.vocabulary import rows_of, with_vocabulary

LAYERS = {"num_hidden_layers": 4}
MAPS = {
    "stack": (8, [0, 1, 2, 3, 0, 1, 2, 3]),
    "interleave": (8, [0, 0, 1, 1, 2, 2, 3, 3]),
    "solar": (6, [0, 1, 2, 1, 2, 3]),
    "identity": (6, [0, 1, 1, 2, 3, 3]),
    "0-2,1,3": (None, [0, 1, 2, 1, 3]),
}


@pytest.mark.parametrize("depth", MAPS)
def test_layers_stand_where_the_method_says(depth: str) -> None:
    layers, wanted = MAPS[depth]
    blocks = blocks_of(depth, layers, 4)
    assert [block.source for block in blocks] == wanted
    assert [number for number, block in enumerate(blocks) if block.identity] == ([2, 5] if depth == "identity" else [])
    assert is_exact(blocks) == (depth == "identity")


def test_identity_blocks_stand_at_even_distances() -> None:
    assert [block.source for block in blocks_of("identity", 6, 2)] == [0, 0, 0, 1, 1, 1]
    assert [block.identity for block in blocks_of("identity", 6, 2)] == [False, True, True] * 2
    assert [block.source for block in blocks_of("identity", 40, 32) if block.identity] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert blocks_of("identity", 4, 4) == blocks_of(None, None, 4) == blocks_of("stack", 4, 4)


LAST = {("gemma", "olmo2"): "post_feedforward_layernorm", ("gpt_neox",): "mlp.dense_4h_to_h"}
"""What a layer ends with."""


@pytest.mark.parametrize(("family", "tied"), tied_in_turn(["llama", *FAMILIES]))
def test_identity_keeps_every_family_with_width_and_without(family: str, tied: bool) -> None:
    small = random_source(tied, **LAYERS, **FAMILIES.get(family, {}))
    before = loaded(small)
    for recipe in (Recipe(depth="identity", layers=6), Recipe(width=2, ffn=3, depth="identity", layers=8)):
        after = loaded(grow(small, recipe))
        assert after.config.num_hidden_layers == recipe.layers
        assert compare(before, after, [IDS]).relative <= 1e-5
        # The new blocks can be trained: what is zero in them has a gradient, and no gradient explodes.
        after(input_ids=IDS, labels=IDS).loss.backward()
        gradients = {name: parameter.grad for name, parameter in after.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        last = next((name for families, name in LAST.items() if family.startswith(families)), "mlp.down_proj")
        prefix = f"{after.base_model_prefix}.layers"
        sizes = [gradients[f"{prefix}.{layer}.{last}.weight"].norm() for layer in range(recipe.layers)]
        assert min(sizes) / max(sizes) > 0.01


@pytest.mark.parametrize("depth", ["stack", "interleave", "solar", "0-2,1,3"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen2"])
def test_other_methods_are_the_stock_model_with_its_layers_moved(family: str, depth: str, capsys) -> None:
    """And its loss right after growth is said beside the small one's."""
    layers, wanted = MAPS[depth]
    small = random_source(**LAYERS, **FAMILIES.get(family, {}))
    before, oracle = loaded(small), loaded(small)
    oracle.model.layers = torch.nn.ModuleList(copy.deepcopy(before.model.layers[layer]) for layer in wanted)
    oracle.config.num_hidden_layers = len(wanted)
    if kinds := getattr(before.config, "layer_types", None):
        oracle.config.layer_types = [kinds[layer] for layer in wanted]
    after = loaded(grow(small, Recipe(depth=depth, layers=layers)))
    with torch.no_grad():
        moved = oracle(input_ids=IDS, use_cache=False).logits
        assert torch.equal(after(input_ids=IDS, use_cache=False).logits, moved)
    found = compare(before, after, [IDS])
    assert found.relative > 1e-3
    with capsys.disabled():
        print(f"\n{family} {depth}: loss {found.loss_small:.3f} -> {found.loss_grown:.3f} right after growth", end="")


@pytest.mark.parametrize(("family", "tied"), tied_in_turn(["llama", *FAMILIES]))
def test_vocabulary_then_width_then_depth(family: str, tied: bool) -> None:
    small = random_source(tied, **LAYERS, **FAMILIES.get(family, {}))
    rows = rows_of([[number] for number in range(40)] + [[3, 4], []])
    found = grow(with_vocabulary(small, rows), Recipe(width=2, depth="identity", layers=6))
    before, after = loaded(small), loaded(found)
    assert (after.config.vocab_size, after.config.hidden_size, after.config.num_hidden_layers) == (42, 48, 6)
    with torch.no_grad():
        logits = after(input_ids=IDS).logits[..., :40]
        wanted = before(input_ids=IDS).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_attention_kinds_go_with_their_layers() -> None:
    small = random_source(**LAYERS, **FAMILIES["gemma2"])  # sliding and full in turn, which its config does not say
    found = grow(small, Recipe(depth="0-2,1,3")).config["layer_types"]
    assert found == [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "full")]
    assert "layer_types" not in grow(random_source(**LAYERS), Recipe(depth="0-2,1,3")).config


@dataclass(frozen=True, kw_only=True)
class Trained(MemorySource):
    """Weights with masters and moments that are multiples of them."""

    @property
    def infos(self) -> dict[str, Info]:
        slots = dict.fromkeys(("weight", "master", "exp_avg", "exp_avg_sq"), torch.float32)
        return {name: replace(info, slots=slots, group="decay") for name, info in super().infos.items()}

    def read(self, name, box, out, stats=None) -> None:
        for slot, target in out.items():
            target.copy_(self.tensors[name][box] * {"exp_avg": 3, "exp_avg_sq": 5}.get(slot, 1))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_moments_go_with_the_layers(family: str) -> None:
    plain = random_source(False, **LAYERS, **FAMILIES.get(family, {}))
    small = Trained(config=plain.config, tensors=plain.tensors, groups={"decay": Group(lr=0.1, step=7)})
    found = grow(small, Recipe(depth="identity", layers=6, state="scaled"))
    assert found.groups == {"decay": Group(lr=0.1, step=7)}
    silent = {"gemma3": ("post_attention_layernorm", "post_feedforward_layernorm")}.get(family, ("o_proj", "down_proj"))
    for name, info in found.infos.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        source = name if layer is None else name.replace(f".{layer}.", f".{MAPS['identity'][1][layer]}.", 1)
        outs = {slot: torch.empty(info.shape) for slot in info.slots}
        found.read(name, full_box(info.shape), outs, found.collect(name, map))
        weight = small.tensors[source]
        assert torch.equal(outs["exp_avg_sq"], weight * 5)
        if layer in (2, 5) and any(part in name for part in silent):
            assert (outs["weight"] == (-1 if family == "gemma3" else 0)).all()
            assert (outs["master"] == outs["weight"]).all()
            assert not outs["exp_avg"].any()
        else:
            assert torch.equal(outs["weight"], weight)
            assert torch.equal(outs["exp_avg"], weight * 3)
    fresh = grow(small, Recipe(depth="identity", layers=6))
    assert all(set(info.slots) == {"weight", "master"} for info in fresh.infos.values())


def test_any_box_is_what_the_whole_has() -> None:
    found = grow(random_source(**LAYERS), Recipe(width=2, depth="stack", layers=8))
    name = "model.layers.6.mlp.up_proj.weight"
    whole = read_tensor(found, name)
    assert torch.equal(whole, read_tensor(found, "model.layers.2.mlp.up_proj.weight"))
    box = (slice(3, 31), slice(5, 44))
    part = torch.empty(28, 39)
    found.read(name, box, {"weight": part}, found.collect(name, map))
    assert torch.equal(part, whole[box])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"depth": "stak", "layers": 8},
            "'stak': allowed are stack, interleave, solar, identity; did you mean 'stack'?",
        ),
        ({"depth": "stack"}, "layers is None with depth stack: say how many the grown model has, from 4 on"),
        ({"depth": "stack", "layers": 6}, "6 layers by stack from 4: allowed are multiples of 4"),
        ({"depth": "interleave", "layers": 9}, "9 layers by interleave from 4: allowed are multiples of 4"),
        ({"depth": "solar", "layers": 7}, "7 layers by solar from 4: allowed are even numbers from 4 to 8"),
        ({"depth": "solar", "layers": 10}, "10 layers by solar from 4: allowed are even numbers from 4 to 8"),
        ({"depth": "identity", "layers": 7}, "7 layers by identity from 4: the number of new ones has to divide 4"),
        ({"depth": "identity", "layers": 3}, "3 layers by identity from 4: the number of new ones has to divide 4"),
        ({"layers": 8}, "8 layers instead of 4: say how by depth, one of stack, interleave, solar, identity"),
        ({"depth": "0-1,3"}, "the map 0-1,3 leaves a hole: layer 2 of 4 is in no layer of the grown model"),
        ({"depth": "0-4"}, "'0-4' in the map 0-4: allowed are layers 0 to 3, as 3 or 0-3"),
        ({"depth": "0-3,2-1"}, "'2-1' in the map 0-3,2-1: allowed are layers 0 to 3"),
        ({"depth": "0-3,x"}, "'x' in the map 0-3,x: allowed are layers 0 to 3"),
        ({"depth": "0-3,0-3", "layers": 8}, "layers 8 beside the map 0-3,0-3: a map says itself how many there are"),
    ],
)
def test_what_cannot_be_made_is_one_line(given: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        grow(random_source(**LAYERS), Recipe(**given))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
