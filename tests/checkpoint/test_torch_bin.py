"""Folders of `.bin` weights: what torch.save wrote and transformers loads is read equal; hostile files do nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from plain_runs import Trap
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from checkpoint.open import format_of, open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from parallel.errors import InputError


def save(folder, state, config, shards=1):
    """Write a folder as older versions of transformers did."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number in range(shards):
        part = dict(list(state.items())[number::shards])
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tiny_bin(folder, shards=1, dtype=torch.float32, **changes):
    model = tiny_model(dtype=dtype, **changes)
    return save(folder, model.state_dict(), tiny_config(**changes), shards)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_saved_is_read_equal(tmp_path, tied, shards, dtype):
    folder = tiny_bin(tmp_path / "bin", shards, dtype, tie_word_embeddings=tied)
    assert format_of(folder) == "torch_bin"
    source = open_checkpoint(folder)
    # transformers reads the same folder, so it is a folder as the hub has them.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(read_tensor(source, name, dtype=dtype), weight), name
        assert source.infos[name].shape == tuple(weight.shape)
    assert source.infos["model.norm.weight"].slots == {"weight": dtype}
    assert source.infos["lm_head.weight"].tied_to == ("model.embed_tokens.weight" if tied else None)
    write_checkpoint(source, tmp_path / "converted", SafetensorsLayout(), workers=2)
    converted = open_checkpoint(tmp_path / "converted")
    for name in source.infos:
        assert torch.equal(read_tensor(converted, name), read_tensor(source, name)), name


def test_any_box_of_a_saved_view_is_read(tmp_path):
    state = dict(tiny_model().state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].t().contiguous().t()  # column-major in the file
    source = open_checkpoint(save(tmp_path / "bin", state, tiny_config()))
    part = torch.empty(3, 5, dtype=torch.bfloat16)
    source.read(name, (slice(2, 5), slice(7, 12)), {"weight": part})
    assert torch.equal(part, state[name][2:5, 7:12].to(torch.bfloat16))


def test_rotary_frequencies_are_no_weights_and_a_tied_tensor_may_have_either_name(tmp_path):
    state = dict(tiny_model().state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    embedding = state.pop("model.embed_tokens.weight")
    source = open_checkpoint(save(tmp_path / "bin", state, tiny_config()))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in source.infos
    assert torch.equal(read_tensor(source, "model.embed_tokens.weight"), embedding)


def test_safetensors_beside_it_are_preferred(tmp_path, tiny_folder):
    folder = tiny_folder(seed=0)
    torch.save(tiny_model(seed=1).state_dict(), folder / "pytorch_model.bin")
    assert format_of(folder) == "safetensors"
    found = read_tensor(open_checkpoint(folder), "model.norm.weight")
    assert torch.equal(found, tiny_model(seed=0).state_dict()["model.norm.weight"])


def refused(folder):
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(folder).infos
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    trapped = tmp_path / "trapped"
    folder = save(tmp_path / "bin", {"model.norm.weight": Trap(str(trapped))}, tiny_config())
    assert "pytorch_model.bin: damaged, or not a plain PyTorch file" in refused(folder)
    assert not trapped.exists()
    folder = save(tmp_path / "shards", {"model.norm.weight": Trap(str(trapped)), "b": torch.ones(1)}, tiny_config(), 2)
    assert "pytorch_model-00001-of-00002.bin: damaged" in refused(folder)
    assert not trapped.exists()


def truncate(folder):
    path = folder / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size - 1000)


def change(**entries):
    def damage(folder):
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        for name, value in entries.items():
            name = name.replace("__", ".")
            if value is None:
                del state[name]
            else:
                state[name] = value
        torch.save(state, folder / "pytorch_model.bin")

    return damage


def index(**entries):
    def damage(folder):
        (folder / "pytorch_model.bin").unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(entries))

    return damage


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "pytorch_model.bin: damaged, or not a plain PyTorch file"),
        (no_config, "config.json: no such file"),
        (change(model__norm__weight=None), "pytorch_model.bin: tensor model.norm.weight is missing"),
        (change(score__weight=torch.ones(2)), "pytorch_model.bin: holds score.weight, which the llama model of"),
        (
            change(model__norm__weight=torch.ones(31)),
            "pytorch_model.bin: model.norm.weight has shape (31,), config.json says (32,)",
        ),
        (
            change(model__norm__weight=torch.ones(32, dtype=torch.int8)),
            "pytorch_model.bin: model.norm.weight is torch.int8",
        ),
        (change(optimizer={"lr": 1.0}), "pytorch_model.bin: holds other things than tensors by name"),
        (index(weight_map={"a": "gone.bin"}), "gone.bin: missing"),
        (index(weight_map={"a": "../outside.bin"}), "leaves its folder"),
        (index(weight_map={"a": 3}), "pytorch_model.bin.index.json: weight_map names something that is not a file"),
        (index(metadata={}), "pytorch_model.bin.index.json: no weight_map"),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(tmp_path, damage, words):
    folder = tiny_bin(tmp_path / "bin")
    damage(folder)
    assert words in refused(folder)


def test_a_file_from_before_zip_archives_is_refused_in_one_line(tmp_path):
    folder = tiny_bin(tmp_path / "bin")
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "pytorch_model.bin: no zip archive, so damaged, or of torch before 1.6" in refused(folder)


def test_reading_touches_no_more_than_it_needs(tmp_path):
    """A 200 MB folder is opened and one tile read within 30 MB of further memory."""
    config = tiny_config(vocab_size=400_000, hidden_size=128, head_dim=32, num_hidden_layers=1, intermediate_size=16)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in tiny_model_on_meta(config).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items() if name != "lm_head.weight"}
    folder = save(tmp_path / "wide", state, config)
    code = (
        "import resource, sys, torch\n"
        "from checkpoint.open import open_checkpoint\n"
        "torch.load(sys.argv[2], weights_only=True, mmap=True)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "source = open_checkpoint(sys.argv[1])\n"
        "out = torch.empty(8192, 128)\n"
        "source.read('model.embed_tokens.weight', (slice(9000, 17192), slice(0, 128)), {'weight': out})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    torch.save({"warm": torch.ones(1)}, tmp_path / "warm.pt")
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "warm.pt")]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(found.stdout) < 30_000


def tiny_model_on_meta(config):
    from transformers import LlamaConfig

    return AutoModelForCausalLM.from_config(LlamaConfig(**config))
