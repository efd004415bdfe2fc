"""nanotron checkpoints: what its files hold is read equal, whatever cut them; what we write is what it would write."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from nanotron_runs import SLOTS, write_optimizer, write_run
from plain_runs import Trap
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from checkpoint.nanotron import interleaved_rows
from checkpoint.nanotron_layout import NanotronLayout
from checkpoint.open import format_of, open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Box, read_tensor
from checkpoint.writer import write_checkpoint
from growmerge.cli import main
from parallel.errors import InputError
from upscale.factors import Recipe
from upscale.grow import grow

QKV = "model/model/decoder/0/pp_block/attn/qkv_proj"
HEAD = "model_weight_pp-rank-0-of-1_tp-rank-{}-of-2.safetensors"
EMBEDDING = "model/model/token_position_embeddings/pp_block/token_embedding"
NORM = "model/model/final_layer_norm/pp_block/model_weight.safetensors"


def sizes(**changes):
    return tiny_config(**{"vocab_size": 132, **changes})


def state_of(dtype=torch.float32, **changes):
    """Return a tiny model's tensors by name; a tied head is left out."""
    config = sizes(**changes)
    state = dict(tiny_model(dtype=dtype, **config).state_dict())
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    return state


def assert_equal(source, state):
    for name, tensor in state.items():
        assert source.infos[name].slots["weight"] == tensor.dtype
        assert torch.equal(read_tensor(source, name, dtype=tensor.dtype), tensor), name
    owned = [name for name, info in source.infos.items() if info.tied_to is None]
    assert sorted(owned) == sorted(state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_what_nanotron_saved_is_read_equal(tmp_path, tied, tp, pp):
    state = state_of(torch.bfloat16, tie_word_embeddings=tied)
    folder = write_run(tmp_path / "7", state, sizes(tie_word_embeddings=tied), tp=tp, pp=pp)
    assert format_of(folder) == "nanotron"
    source = open_checkpoint(folder)
    assert_equal(source, state)
    assert source.infos["lm_head.weight"].tied_to == ("model.embed_tokens.weight" if tied else None)
    assert (source.run.step, source.run.samples, source.run.tokens) == (7, 70, 3580)


@pytest.mark.parametrize("tp", [1, 2])
def test_interleaved_rows_are_put_in_order(tmp_path, tp):
    state = state_of()
    source = open_checkpoint(write_run(tmp_path / "7", state, sizes(), tp=tp, interleaved=True, numpy=True))
    assert_equal(source, state)


def test_a_config_from_before_the_key_is_of_an_interleaved_model(tmp_path):
    state = state_of()
    folder = write_run(tmp_path / "7", state, sizes(), interleaved=True)
    found = json.loads((folder / "model_config.json").read_text())
    del found["rope_interleaved"]
    (folder / "model_config.json").write_text(json.dumps(found))
    assert_equal(open_checkpoint(folder), state)


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_box_is_read(tmp_path, interleaved):
    state = state_of()
    source = open_checkpoint(write_run(tmp_path / "7", state, sizes(), tp=2, interleaved=interleaved))
    generator = torch.Generator().manual_seed(0)

    def span(size):
        low, high = sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist())
        return slice(low, high)

    for name, tensor in state.items():
        for _ in range(20):
            box: Box = tuple(span(size) for size in tensor.shape)
            out = torch.empty(tensor[box].shape)
            source.read(name, box, {"weight": out})
            assert torch.equal(out, tensor[box]), (name, box)


def test_rows_of_heads_are_mapped_one_by_one():
    # Two heads of 6 rows: 0 2 4 | 1 3 5 there are 0 1 2 | 3 4 5 here.
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    for start in range(12):
        for stop in range(start, 13):
            pieces = list(interleaved_rows(slice(start, stop), 3))
            found = [row for _, rows in pieces for row in range(rows.start, rows.stop, rows.step)]
            assert found == expected[start:stop]
            assert [at for at, _ in pieces] == [
                sum(len(range(*rows.indices(99))) for _, rows in pieces[:number]) for number in range(len(pieces))
            ]


