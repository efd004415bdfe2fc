"""ZeRO-3 folders of tensor-parallel runs: real DeepSpeed's read as whole tensors, ours loaded by it; what does not fit.

How the model is cut: `test_tensor_parallel`.
"""

import shutil

import pytest
import torch
from plain_runs import assert_read, loaded, resumed, train
from tiny import on_ranks, tiny_config
from trained import Trained, assert_same, ds_to_universal

from checkpoint.open import format_of, open_checkpoint
from checkpoint.pickles import load_pickle
from checkpoint.shard import part_of, part_size
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from checkpoint.zero3_tp import bounds
from parallel.errors import InputError
from upscale.grow import Recipe, grow

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
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                joined[name][slot] = torch.cat(parts, 1)
            elif any(part in name for part in cut) or parts[0].shape != parts[-1].shape:
                joined[name][slot] = torch.cat(parts, 0)
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


def assert_same_files(ours, theirs):
    """Compare all tensors, and the shapes and lists about them, of the files of two folders; but not the padding."""
    names = {path.name for path in theirs.glob("*.pt")}
    assert names == {path.name for path in ours.glob("*.pt")}
    for name in sorted(path for path in names if "model" in path):
        one, other = load_pickle(ours / name), load_pickle(theirs / name)
        for key in ("param_shapes", "frozen_param_shapes", "shared_params", "buffer_names"):
            assert one[key] == other[key], (name, key)
        for key in ("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "global_steps"):
            assert one[key] == other[key], (name, key)
        assert [*one["module"]] == [*other["module"]]
        assert {tensor.dtype for tensor in one["module"].values()} == {
            tensor.dtype for tensor in other["module"].values()
        }
        # DeepSpeed says the same once more, by geometry.
        described = {key: other["universal_checkpoint_info"][key] for key in one["universal_checkpoint_info"]}
        assert one["universal_checkpoint_info"] == described
        assert other["universal_checkpoint_info"].keys() - described == {"affine_map"}
        ranks, rank = one["dp_world_size"], int(name.split("_")[3])
        for tensor, shape in other["frozen_param_shapes"].items():
            start, stop = part_of(shape, ranks, rank)
            mine, expected = (file["frozen_param_fragments"][tensor] for file in (one, other))
            assert mine.shape == expected.shape
            assert torch.equal(mine[: stop - start], expected[: stop - start]), tensor
        name = name.replace("model", "optim")
        name = name if name in names else f"bf16_{name}"
        one, other = (load_pickle(folder / name)["optimizer_state_dict"] for folder in (ours, theirs))
        shapes = load_pickle(theirs / name.replace("optim", "model").removeprefix("bf16_"))["param_shapes"]
        assert_same_parts(one["fp32_flat_groups"], other["fp32_flat_groups"], shapes, ranks, rank)
        one, other = one["optimizer_state_dict"], other["optimizer_state_dict"]
        assert one["state"].keys() == other["state"].keys()
        for key in ("exp_avg", "exp_avg_sq"):
            moments = ([state[key] for state in found["state"].values()] for found in (one, other))
            assert_same_parts(*moments, shapes, ranks, rank)
        assert [flat["step"] for flat in one["state"].values()] == [flat["step"] for flat in other["state"].values()]
        for group, expected in zip(one["param_groups"], other["param_groups"], strict=True):
            for key in ("name", "lr", "weight_decay", "betas", "eps", "params"):
                assert group[key] == expected[key], (name, key)


def assert_same_parts(ours, theirs, shapes, ranks, rank):
    """Compare flat buffers, a sub-group each, without what is behind each tensor's part."""
    assert len(ours) == len(theirs) == len(shapes)
    for one, other, sub_group in zip(ours, theirs, shapes, strict=True):
        assert one.shape == other.shape
        at = 0
        for name, shape in sub_group.items():
            start, stop = part_of(shape, ranks, rank)
            assert torch.equal(one[at : at + stop - start], other[at : at + stop - start]), name
            at += part_size(shape.numel(), ranks)
        assert at == len(one)


def assert_goes_on(tmp_path, tag, variant, found):
    """Load a folder with DeepSpeed and compare what each rank gathers, and its losses, with what `train` returned."""
    again = on_ranks(tmp_path, len(found), loaded, str(tmp_path), tag, variant)
    for (now, losses), (expected, expected_losses) in zip(again, found, strict=True):
        assert losses == expected_losses  # digit for digit
        for name, slots in expected.items():
            for slot, tensor in slots.items():
                assert torch.equal(now[name][slot], tensor), (name, slot)


def test_what_deepspeed_wrote_is_written_again_as_it_was_and_it_goes_on(two, tmp_path):
    folder, found = two
    write_checkpoint(open_checkpoint(folder / "two"), tmp_path / "again", Zero3Layout(ranks=1, tensor_ranks=2))
    assert_same_files(tmp_path / "again", folder / "two")
    assert_goes_on(tmp_path, "again", FAST["two"], [rank["two"] for rank in found])


HEADS = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3}
"""Of which no two ranks get as many."""


