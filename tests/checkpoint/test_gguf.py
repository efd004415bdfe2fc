"""GGUF files: what llama.cpp's converter stores is read back, quantised or not, as transformers itself reads it."""

import os
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFEndian
from gguf_runs import permuted, tiny, write_gguf
from transformers import AutoModelForCausalLM

from checkpoint import gguf_model
from checkpoint.gguf_model import gguf_name
from checkpoint.open import format_of, open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Box, read_tensor
from checkpoint.writer import write_checkpoint
from growmerge.cli import main
from parallel.errors import InputError
from parallel.families import FAMILIES

WIDE = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8}
"""transformers' loader takes 256 for what attention is scaled by; a window shorter than the text."""
MODELS = {
    "llama": {"head_dim": 8, "tie_word_embeddings": False},
    "llama, tied": {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e4}},
    "mistral": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "phi3": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
}
ALONE = {
    "olmo2": {},
    "llama, biases": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "llama, linear": {"head_dim": 8, "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
}
"""Those that transformers' loader does not know, or reads as something else."""
IDS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(1))


def model_of(name):
    return tiny(name.partition(",")[0], **{**MODELS, **ALONE}[name])


def converted(path, folder):
    ran = CliRunner().invoke(main, ["convert", str(path), str(folder)])
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.endswith("; its tokenizer has to be brought, a GGUF file's is not read\n")
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_weights(source, model, exact=True):
    for name, tensor in model.state_dict().items():
        if source.infos[name].tied_to is None:
            found = read_tensor(source, name)
            assert torch.equal(found, tensor) if exact else torch.allclose(found, tensor, atol=1e-6), name


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_did_and_what_transformers_reads(tmp_path, name):
    model = model_of(name)
    path, _ = write_gguf(tmp_path / "tiny.gguf", model)
    assert format_of(path) == format_of(tmp_path) == "gguf"
    shifted = "gemma" in name  # norms + 1 - 1 in float32
    assert_weights(open_checkpoint(path), model, exact=not shifted)
    ours = logits(converted(path, tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert torch.equal(ours, logits(theirs))
    torch.testing.assert_close(ours, logits(model), atol=1e-4 if shifted else 0, rtol=0)


@pytest.mark.parametrize("name", ALONE)
def test_what_transformers_does_not_read(tmp_path, name):
    model = model_of(name)
    keys = {}
    if "linear" in name:
        keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    path, _ = write_gguf(tmp_path / "tiny.gguf", model, keys=keys)
    assert_weights(open_checkpoint(path), model)
    assert torch.equal(logits(converted(path, tmp_path / "out")), logits(model))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_frequencies_of_llama_3(tmp_path):
    model = tiny(head_dim=16, rope_parameters=LLAMA3)
    plain = 1.0 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    path, _ = write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": divisors})
    assert open_checkpoint(path).config["rope_parameters"] == LLAMA3
    assert torch.equal(logits(converted(path, tmp_path / "out")), logits(model))
    other = divisors * np.float32(1.01)
    path, _ = write_gguf(tmp_path / "other.gguf", model, tensors={"rope_freqs.weight": other})
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not that of Llama 3"):
        open_checkpoint(path)
    path, _ = write_gguf(tmp_path / "ones.gguf", model, tensors={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    assert open_checkpoint(path).config["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}


def test_yarn_is_kept(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny("qwen2", rope_parameters=rope)
    keys = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    }
    path, _ = write_gguf(tmp_path / "tiny.gguf", model, keys=keys)
    assert open_checkpoint(path).config["rope_parameters"] == rope
    assert torch.equal(logits(converted(path, tmp_path / "out")), logits(model))


def test_a_gemma_of_27b_scales_attention_by_its_own_rule(tmp_path):
    for layers, scale in ((2, 16), (62, 8)):
        model = tiny("gemma3_text", head_dim=16, num_hidden_layers=layers)
        path, _ = write_gguf(tmp_path / f"{layers}.gguf", model)
        assert open_checkpoint(path).config["query_pre_attn_scalar"] == scale


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_stays_what_it_is(tmp_path, kind, dtype):
    model = tiny(head_dim=8)
    path, _ = write_gguf(tmp_path / "tiny.gguf", model, kind)
    source = open_checkpoint(path)
    for name, tensor in model.state_dict().items():
        expected = torch.float32 if "norm" in name else dtype
        assert source.infos[name].slots == {"weight": expected}
        assert torch.equal(read_tensor(source, name, dtype=expected), tensor.to(expected)), name
    write_checkpoint(source, tmp_path / "out", SafetensorsLayout(dtype=torch.bfloat16), workers=2)
    again = open_checkpoint(tmp_path / "out")
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(read_tensor(again, name), model.state_dict()[name].to(dtype).bfloat16().float())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL"])
def test_quantised_tensors_are_what_gguf_unpacks(tmp_path, kind):
    model = tiny(hidden_size=256, head_dim=8, num_hidden_layers=1)
    path, stored = write_gguf(tmp_path / "tiny.gguf", model, kind)
    source = open_checkpoint(path)
    assert sum(one.name == kind for _, one in stored.values()) >= 4
    heads = {"q_proj": 4, "k_proj": 2}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in source.family.tensors(source.config).items():
        if tensor.tied_to is not None:
            continue
        data, packed = stored[gguf_name(tensor)]
        expected = torch.from_numpy(gguf.quants.dequantize(data, packed).reshape(tensor.shape).copy())
        for part, count in heads.items():
            if part in name:  # undone in another way than the reader's
                rows = permuted(np.arange(tensor.shape[0]), count)
                expected = expected[torch.from_numpy(np.argsort(rows))]
        assert source.infos[name].slots["weight"] == (torch.float16 if packed.name == "F16" else torch.float32)
        assert torch.equal(read_tensor(source, name), expected), name
        for _ in range(5):
            bounds = [sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in tensor.shape]
            box: Box = tuple(slice(low, high) for low, high in bounds)
            out = torch.empty(expected[box].shape)
            source.read(name, box, {"weight": out})
            assert torch.equal(out, expected[box]), (name, box)


def test_a_quantised_model_computes_what_transformers_reads(tmp_path):
    path, _ = write_gguf(tmp_path / "tiny.gguf", tiny(head_dim=8), "Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ran = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out"), "--dtype", "float32"])
    assert ran.exit_code == 0, ran.stderr
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(theirs))


def test_a_split_model_is_one(tmp_path):
    model = tiny(head_dim=8)
    write_gguf(tmp_path / "tiny.gguf", model, split_max_tensors=4)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 3
    for path in (tmp_path, parts[0], parts[2]):
        assert_weights(open_checkpoint(path), model)
    parts[1].unlink()
    with pytest.raises(InputError, match=rf"{parts[1].name}: missing \(the model is split into {len(parts)} files\)"):
        open_checkpoint(tmp_path)


def test_names_are_those_of_gguf():
    for arch, (model_type, _) in gguf_model.ARCHITECTURES.items():
        number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
        family = next(family for family in FAMILIES.values() if model_type in family.model_types)
        names = gguf.get_tensor_name_map(number, 3)
        config = {**tiny(model_type).config.to_dict(), "num_hidden_layers": 3}
        for name, tensor in family.tensors(config).items():
            if tensor.tied_to is not None:
                continue
            module, _, leaf = name.rpartition(".")
            assert gguf_name(tensor) == f"{names.get_name(module)}.{leaf}"


def test_a_part_of_a_large_file_is_read_within_little_memory(tmp_path):
    """One tile of a quantised embedding of 100 MB, unpacked, within 20 MB of further memory."""
    model = tiny(head_dim=8, num_hidden_layers=1, tie_word_embeddings=True)
    small, _ = write_gguf(tmp_path / "small.gguf", model, "Q8_0")
    rows = np.zeros((800_000, 34), dtype=np.uint8)
    large = {"token_embd.weight": (rows, gguf.GGMLQuantizationType.Q8_0)}
    path, _ = write_gguf(tmp_path / "large.gguf", model, "Q8_0", tensors=large)
    code = (
        "import resource, sys, torch\n"
        "from checkpoint.open import open_checkpoint\n"
        "from checkpoint.source import read_tensor\n"
        "read_tensor(open_checkpoint(sys.argv[2]), 'model.embed_tokens.weight')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "source = open_checkpoint(sys.argv[1])\n"
        "out = torch.empty(8192, 32)\n"
        "source.read('model.embed_tokens.weight', (slice(399_000, 407_192), slice(0, 32)), {'weight': out})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, path, small], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 20_000


def refused(path):
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(path).infos
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 20, 100, 3000, -1])
def test_a_truncated_file_is_one_line(tmp_path, size):
    path, _ = write_gguf(tmp_path / "tiny.gguf", tiny(head_dim=8), "Q8_0")
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1000)
    assert refused(path).startswith(f"{path}: truncated")


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        (b"GGML\x03\0\0\0", "not a GGUF file"),
        (b"GGUF\x01\0\0\0", "is of GGUF version 1: allowed are 2 and 3"),
    ],
)
def test_another_kind_of_file(tmp_path, begin, words):
    path, _ = write_gguf(tmp_path / "tiny.gguf", tiny(head_dim=8))
    with path.open("r+b") as file:
        file.write(begin)
    assert refused(path) == f"{path}: {words}"


