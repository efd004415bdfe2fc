"""ZeRO-1 and ZeRO-2 folders that real DeepSpeed wrote: every element as the engine itself gathers it; and bad files."""

import os
import shutil

import pytest
import torch
from plain_runs import Trap, assert_read, resumed, run_variants
from tiny import on_ranks

from checkpoint.open import format_of, open_checkpoint
from checkpoint.source import read_tensor
from checkpoint.zero12 import flat_group
from parallel.errors import InputError

FAST = {
    "one": {"zero": {"stage": 1}, "bf16": False},
    "two": {"zero": {"stage": 2}, "bf16": True, "model": {"tie_word_embeddings": False}, "named": False},
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Runs of 3 ranks, where groups are padded and parts end inside of tensors."""
    folder = tmp_path_factory.mktemp("three")
    return folder / "run", run_variants(folder, 3, FAST)


def test_every_element_of_every_slot_is_read_as_the_engine_gathers_it(three):
    folder, found = three
    for key in FAST:
        assert format_of(folder / key) == "zero12"
        assert_read(open_checkpoint(folder / key), found[key][0])
    source = open_checkpoint(folder / "one")
    found_groups = {name: (group.step, group.weight_decay, group.lr) for name, group in source.groups.items()}
    assert found_groups == {"decay": (3, 0.1, 1e-2), "no_decay": (3, 0.0, 1e-2), "last": (3, 0.0, 1e-2)}
    assert source.infos["model.norm.weight"].group == "last"
    assert source.infos["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert (source.run.step, source.run.tokens, source.run.samples, source.run.seed) == (3, 7, 9, 1)
    unnamed = open_checkpoint(folder / "two")
    assert list(unnamed.groups) == ["group0", "group1", "group2"]
    assert unnamed.infos["model.norm.weight"].group == "group2"
    assert unnamed.groups["group0"].weight_decay == 0.1
    assert unnamed.infos["lm_head.weight"].tied_to is None


def test_boxes_that_cross_ranks_are_read(three):
    folder, found = three
    name = "model.layers.0.mlp.gate_proj.weight"  # its elements lie on two ranks: cut at 652 of 1536
    part = torch.empty(48, 5)
    open_checkpoint(folder / "two").read(name, (slice(0, 48), slice(20, 25)), {"exp_avg": part})
    assert torch.equal(part, found["two"][0][name]["exp_avg"][:, 20:25])


@pytest.mark.parametrize("paddings", [[0, 0, 0], [3, 1, 0]])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_cut_is_that_of_a_buffer_padded_to_twice_the_ranks(ranks, paddings):
    shapes = {"a": (3, 5), "b": (1,), "c": (2,)}
    flat = flat_group("g", shapes, paddings, ranks)
    buffer = []
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        assert flat.starts[name] == len(buffer)
        buffer += [name] * (shape[0] * (shape[1] if len(shape) > 1 else 1)) + [None] * padding
    assert flat.total == len(buffer)
    while len(buffer) % (2 * ranks):
        buffer.append(None)
    assert flat.part * ranks == len(buffer)


TINIEST = {
    "hidden_size": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "intermediate_size": 3,
    "tie_word_embeddings": False,
}
FLOAT_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
SLOW = {
    "plain": {"zero": {"stage": 2}, "bf16": False},
    "round-robin": {"zero": {"stage": 2, "round_robin_gradients": True}, "bf16": False},
    "aligned": {
        "zero": {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True},
        "bf16": True,
        "model": TINIEST,
    },
    "elastic": {"zero": {"stage": 1, "elastic_checkpoint": True}, "bf16": True, "model": TINIEST},
    "bf16-optimizer": {"zero": {"stage": 1}, "bf16": True, "model": TINIEST, "config": FLOAT_SUMS},
    "frozen-1": {
        "zero": {"stage": 1},
        "bf16": True,
        "frozen": ["embed_tokens"],
        "model": {"tie_word_embeddings": False},
    },
    "frozen-2": {
        "zero": {"stage": 2},
        "bf16": False,
        "frozen": ["embed_tokens"],
        "model": {"tie_word_embeddings": False},
    },
}


@pytest.mark.slow
def test_all_settings_are_read_and_a_run_goes_on_in_zero3_on_other_ranks(tmp_path):
    found = run_variants(tmp_path, 2, SLOW)
    folder = tmp_path / "run"
    for key, (gathered, _) in found.items():
        # With round_robin_gradients and no padding DeepSpeed 0.19.8 gathers masters and moments from wrong offsets.
        assert_read(open_checkpoint(folder / key), gathered, links=key != "round-robin")
    # Rank 1 of the final norm's two elements has padding alone.
    path = folder / "elastic" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    saved = torch.load(path, weights_only=False)["optimizer_state_dict"]  # ours, just written
    assert saved["single_partition_of_fp32_groups"][2].numel() == 0
    # Where gradients are reduced in another order, the same numbers lie elsewhere.
    plain, turned = open_checkpoint(folder / "plain"), open_checkpoint(folder / "round-robin")
    for name, info in plain.infos.items():
        for slot in info.slots:
            one, other = read_tensor(plain, name, slot), read_tensor(turned, name, slot)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    for key in ("frozen-1", "frozen-2"):
        source = open_checkpoint(folder / key)
        assert [name for name, info in source.infos.items() if not info.trainable] == ["model.embed_tokens.weight"]
        assert source.groups[source.infos["model.embed_tokens.weight"].group].step == 0
    assert open_checkpoint(folder / "elastic").groups["group1"].step == 3

    losses = on_ranks(tmp_path, 3, resumed, str(folder / "plain"))[0]
    assert losses == pytest.approx(found["plain"][1], abs=1e-5)


def change(file, edit):
    """Rewrite a `.pt` file of a folder with a change, as torch.save writes it."""

    def damage(folder):
        path = folder / file
        state = torch.load(path, weights_only=False)  # a file of this test's own run
        edit(state)
        torch.save(state, path)

    return damage


MODEL = "mp_rank_00_model_states.pt"
FIRST, LAST = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 2))


def cut_short(state):
    masters = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    masters[0] = masters[0][:-1].clone()


def less_groups(state):
    state["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop()


def no_moments(state):
    state["optimizer_state_dict"]["base_optimizer_state"]["state"] = {}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: os.truncate(folder / LAST, 1000), f"{LAST}: damaged"),
        (lambda folder: (folder / LAST).unlink(), f"{LAST}: missing (the checkpoint was written by 3 ranks)"),
        (lambda folder: os.truncate(folder / MODEL, 1000), f"{MODEL}: damaged"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json here or above"),
        (change(LAST, cut_short), f"{LAST}: master of group decay has "),
        (change(LAST, less_groups), f"{LAST}: has 2 parameter groups, not 3"),
        (change(LAST, no_moments), f"{LAST}: group decay has master; rank 0 has other slots"),
        (change(LAST, dict.clear), f"{LAST}: not the optimizer file of a ZeRO-1 or ZeRO-2 run"),
        (
            change(MODEL, lambda state: state.update(mp_world_size=2)),
            "mp_rank_01_model_states.pt: missing (the run had 2 model-parallel ranks)",
        ),
        (change(MODEL, lambda state: state.update(param_shapes=None)), f"{MODEL}: no param_shapes"),
        (change(MODEL, lambda state: state.pop("global_steps")), f"{MODEL}: no global_steps"),
        (change(MODEL, lambda state: state["param_shapes"].pop()), f"{MODEL}: its parameter groups are not those of"),
        (
            change(MODEL, lambda state: state["module"].pop("model.norm.weight")),
            f"{MODEL}: tensor model.norm.weight is missing",
        ),
        (
            change(MODEL, lambda state: state["module"].update({"model.norm.weight": torch.ones(31)})),
            f"{MODEL}: model.norm.weight has shape (31,), config.json says (32,)",
        ),
        (
            change(FIRST, lambda state: state["optimizer_state_dict"].update(partition_count=[3, 1, 3])),
            "cut over [3, 1, 3] ranks by group (expert parallel)",
        ),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(three, tmp_path, damage, words):
    folder = tmp_path / "copy"
    shutil.copytree(three[0] / "one", folder)
    damage(folder)
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(folder).infos
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


def test_a_hostile_pickle_is_refused_and_does_nothing(three, tmp_path):
    for file in (MODEL, FIRST):
        folder = tmp_path / file
        shutil.copytree(three[0] / "one", folder)
        torch.save({"optimizer_state_dict": Trap(str(tmp_path / "trapped"))}, folder / file)
        with pytest.raises(InputError, match=f"{file}: damaged, or not a plain DeepSpeed file"):
            open_checkpoint(folder)
        assert not (tmp_path / "trapped").exists()