@pytest.mark.parametrize(
    ("layout", "changes", "first"),
    [
        (Zero3Layout(ranks=2, tensor_ranks=2, bf16=True), {}, {"embed_tokens": (131, 32), "0.self_attn.o": (32, 16)}),
        (Zero3Layout(ranks=1, tensor_ranks=2, vocab_parallel=True), {}, {"embed_tokens": (66, 32)}),
        (
            Zero3Layout(ranks=2, tensor_ranks=2, sub_group_size=2000),
            {**UNEVEN, **HEADS},
            {"0.self_attn.q_proj.bias": (32,), "0.self_attn.o_proj.weight": (36, 32), "lm_head": (66, 36)},
        ),
        (Zero3Layout(ranks=2, tensor_ranks=3), {**UNEVEN, **HEADS}, {"0.mlp.down": (36, 17), "lm_head": (44, 36)}),
    ],
)
def test_all_slots_are_written_for_any_ranks_and_read_back(tmp_path, layout, changes, first):
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    source = Trained(config=tiny_config(**changes), dtype=dtype)
    hashes = {write_checkpoint(source, tmp_path / str(count), layout, workers=count) for count in (1, 3)}
    assert len(hashes) == 1
    written = open_checkpoint(tmp_path / "1")
    assert_same(written, source)
    for part, shape in first.items():
        assert {written.pieces[0].shapes[name] for name in written.infos if part in name} == {shape}, part
    counts = [len(piece.topology.sub_groups) for piece in written.pieces]
    assert counts == ([5, 5] if layout.sub_group_size == 2000 else [2] * layout.tensor_ranks)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"tensor_ranks": 0}, "a ZeRO-3 checkpoint of 0 tensor-parallel ranks cannot be written: at least 1 is needed"),
        (
            {"tensor_ranks": 4},
            "model.layers.0.self_attn.q_proj.weight has 3 key/value heads: DeepSpeed cannot ",
        ),
        ({"sub_group_size": 700}, "of 700 elements the tensor-parallel ranks have [9, 8] sub-groups, and DeepSpeed"),
    ],
)
def test_what_deepspeed_could_not_train_is_not_written(tmp_path, options, line):
    source = Trained(config=tiny_config(**UNEVEN, **HEADS))
    with pytest.raises(InputError) as caught:
        write_checkpoint(source, tmp_path / "t", Zero3Layout(**{"ranks": 2, "tensor_ranks": 2, **options}))
    assert str(caught.value).startswith(line)
    assert not (tmp_path / "t").exists()


def test_deepspeeds_own_converter_joins_the_pieces(tmp_path):
    source = Trained(config=tiny_config(**UNEVEN, **HEADS))
    write_checkpoint(source, tmp_path / "zero3", Zero3Layout(ranks=2, tensor_ranks=2))
    ds_to_universal(tmp_path / "zero3", tmp_path / "universal", **UNEVEN, **HEADS)
    assert_same(open_checkpoint(tmp_path / "universal"), source)


GROWTHS = [Recipe(width=2, method="symmetric", state="scaled", noise_db=20.0), Recipe(kv_heads=2, heads=2, ffn=3)]


@pytest.mark.parametrize("recipe", GROWTHS)
def test_grown_straight_into_pieces(tmp_path, recipe):
    config = tiny_config(tie_word_embeddings=False, intermediate_size=49)
    grown = grow(Trained(config=config), recipe)
    write_checkpoint(grown, tmp_path / "pieces", Zero3Layout(ranks=2, tensor_ranks=2), workers=2)
    found = open_checkpoint(tmp_path / "pieces")
    assert found.groups == grown.groups
    for name, info in grown.infos.items():
        assert found.infos[name] == info
        for slot in info.slots:
            assert torch.equal(read_tensor(found, name, slot), read_tensor(grown, name, slot)), (name, slot)