GATE = "blk.1.ffn_gate.weight"
BYTES = (np.zeros((2, 2), dtype=np.int8), gguf.GGMLQuantizationType.I8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"endianess": GGUFEndian.BIG}, "is big-endian; only little-endian GGUF files are read"),
        ({"arch": "qwen2moe"}, "unknown architecture 'qwen2moe': allowed are llama, qwen2, .*; did you mean 'qwen2'"),
        ({"tensors": {GATE: None}}, f"tensor {GATE} is missing"),
        ({"tensors": {"token_embd.weight": None}}, "tensor token_embd.weight is missing"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((2, 2), dtype=np.float32)}}, "holds a tensor blk.0"),
        ({"tensors": {GATE: BYTES}}, f"{GATE} is I8, which the gguf package does not unpack"),
        ({"tensors": {GATE: np.ones((64, 16), dtype=np.float32)}}, r"1.mlp.gate_proj.weight has shape \(64, 16\), "),
        ({"keys": {"llama.block_count": None}}, "llama.block_count is None: allowed are whole numbers above 0"),
        ({"keys": {"llama.block_count": 0}}, "llama.block_count is 0: allowed are whole numbers above 0"),
        ({"keys": {"llama.feed_forward_length": [64, 64]}}, r"llama.feed_forward_length is \(64, 64\): allowed are "),
        ({"keys": {"llama.attention.layer_norm_rms_epsilon": None}}, "layer_norm_rms_epsilon is missing"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "llama.rope.scaling.type is 'longrope': allowed are"),
        ({"keys": {"llama.rope.scaling.type": "linear"}}, "llama.rope.scaling.factor is missing"),
        ({"keys": {"llama.rope.dimension_count": 4}}, "llama.rope.dimension_count is 4: a rotary embedding of"),
        ({"keys": {"general.alignment": 0}}, "general.alignment is 0: allowed are whole numbers above 0"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, given, words):
    path, _ = write_gguf(tmp_path / "tiny.gguf", tiny(head_dim=8), **given)
    line = refused(path)
    assert line.startswith(f"{path}: ")
    assert re.search(words, line), line


