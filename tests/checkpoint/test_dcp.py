"""DCP folders, judged by their owner: what FSDP2 ranks saved is read equal, and what is written they load and go on."""

import functools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import fsdp_runs
import pytest
import torch
import torch.distributed.checkpoint as dcp
from plain_runs import Trap
from tiny import on_ranks, tiny_config, tiny_model
from trained import Trained, assert_same

from checkpoint.dcp_layout import DcpLayout
from checkpoint.manifest import check
from checkpoint.open import format_of, open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Group, read_tensor
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from growmerge.convert import Target, convert_checkpoint
from parallel.errors import InputError

SMALL = {"file_size": 40_000, "chunk_size": 1000}
"""Layout of many files and chunks."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save each form once, and return folder, whole state and the losses of the run that goes on."""

    @functools.cache
    def make(form="model", tied=True):
        folder = tmp_path_factory.mktemp("saved")
        results = on_ranks(folder, 2, fsdp_runs.save, str(folder / "saved"), form, tie_word_embeddings=tied)
        (folder / "saved" / "config.json").write_text(json.dumps(tiny_config(tie_word_embeddings=tied)))
        return folder / "saved", *results[0]

    return make


@pytest.fixture
def copied(saved, tmp_path):
    """Return a copy to be damaged."""
    shutil.copytree(saved()[0], tmp_path / "copied")
    return tmp_path / "copied"


def assert_is(source, model, optim):
    """Compare every element of every slot with a whole state of torch's."""
    aliases = {name for name, info in source.infos.items() if info.tied_to is not None}
    assert set(source.infos) == set(model)
    for name, info in source.infos.items():
        if name in aliases:
            continue
        assert set(info.slots) == {"weight", "master", "exp_avg", "exp_avg_sq"}
        for slot in info.slots:
            expected = model[name] if slot in ("weight", "master") else optim["state"][name][slot]
            assert torch.equal(read_tensor(source, name, slot), expected), (name, slot)
        assert source.groups[info.group].step == int(optim["state"][name]["step"]) == 3


@pytest.mark.parametrize(("form", "tied"), [("model", True), ("model", False), ("app", False), ("titan", True)])
def test_what_two_ranks_saved_is_read_equal(saved, form, tied):
    folder, (model, optim), _ = saved(form, tied)
    assert format_of(folder) == "dcp"
    source = open_checkpoint(folder)
    assert_is(source, model, optim)
    assert source.run.step == 3
    for name, info in source.infos.items():
        if info.tied_to is None:
            expected = Group(lr=fsdp_runs.LR, weight_decay=0.0 if "norm" in name else 0.1, betas=(0.9, 0.95), step=3)
            assert source.groups[info.group] == expected
    assert source.infos["lm_head.weight"].tied_to == ("model.embed_tokens.weight" if tied else None)


def test_a_model_alone_is_read(saved):
    folder, (model, _), _ = saved("flat")
    source = open_checkpoint(folder)
    assert source.infos["model.norm.weight"].slots == {"weight": torch.float32}
    assert source.groups == {"default": Group()}
    for name, info in source.infos.items():
        if info.tied_to is None:
            assert torch.equal(read_tensor(source, name), model[name])


def test_any_box_of_any_slot_is_read(saved):
    folder, (_, optim), _ = saved()
    source = open_checkpoint(folder)
    name = "model.embed_tokens.weight"  # 131 rows, of which rank 0 has 66
    out = torch.empty(70, 5, dtype=torch.bfloat16)
    source.read(name, (slice(50, 120), slice(7, 12)), {"exp_avg": out})
    assert torch.equal(out, optim["state"][name]["exp_avg"][50:120, 7:12].to(torch.bfloat16))


@pytest.mark.parametrize(("world", "tied"), [(1, False), (3, True), (3, False)])
def test_fsdp_loads_what_is_written_and_goes_on(saved, tmp_path, tied, world):
    folder, whole, losses = saved("model", tied)
    write_checkpoint(open_checkpoint(folder), tmp_path / "written", DcpLayout(**SMALL), workers=2)
    assert len(list((tmp_path / "written").glob("*.distcp"))) > 3
    # What torch loads of its own folder is the judge.
    folders = [str(tmp_path / "written"), str(folder)]
    results = on_ranks(tmp_path, world, fsdp_runs.load, folders, tie_word_embeddings=tied)[0]
    (found, went_on), (expected, same) = results
    for name, weight in whole[0].items():
        assert torch.equal(found[0][name], weight)
    for name, state in whole[1]["state"].items():
        assert all(torch.equal(found[1]["state"][name][key], value) for key, value in state.items())
    assert found[1]["param_groups"] == expected[1]["param_groups"]
    assert went_on == same
    assert went_on == pytest.approx(losses, rel=1e-5)


