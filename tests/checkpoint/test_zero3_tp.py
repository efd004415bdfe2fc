"""ZeRO-3 folders of tensor-parallel runs that real DeepSpeed wrote, read as whole tensors; and what does not fit."""

import shutil

import pytest
import torch
from plain_runs import assert_read, resumed, train
from tiny import on_ranks

from checkpoint.open import format_of, open_checkpoint
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from checkpoint.zero3_tp import bounds
from parallel.errors import InputError

UNEVEN = {"tie_word_embeddings": False, "intermediate_size": 49, "attention_bias": True}
FAST = {"two": {"zero": {"stage": 3}, "bf16": False, "tensor": 2, "model": UNEVEN}}


def whole(found, key, tensor):
    """Join what the tensor-parallel ranks of the first data-parallel rank gathered; one that is not cut is equal."""
    ranks = [found[rank][key][0] for rank in range(tensor)]
    cut = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    joined = {}
    for name, slots in ranks[0].items():
        joined[name] = {}
        for slot in slots:
            parts = [rank[name][slot] for rank in ranks]
            if any(part in name for part in cut):
                joined[name][slot] = torch.cat(parts, 0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                joined[name][slot] = torch.cat(parts, 1)
            else:
                assert all(torch.equal(part, parts[0]) for part in parts), (name, slot)
                joined[name][slot] = parts[0]
    return joined


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of 2 tensor-parallel ranks: 131 rows of the head are 66 + 65, 49 features 25 + 24."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "run", on_ranks(folder, 2, train, str(folder / "run"), FAST)


def test_every_element_of_every_slot_is_read_as_the_ranks_gather_it(two):
    folder, found = two
    assert format_of(folder / "two") == "zero3_tp"
    source = open_checkpoint(folder / "two")
    assert [tuple(rank["two"][0]["lm_head.weight"]["weight"].shape) for rank in found] == [(66, 32), (65, 32)]
    assert_read(source, whole(found, "two", 2))
    assert {name: group.step for name, group in source.groups.items()} == {"decay": 3, "no_decay": 3, "last": 3}
    assert (source.run.step, source.run.tokens, source.run.samples) == (3, 7, 9)
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        part, all_of_it = torch.empty(20, 7), whole(found, "two", 2)[name]["exp_avg"]
        rows = slice(60, 80) if "head" in name else slice(3, 23)
        source.read(name, (rows, slice(21, 28)), {"exp_avg": part})
        assert torch.equal(part, all_of_it[rows, 21:28]), name


MORE = {
    "bfloat16": {"zero": {"stage": 3}, "bf16": True, "tensor": 2, "frozen": ["embed_tokens", "layers.1.mlp"]},
    "float32": {"zero": {"stage": 3}, "bf16": False, "tensor": 2, "model": UNEVEN},
}
THREE = {
    "three": {
        "zero": {"stage": 3},
        "bf16": False,
        "tensor": 3,
        "model": {**UNEVEN, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
    }
}


@pytest.mark.slow
def test_any_ranks_are_read_and_the_run_goes_on_without_tensor_parallelism(tmp_path):
    found = on_ranks(tmp_path, 4, train, str(tmp_path / "run"), MORE)
    for key, variant in MORE.items():
        source = open_checkpoint(tmp_path / "run" / key)
        assert_read(source, whole(found, key, 2))
        write_checkpoint(source, tmp_path / "plain" / key, Zero3Layout(ranks=3, bf16=variant["bf16"]), workers=2)
        plain = open_checkpoint(tmp_path / "plain" / key)
        assert plain.infos == source.infos
        for name, info in source.infos.items():
            for slot in info.slots:
                assert torch.equal(read_tensor(plain, name, slot), read_tensor(source, name, slot)), (name, slot)
    losses = on_ranks(tmp_path, 2, resumed, str(tmp_path / "run" / "float32"))[0]
    assert losses == pytest.approx(found[0]["float32"][1], abs=1e-5)

    found = on_ranks(tmp_path, 3, train, str(tmp_path / "run"), THREE)
    assert_read(open_checkpoint(tmp_path / "run" / "three"), whole(found, "three", 3))


@pytest.mark.parametrize(
    ("shape", "split", "pieces", "expected"),
    [
        ((131, 32), "vocab", [(131, 32), (131, 32)], None),
        ((131, 32), "vocab", [(66, 32), (65, 32)], (0, [0, 66, 131])),
        ((32, 49), "row", [(32, 17), (32, 16), (32, 16)], (1, [0, 17, 33, 49])),
        ((49,), "column", [(25,), (24,)], (0, [0, 25, 49])),
        ((32,), "none", [(32,), (32,)], None),
        ((32,), "none", [(16,), (16,)], "is never cut"),
        ((32, 49), "row", [(16, 49), (16, 49)], "is cut along dim 1"),
        ((32, 49), "column", [(16, 49), (15, 49)], "has 32 along dim 0"),
    ],
)
def test_where_a_tensor_is_cut(shape, split, pieces, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            bounds(shape, split, pieces)
    else:
        assert bounds(shape, split, pieces) == expected


def edit_shapes(folder, edit, rank=1):
    path = folder / f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt"
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink(),
            "zero_pp_rank_0_mp_rank_01_optim_states.pt: missing",
        ),
        (
            lambda folder: (folder / "zero_pp_rank_0_mp_rank_01_model_states.pt").unlink(),
            "zero_pp_rank_0_mp_rank_01_model_states.pt: missing (the checkpoint has tensor parallelism 2)",
        ),
        (
            lambda folder: edit_shapes(folder, lambda state: state["param_shapes"][0].pop("lm_head.weight")),
            "zero_pp_rank_0_mp_rank_01_model_states.pt: tensor lm_head.weight is missing",
        ),
        (
            lambda folder: edit_shapes(
                folder, lambda state: state["param_shapes"][0].update({"lm_head.weight": torch.Size((66, 32))})
            ),
            "lm_head.weight has pieces (66, 32) + (66, 32); config.json says (131, 32), which has 131 along dim 0",
        ),
        (
            lambda folder: edit_shapes(folder, lambda state: state.update(mp_world_size=3)),
            "zero_pp_rank_0_mp_rank_02_model_states.pt: missing",
        ),
        (
            lambda folder: edit_shapes(
                folder, lambda state: state["universal_checkpoint_info"].update(parameter_with_sub_params=[1]), 0
            ),
            "zero_pp_rank_0_mp_rank_00_model_states.pt: has fused tensors",
        ),
        (lambda folder: edit_shapes(folder, dict.clear), "_mp_rank_01_model_states.pt: no param_shapes, so not the"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_the_file(two, tmp_path, damage, words):
    folder = tmp_path / "copy"
    shutil.copytree(two[0] / "two", folder)
    damage(folder)
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(folder).infos
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)
