"""Megatron-LM's `--ckpt-format torch`: its files are read equal, whatever cut them; what we write its model loads."""

import json
import os
import re
from argparse import Namespace
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from megatron_engine import LENGTH, ids_of, loaded, saved, staged
from megatron_runs import (
    FAMILIES,
    SLOTS,
    arguments,
    chunk_of,
    config_of,
    distributed_state,
    model_of,
    padded,
    param_group,
    plain_state,
    state_of,
    write_run,
)
from plain_runs import Trap
from tiny import on_ranks
from transformers import AutoModelForCausalLM

from checkpoint import writer
from checkpoint.megatron_layout import MegatronLayout
from checkpoint.megatron_model import config_of as config_from
from checkpoint.megatron_model import parameters_of
from checkpoint.memory import ScratchSource
from checkpoint.open import format_of, open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Box, Wrapped, read_tensor
from checkpoint.writer import write_checkpoint
from growmerge.cli import main
from parallel.errors import InputError
from parallel.families import family_of

FILE = "iter_0000007/mp_rank_00/model_optim_rng.pt"
OTHER = "iter_0000007/mp_rank_01/model_optim_rng.pt"
RELEASED = "release/mp_rank_00/model_optim_rng.pt"


def assert_equal(source, state):
    for name, tensor in state.items():
        assert source.infos[name].slots["weight"] == tensor.dtype
        assert torch.equal(read_tensor(source, name, dtype=tensor.dtype), tensor), name
    owned = [name for name, info in source.infos.items() if info.tied_to is None]
    assert sorted(owned) == sorted(state)


def hugging_face(folder, config, dtype=torch.float32):
    """Save transformers' model of a config and return its folder."""
    model = model_of(config).to(dtype)
    model.save_pretrained(folder)
    return folder


def close(found, expected):
    return (found - expected).abs().max() <= 1e-4 * expected.abs().max()


# What Megatron-LM wrote.


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["llama", "untied"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_what_megatron_saved_is_read_equal(tmp_path, kind, tp, pp, fused):
    config = config_of(kind)
    state = state_of(config, torch.bfloat16)
    folder = write_run(tmp_path / "run", state, config, tp=tp, pp=pp, fused=fused)
    assert format_of(folder) == format_of(folder / "iter_0000007") == "megatron"
    for place in (folder, folder / "iter_0000007"):
        source = open_checkpoint(place)
        assert_equal(source, state)
    tied = "model.embed_tokens.weight" if kind == "llama" else None
    assert source.infos["lm_head.weight"].tied_to == tied
    assert (source.run.step, source.run.samples, source.run.tokens, source.run.seed) == (7, 70, 70 * 64, 1234)


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - {"llama", "untied"}))
@pytest.mark.parametrize("tp", [1, 2])
def test_models_of_all_kinds_are_read_equal(tmp_path, kind, tp):
    config = config_of(kind)
    state = state_of(config)
    source = open_checkpoint(write_run(tmp_path / "run", state, config, tp=tp))
    assert_equal(source, state)
    # Without a window Megatron's arguments are a Llama's.
    expected = "llama" if kind == "mistral" else config["model_type"]
    assert source.config["model_type"] == expected
    write_checkpoint(source, tmp_path / "hf", SafetensorsLayout())
    ids = ids_of(131)
    with torch.no_grad():
        ours, theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits, model_of(config)(ids).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("layers", "pp", "virtual"), [(4, 2, 2), (8, 2, 2), (6, 3, 1)])
def test_layers_of_virtual_stages_are_put_in_order(tmp_path, layers, pp, virtual):
    config = config_of("untied", num_hidden_layers=layers)
    state = state_of(config)
    folder = write_run(tmp_path / "run", state, config, pp=pp, virtual=virtual)
    assert_equal(open_checkpoint(folder), state)


def test_any_box_is_read(tmp_path):
    config = config_of("qwen2")
    state = state_of(config)
    source = open_checkpoint(write_run(tmp_path / "run", state, config, tp=2, fused=True))
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


def test_more_ranks_than_key_value_heads_share_them(tmp_path):
    config = config_of()
    state = state_of(config)
    assert_equal(open_checkpoint(write_run(tmp_path / "run", state, config, tp=4)), state)