def test_the_config_makes_the_model_that_was_trained(tmp_path):
    theirs = tiny_model(**sizes(rope_parameters={"rope_theta": 5e4, "rope_type": "default"}))
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    folder = write_run(tmp_path / "7", state, sizes(), tp=2, rope_theta=5e4)
    write_checkpoint(open_checkpoint(folder), tmp_path / "hf", SafetensorsLayout())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(ours).__name__ == "LlamaForCausalLM"
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_rope_scaling_is_kept_both_ways(tmp_path):
    scaling = {"type": "linear", "factor": 2.0}
    folder = write_run(tmp_path / "7", state_of(), sizes(), rope_scaling=scaling)
    source = open_checkpoint(folder)
    assert source.config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    write_checkpoint(source, tmp_path / "again", NanotronLayout())
    found = json.loads((tmp_path / "again" / "model_config.json").read_text())
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert found["rope_theta"] == 10000.0
    assert open_checkpoint(tmp_path / "again").config == source.config


@pytest.mark.parametrize("tp", [1, 2])
def test_qwen2_has_biases(tmp_path, tp):
    config = {**sizes(), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**config))
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    kind = {"is_llama_config": None, "is_qwen2_config": True, "attention_bias": True}
    source = open_checkpoint(write_run(tmp_path / "7", state, config, tp=tp, **kind))
    assert source.config["model_type"] == "qwen2"
    assert_equal(source, state)
    write_checkpoint(source, tmp_path / "again", NanotronLayout(tp=tp))
    assert_equal(open_checkpoint(tmp_path / "again"), state)


def test_a_qwen2_without_biases_is_a_llama(tmp_path):
    state = state_of()
    source = open_checkpoint(write_run(tmp_path / "7", state, sizes(), is_llama_config=None, is_qwen2_config=True))
    assert source.config["model_type"] == "llama"
    assert_equal(source, state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_written_is_what_nanotron_writes(tmp_path, tied, tp):
    state = state_of(torch.bfloat16, tie_word_embeddings=tied)
    theirs = write_run(tmp_path / "7", state, sizes(tie_word_embeddings=tied), tp=tp)
    write_checkpoint(open_checkpoint(theirs), tmp_path / "hf", SafetensorsLayout())
    write_checkpoint(open_checkpoint(tmp_path / "hf"), tmp_path / "ours", NanotronLayout(tp=tp), workers=2)
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*.safetensors"))
    for file in files:
        ours, expected = load_file(tmp_path / "ours" / file), load_file(theirs / file)
        assert ours.keys() == expected.keys() == {"data"}
        assert torch.equal(ours["data"], expected["data"]), file
        with safe_open(theirs / file, "pt") as one, safe_open(tmp_path / "ours" / file, "pt") as other:
            there, here = one.metadata() or {}, other.metadata() or {}
        assert there.keys() == here.keys()
        if there:
            assert there["unsharded_shape"] == here["unsharded_shape"]
            size = expected["data"].shape
            assert places(there, size) == places(here, size)
    named = json.loads((theirs / "model_config.json").read_text())
    written = json.loads((tmp_path / "ours" / "model_config.json").read_text())
    assert written.items() <= named.items()
    metas = json.loads((tmp_path / "ours" / "checkpoint_metadata.json").read_text())["metas"]
    assert metas["consumed_train_samples"] == sum(stage["consumed_train_samples"] for stage in metas["data_stages"])


def places(metadata, shape):
    """Return what a shard's metadata says, slices without ends resolved."""
    found = []
    for pair in metadata["local_global_slices_pairs"].split(";"):
        local, whole = ([part.split(",") for part in side.split("|")] for side in pair.split("#"))
        ends = [
            (0, size) if one[0] == "None" else (int(one[0]), int(one[1]))
            for one, size in zip(local, shape, strict=True)
        ]
        found.append((ends, whole))
    return found


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 2)])
def test_from_one_parallelism_to_another_and_back(tmp_path, first, second):
    state = state_of()
    write_checkpoint(
        open_checkpoint(write_run(tmp_path / "7", state, sizes(), tp=first)), tmp_path / "b", NanotronLayout(tp=second)
    )
    assert_equal(open_checkpoint(tmp_path / "b"), state)
    write_checkpoint(open_checkpoint(tmp_path / "b"), tmp_path / "c", NanotronLayout(tp=first))
    for path in (tmp_path / "7").rglob("*.safetensors"):
        again = tmp_path / "c" / path.relative_to(tmp_path / "7")
        assert torch.equal(load_file(again)["data"], load_file(path)["data"])


