"""GPT-NeoX (Pythia) as its files are: the head's own name on disk, buffers beside the weights, fused q, k and v."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from checkpoint.open import open_checkpoint
from checkpoint.source import read_tensor
from growmerge.cli import main

IDS = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(2))


def saved(folder, **changes):
    """Save a random Pythia as transformers does, and return it."""
    torch.manual_seed(4)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPTNeoXConfig(**{**sizes, "intermediate_size": 48, "max_position_embeddings": 64, **changes})
    model = GPTNeoXForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def run(*arguments):
    ran = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert ran.exit_code == 0, ran.stderr


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_through_zero3_and_grown_it_is_the_same_function(tmp_path):
    small = saved(tmp_path / "small")
    on_disk = load_file(tmp_path / "small" / "model.safetensors")
    assert "embed_out.weight" in on_disk and "lm_head.weight" not in on_disk
    run("convert", tmp_path / "small", tmp_path / "sharded", "--format", "zero3", "--dp", "3")
    run("convert", tmp_path / "sharded", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == on_disk.keys()
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in back.items())
    sizes = ("--width", "2", "--to-ffn", "100", "--depth", "identity", "--layers", "4")
    run("grow", tmp_path / "sharded", tmp_path / "big", *sizes)
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big").eval()
    config = big.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (64, 4, 100)
    before, after = logits(small), logits(big)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_what_old_files_hold_besides_is_no_weight(tmp_path):
    """Published Pythias were saved with the causal mask and the rotary frequencies."""
    small = saved(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    for layer in range(2):
        before = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{before}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[f"{before}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{before}.rotary_emb.inv_freq"] = torch.ones(2)
    old = tmp_path / "old"
    old.mkdir()
    torch.save(tensors, old / "pytorch_model.bin")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    for key in ("attention_bias", "rope_parameters"):  # as before transformers had them
        config.pop(key)
    (old / "config.json").write_text(json.dumps({**config, "rotary_pct": 0.25, "rotary_emb_base": 10000}))
    source = open_checkpoint(old)
    assert torch.equal(read_tensor(source, "lm_head.weight"), small.lm_head.weight)
    run("convert", old, tmp_path / "new")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()), logits(small))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--to-hidden", "48"), "size of hidden: of gpt_neox ffn alone can be padded"),
        (("--hidden", "2"), "hidden 2, heads 1 and kv_heads 1: they have to be equal"),
        (("--width", "2", "--format", "zero3", "--tp", "2"), "gpt_neox has queries, keys and values in one matrix"),
    ],
)
def test_each_mistake_is_a_line(tmp_path, options, line):
    saved(tmp_path / "small")
    ran = CliRunner().invoke(main, ["grow", str(tmp_path / "small"), str(tmp_path / "big"), *options])
    assert ran.exit_code == 2 and ran.stderr.count("\n") == 1 and line in ran.stderr