def test_a_vocabulary_that_no_argument_tells_keeps_its_padding(tmp_path):
    config = config_of()
    state = state_of(config)
    folder = write_run(tmp_path / "run", state, config, vocab_size=None)
    source = open_checkpoint(folder)
    assert source.config["vocab_size"] == padded(config) == 144
    found = read_tensor(source, "model.embed_tokens.weight")
    assert torch.equal(found[:131], state["model.embed_tokens.weight"])
    assert (found[131:] == 99).all()
    # NullTokenizer's argument leaves out the token that ends a document.
    null = write_run(tmp_path / "null", state, config, tokenizer_type="NullTokenizer")
    assert open_checkpoint(null).config["vocab_size"] == 144
    # A config.json beside says it, and what arguments never say.
    model_of(config_of(eos_token_id=5)).config.save_pretrained(folder)
    source = open_checkpoint(folder)
    assert (source.config["vocab_size"], source.config["eos_token_id"]) == (131, 5)
    assert_equal(source, state)


def test_arguments_that_are_left_out_mean_what_they_mean_there(tmp_path):
    config = config_of()
    args = vars(arguments(config))
    for name in ("kv_channels", "rotary_base", "norm_epsilon", "use_rope_scaling", "window_size", "init_method_std"):
        del args[name]
    args |= {"group_query_attention": False, "num_query_groups": 1, "layernorm_epsilon": 1e-6}
    found = config_from(args, tmp_path)
    assert found["num_key_value_heads"] == found["num_attention_heads"] == 4
    assert (found["head_dim"], found["rms_norm_eps"]) == (8, 1e-6)
    assert found["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    del args["add_bias_linear"]
    assert config_from(args, tmp_path)["mlp_bias"] is True


# What we write.


def test_what_is_written_is_what_megatron_writes(tmp_path):
    """Of all kinds, over one and two ranks, with the norms of both layer specs, and over stages."""
    for kind in FAMILIES:
        config = config_of(kind)
        folder = hugging_face(tmp_path / f"hf-{kind}", config, torch.bfloat16)
        state = state_of(config, torch.bfloat16)
        for tp, pp, fused in ((1, 1, True), (2, 1, False), (2, 2, True)):
            new = tmp_path / f"{kind}-{tp}-{pp}"
            layout = MegatronLayout(tp=tp, stages=pp, fused_norms=fused, multiple=16)
            write_checkpoint(open_checkpoint(folder), new, layout)
            for stage in range(pp):
                for rank in range(tp):
                    name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                    with torch.serialization.safe_globals([Namespace]):
                        found = torch.load(new / "release" / name / "model_optim_rng.pt", weights_only=True)
                    ends = {"first": stage == 0, "last": stage == pp - 1, "copied": pp > 1}
                    layers = range(2) if pp == 1 else [stage]
                    theirs = chunk_of(state, config, layers, **ends, tp=tp, rank=rank, fused=fused)
                    assert_written(found, theirs, vars(arguments(config, tp=tp, pp=pp)))
            assert (new / "latest_checkpointed_iteration.txt").read_text() == "release"
            assert_equal(open_checkpoint(new), state)


def assert_written(found, theirs, args):
    weights = {name: tensor for name, tensor in theirs.items() if not name.endswith("_extra_state")}
    assert list(found["model"]) == list(weights)
    for name, tensor in found["model"].items():
        expected = weights[name].clone()
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            padding = (expected == 99).all(dim=1)
            if padding.any() and not padding.all():
                expected[padding] = expected[~padding][-1]
        assert torch.equal(tensor, expected), name
    ours = vars(found["args"])
    same = set(args) & set(ours) - {"seq_length", "consumed_train_samples"}
    # An argument that is not there means None.
    assert {name: ours[name] for name in same} == {name: args[name] for name in same}
    optional = {"window_size", "rotary_seq_len_interpolation_factor"}
    assert all(args[name] is None for name in optional - set(ours))
    assert {"num_layers", "hidden_size", "padded_vocab_size", "norm_epsilon", "rotary_base"} <= same


@pytest.mark.parametrize(("first", "second"), [((1, 1), (2, 2)), ((2, 1), (1, 2)), ((2, 2), (2, 1))])
def test_from_one_parallelism_to_another_and_back(tmp_path, first, second):
    source = open_checkpoint(hugging_face(tmp_path / "hf", config_of("qwen3")))
    for number, (tp, stages) in enumerate((first, second, first)):
        write_checkpoint(source, tmp_path / f"{number}", MegatronLayout(tp=tp, stages=stages), workers=2)
        source = open_checkpoint(tmp_path / f"{number}")
    names = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.pt"))
    assert len(names) == first[0] * first[1]
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_bytes_do_not_depend_on_workers(tmp_path):
    source = open_checkpoint(hugging_face(tmp_path / "hf", config_of()))
    hashes = {
        write_checkpoint(source, tmp_path / f"{workers}", MegatronLayout(tp=2), workers=workers) for workers in (1, 3)
    }
    assert len(hashes) == 1


class Interrupted(Wrapped):
    """A source that stops where it is asked for the end of the head."""

    def read(self, name, box, out, stats=None):
        if name == "lm_head.weight" and box[0].stop > 150_000:
            raise KeyboardInterrupt
        super().read(name, box, out, stats)


def test_an_interrupted_file_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "EVERY_S", 0)
    source = ScratchSource(config=config_of("untied", vocab_size=200_000), seed=0)
    layout, about = MegatronLayout(), {"name": "x"}
    whole = write_checkpoint(source, tmp_path / "whole", layout, about=about)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(Interrupted(source), tmp_path / "cut", layout, about=about)
    assert json.loads((tmp_path / "cut" / writer.PROGRESS).read_text())["part"]  # how many, time tells
    assert write_checkpoint(source, tmp_path / "cut", layout, about=about) == whole
    assert (tmp_path / "cut" / RELEASED).read_bytes() == (tmp_path / "whole" / RELEASED).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_written_in_another_dtype(tmp_path, dtype):
    source = open_checkpoint(hugging_face(tmp_path / "hf", config_of()))
    write_checkpoint(source, tmp_path / "new", MegatronLayout(tp=2, dtype=dtype))
    for name, info in source.infos.items():
        if info.tied_to is None:
            found = read_tensor(open_checkpoint(tmp_path / "new"), name, dtype=dtype)
            assert torch.equal(found, read_tensor(source, name).to(dtype))