def test_bytes_do_not_depend_on_workers(tmp_path, tiny_folder):
    source = open_checkpoint(tiny_folder(vocab_size=132))
    hashes = {
        write_checkpoint(source, tmp_path / f"{workers}", NanotronLayout(tp=2), workers=workers) for workers in (1, 3)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_written_in_another_dtype(tmp_path, tiny_folder, dtype):
    source = open_checkpoint(tiny_folder(vocab_size=132))
    write_checkpoint(source, tmp_path / "new", NanotronLayout(tp=2, dtype=dtype))
    for name, info in source.infos.items():
        if info.tied_to is None:
            found = read_tensor(open_checkpoint(tmp_path / "new"), name, dtype=dtype)
            assert torch.equal(found, read_tensor(source, name).to(dtype))


def slots_of(state):
    generator = torch.Generator().manual_seed(1)
    found = {"master": {name: tensor.float() + 1e-4 for name, tensor in state.items()}}
    for slot in SLOTS[1:]:
        found[slot] = {name: torch.rand(tensor.shape, generator=generator) for name, tensor in state.items()}
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("tp", "pp", "dp", "interleaved"),
    [(1, 1, None, False), (2, 2, None, False), (1, 1, 3, False), (2, 2, 2, True), (1, 1, 34, True)],
)
def test_the_state_of_adam_is_read_equal(tmp_path, tied, tp, pp, dp, interleaved):
    config = sizes(tie_word_embeddings=tied)
    state = state_of(torch.bfloat16, tie_word_embeddings=tied)
    folder = write_run(tmp_path / "7", state, config, tp=tp, pp=pp, interleaved=interleaved)
    slots = slots_of(state)
    write_optimizer(folder, slots, config, tp=tp, pp=pp, dp=dp, interleaved=interleaved, tied=tied)
    source = open_checkpoint(folder)
    assert_equal(source, state)
    for name in state:
        for slot in SLOTS:
            assert source.infos[name].slots[slot] == torch.float32
            assert torch.equal(read_tensor(source, name, slot), slots[slot][name]), (name, slot)
        assert source.infos[name].group == ("no_decay" if "norm" in name else "decay")
    assert source.groups["decay"].weight_decay == 0.1
    assert source.groups["no_decay"].weight_decay == 0.0
    assert {group.step for group in source.groups.values()} == {7}
    assert source.groups["decay"].lr == 3e-4
    part = torch.empty(5, 3)
    source.read("model.layers.1.mlp.down_proj.weight", (slice(4, 9), slice(22, 25)), {"exp_avg": part})
    assert torch.equal(part, slots["exp_avg"]["model.layers.1.mlp.down_proj.weight"][4:9, 22:25])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("factor", [2, 3])
def test_a_head_that_divides_is_folded_into_the_final_norm(tmp_path, tied, factor):
    config = sizes(tie_word_embeddings=tied)
    state = state_of(torch.float32, tie_word_embeddings=tied)
    slots = slots_of(state)
    folder = write_run(tmp_path / "7", state, config, tp=2, lm_head_normalization_factor=factor)
    write_optimizer(folder, slots, config, tp=2)
    source = open_checkpoint(folder)
    norm = "model.norm.weight"
    assert torch.equal(read_tensor(source, norm), state[norm] / factor)
    assert torch.equal(read_tensor(source, norm, "master"), slots["master"][norm] / factor)
    assert torch.equal(read_tensor(source, norm, "exp_avg"), slots["exp_avg"][norm] * factor)
    assert torch.equal(read_tensor(source, norm, "exp_avg_sq"), slots["exp_avg_sq"][norm] * factor**2)
    group = source.groups[source.infos[norm].group]
    found = (group.lr_factor, group.weight_decay_factor, group.eps_factor, group.norm_weight)
    assert found == (1 / factor, factor, factor, 1 / factor**2)
    assert source.infos["model.layers.0.input_layernorm.weight"].group == "no_decay"
    others = {name: tensor for name, tensor in state.items() if name != norm}
    assert all(torch.equal(read_tensor(source, name), tensor) for name, tensor in others.items())
    write_checkpoint(source, tmp_path / "hf", SafetensorsLayout())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = tiny_model(**config)
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        hidden = theirs.model(ids).last_hidden_state
        torch.testing.assert_close(ours(ids).logits, hidden @ (theirs.lm_head.weight / factor).T)


