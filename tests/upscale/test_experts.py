"""Models with experts: any growth keeps them, stock transformers is the judge, and Adam's moments follow the rule."""

import json
import re
from math import prod
from pathlib import Path

import pytest
import torch
from grown_models import config, loaded, random_source, tied_in_turn
from safetensors.torch import load_file
from test_depth import LAYERS, Trained
from test_grow import IDS, VARIANTS
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import full_box, read_tensor
from checkpoint.tensor_parallel import cuts_of
from checkpoint.writer import write_checkpoint
from parallel.errors import InputError
from parallel.families import family_of
from parallel.mesh import Mesh, check_model
from parallel.timing import flops_per_token
from upscale.factors import Recipe
from upscale.grow import grow
from upscale.verify import check_gradients, compare

MOE = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    },
}
UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
ROUTER = "model.layers.1.mlp.gate.weight"


def stock(family: str, tied: bool = False, **changes: object) -> PreTrainedModel:
    """What transformers makes of a config, its weights large enough for logits of some size."""
    settings = config(tied, **{**MOE[family], **changes})
    kind = settings.pop("model_type")
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    return model.eval()


def names_in(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize(("family", "variant", "tied"), tied_in_turn(MOE, VARIANTS))
def test_every_variant_keeps_every_family(family: str, variant: str, tied: bool) -> None:
    small = random_source(tied, **MOE[family])
    before = loaded(small)
    found = compare(before, loaded(grow(small, VARIANTS[variant])), [IDS])
    assert found.relative <= 1e-5
    assert found.argmax_agreement == 1
    with torch.no_grad():
        assert before(input_ids=IDS).logits.std() > 1  # the models say something


@pytest.mark.parametrize("family", MOE)
def test_a_stock_model_is_read_grown_and_written_as_transformers_itself_would(family: str, tmp_path: Path) -> None:
    small = stock(family)
    small.save_pretrained(tmp_path / "small")
    assert any(re.search(r"\.experts\.0\.", name) for name in names_in(tmp_path / "small"))
    source = open_checkpoint(tmp_path / "small")
    for name, parameter in small.named_parameters():
        assert torch.equal(read_tensor(source, name), parameter), name
    assert source.family.parameters(source.config) == sum(parameter.numel() for parameter in small.parameters())

    big_folder = tmp_path / "big"
    write_checkpoint(grow(source, Recipe(width=2, ffn=3)), big_folder, SafetensorsLayout(shard_size=60_000))
    big = AutoModelForCausalLM.from_pretrained(big_folder).eval()
    assert compare(small, big, [IDS]).relative <= 1e-5
    assert len(list(big_folder.glob("*.safetensors"))) > 1
    weight_map = json.loads((big_folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == names_in(big_folder)
    big.save_pretrained(tmp_path / "theirs")
    ours = {name: tensor for file in set(weight_map.values()) for name, tensor in load_file(big_folder / file).items()}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for key in source.family.widths.values():
        assert getattr(big.config, key) == 3 * getattr(small.config, key)


@pytest.mark.parametrize(("family", "tied"), tied_in_turn(MOE))
def test_identity_layers_keep_every_family_and_learn(family: str, tied: bool) -> None:
    small = random_source(tied, **LAYERS, **MOE[family])
    before = loaded(small)
    for recipe in (Recipe(depth="identity", layers=6), Recipe(width=2, ffn=3, depth="identity", layers=8)):
        after = loaded(grow(small, recipe))
        assert after.config.num_hidden_layers == recipe.layers
        assert compare(before, after, [IDS]).relative <= 1e-5
        after(input_ids=IDS, labels=IDS).loss.backward()
        gradients = dict(after.named_parameters())
        sizes = [gradients[f"model.layers.{layer}.mlp.experts.down_proj"].grad.norm() for layer in range(recipe.layers)]
        assert min(sizes) / max(sizes) > 0.01
    silent = read_tensor(grow(small, Recipe(depth="identity", layers=6)), "model.layers.2.mlp.experts.down_proj")
    assert not silent.any()


@pytest.mark.parametrize(
    "recipe",
    [Recipe(to_hidden=32, to_ffn=28), Recipe(to_heads=6, to_kv_heads=3), Recipe(width=2, to_hidden=60)],
    ids=["sizes", "heads", "width"],
)
@pytest.mark.parametrize("family", MOE)
def test_padding_keeps_every_family(family: str, recipe: Recipe) -> None:
    small = random_source(**MOE[family])
    found = grow(small, recipe)
    # eps 1e-5 of heads' norms beside mean squares of about 1 changes by a third.
    bound = 1e-4 if family == "qwen3_moe" and recipe.to_hidden else 1e-5
    assert compare(loaded(small), loaded(found), [IDS]).relative <= bound
    if recipe.to_ffn:
        assert found.infos[DOWN].shape[1:] == (32, 28)
        assert found.infos[UP].shape[1:] == (56, 32)


@pytest.mark.parametrize("family", MOE)
def test_a_larger_head_dim_keeps_the_families_without_norms_of_heads(family: str) -> None:
    small = random_source(**MOE[family])
    if family == "qwen3_moe":
        with pytest.raises(InputError, match="its norms of heads would mix what is new with what is there"):
            grow(small, Recipe(to_head_dim=12))
        return
    assert compare(loaded(small), loaded(grow(small, Recipe(to_head_dim=12))), [IDS]).relative <= 1e-5


@pytest.mark.parametrize("method", ["exact-split", "symmetric", "diagonal"])
def test_shares_of_an_expert_add_up_to_its_matrix_and_no_other_s(method: str) -> None:
    small = random_source(**MOE["mixtral"])
    found = read_tensor(grow(small, Recipe(width=2, method=method)), DOWN).double().view(4, 2, 24, 2, 20)
    whole = small.tensors[DOWN].double()
    torch.testing.assert_close(found.sum(3), whole[:, None].expand(4, 2, 24, 20), rtol=1e-6, atol=1e-7)
    share = (found[:, 0, :, 0] / whole).flatten(1)
    if method == "exact-split":
        assert torch.corrcoef(share).fill_diagonal_(0).abs().max() < 0.3  # each expert has random numbers of its own
    elif method == "diagonal":
        assert torch.equal(found[:, 0, :, 0], whole) and torch.equal(found[:, 1, :, 1], whole)
        assert not found[:, 0, :, 1].any() and not found[:, 1, :, 0].any()
    else:
        assert (share - 0.5).abs().max() < 1e-6


def test_gate_and_up_are_copied_each_by_itself() -> None:
    small = random_source(**MOE["mixtral"])
    found = read_tensor(grow(small, Recipe(ffn=3)), UP)
    gate, up = small.tensors[UP].split(20, dim=1)
    assert torch.equal(found, torch.cat([gate.repeat(1, 3, 1), up.repeat(1, 3, 1)], dim=1))
    router = read_tensor(grow(small, Recipe(hidden=2, method="symmetric")), ROUTER)
    assert torch.equal(router, small.tensors[ROUTER].repeat(1, 2) / 2)


@pytest.mark.parametrize("recipe", [*VARIANTS.values(), Recipe(to_hidden=32, to_ffn=28)])
def test_boxes_do_not_matter(recipe: Recipe) -> None:
    grown = grow(random_source(**MOE["mixtral"]), recipe)
    for name in (UP, DOWN, ROUTER):
        stats = grown.collect(name, map)
        whole = torch.empty(grown.infos[name].shape)
        grown.read(name, full_box(whole.shape), {"weight": whole}, stats)
        box = (slice(1, 3), *((slice(3, 19),) if whole.dim() == 3 else ()), slice(2, 17))
        part = torch.empty([one.stop - one.start for one in box])
        grown.read(name, box, {"weight": part}, stats)
        assert torch.equal(part, whole[box])


@pytest.mark.parametrize(("family", "tied"), tied_in_turn(MOE))
def test_gradients_follow_the_rule(family: str, tied: bool) -> None:
    small = random_source(tied, **MOE[family])
    for recipe in (Recipe(width=2, ffn=3, method="symmetric"), Recipe(width=2, method="diagonal"), Recipe(width=3)):
        grown = grow(small, recipe)
        names = [name for name, info in grown.infos.items() if info.tied_to is None]
        growths, rules = ({name: of(name) for name in names} for of in (grown.growths, grown.rule))
        found = check_gradients(loaded(small), loaded(grown), IDS, growths, rules)
        assert found.mean < 1e-4
        assert (found.single < 1e-4) == (recipe.method != "exact-split")


def test_moments_follow_the_formula_element_by_element() -> None:
    """By hand, for hidden 2 and ffn 3: copies by dim, and the divisor of the gradient, which are those of outputs."""
    plain = random_source(False, **MOE["qwen2_moe"])
    grown = grow(Trained(config=plain.config, tensors=plain.tensors), Recipe(width=2, ffn=3, state="scaled"))
    halves = plain.tensors[UP].split(12, dim=1)
    fused = torch.cat([half.repeat(1, 3, 2) for half in halves], dim=1)
    block = "model.layers.1.mlp."
    table = {
        UP: (fused, 3),
        DOWN: (plain.tensors[DOWN].repeat(1, 2, 3), 2),
        ROUTER: (plain.tensors[ROUTER].repeat(1, 2), 1),
        f"{block}shared_expert.up_proj.weight": (plain.tensors[f"{block}shared_expert.up_proj.weight"].repeat(3, 2), 3),
        f"{block}shared_expert.down_proj.weight": (
            plain.tensors[f"{block}shared_expert.down_proj.weight"].repeat(2, 3),
            2,
        ),
        f"{block}shared_expert_gate.weight": (plain.tensors[f"{block}shared_expert_gate.weight"].repeat(1, 2), 1),
    }
    for name, (copies, divisor) in table.items():
        for slot, factor, power in (("exp_avg", 3, 1), ("exp_avg_sq", 5, 2)):
            wanted = copies * factor / divisor**power
            torch.testing.assert_close(read_tensor(grown, name, slot), wanted, rtol=1e-6, atol=1e-7)
    assert grown.rule(UP).r_in == 2 and grown.rule(DOWN).r_in == 3 and grown.rule(ROUTER).r_in == 2


def test_a_model_from_scratch_has_other_numbers_in_each_expert() -> None:
    source = ScratchSource(config=config(**{**MOE["mixtral"], "hidden_size": 64}), seed=3)
    whole = read_tensor(source, DOWN)
    assert torch.corrcoef(whole.flatten(1)).fill_diagonal_(0).abs().max() < 0.2
    assert whole.std() == pytest.approx(1 / (64 * 4) ** 0.5, rel=0.1)  # 1/sqrt(hidden) / sqrt(2 * layers)
    box = (slice(2, 4), slice(5, 9), slice(1, 8))
    part = torch.empty(2, 4, 7)
    source.read(DOWN, box, {"weight": part})
    assert torch.equal(part, whole[box])


def test_a_token_is_multiplied_with_the_experts_that_it_is_sent_to() -> None:
    settings = config(False, **MOE["mixtral"])
    model = loaded(random_source(False, **MOE["mixtral"]))
    count = {name: parameter.numel() for name, parameter in model.named_parameters() if "embed_tokens" not in name}
    active = sum(size * (2 / 4 if ".experts." in name else 1) for name, size in count.items())
    assert flops_per_token(settings, 0) == 6 * active
    assert family_of(settings).idle(settings) == sum(size for name, size in count.items() if ".experts." in name) / 2


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2: of qwen2_moe only models with 1 are"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]: of qwen3_moe only models with \[\] are"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts of a mixtral model is None: allowed are whole"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts of a qwen3_moe model is 0: allowed are whole numbers from 1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but num_local_experts is 4"),
        ("qwen2_moe", {"moe_intermediate_size": "12"}, "moe_intermediate_size of a qwen2_moe model is '12'"),
    ],
)
def test_a_config_that_no_table_describes_is_one_line(family: str, changes: dict, message: str, tmp_path: Path) -> None:
    settings = config(**{**MOE[family], **changes})
    with pytest.raises(InputError, match=message):
        family_of(settings)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}/config.json: {message}") as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_may_lack_what_has_one_meaning() -> None:
    settings = config(**MOE["qwen2_moe"])
    tensors = family_of(settings).tensors(settings)
    assert "model.layers.0.self_attn.q_proj.bias" in tensors  # qkv_bias is true unless it is said not to be
    assert "model.layers.0.self_attn.q_proj.bias" not in family_of(settings).tensors({**settings, "qkv_bias": False})
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in MOE["qwen3_moe"].items()}
    assert family_of(config(**renamed)).experts_of(config(**renamed)) == 4  # as transformers itself saves it
    assert prod(tensors[UP].shape) == 5 * 24 * 24


@pytest.mark.parametrize("family", MOE)
def test_experts_are_not_cut_over_tensor_parallel_ranks(family: str) -> None:
    small = random_source(**MOE[family])
    message = f"{family} has experts, all of a layer in one tensor"
    with pytest.raises(InputError, match=f"2 tensor-parallel ranks: {message}"):
        cuts_of(small, 2)
    with pytest.raises(InputError, match=f"parallel.tp is 2: {message}"):
        check_model(Mesh(dp=1, tp=2, sp=1), small.config, 8)