def test_to_megatron_and_back_in_one_command_each(tmp_path):
    folder = hugging_face(tmp_path / "hf", config_of("untied"))
    (folder / "tokenizer.json").write_text("{}")
    for told in (
        ("convert", "hf", "run", "--format", "megatron_local", "--tp", "2", "--stages", "2", "--workers", "1"),
        ("convert", "run", "again", "--workers", "1"),
        ("inspect", "run"),
    ):
        paths = [str(tmp_path / word) if word in ("hf", "run", "again") else word for word in told]
        ran = CliRunner().invoke(main, paths)
        assert ran.exit_code == 0, ran.output
    assert "megatron" in ran.output
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    assert_equal(open_checkpoint(tmp_path / "again"), state_of(config_of("untied")))


@pytest.mark.parametrize(
    ("kind", "changes", "layout", "words"),
    [
        ("llama", {}, {"tp": 0}, "a Megatron-LM checkpoint of 0 x 1 ranks cannot be written"),
        ("llama", {}, {"stages": 3}, "2 layers cannot be as many on each of 3 stages"),
        ("llama", {}, {"tp": 3}, "3 tensor-parallel ranks do not fit the model's query heads"),
        ("llama", {"intermediate_size": 49}, {"tp": 2}, "do not fit the model's elements of intermediate_size"),
        (
            "llama",
            {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 96},
            {"tp": 6},
            "6 tensor-parallel ranks do not fit the model's key/value heads",
        ),
        ("llama", {"attention_bias": True}, {}, "attention_bias is True and mlp_bias is False"),
        ("qwen3", {"attention_bias": True}, {}, "attention_bias is True and mlp_bias is False"),
        ("llama", {"hidden_act": "gelu"}, {}, "hidden_act is 'gelu': Megatron-LM's SwiGLU has silu"),
        (
            "qwen2",
            {"use_sliding_window": True},
            {},
            "use_sliding_window is true: it is not written for Megatron-LM, only false is",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "rope_type is 'yarn': Megatron-LM has default, linear, and llama3 with low_freq_factor 1",
        ),
    ],
)
def test_what_megatron_could_not_load_is_not_written(tmp_path, kind, changes, layout, words):
    source = open_checkpoint(hugging_face(tmp_path / "hf", config_of(kind, **changes)))
    with pytest.raises(InputError, match=re.escape(words)):
        MegatronLayout(**layout).files(source)