def test_grown_and_folded_groups_have_one_name(tmp_path):
    state = state_of()
    folder = write_run(tmp_path / "7", state, sizes(), lm_head_normalization_factor=2)
    write_optimizer(folder, slots_of(state), sizes())
    assert list(open_checkpoint(folder).groups) == ["decay", "no_decay", "no_decay/in2-out0.5"]


def test_a_part_of_a_large_checkpoint_is_read_within_little_memory(tmp_path):
    """A 50 MB embedding is opened and one tile read within 20 MB of further memory."""
    config = tiny_config(vocab_size=100_000, hidden_size=128, head_dim=32, num_hidden_layers=1, intermediate_size=16)
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in AutoModelForCausalLM.from_config(LlamaConfig(**config)).state_dict().items()
        }
    state = {name: torch.zeros(shape) for name, shape in shapes.items() if name != "lm_head.weight"}
    small = write_run(tmp_path / "small", state_of(), sizes())
    folder = write_run(tmp_path / "wide", state, config, tp=2)
    code = (
        "import resource, sys, torch\n"
        "from checkpoint.open import open_checkpoint\n"
        "from checkpoint.source import read_tensor\n"
        "read_tensor(open_checkpoint(sys.argv[2]), 'model.embed_tokens.weight')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "source = open_checkpoint(sys.argv[1])\n"
        "out = torch.empty(8192, 128)\n"
        "source.read('model.embed_tokens.weight', (slice(45_904, 54_096), slice(0, 128)), {'weight': out})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(small)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(found.stdout) < 20_000


def test_no_file_stays_open(tmp_path):
    source = open_checkpoint(write_run(tmp_path / "7", state_of(), sizes(), tp=2))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name, info in source.infos.items():
        if info.tied_to is None:
            read_tensor(source, name)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def refused(folder):
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(folder).infos
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gone(name):
    def damage(folder):
        (folder / name).unlink()

    return damage


def cut_short(folder):
    path = folder / QKV / HEAD.format(1)
    os.truncate(path, path.stat().st_size - 8)


def rewrite(path, **changes):
    """Return what changes the metadata of a file, or its tensor."""

    def damage(folder):
        with safe_open(folder / path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(folder / path)
        tensors = changes.get("tensors", tensors)
        kept = {**metadata, **changes.get("metadata", {})}
        save_file(tensors, folder / path, metadata={key: value for key, value in kept.items() if value is not None})

    return damage


def says(**changes):
    def damage(folder):
        path = folder / "model_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def file_at(path, content="x"):
    def damage(folder):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)

    return damage


def directory_for_a_file(folder):
    (folder / NORM).unlink()
    (folder / NORM).mkdir()


def two_runs(folder):
    path = folder / QKV / HEAD.format(0)
    path.with_name("model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors").write_bytes(path.read_bytes())


def twice(folder):
    """Both ranks say that they are the first."""
    path = folder / QKV / HEAD.format(0)
    (folder / QKV / HEAD.format(1)).write_bytes(path.read_bytes())


SLICES = "local_global_slices_pairs"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (gone("model_config.json"), "model_config.json: no such file"),
        (file_at("model_config.json", "{"), "model_config.json: not valid JSON"),
        (file_at("model_config.json", "[]"), "model_config.json: holds no keys of a model"),
        (gone(f"{QKV}/{HEAD.format(1)}"), f"{QKV}/{HEAD.format(1)}: missing (the checkpoint has tensor parallelism 2)"),
        (gone(NORM), f"{NORM}: missing"),
        (cut_short, f"{QKV}/{HEAD.format(1)}: truncated"),
        (file_at(f"{EMBEDDING}/{HEAD.format(0)}"), f"{EMBEDDING}/{HEAD.format(0)}: truncated, or not a safetensors"),
        (directory_for_a_file, f"{NORM}: cannot be read"),
        (rewrite(NORM, tensors={"data": torch.ones(31)}), f"{NORM}: is of a tensor of shape (31,), model_config.json"),
        (rewrite(NORM, tensors={"weight": torch.ones(32)}), f"{NORM}: holds no tensor 'data'"),
        (
            rewrite(f"{QKV}/{HEAD.format(0)}", metadata={"unsharded_shape": "(64, 16)"}),
            f"{QKV}/{HEAD.format(0)}: is of a tensor of shape (64, 16), model_config.json says (64, 32)",
        ),
        (
            rewrite(f"{QKV}/{HEAD.format(0)}", metadata={SLICES: None}),
            f"{QKV}/{HEAD.format(0)}: its metadata has no {SLICES}",
        ),
        (
            rewrite(f"{QKV}/{HEAD.format(0)}", metadata={SLICES: "0,4,None#0,4,None"}),
            f"{QKV}/{HEAD.format(0)}: {SLICES} '0,4,None#0,4,None' is no pair of slices of its tensors",
        ),
        (
            rewrite(f"{QKV}/{HEAD.format(0)}", metadata={SLICES: "nonsense"}),
            f"{QKV}/{HEAD.format(0)}: {SLICES} 'nonsense' is no pair",
        ),
        (
            rewrite(f"{QKV}/{HEAD.format(0)}", metadata={SLICES: "0,4,None|None,None,None#0,5,None|None,None,None"}),
            "its two sides differ in size",
        ),
        (
            rewrite(f"{QKV}/{HEAD.format(0)}", tensors={"data": torch.ones(32, 31)}),
            "its two sides differ in size",
        ),
        (rewrite(f"{QKV}/{HEAD.format(0)}", tensors={"data": torch.ones(32, 32).half()}), "torch.float16, but other"),
        (twice, "do not cover model.decoder.0.pp_block.attn.qkv_proj.weight, (64, 32), once"),
        (two_runs, f"{QKV}: shards of several runs ("),
        (file_at("model/model/decoder/7/x/model_weight.safetensors"), "7/x/model_weight.safetensors: no tensor of the"),
        (says(intermediate_size=None), "model_config.json: intermediate_size is None: allowed are whole numbers above"),
        (says(vocab_size=True), "model_config.json: vocab_size is True: allowed are whole numbers above 0"),
        (says(num_attention_heads=5), "model_config.json: hidden_size 32 is no multiple of num_attention_heads 5"),
        (says(intermediate_size=96), "model_config.json says (192, 32)"),
        (says(is_llama_config=None, is_starcoder2_config=True), "is_starcoder2_config: allowed are models with is_"),
        (says(moe_config={"top_k": 2}), "model_config.json: moe_config is {'top_k': 2}: models with it are not read"),
        (says(no_rope_layer=4), "model_config.json: no_rope_layer is 4: models with it are not read"),
        (says(lm_head_normalization_factor=0), "lm_head_normalization_factor is 0: allowed are numbers from 1 on"),
        (file_at("config.yaml", "model:\n  init_method:\n    use_mup: true\n"), "config.yaml: use_mup is true"),
        (file_at("checkpoint_metadata.json", "{}"), "checkpoint_metadata.json: no metas"),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(tmp_path, damage, words):
    folder = write_run(tmp_path / "7", state_of(), sizes(), tp=2)
    damage(folder)
    assert words in refused(folder)


def test_the_folder_of_a_run_says_which_step_to_open(tmp_path):
    write_run(tmp_path / "run" / "7", state_of(), sizes())
    (tmp_path / "run" / "latest.txt").write_text("7")
    assert refused(tmp_path / "run").endswith(f"open one of its steps, the newest is {tmp_path / 'run' / '7'}")
    (tmp_path / "run" / "latest.txt").write_text("../../somewhere")
    assert "not a checkpoint of a known format" in refused(tmp_path / "run")


def optimizer_file(**changes):
    def damage(folder):
        path = folder / "optimizer" / "optimizer_pp-0-of-1_dp-0-of-2_tp-0-of-1_exp-0-of-1.pt"
        state = torch.load(path, weights_only=True)
        for key, value in changes.items():
            value(state) if callable(value) else state.pop(key)
        torch.save(state, path)

    return damage


def less(state):
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][1:]