MORE = {
    "bfloat16": {"zero": {"stage": 3}, "bf16": True, "tensor": 2, "frozen": ["embed_tokens", "layers.1.mlp"]},
    "float32": {"zero": {"stage": 3}, "bf16": False, "tensor": 2, "model": UNEVEN},
    "pieces": {
        "zero": {"stage": 3, "sub_group_size": 2000},
        "bf16": False,
        "tensor": 2,
        "model": {**UNEVEN, **HEADS},
    },
    # DeepSpeed left to itself cuts a tied pair.
    "vocab": {"zero": {"stage": 3}, "bf16": False, "tensor": 2, "tensor_config": {"autotp_size": 2}},
}
THREE = {"three": {"zero": {"stage": 3}, "bf16": False, "tensor": 3, "model": {**UNEVEN, **HEADS}}}
ALONE = {
    "untied": {"zero": {"stage": 3}, "bf16": False, "model": UNEVEN},
    "tied": {"zero": {"stage": 3}, "bf16": False},
}
"""Without tensor parallelism."""


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Runs of 2 x 2 ranks."""
    folder = tmp_path_factory.mktemp("four")
    return folder / "run", on_ranks(folder, 4, train, str(folder / "run"), MORE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of 2 ranks without tensor parallelism."""
    folder = tmp_path_factory.mktemp("alone")
    return folder / "run", on_ranks(folder, 2, train, str(folder / "run"), ALONE)[0]


@pytest.mark.slow
def test_any_ranks_are_read_and_the_run_goes_on_without_tensor_parallelism(four, tmp_path):
    folder, found = four
    for key, variant in MORE.items():
        source = open_checkpoint(folder / key)
        assert_read(source, whole(found, key, 2))
        write_checkpoint(source, tmp_path / "plain" / key, Zero3Layout(ranks=3, bf16=variant["bf16"]), workers=2)
        plain = open_checkpoint(tmp_path / "plain" / key)
        assert plain.infos == source.infos
        for name, info in source.infos.items():
            for slot in info.slots:
                assert torch.equal(read_tensor(plain, name, slot), read_tensor(source, name, slot)), (name, slot)
    losses = on_ranks(tmp_path, 2, resumed, str(folder / "float32"))[0]
    assert losses == pytest.approx(found[0]["float32"][1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("key", MORE)
def test_what_2_by_2_ranks_wrote_is_written_again_as_it_was_and_it_goes_on(four, tmp_path, key):
    folder, found = four
    layout = Zero3Layout(
        ranks=2,
        tensor_ranks=2,
        vocab_parallel=key == "vocab",
        bf16=MORE[key]["bf16"],
        sub_group_size=MORE[key]["zero"].get("sub_group_size", 10**9),
    )
    write_checkpoint(open_checkpoint(folder / key), tmp_path / key, layout, workers=2)
    assert_same_files(tmp_path / key, folder / key)
    assert_goes_on(tmp_path, key, MORE[key], [rank[key] for rank in found])


@pytest.mark.slow
def test_three_tensor_parallel_ranks(tmp_path):
    found = on_ranks(tmp_path, 3, train, str(tmp_path / "run"), THREE)
    source = open_checkpoint(tmp_path / "run" / "three")
    assert_read(source, whole(found, "three", 3))
    write_checkpoint(source, tmp_path / "again", Zero3Layout(ranks=1, tensor_ranks=3))
    assert_same_files(tmp_path / "again", tmp_path / "run" / "three")
    assert_goes_on(tmp_path, "again", THREE["three"], [rank["three"] for rank in found])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "ranks", "options", "settings"),
    [
        ("untied", 1, {}, {}),
        ("untied", 2, {}, {}),
        ("tied", 1, {}, {}),
        ("tied", 2, {"vocab_parallel": True}, {"tensor_config": {"autotp_size": 2}}),
        ("untied", 1, {}, {"tensor_config": {"autotp_size": 2}}),
    ],
)
def test_a_run_goes_on_with_tensor_parallelism(alone, tmp_path, key, ranks, options, settings):
    source = open_checkpoint(alone[0] / key)
    write_checkpoint(source, tmp_path / "t", Zero3Layout(ranks=ranks, tensor_ranks=2, **options), workers=2)
    found = on_ranks(tmp_path, 2 * ranks, loaded, str(tmp_path), "t", {**ALONE[key], "tensor": 2, **settings})
    assert_read(source, whole([{"t": rank} for rank in found], "t", 2))
    assert found[0][1] == pytest.approx(alone[1][key][1], abs=1e-5)


@pytest.mark.slow
def test_grown_it_goes_on_with_tensor_parallelism(alone, tmp_path):
    grown = grow(open_checkpoint(alone[0] / "tied"), Recipe(width=2, state="scaled"))
    write_checkpoint(grown, tmp_path / "t", Zero3Layout(ranks=1, tensor_ranks=2), workers=2)
    sizes = ("hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    variant = {
        **ALONE["tied"],
        "tensor": 2,
        "model": {key: grown.config[key] for key in sizes},
        "group_of": {name: info.group for name, info in grown.infos.items()},
        "order": list(grown.groups),
    }
    found = on_ranks(tmp_path, 2, loaded, str(tmp_path), "t", variant)
    assert_read(grown, whole([{"t": rank} for rank in found], "t", 2))
    assert found[0][1][0] == pytest.approx(alone[1]["tied"][1][0], abs=1e-4)  # the function is preserved


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