def test_a_family_that_megatron_has_not_is_refused():
    config = {**config_of(), "model_type": "granite"}
    with pytest.raises(InputError, match="Megatron-LM has no model of the granite family: allowed are llama, mistral"):
        MegatronLayout().files(Namespace(family=family_of(config), config=config))


# The format's owner.


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_megatron_core_loads_what_we_write_and_computes_the_same(tmp_path, tp):
    """Strictly; its modules are in our order, and our arguments build its model."""
    expected, folders = {}, {}
    for kind in FAMILIES:
        config = config_of(kind)
        source = open_checkpoint(hugging_face(tmp_path / f"hf-{kind}", config))
        with torch.no_grad():
            expected[kind] = model_of(config)(ids_of(131)).logits
        folders[kind] = str(tmp_path / kind)
        write_checkpoint(source, tmp_path / kind, MegatronLayout(tp=tp, fused_norms=False))
    assert not torch.equal(expected["mistral"], expected["window"])
    for found in on_ranks(tmp_path, tp, loaded, folders):
        assert found.keys() == FAMILIES.keys()
        for kind, logits in found.items():
            assert logits.shape == (2, LENGTH, 131)
            assert close(logits, expected[kind]), kind


VARIANTS = {
    "float32": {"optimizer": "plain"},
    "bfloat16": {"optimizer": "plain", "dtype": torch.bfloat16, "kind": "qwen2"},
    "distributed": {"optimizer": "distributed", "dtype": torch.bfloat16, "kind": "qwen3"},
    "buckets": {"optimizer": "distributed", "dtype": torch.bfloat16, "bucket": 1000, "sizes": {"hidden_size": 64}},
    "untied": {"kind": "untied"},
    "norms": {"optimizer": "plain", "kind": "qwen3", "more": {"apply_wd_to_qk_layernorm": True}},
}
"""What Megatron-Core saves on one rank."""


def variant_of(how, tp=1):
    config = config_of(how.get("kind", "llama"), **{"num_key_value_heads": 2, **how.get("sizes", {})})
    config["head_dim"] = config["hidden_size"] // 4 if how.get("kind") != "qwen3" else 16
    dropouts = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    args = arguments(config, tp=tp, params_dtype=how.get("dtype", torch.float32), **dropouts, **how.get("more", {}))
    return config, {**how, "args": args}


@pytest.fixture(scope="module")
def engine_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    variants = {key: variant_of(how) for key, how in VARIANTS.items()}
    given = {key: variant for key, (_, variant) in variants.items()}
    found = on_ranks(folder, 1, saved, str(folder / "runs"), given)[0]
    return folder / "runs", {key: config for key, (config, _) in variants.items()}, found