def test_a_written_model_without_optimizer_is_loaded(tmp_path, tiny_folder):
    folder = tiny_folder(seed=3)
    convert_checkpoint(folder, Target(folder=tmp_path / "dcp", format="dcp", workers=2))
    [((found, _), _)] = on_ranks(tmp_path, 2, fsdp_runs.load, [str(tmp_path / "dcp")], optim=False)[0]
    assert all(torch.equal(found[name], weight) for name, weight in tiny_model(seed=3).state_dict().items())


def test_a_flipped_bit_in_the_index_is_found(tmp_path, tiny_folder):
    convert_checkpoint(tiny_folder("small"), Target(folder=tmp_path / "dcp", format="dcp"))
    check(tmp_path / "dcp", deep=True)
    data = bytearray((tmp_path / "dcp" / ".metadata").read_bytes())
    data[100] ^= 1
    (tmp_path / "dcp" / ".metadata").write_bytes(data)
    with pytest.raises(InputError, match=r"\.metadata"):
        check(tmp_path / "dcp", deep=True)


def test_safetensors_come_back_the_same_bytes(tmp_path, tiny_folder):
    for dtype in (torch.float32, torch.bfloat16):
        folder = tiny_folder(f"tiny-{dtype}", dtype=dtype)
        write_checkpoint(open_checkpoint(folder), tmp_path / f"first-{dtype}", SafetensorsLayout())
        convert_checkpoint(folder, Target(folder=tmp_path / f"dcp-{dtype}", format="dcp"))
        convert_checkpoint(
            tmp_path / f"dcp-{dtype}", Target(folder=tmp_path / f"back-{dtype}", format="safetensors", workers=1)
        )
        first, back = (tmp_path / f"{kind}-{dtype}" / "model.safetensors" for kind in ("first", "back"))
        assert first.read_bytes() == back.read_bytes()


def data_of(archive, name):
    """Return a record's bytes; what is laid out first and filled then has no checksum for zipfile to go by."""
    info = archive.getinfo(name)
    archive.fp.seek(info.header_offset + 26)
    lengths = struct.unpack("<HH", archive.fp.read(4))
    archive.fp.seek(sum(lengths), os.SEEK_CUR)
    return archive.fp.read(info.file_size)


@pytest.mark.parametrize("bf16", [True, False])
def test_zero3_comes_back_the_same_bytes(tmp_path, bf16):
    source = Trained(config=tiny_config(), dtype=torch.bfloat16 if bf16 else torch.float32)
    write_checkpoint(source, tmp_path / "first", Zero3Layout(ranks=2, bf16=bf16))
    write_checkpoint(open_checkpoint(tmp_path / "first"), tmp_path / "dcp", DcpLayout(**SMALL))
    write_checkpoint(open_checkpoint(tmp_path / "dcp"), tmp_path / "back", Zero3Layout(ranks=2, bf16=bf16))
    assert_same(open_checkpoint(tmp_path / "back"), open_checkpoint(tmp_path / "first"))
    for path in (tmp_path / "first").glob("*.pt"):
        with zipfile.ZipFile(path) as first, zipfile.ZipFile(tmp_path / "back" / path.name) as back:
            assert first.namelist() == back.namelist()
            for name in first.namelist():
                if "/data/" in name:  # the pickle beside says the same, but of equal tuples and not of one
                    assert data_of(first, name) == data_of(back, name), (path.name, name)


def test_all_that_a_source_says_comes_back(tmp_path):
    source = Trained(config=tiny_config(tie_word_embeddings=False))
    write_checkpoint(source, tmp_path / "dcp", DcpLayout(**SMALL))
    assert_same(open_checkpoint(tmp_path / "dcp"), source)


