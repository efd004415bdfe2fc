"""Pipeline folders that we write: everything comes back, whatever the stages and ranks; what cannot be is refused."""

import re
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_config
from trained import Trained, assert_same

from checkpoint.memory import ScratchSource
from checkpoint.open import format_of, open_checkpoint
from checkpoint.pipeline_layout import PipelineLayout
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from growmerge.cli import main
from parallel.errors import InputError
from upscale.factors import Recipe
from upscale.grow import grow

UNEVEN = {
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "intermediate_size": 47,
    "num_hidden_layers": 3,
}
"""Sizes at which parts are padded and end inside tensors."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("stages", "ranks", "bf16"), [(1, 1, False), (2, 1, True), (3, 2, False), (2, 7, True)])
def test_what_is_written_is_read_equal(tmp_path, tied, stages, ranks, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    source = Trained(config=tiny_config(**UNEVEN, tie_word_embeddings=tied), dtype=dtype)
    write_checkpoint(source, tmp_path / "p", PipelineLayout(stages=stages, ranks=ranks, bf16=bf16))
    assert format_of(tmp_path / "p") == "pipeline"
    assert_same(open_checkpoint(tmp_path / "p"), source)
    prefix = "bf16_zero" if bf16 else "zero"
    names = {f"mp_rank_{at:02d}_model_states.pt" for at in range(stages)}
    for rank in range(ranks):
        names |= {f"{prefix}_pp_rank_{rank}_mp_rank_{at:02d}_optim_states.pt" for at in range(stages)}
    # The embedding, three layers, the norm, and a head if it is one of its own.
    names |= {f"layer_{number:02d}-model_states.pt" for number in range(5 if tied else 6)}
    assert {path.name for path in (tmp_path / "p").glob("*.pt")} == names


def test_the_layers_files_are_what_the_run_computes_with(tmp_path):
    source = Trained(config=tiny_config(tie_word_embeddings=False), dtype=torch.bfloat16)
    write_checkpoint(source, tmp_path / "p", PipelineLayout(stages=2, bf16=True))
    prefixes = ["model.embed_tokens.", "model.layers.0.", "model.layers.1.", "model.norm.", "lm_head."]
    seen = set()
    for number, prefix in enumerate(prefixes):
        for own, tensor in torch.load(tmp_path / "p" / f"layer_{number:02d}-model_states.pt").items():
            name = prefix + own.removeprefix("inner.")
            seen.add(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, read_tensor(source, name, dtype=torch.bfloat16)), name
    assert seen == set(source.infos)


def test_weights_alone_are_masters_without_moments(tmp_path):
    source = ScratchSource(config=tiny_config(), seed=3)
    write_checkpoint(source, tmp_path / "p", PipelineLayout(stages=2, ranks=3))
    found = open_checkpoint(tmp_path / "p")
    for name, info in found.infos.items():
        if info.tied_to is None:
            assert info.slots == {"weight": torch.float32, "master": torch.float32}
            assert torch.equal(read_tensor(found, name, "master"), read_tensor(source, name)), name
    assert {group.step for group in found.groups.values()} == {0}


def test_a_float32_run_computes_with_the_masters_of_a_bfloat16_one(tmp_path):
    source = Trained(config=tiny_config(), dtype=torch.bfloat16)
    write_checkpoint(source, tmp_path / "p", PipelineLayout(stages=2))
    norm = torch.load(tmp_path / "p" / "layer_03-model_states.pt")["inner.weight"]
    assert torch.equal(norm, read_tensor(source, "model.norm.weight", "master"))


def test_bytes_do_not_depend_on_workers(tmp_path):
    source = Trained(config=tiny_config(**UNEVEN))
    layout = PipelineLayout(stages=2, ranks=2)
    hashes = {write_checkpoint(source, tmp_path / f"{workers}", layout, workers=workers) for workers in (1, 3)}
    assert len(hashes) == 1


def test_a_grown_model_between_shards_of_two_kinds(tmp_path):
    config = tiny_config(tie_word_embeddings=False)
    write_checkpoint(Trained(config=config), tmp_path / "z", Zero3Layout(ranks=3))
    told = ("grow", str(tmp_path / "z"), str(tmp_path / "p"), "--width", "2", "--format", "pipeline", "--stages", "2")
    ran = CliRunner().invoke(main, [*told, "--dp", "2", "--with-optimizer"])
    assert ran.exit_code == 0, ran.stderr
    wanted = grow(open_checkpoint(tmp_path / "z"), Recipe(width=2, state="scaled"))
    found = open_checkpoint(tmp_path / "p")
    assert (len(found.stages), found.stages[0].ranks) == (2, 2)
    for name, info in wanted.infos.items():
        for slot in info.slots:
            assert torch.equal(read_tensor(found, name, slot), read_tensor(wanted, name, slot)), (name, slot)
        assert found.infos[name].group == info.group
    assert dict(found.groups) == dict(wanted.groups)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"stages": 0}, "a pipeline checkpoint of 0 stages cannot be written: at least 1 is needed"),
        ({}, {"ranks": 0}, "a pipeline checkpoint of 0 ranks cannot be written: at least 1 is needed"),
        ({}, {"stages": 3}, "3 pipeline stages: the model has 2 layers; at most 2 work"),
        ({"model_type": "gemma2"}, {}, "pipeline: the family gemma2 scales between its layers, which no stage does"),
        ({"model_type": "granite", "logits_scaling": 3.0}, {}, "pipeline: the family granite scales between"),
    ],
)
def test_what_no_pipeline_of_ours_could_run_is_not_written(tmp_path, changes, options, words):
    source = ScratchSource(config=tiny_config(**changes), seed=1)
    with pytest.raises(InputError) as caught:
        write_checkpoint(source, tmp_path / "p", PipelineLayout(**options))
    assert re.search(words, str(caught.value))
    assert not (tmp_path / "p").exists()


class Frozen(Trained):
    """Its norms are not trained."""

    @cached_property
    def infos(self):
        infos = Trained.infos.func(self)
        return {name: replace(info, trainable="norm" not in name) for name, info in infos.items()}


def test_what_is_not_trained_is_not_written(tmp_path):
    line = "pipeline: model.layers.0.input_layernorm.weight is not trained, and our pipeline trains every tensor"
    with pytest.raises(InputError, match=line):
        write_checkpoint(Frozen(config=tiny_config()), tmp_path / "p", PipelineLayout())


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (("--format", "zero3", "--stages", "2"), "--stages is of --format pipeline"),
        (("--format", "pipeline", "--tp", "2"), "--tp is of --format zero3"),
        (("--format", "pipeline", "--stages", "9"), "9 pipeline stages: the model has 2 layers; at most 2 work"),
        (
            ("--format", "pipeline", "--dtype", "float16"),
            "a DeepSpeed checkpoint of a float16 run is not written; choose --dtype bfloat16 or float32",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, tiny_folder, told, line):
    ran = CliRunner().invoke(main, ["convert", str(tiny_folder("small")), str(tmp_path / "new"), *told])
    assert ran.exit_code == 2
    assert ran.stderr.startswith(f"growmerge: {line}")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_where_data_goes_does_not_depend_on_what_a_file_is_called_meanwhile(tmp_path):
    """A write that was killed is gone on with by the places that a file beside has."""
    for plan in PipelineLayout(stages=2, ranks=2).files(Trained(config=tiny_config())):
        assert plan.create(tmp_path / plan.name) == plan.create(tmp_path / f".{plan.name}.1234567.tmp")
        assert (tmp_path / plan.name).stat().st_size == (tmp_path / f".{plan.name}.1234567.tmp").stat().st_size