@pytest.mark.parametrize("key", VARIANTS)
def test_what_megatron_core_saves_is_read_equal(tmp_path, engine_runs, key):
    """Weights and Adam's state, and transformers' model computes what Megatron-Core's does."""
    folder, configs, found = engine_runs
    logits, slots = found[key]
    config, source = configs[key], open_checkpoint(folder / key)
    parameters = parameters_of(source.family, source.config, padded_vocab=padded(config))
    assert list(parameters) == list(slots["weight"])
    for name, parameter in parameters.items():
        for slot, tensors in slots.items():
            assert tuple(tensors[name].shape) == parameter.shape
            rows = [
                read_tensor(source, piece.tensor, slot, tensors[name].dtype)[piece.start : piece.stop]
                for piece in parameter.pieces
            ]
            joined = torch.cat(rows)
            assert torch.equal(joined, tensors[name][: len(joined)]), (name, slot)
            assert source.infos[parameter.pieces[0].tensor].slots[slot] == tensors[name].dtype
    assert {slot for info in source.infos.values() for slot in info.slots} == slots.keys()
    if "optimizer" in VARIANTS[key]:
        decaying = ("q_norm", "k_norm") if "more" in VARIANTS[key] else ()
        assert {name: (group.weight_decay, group.step) for name, group in source.groups.items()} == {
            "decay": (0.1, 3),
            "no_decay": (0.0, 3),
        }
        for name, info in source.infos.items():
            if info.tied_to is None:
                decays = len(info.shape) == 2 or any(part in name for part in decaying)
                assert info.group == ("decay" if decays else "no_decay")
    if VARIANTS[key].get("dtype", torch.float32) == torch.float32:
        write_checkpoint(source, tmp_path / "hf", SafetensorsLayout())
        with torch.no_grad():
            ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids_of(131)).logits
        assert close(ours, logits)