def other_optimizer(state):
    del state["state"][0]["exp_avg_sq"]


def truncated_optimizer(folder):
    path = folder / "optimizer" / "optimizer_pp-0-of-1_dp-0-of-2_tp-0-of-1_exp-0-of-1.pt"
    os.truncate(path, path.stat().st_size - 1000)


def forgotten(folder):
    for path in (folder / "optimizer").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state["names"] = {number: name for number, name in state["names"].items() if "final_layer_norm" not in name}
        torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            gone("optimizer/optimizer_pp-0-of-1_dp-1-of-2_tp-0-of-1_exp-0-of-1.pt"),
            "optimizer: the file of pipeline stage 0, tensor-parallel rank 0, data-parallel rank 1 is missing",
        ),
        (truncated_optimizer, "dp-0-of-2_tp-0-of-1_exp-0-of-1.pt: damaged, or not a plain nanotron file"),
        (optimizer_file(names=None), "_exp-0-of-1.pt: no names, so not the optimizer's file of nanotron"),
        (optimizer_file(state=less), "exp_avg of model.token_position_embeddings.pp_block.token_embedding.weight has"),
        (optimizer_file(state=other_optimizer), "has no exp_avg_sq: the state of Adam alone is read"),
        (file_at("optimizer/optimizer_pp-0-of-2_tp-0-of-1_exp-0-of-1.pt"), "optimizer: files of several runs ("),
        (forgotten, "optimizer: no state of model.final_layer_norm.pp_block.weight"),
    ],
)
def test_damaged_state_is_one_line(tmp_path, damage, words):
    state = state_of()
    folder = write_run(tmp_path / "7", state, sizes())
    write_optimizer(folder, slots_of(state), sizes(), dp=2)
    damage(folder)
    assert words in refused(folder)


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    folder = write_run(tmp_path / "7", state_of(), sizes())
    trapped = tmp_path / "trapped"
    (folder / "optimizer").mkdir()
    torch.save({"state": Trap(str(trapped))}, folder / "optimizer" / "optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt")
    assert "damaged, or not a plain nanotron file" in refused(folder)
    assert not trapped.exists()