def test_bytes_depend_on_neither_workers_nor_place(tmp_path):
    source = Trained(config=tiny_config())
    for name, workers in (("a", 1), ("b", 3)):
        write_checkpoint(source, tmp_path / name, DcpLayout(**SMALL), workers=workers)
    for path in (tmp_path / "a").iterdir():
        if path.suffix == ".distcp" or path.name == ".metadata":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_torch_makes_one_file_of_what_is_written(tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    source = Trained(config=tiny_config())
    write_checkpoint(source, tmp_path / "dcp", DcpLayout(dtype=torch.bfloat16, **SMALL))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "one.pt")
    state = torch.load(tmp_path / "one.pt", weights_only=True)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(state["model"][name], read_tensor(source, name).bfloat16())
    assert torch.equal(state["optim"]["state"][name]["exp_avg"], read_tensor(source, name, "exp_avg"))
    assert state["optim"]["param_groups"][0]["params"][0] == "model.embed_tokens.weight"


def plain(folder, state, **changes):
    """Save a state dict from one process."""
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    return folder


def stepped(model):
    """Return the state dict of a model of which what requires a gradient was stepped twice."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.01)
    fsdp_runs.train(model, optimizer, range(2))
    return fsdp_runs.state_of(model, optimizer, "model")


def test_what_is_not_trained_is_known_and_comes_back(tmp_path):
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    source = open_checkpoint(plain(tmp_path / "saved", stepped(model)))
    frozen = source.infos["model.embed_tokens.weight"]
    assert (frozen.trainable, frozen.group, frozen.slots) == (False, "frozen", {"weight": torch.float32})
    write_checkpoint(source, tmp_path / "written", DcpLayout())
    assert_same(open_checkpoint(tmp_path / "written"), source)


def test_groups_as_torch_before_2_4_saved_them(tmp_path, monkeypatch):
    from torch.distributed.checkpoint import _version

    model = tiny_model()
    state = stepped(model)
    expected = open_checkpoint(plain(tmp_path / "new", state))
    monkeypatch.setattr(_version, "_derived_version", "2_3")
    folder = plain(tmp_path / "old", state)
    assert b"optim.param_groups.0" not in (folder / ".metadata").read_bytes()
    assert_same(open_checkpoint(folder), expected)
    assert expected.groups["group0"].step == 2


def test_a_compiled_model_and_either_name_of_a_tied_tensor(tmp_path):
    state = {f"_orig_mod.{name}": value for name, value in tiny_model().state_dict().items()}
    embedding = state.pop("_orig_mod.model.embed_tokens.weight")
    state["_orig_mod.model.rotary_emb.inv_freq"] = torch.ones(4)
    source = open_checkpoint(plain(tmp_path / "saved", state))
    assert torch.equal(read_tensor(source, "model.embed_tokens.weight"), embedding)


def test_a_chunk_is_read_whatever_its_strides(tmp_path):
    state = dict(tiny_model().state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].t().contiguous().t()
    source = open_checkpoint(plain(tmp_path / "saved", state))
    assert torch.equal(read_tensor(source, name), state[name])


def refused(folder):
    with pytest.raises(InputError) as caught:
        source = open_checkpoint(folder)
        for name, info in source.infos.items():
            for slot in info.slots:
                read_tensor(source, name, slot)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(what):
    """Return a damage to `.metadata`, made with torch's own classes."""

    def damage(folder):
        with (folder / ".metadata").open("rb") as file:
            metadata = pickle.load(file)  # written by the test
        what(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


NORM = "model.model.norm.weight"


def place(**values):
    def damage(metadata):
        for index, info in metadata.storage_data.items():
            if index.fqn == NORM:
                vars(info).update(values)

    return change(damage)


def rename(old, new):
    def damage(metadata):
        for index in [index for index in metadata.storage_data if index.fqn == old]:
            object.__setattr__(index, "fqn", new)
        metadata.storage_data = dict(metadata.storage_data.items())
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)

    return change(damage)


def tensor(**values):
    return change(lambda metadata: vars(metadata.state_dict_metadata[NORM]).update(values))


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder):
    path = folder / "__1_0.distcp"
    os.truncate(path, path.stat().st_size - 1)


def overwrite(folder):
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def cut_metadata(folder):
    os.truncate(folder / ".metadata", 1000)


