"""HyperLlama folders are plain Llamas with another final norm; the code that they carry is not run."""

import json

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from checkpoint.open import format_of, open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from parallel.errors import InputError

NORM = "model.norm.weight"


def hyperllama(folder, factor, **changes):
    """Make a Llama's folder one that the fork's exporter writes, code and all."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "hyperllama", "architectures": ["HyperLlamaForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_hyperllama.HyperLlamaConfig",
        "AutoModelForCausalLM": "modeling_hyperllama.HyperLlamaForCausalLM",
    }
    path.write_text(json.dumps({**config, "lm_head_normalization_factor": factor, **changes}))
    ran = folder.parent / "ran"
    for name in ("configuration_hyperllama.py", "modeling_hyperllama.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w').close()\n")
    return ran


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_plain_llama_has_the_logits_of_the_divided_head(tmp_path, tiny_folder, tied, factor):
    folder = tiny_folder(tie_word_embeddings=tied)
    ran = hyperllama(folder, factor)
    assert format_of(folder) == "hyperllama"
    write_checkpoint(open_checkpoint(folder), tmp_path / "plain", SafetensorsLayout(), workers=2)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "lm_head_normalization_factor"} & config.keys()
    assert sorted(path.name for path in (tmp_path / "plain").glob("*.py")) == []
    assert not ran.exists()
    ours, theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tiny_model(tie_word_embeddings=tied)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = theirs.model(ids).last_hidden_state @ (theirs.lm_head.weight / factor).T
        torch.testing.assert_close(ours(ids).logits, expected)


def test_the_final_norm_alone_is_divided_in_float32_and_rounded_once(tiny_folder):
    folder = tiny_folder(dtype=torch.bfloat16)
    plain = {name: read_tensor(open_checkpoint(folder), name) for name in open_checkpoint(folder).infos}
    hyperllama(folder, 3)
    source = open_checkpoint(folder)
    for name, info in source.infos.items():
        if info.tied_to is None:
            expected = plain[name] / 3 if name == NORM else plain[name]
            assert torch.equal(read_tensor(source, name), expected), name
            found = read_tensor(source, name, dtype=torch.bfloat16)
            assert torch.equal(found, expected.to(torch.bfloat16)), name


def test_a_folder_without_a_factor_divides_by_nothing(tiny_folder):
    folder = tiny_folder()
    plain = read_tensor(open_checkpoint(folder), NORM)
    hyperllama(folder, 1)
    config = json.loads((folder / "config.json").read_text())
    del config["lm_head_normalization_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(read_tensor(open_checkpoint(folder), NORM), plain)


@pytest.mark.parametrize("factor", [0, -2, "2", True, None, float("nan"), float("inf")])
def test_a_factor_that_is_no_number_above_0_is_refused(tiny_folder, factor):
    folder = tiny_folder()
    hyperllama(folder, factor)
    with pytest.raises(InputError, match=r"config\.json: lm_head_normalization_factor is .*: allowed are numbers abo"):
        open_checkpoint(folder)


def test_a_config_that_cannot_be_read_is_one_line(tiny_folder):
    folder = tiny_folder()
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        open_checkpoint(folder)


def test_a_missing_tensor_is_one_line(tiny_folder):
    folder = tiny_folder()
    hyperllama(folder, 2, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"tensor model\.layers\.2\..* is missing"):
        _ = open_checkpoint(folder).infos