@pytest.mark.parametrize(
    ("changes", "tp", "words"),
    [
        ({}, 0, "a nanotron checkpoint of 0 tensor-parallel ranks cannot be written: at least 1"),
        ({}, 4, r"model.layers.0.self_attn.k_proj.weight has 2 heads: .* and 4 does not"),
        ({"vocab_size": 131}, 2, r"model.embed_tokens.weight has 131 elements along dim 0: .* and 2 does not"),
        ({"head_dim": 16}, 1, "4 heads of 16 do not make up hidden_size 32"),
        ({"mlp_bias": True}, 1, "mlp_bias is true: nanotron's Llama has no biases"),
        ({"attention_bias": True}, 1, "attention_bias is true: nanotron's Llama has no biases"),
    ],
)
def test_what_nanotron_could_not_load_is_not_written(tmp_path, tiny_folder, changes, tp, words):
    source = open_checkpoint(tiny_folder(**{"vocab_size": 132, **changes}))
    with pytest.raises(InputError) as caught:
        NanotronLayout(tp=tp).files(source)
    assert re.search(words, str(caught.value))


def test_two_tensor_ranks_become_a_grown_run_of_three_ranks_in_one_command(tmp_path):
    """With its optimizer, and the model is the small one's function."""
    config = sizes()
    state = state_of()
    slots = {**slots_of(state), "master": state}
    write_optimizer(write_run(tmp_path / "7", state, config, tp=2), slots, config, tp=2, dp=2)
    told = ("grow", str(tmp_path / "7"), str(tmp_path / "big"), "--width", "2", "--format", "zero3", "--dp", "3")
    ran = CliRunner().invoke(main, [*told, "--with-optimizer"])
    assert ran.exit_code == 0, ran.stderr
    assert len(list((tmp_path / "big").glob("zero_pp_rank_?_mp_rank_00_optim_states.pt"))) == 3
    wanted, found = (
        grow(open_checkpoint(tmp_path / "7"), Recipe(width=2, state="scaled")),
        open_checkpoint(tmp_path / "big"),
    )
    for name, info in wanted.infos.items():
        for slot in () if info.tied_to else ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(read_tensor(found, name, slot), read_tensor(wanted, name, slot)), (name, slot)
    assert {group.step for group in found.groups.values()} == {group.step for group in wanted.groups.values()} != {0}
    write_checkpoint(found, tmp_path / "plain", SafetensorsLayout())
    small, big = tiny_model(**config), AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before, after = small(input_ids=ids).logits, big(input_ids=ids).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