def other_dtype(metadata):
    metadata.state_dict_metadata[NORM].properties.dtype = torch.int64


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove(".metadata"), ".metadata: missing"),
        (remove("config.json"), "no config.json here or above; copy the model's Hugging Face config there"),
        (remove("__1_0.distcp"), "__1_0.distcp: missing"),
        (truncate, "__1_0.distcp: truncated"),
        (overwrite, "__0_0.distcp: "),
        (cut_metadata, ".metadata: damaged, or not a plain DCP metadata"),
        (place(relative_path="../outside.distcp"), "leaves its folder"),
        (place(relative_path="/etc/passwd"), "leaves its folder"),
        (place(offset=-5), ".metadata: bytes -5 to"),
        (place(offset=3), "model.model.norm.weight: damaged"),
        (place(transform_descriptors=["zstd"]), ".metadata: entries are stored with zstd"),
        (
            rename(NORM, "model.model.norm.bias"),
            "holds model.model.norm.bias, which the llama model of config.json has",
        ),
        (rename(NORM, "other.norm.weight"), ".metadata: tensor model.model.norm.weight is missing"),
        (
            tensor(size=torch.Size([31])),
            ".metadata: a chunk of model.model.norm.weight lies outside of its shape (31,)",
        ),
        (tensor(size=torch.Size([33])), ".metadata: the chunks of model.model.norm.weight have 32 of its 33 elements"),
        (tensor(chunks=None), ".metadata: not what torch.distributed.checkpoint writes"),
        (change(other_dtype), ".metadata: model.model.norm.weight is torch.int64; plain floating point is read"),
        (rename("optim.state.model.norm.weight.exp_avg", "gone"), "model.norm.weight has one of Adam's two moments"),
        (
            rename("optim.state.model.norm.weight.exp_avg", "optim.state.lm_head.weight.exp_avg"),
            "exp_avg are there, but config.json ties the tensors",
        ),
        (
            rename("optim.state.model.norm.weight.exp_avg", "second.state.model.norm.weight.exp_avg"),
            ".metadata: holds several optimizers (optim.state., second.state.), where one is expected",
        ),
        (
            rename(NORM, "ema.model.layers.0.self_attn.q_proj.weight"),
            ".metadata: holds several models (ema., model.), where one is expected",
        ),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(copied, damage, words):
    damage(copied)
    assert words in refused(copied)


def test_another_shape_or_another_model_than_the_config_says(copied):
    (copied / "config.json").write_text(json.dumps(tiny_config(intermediate_size=64)))
    expected = "gate_proj.weight has shape (48, 32), config.json says (64, 32)"
    assert expected in refused(copied)
    dcp.save({"transformer.h.0.attn.weight": torch.ones(3)}, checkpoint_id=copied, no_dist=True)
    assert ".metadata: holds no llama model as config.json says under names that are known" in refused(copied)


def test_hostile_pickles_are_refused_and_do_nothing(copied, tmp_path):
    trapped = tmp_path / "trapped"
    (copied / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Trap(str(trapped))}))
    assert ".metadata: damaged, or not a plain DCP metadata (it names" in refused(copied)
    state = {**tiny_model().state_dict(), "step": Trap(str(trapped))}
    assert ".distcp: step: damaged, or not a plain DCP file" in refused(plain(tmp_path / "value", state))
    assert not trapped.exists()


def test_reading_touches_no_more_than_it_needs(tmp_path):
    """A 200 MB folder is opened and one tile read within 30 MB of further memory."""
    plain(tmp_path / "tiny", dict(tiny_model().state_dict()))
    state = dict(tiny_model().state_dict())
    state["model.embed_tokens.weight"] = torch.arange(1_600_000.0)[:, None].expand(-1, 32).contiguous()
    del state["lm_head.weight"]  # the same, tied
    folder = plain(tmp_path / "wide", state, vocab_size=1_600_000)
    code = (
        "import resource, sys, torch\n"
        "from checkpoint.open import open_checkpoint\n"
        "out = torch.empty(8192, 32)\n"
        "def read(folder, rows, count):\n"
        "    source = open_checkpoint(folder)\n"
        "    source.read('model.embed_tokens.weight', (rows, slice(0, 32)), {'weight': out[:count]})\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = read(sys.argv[2], slice(0, 131), 131)\n"
        "print(read(sys.argv[1], slice(900_000, 908_192), 8192) - before, int(out[0, 0]))\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "tiny")]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    used, value = map(int, found.stdout.split())
    assert used < 30_000
    assert value == 900_000