@pytest.mark.slow
def test_two_ranks_of_megatron_core_are_read_as_one_model(tmp_path):
    config, variant = variant_of({"kind": "qwen2"}, tp=2)
    results = on_ranks(tmp_path, 2, saved, str(tmp_path / "runs"), {"tp": variant})
    source = open_checkpoint(tmp_path / "runs" / "tp")
    write_checkpoint(source, tmp_path / "hf", SafetensorsLayout())
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids_of(131)).logits
    for found in results:
        assert close(ours, found["tp"][0])
    write_checkpoint(source, tmp_path / "again", MegatronLayout(tp=2, fused_norms=False, multiple=16))
    for rank, found in enumerate(results):
        path = tmp_path / "again" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        with torch.serialization.safe_globals([Namespace]):
            model = torch.load(path, weights_only=True)["model"]
        for name, tensor in found["tp"][1]["weight"].items():
            # Of the vocabulary the last rank ends in padding.
            ended = rank and name in ("embedding.word_embeddings.weight", "output_layer.weight")
            rows = config["vocab_size"] - 80 if ended else len(tensor)
            assert torch.equal(model[name][:rows], tensor[:rows]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_stages_of_megatron_core_are_read_as_one_model(tmp_path, kind):
    config = config_of(kind, num_hidden_layers=4)
    more = {"params_dtype": torch.float32, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    found = on_ranks(tmp_path, 2, staged, str(tmp_path / "run"), arguments(config, pp=2, **more))
    assert ("output_layer.weight" in found[1], "output_layer.weight" in found[0]) == (True, False)
    source = open_checkpoint(tmp_path / "run")
    parameters = parameters_of(source.family, source.config, padded_vocab=padded(config))
    for name, parameter in parameters.items():
        stage = parameter.layer // 2 if parameter.layer is not None else int("embedding" not in name)
        there = name.replace(f"layers.{parameter.layer}.", f"layers.{(parameter.layer or 0) % 2}.")
        joined = torch.cat([read_tensor(source, one.tensor)[one.start : one.stop] for one in parameter.pieces])
        assert torch.equal(joined, found[stage][there][: len(joined)]), name


# The optimizer's state.


def slots_of(state):
    generator = torch.Generator().manual_seed(1)
    found = {"master": {name: tensor.float() + 1e-4 for name, tensor in state.items()}}
    for slot in SLOTS[1:]:
        found[slot] = {name: torch.rand(tensor.shape, generator=generator) for name, tensor in state.items()}
    return found


def assert_state(source, slots, step=7):
    for slot in SLOTS:
        for name, tensor in slots[slot].items():
            assert source.infos[name].slots[slot] == torch.float32
            assert torch.equal(read_tensor(source, name, slot), tensor), (name, slot)
    assert source.groups["decay"].weight_decay == 0.1
    assert source.groups["no_decay"].weight_decay == 0.0
    assert {group.step for group in source.groups.values()} == {step}
    assert {group.lr for group in source.groups.values()} == {3e-4}
    for info in source.infos.values():
        if info.tied_to is None:
            assert info.group == ("no_decay" if len(info.shape) == 1 else "decay")


@pytest.mark.parametrize("optimizer", [plain_state, distributed_state])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("tp", "pp", "virtual"), [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_adams_state_is_read_equal(tmp_path, optimizer, kind, tp, pp, virtual):
    config = config_of(kind, num_hidden_layers=4)
    state = state_of(config, torch.bfloat16)
    slots = slots_of(state)
    how = {"tp": tp, "pp": pp, "virtual": virtual, "slots": slots, "optimizer": optimizer}
    source = open_checkpoint(write_run(tmp_path / "run", state, config, **how, fused=True))
    assert_equal(source, state)
    assert_state(source, slots)


def test_adams_state_of_a_run_in_float32(tmp_path):
    config = config_of()
    state = state_of(config)
    slots = {**slots_of(state), "master": state}
    source = open_checkpoint(write_run(tmp_path / "run", state, config, slots=slots, optimizer=plain_state))
    assert_state(source, slots)


def test_buckets_make_no_difference_where_sizes_are_multiples_of_64(tmp_path):
    config = config_of(hidden_size=64, head_dim=16, intermediate_size=64)
    state = state_of(config, torch.bfloat16)
    how = {"slots": slots_of(state), "optimizer": partial(distributed_state, buckets=3)}
    assert_state(open_checkpoint(write_run(tmp_path / "run", state, config, **how)), how["slots"])


def test_the_distributed_optimizers_file_may_be_taken_away(tmp_path):
    config = config_of()
    state = state_of(config, torch.bfloat16)
    folder = write_run(tmp_path / "run", state, config, slots=slots_of(state), optimizer=distributed_state)
    (folder / FILE).with_name("distrib_optim.pt").unlink()
    source = open_checkpoint(folder)
    assert_equal(source, state)
    assert {slot for info in source.infos.values() for slot in info.slots} == {"weight"}


def test_state_goes_on_into_a_sharded_run_in_one_command(tmp_path):
    config = config_of()
    state = state_of(config)
    slots = {**slots_of(state), "master": state}
    folder = write_run(tmp_path / "run", state, config, tp=2, slots=slots, optimizer=plain_state)
    told = ("convert", str(folder), str(tmp_path / "zero"), "--format", "zero3", "--dp", "2", "--workers", "1")
    ran = CliRunner().invoke(main, told)
    assert ran.exit_code == 0, ran.output
    found = open_checkpoint(tmp_path / "zero")
    for slot in SLOTS:
        for name, tensor in slots[slot].items():
            assert torch.equal(read_tensor(found, name, slot), tensor), (name, slot)


# Mistakes.


def refused(folder):
    with pytest.raises(InputError) as caught:
        source = open_checkpoint(folder)
        for name, info in source.infos.items():
            if info.tied_to is None:
                for slot in info.slots:
                    read_tensor(source, name, slot)
    text = str(caught.value)
    assert "\n" not in text
    return text


def rewrite(name, change):
    """Return a damage: `change` is called with what a file holds."""

    def damage(folder):
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(folder / name, weights_only=False)  # written by this test
        change(state)
        torch.save(state, folder / name)

    return damage


def says(name=FILE, **changes):
    return rewrite(name, lambda state: state.update(args=Namespace(**{**vars(state["args"]), **changes})))


def holds(name=FILE, **changes):
    """Change tensors of a file; None takes them away."""

    def change(state):
        for key, value in changes.items():
            state["model"].pop(key, None)
            if value is not None:
                state["model"][key] = value

    return rewrite(name, change)


def gone(name):
    return lambda folder: (folder / name).unlink()


def truncated(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1000)


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def moved(name, new):
    def damage(folder):
        (folder / name).rename(folder / new)

    return damage


STEP = "iter_0000007"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FIVE = {"kv_channels": None, "num_attention_heads": 5, "num_query_groups": 5}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (gone(OTHER), f"{OTHER}: missing (the checkpoint is of 2 x 1 ranks, tensor x pipeline)"),
        (moved(f"{STEP}/mp_rank_01", "elsewhere"), f"{FILE}: of a run with tensor_model_parallel_size 2"),
        (moved(f"{STEP}/mp_rank_01", f"{STEP}/mp_rank_02"), f"{OTHER}: missing (the checkpoint is of 3 x 1 ranks"),
        (moved(f"{STEP}/mp_rank_01", f"{STEP}/mp_rank_01_000"), f"{STEP}: ranks of several runs (mp_rank_00, mp_rank_"),
        (moved(f"{STEP}/mp_rank_01", f"{STEP}/mp_rank_01_000_001"), "_001: allowed are mp_rank_TT and mp_rank_TT_PPP"),
        (truncated(OTHER), f"{OTHER}: damaged, or not a plain Megatron-LM file"),
        (says(OTHER, tensor_model_parallel_size=4), f"{OTHER}: of a run with tensor_model_parallel_size 4, but"),
        (says(OTHER, num_layers=4), f"{OTHER}: num_layers is 4, and 2 in"),
        (rewrite(OTHER, lambda state: state.update(iteration=8)), f"{OTHER}: of iteration 8, but"),
        (rewrite(FILE, lambda state: state.pop("args")), f"{FILE}: no args, so it does not say which model"),
        (rewrite(FILE, lambda state: state.update(args={"num_layers": 2})), f"{FILE}: no args, so it does not say"),
        (rewrite(FILE, lambda state: state.pop("model")), f"{FILE}: no model, so it holds no weights"),
        (rewrite(FILE, lambda state: state.update(model=[1])), f"{FILE}: its model is no table of tensors by name"),
        (rewrite(FILE, lambda state: state.update(checkpoint_version=2.0)), "checkpoint_version is 2.0: only 3.0 is"),
        (holds(**{QKV: None}), f"{FILE}: {QKV} is missing"),
        (holds(**{QKV: torch.ones(32, 31)}), f"{FILE}: {QKV} has shape (32, 31), its args say (32, 32)"),
        (holds(**{QKV: torch.ones(32, 32, dtype=torch.int8)}), f"{FILE}: {QKV} is no tensor of float32, float16 or"),
        (holds(**{QKV: 3}), f"{FILE}: {QKV} is no tensor of float32, float16 or bfloat16"),
        (holds(OTHER, **{QKV: torch.ones(32, 32).half()}), f"some ranks have {QKV} in another dtype"),
        (holds(**{"output_layer.weight": torch.ones(80, 32)}), "holds output_layer.weight, which the llama model of"),
        (
            both(says(FILE, num_layers=4), says(OTHER, num_layers=4)),
            f"{FILE}: decoder.layers.2.input_layernorm.weight is missing",
        ),
        (
            both(says(FILE, num_layers=1), says(OTHER, num_layers=1)),
            f"{FILE}: holds decoder.layers.1.input_layernorm.weight, which the llama model of its args has not",
        ),
        (says(ffn_hidden_size=64), "has shape (48, 32), its args say (64, 32)"),
        (says(hidden_size=None), f"{OTHER}: hidden_size is 32, and None in"),
        (says(ffn_hidden_size="many"), f"{FILE}: ffn_hidden_size is 'many': allowed are whole numbers above 0"),
        (says(num_query_groups=3), f"{FILE}: num_attention_heads 4 is no multiple of num_query_groups 3"),
        (both(*(says(name, **FIVE) for name in (FILE, OTHER))), "hidden_size 32 is no multiple of num_attention_head"),
        (says(position_embedding_type="yarn"), "position_embedding_type is 'yarn': models with 'rope' alone are read"),
        (says(normalization="LayerNorm"), "normalization is 'LayerNorm': models with 'RMSNorm' alone are read"),
        (says(swiglu=False), "swiglu is False: models with True alone are read"),
        (says(num_experts=8), "num_experts is 8: models with it are not read"),
        (says(rotary_interleaved=True), "rotary_interleaved is True: models with it are not read"),
        (says(multi_latent_attention=True), "multi_latent_attention is True: models with it are not read"),
        (says(apply_layernorm_1p=True), "apply_layernorm_1p is True: models with it are not read"),
        (says(rotary_percent=0.5), "rotary_percent is 0.5: only 1.0 is read"),
        (says(softmax_type="learnable"), "softmax_type is 'learnable': only 'vanilla' is read"),
        (says(window_size=(4, 4)), "window_size is (4, 4): only (w, 0) is read, w tokens before each"),
        (says(qk_layernorm=True, add_qkv_bias=True), "qk_layernorm and add_qkv_bias: no model of Hugging Face's"),
        (
            lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("9"),
            "latest_checkpointed_iteration.txt: names iter_0000009, which is not there; open one of iter_0000007",
        ),
        (
            lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("../../somewhere"),
            "not a checkpoint of a known format",
        ),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(tmp_path, damage, words):
    config = config_of()
    folder = write_run(tmp_path / "run", state_of(config), config, tp=2)
    damage(folder)
    assert words in refused(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64, "head_dim": 16}, "config.json: model.embed_tokens.weight is (131, 64), and (131, 32) by"),
        ({"num_hidden_layers": 3}, "config.json: model.layers.2.self_attn.q_proj.weight is (32, 32), and not there by"),
        ({"tie_word_embeddings": False}, "config.json: lm_head.weight is (131, 32), and model.embed_tokens.weight by"),
        ({"vocab_size": 200}, "config.json: vocab_size is 200, but"),
        ({"model_type": "gpt2"}, "config.json: unknown model_type 'gpt2'"),
        ({"model_type": "granite"}, "config.json: Megatron-LM has no model of the granite family"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, changes, words):
    config = config_of()
    folder = write_run(tmp_path / "run", state_of(config), config)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert words in refused(folder)


def no_moment(state):
    del state["optimizer"]["optimizer"]["state"][3]["exp_avg_sq"]


def other_shape(state):
    state["optimizer"]["optimizer"]["state"][3]["exp_avg"] = torch.ones(5)


def no_masters(state):
    del state["optimizer"]["fp32_from_fp16_params"]


def one_more(state):
    state["optimizer"]["optimizer"]["param_groups"][0]["params"].append(99)


def chained(state):
    state["optimizer"] = [state["optimizer"], state["optimizer"]]


def third_group(state):
    state["optimizer"]["optimizer"]["param_groups"].append(param_group(True, params=[99]))


@pytest.mark.parametrize(
    ("optimizer", "damage", "words"),
    [
        (plain_state, rewrite(FILE, no_moment), f"{FILE}: its optimizer has no exp_avg_sq of"),
        (plain_state, rewrite(FILE, other_shape), f"{FILE}: its optimizer has no exp_avg of"),
        (plain_state, rewrite(FILE, no_masters), f"{FILE}: fp32_from_fp16_params has 0 of"),
        (plain_state, rewrite(FILE, one_more), "a group of its optimizer has 11 parameters, the model has 10 of"),
        (plain_state, rewrite(FILE, chained), f"{FILE}: its optimizer has no param_groups: the state of one Adam is"),
        (plain_state, rewrite(FILE, third_group), f"{FILE}: parameter groups other than one that decays and one that"),
        (distributed_state, truncated(f"{STEP}/mp_rank_00/distrib_optim.pt"), "distrib_optim.pt: damaged, or not a"),
        (
            distributed_state,
            rewrite(f"{STEP}/mp_rank_00/distrib_optim.pt", lambda state: state.pop("buckets_coalesced")),
            "distrib_optim.pt: does not have one buffer for each of 1 virtual stages",
        ),
        (
            partial(distributed_state, buckets=4),
            lambda folder: None,
            "numbers, as the parameters beside it make in one bucket: of another run, or in buckets, of which no",
        ),
    ],
)
def test_damaged_state_is_one_line(tmp_path, optimizer, damage, words):
    config = config_of("untied")
    state = state_of(config, torch.bfloat16)
    folder = write_run(tmp_path / "run", state, config, slots=slots_of(state), optimizer=optimizer)
    damage(folder)
    assert words in refused(folder)


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    config = config_of()
    folder = write_run(tmp_path / "run", state_of(config), config)
    trapped = tmp_path / "trapped"
    rewrite(FILE, lambda state: state.update(rng_state=Trap(str(trapped))))(folder)
    assert f"{FILE}: damaged, or not a plain Megatron-LM file" in refused(folder)
    assert not trapped.exists()