def test_a_quantised_vector_and_an_unknown_type(tmp_path):
    model = tiny(head_dim=8)
    packed = (np.zeros(34, dtype=np.uint8), gguf.GGMLQuantizationType.Q8_0)
    path, _ = write_gguf(tmp_path / "vector.gguf", model, tensors={"output_norm.weight": packed})
    assert refused(path) == f"{path}: output_norm.weight of shape (32,) is Q8_0, whose rows are of whole 32 elements"
    path, _ = write_gguf(tmp_path / "tiny.gguf", model)
    data = path.read_bytes()
    at = data.index(GATE.encode()) + len(GATE) + 4 + 16
    path.write_bytes(data[:at] + (99).to_bytes(4, "little") + data[at + 4 :])
    assert refused(path) == f"{path}: {GATE} is of the type 99, which the gguf package does not unpack"


def test_without_the_package_plain_files_are_read_and_others_say_what_to_install(tmp_path, monkeypatch):
    model = tiny(head_dim=8)
    plain, _ = write_gguf(tmp_path / "plain.gguf", model, "BF16")
    packed, _ = write_gguf(tmp_path / "packed.gguf", model, "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_checkpoint(plain).infos["model.embed_tokens.weight"].slots == {"weight": torch.bfloat16}
    line = refused(packed)
    assert line.startswith(f"{packed}: ")
    assert line.endswith(" is quantised: to unpack it, pip install 'growmerge[gguf]'")


def test_folders_that_are_not_one_model(tmp_path):
    model = tiny(head_dim=8)
    one, _ = write_gguf(tmp_path / "one.gguf", model)
    write_gguf(tmp_path / "two.gguf", model)
    assert refused(tmp_path) == f"{tmp_path}: holds 2 GGUF models (one.gguf, two.gguf); name the file of one"
    assert_weights(open_checkpoint(one), model)
    model.save_pretrained(tmp_path)  # a folder of Hugging Face with files for llama.cpp beside
    assert format_of(tmp_path) == "safetensors"
    assert refused(tmp_path / "gone.gguf") == f"{tmp_path / 'gone.gguf'}: no such checkpoint folder"


def test_it_is_input_alone(tmp_path, tiny_folder):
    ran = CliRunner().invoke(main, ["convert", str(tiny_folder("small")), str(tmp_path / "x"), "--format", "gguf"])
    assert ran.exit_code == 2
    assert ran.stderr.startswith("growmerge: unknown format 'gguf': allowed are safetensors, ")


def test_numbers_are_the_shortest_that_float32_knows(tmp_path):
    path, _ = write_gguf(tmp_path / "tiny.gguf", tiny(head_dim=8, rms_norm_eps=1e-6))
    assert open_checkpoint(path).config["rms_norm_eps"] == 1e-6


def test_a_file_is_inspected_and_a_conversion_is_not_repeated(tmp_path):
    path, _ = write_gguf(tmp_path / "tiny.gguf", tiny(head_dim=8), "Q8_0")
    shown = CliRunner().invoke(main, ["inspect", str(path)], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.stderr
    assert "gguf" in shown.stdout
    told = ["convert", str(path), str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert CliRunner().invoke(main, told).stdout.startswith(f"{tmp_path / 'out'}: safetensors, ")
    assert CliRunner().invoke(main, told).stdout.startswith("nothing to do")
    os.utime(path, (1, 1))
    again = CliRunner().invoke(main, told)
    assert (again.exit_code, "holds another checkpoint" in again.stderr) == (2, True)
