"""Experts in files, an entry a matrix, and in the running model, one tensor: stock transformers judges both."""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint.experts import entries_of, overlaps
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import full_box, read_tensor, row_major_tiles
from checkpoint.writer import write_checkpoint
from growmerge.cli import main
from parallel.errors import InputError
from parallel.families import family_of

MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
UP = "model.layers.1.mlp.experts.gate_up_proj"


def folder_of(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """What `save_pretrained` leaves of a random model."""
    settings = {**tiny_config(**MODELS[family]), **changes}
    del settings["architectures"], settings["model_type"]
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.normal_().to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def told(*arguments: str) -> None:
    ran = CliRunner().invoke(main, arguments)
    assert ran.exit_code == 0, ran.stderr


@pytest.mark.parametrize("shard", ["5", "5e-5"], ids=["one-file", "shards"])
@pytest.mark.parametrize("family", MODELS)
def test_through_every_format_and_back_gives_the_same_tensors(family: str, shard: str, tmp_path: Path) -> None:
    theirs = folder_of(family, tmp_path / "hf", torch.bfloat16, tie_word_embeddings=shard == "5")
    for source, target, *options in (
        ("hf", "zero", "--format", "zero3", "--dp", "3"),
        ("zero", "universal", "--format", "universal"),
        ("universal", "dcp", "--format", "dcp"),
        ("dcp", "back", "--shard-gb", shard, "--dtype", "bfloat16"),
    ):
        told("convert", str(tmp_path / source), str(tmp_path / target), *options)
    ours, wanted = weights(tmp_path / "back"), weights(theirs)
    assert ours.keys() == wanted.keys()
    assert all(ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], wanted[name]) for name in wanted)
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) > 1) == (shard != "5")
    if shard != "5":
        index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"]
        assert {name: load_file(tmp_path / "back" / file)[name].shape for name, file in index.items()} == {
            name: tensor.shape for name, tensor in wanted.items()
        }
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    for (name, before), (_, after) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(before, after), name


@pytest.mark.parametrize("family", MODELS)
def test_any_box_of_a_fused_tensor_is_put_together(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(folder_of(family, tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, info in source.infos.items():
        if info.tied_to is None:
            whole = model.get_parameter(name)
            assert info.shape == tuple(whole.shape)
            for size in (1, 37, 700):
                for box in row_major_tiles(info.shape, size) if size > 1 else [full_box(info.shape)]:
                    part = torch.full(whole[box].shape, torch.nan)
                    source.read(name, box, {"weight": part})
                    assert torch.equal(part, whole[box]), name
    box = (slice(1, 3), slice(13, 35), slice(5, 9))
    part = torch.full((2, 22, 4), torch.nan)
    source.read(UP, box, {"weight": part})
    assert torch.equal(part, model.get_parameter(UP)[box])


def test_a_box_touches_the_entries_that_it_is_in_alone() -> None:
    config = tiny_config(model_type="mixtral", **MODELS["mixtral"])
    entries = entries_of(family_of(config), UP, (4, 96, 32))
    assert len(entries) == 8
    found = [(name, inside, at) for name, inside, at in overlaps(entries, (slice(2, 3), slice(40, 60), slice(0, 32)))]
    start = "model.layers.1.block_sparse_moe.experts.2."
    assert found == [
        (f"{start}w1.weight", (slice(40, 48), slice(0, 32)), (slice(0, 1), slice(0, 8), slice(0, 32))),
        (f"{start}w3.weight", (slice(0, 12), slice(0, 32)), (slice(0, 1), slice(8, 20), slice(0, 32))),
    ]


def test_a_fused_entry_is_read_as_it_is(tmp_path: Path) -> None:
    """As the running model calls it; transformers loads such a file as well."""
    folder = folder_of("mixtral", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(folder)
    for name, parameter in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        assert torch.equal(read_tensor(source, name), parameter), name


def test_entries_of_several_dtypes_are_read_in_one_that_holds_all(tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path / "hf")
    found = weights(folder)
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    found[name] = found[name].bfloat16()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(folder)
    assert source.infos[UP].slots["weight"] == torch.float32
    assert torch.equal(read_tensor(source, UP)[0, :48], found[name].float())


def changed(folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    found = {**weights(folder), **change}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MOE = "model.layers.0.block_sparse_moe"
FAULTS = {
    "missing": ({f"{MOE}.experts.3.w2.weight": None}, f"hf: tensor {MOE}.experts.3.w2.weight is missing"),
    "router": ({f"{MOE}.gate.weight": None}, f"hf: tensor {MOE}.gate.weight is missing"),
    "shape": (
        {f"{MOE}.experts.1.w3.weight": torch.zeros(47, 32)},
        f"model.safetensors: {MOE}.experts.1.w3.weight has shape (47, 32), config.json says (48, 32)",
    ),
    "unknown": (
        {f"{MOE}.experts.4.w1.weight": torch.zeros(48, 32)},
        f"model.safetensors: holds {MOE}.experts.4.w1.weight, which the mixtral model of config.json has not",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_one_line(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    folder = changed(folder_of("mixtral", tmp_path / "hf"), change)
    with pytest.raises(InputError) as error:
        _ = open_checkpoint(folder).infos
    assert str(error.value).endswith(message) and "\n" not in str(error.value)
    ran = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "out")])
    assert (ran.exit_code, ran.stderr) == (2, f"growmerge: {error.value}\n")


def test_fewer_experts_than_the_config_says_are_missed(tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    key = next(key for key in ("num_local_experts", "num_experts") if key in config)
    for count, message in ((6, r"layers\.0\.mlp\.experts\.4\.gate_proj\.weight is missing"), (2, "holds ")):
        (folder / "config.json").write_text(json.dumps({**config, key: count}))
        with pytest.raises(InputError, match=message):
            _ = open_checkpoint(folder).infos


def test_experts_in_bin_files_are_refused(tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path / "hf")
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"hf: experts are read from safetensors alone: load the model with transf"):
        open_checkpoint(folder)


def test_a_dense_folder_s_bytes_have_no_experts_in_them(tiny_folder, tmp_path: Path) -> None:
    """Names, order and offsets of a dense model's file are those of its tensors, one behind the other."""
    source = open_checkpoint(tiny_folder())
    write_checkpoint(source, tmp_path / "copy", SafetensorsLayout())
    data = (tmp_path / "copy" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", *(name for name, info in source.infos.items() if info.tied_to is None)]
    at = 8 + length
    for name in list(header)[1:]:
        values = read_tensor(source, name).numpy().tobytes()
        assert data[at : at + len(values)] == values
        at += len(values)
    assert at == len(data)
    assert not re.search(rb"\{expert\}|\{layer\}", data[: 8 + length])
