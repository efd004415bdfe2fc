"""Tensors that are not trained, in ZeRO-3 folders of real DeepSpeed: read, written for other ranks, loaded again."""

import pytest
import torch
from plain_runs import assert_read, loaded, run_variants
from tiny import on_ranks

from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout, topology_of
from checkpoint.zero_files import model_name
from parallel.errors import InputError
from upscale.grow import Recipe, grow

EMBEDDING = "model.embed_tokens.weight"
RUNS = {
    "tied": {"zero": {"stage": 3}, "bf16": False, "frozen": ["embed_tokens"]},
    "untied": {
        "zero": {"stage": 3},
        "bf16": True,
        "frozen": ["embed_tokens", "layers.0.", "model.norm"],
        "model": {"tie_word_embeddings": False, "intermediate_size": 49},
    },
}
PIECES = {"zero": {"stage": 3, "sub_group_size": 3000}, "bf16": False, "frozen": ["embed_tokens"]}
"""Groups of several sub-groups, as those of 1e9 elements and more are."""


def same(one, other):
    """Compare two sources: every element of every slot, groups and run."""
    assert (one.groups, one.run) == (other.groups, other.run)
    for name, info in one.infos.items():
        assert other.infos[name] == info
        for slot in info.slots:
            assert torch.equal(read_tensor(other, name, slot), read_tensor(one, name, slot)), (name, slot)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder / "run", run_variants(folder, 2, RUNS)


def test_every_element_is_read_and_converted_to_3_ranks_deepspeed_goes_on(two, tmp_path):
    folder, found = two
    for key, (gathered, _) in found.items():
        source = open_checkpoint(folder / key)
        assert_read(source, gathered)
        three = tmp_path / key / "three"
        write_checkpoint(source, three, Zero3Layout(ranks=3, bf16=RUNS[key]["bf16"]), workers=2)
        same(source, open_checkpoint(three))
        write_checkpoint(open_checkpoint(three), tmp_path / key / "two", Zero3Layout(ranks=2, bf16=RUNS[key]["bf16"]))
        same(source, open_checkpoint(tmp_path / key / "two"))
    source = open_checkpoint(folder / "tied")
    frozen = [name for name, info in source.infos.items() if not info.trainable]
    assert frozen == [EMBEDDING]
    assert source.infos["lm_head.weight"].tied_to == EMBEDDING
    assert {name: group.step for name, group in source.groups.items()} == {
        "decay": 3,
        "no_decay": 3,
        "last": 3,
        "frozen": 0,
    }

    gathered, losses = on_ranks(tmp_path, 3, loaded, str(tmp_path / "tied"), "three", RUNS["tied"])[0]
    assert losses == pytest.approx(found["tied"][1], abs=1e-5)
    for name, slots in found["tied"][0].items():
        for slot, tensor in slots.items():
            assert torch.equal(gathered[name][slot], tensor), (name, slot)


@pytest.mark.slow
def test_in_bfloat16_and_in_sub_groups_it_goes_on_too(two, tmp_path):
    folder, found = two
    write_checkpoint(open_checkpoint(folder / "untied"), tmp_path / "untied" / "t", Zero3Layout(ranks=3, bf16=True))
    gathered, losses = on_ranks(tmp_path, 3, loaded, str(tmp_path / "untied"), "t", RUNS["untied"])[0]
    assert losses == pytest.approx(found["untied"][1], abs=2e-2)  # bfloat16 sums in another order
    for name, slots in found["untied"][0].items():
        for slot, tensor in slots.items():
            assert torch.equal(gathered[name][slot], tensor), (name, slot)

    (tmp_path / "pieces").mkdir()
    found = run_variants(tmp_path / "pieces", 2, {"pieces": PIECES})["pieces"]
    source = open_checkpoint(tmp_path / "pieces" / "run" / "pieces")
    assert_read(source, found[0])
    topology = topology_of(source, 3, 3000)
    assert len(topology.sub_groups) > 3
    write_checkpoint(source, tmp_path / "pieces" / "three", Zero3Layout(ranks=3, sub_group_size=3000))
    _, losses = on_ranks(tmp_path, 3, loaded, str(tmp_path / "pieces"), "three", PIECES)[0]
    assert losses == pytest.approx(found[1], abs=1e-5)


@pytest.mark.slow
def test_grown_it_goes_on_too(two, tmp_path):
    folder, found = two
    grown = grow(open_checkpoint(folder / "tied"), Recipe(width=2, state="scaled"))
    assert [name for name, info in grown.infos.items() if not info.trainable] == [EMBEDDING]
    write_checkpoint(grown, tmp_path / "grown" / "t", Zero3Layout(ranks=3), workers=2)
    sizes = {key: grown.config[key] for key in ("hidden_size", "intermediate_size", "head_dim")}
    heads = {key: grown.config[key] for key in ("num_attention_heads", "num_key_value_heads")}
    group_of = {name: info.group for name, info in grown.infos.items() if info.trainable}
    variant = {**RUNS["tied"], "model": {**sizes, **heads}, "group_of": group_of, "order": list(grown.groups)}
    _, losses = on_ranks(tmp_path, 3, loaded, str(tmp_path / "grown"), "t", variant)[0]
    assert losses[0] == pytest.approx(found["tied"][1][0], abs=1e-4)  # the function is preserved


def test_weights_alone_are_taken_from_it_too(two, tmp_path):
    source = open_checkpoint(two[0] / "untied")
    write_checkpoint(source, tmp_path / "hf", SafetensorsLayout())
    plain = open_checkpoint(tmp_path / "hf")
    for name in source.infos:
        assert torch.equal(read_tensor(plain, name), read_tensor(source, name)), name


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda parts: parts.pop(EMBEDDING), f"has nothing of the frozen {EMBEDDING}, not 2096 elements"),
        (
            lambda parts: parts.update({EMBEDDING: torch.ones(2095)}),
            f"has 2095 elements of the frozen {EMBEDDING}, not 2096 elements",
        ),
    ],
)
def test_a_damaged_part_is_one_line_that_names_the_file(two, tmp_path, edit, words):
    source = open_checkpoint(two[0] / "tied")
    folder = tmp_path / "copy"
    write_checkpoint(source, folder, Zero3Layout(ranks=2))
    path = folder / model_name(1)
    state = torch.load(path, weights_only=True)
    edit(state["frozen_param_fragments"])
    torch.save(state, path)
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(folder).infos
    assert str(caught.value) == f"{path}: {words}"


def test_a_run_that_left_them_out_names_the_first_that_is_missing(two, tmp_path):
    folder = tmp_path / "copy"
    write_checkpoint(open_checkpoint(two[0] / "tied"), folder, Zero3Layout(ranks=2))
    for rank in range(2):
        state = torch.load(folder / model_name(rank), weights_only=True)
        state.update(frozen_param_shapes=None, frozen_param_fragments=None)  # exclude_frozen_parameters
        torch.save(state, folder / model_name(rank))
    with pytest.raises(InputError, match=f"tensor {EMBEDDING} is missing"):
        _ = open_checkpoint(folder).infos
