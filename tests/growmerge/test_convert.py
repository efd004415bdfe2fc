"""grow, convert and verify on the command line: any format to any other, nothing half-done, exit codes."""

import json
import os
import re
import shutil
import subprocess
import time
from fnmatch import fnmatch

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from toy import command, growmerge
from transformers import AutoModelForCausalLM

from checkpoint.open import open_checkpoint
from checkpoint.source import read_tensor
from growmerge.cli import main
from train.data.tokenizer import train_tokenizer


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A Hugging Face folder: a tiny model in bfloat16 with a tokenizer of its own."""
    folder = tiny_folder("small", dtype=torch.bfloat16, vocab_size=300)
    text = (tmp_path / "text.txt").absolute()
    text.write_text("Growing keeps what a model knows, and a wider model can learn more. " * 40)
    train_tokenizer([text.read_text()], vocab_size=300, folder=folder)
    return folder


def told(*arguments, **given):
    """What the command line says, without a process of its own: its imports take longer than its work."""
    return CliRunner().invoke(main, arguments, **given)


def test_grown_and_verified(model, tmp_path):
    grown = told("grow", str(model), str(tmp_path / "big"), "--width", "3", "--seed", "5")
    assert grown.exit_code == 0, grown.stderr
    assert grown.stdout.startswith(f"{tmp_path / 'big'}: safetensors, ")
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    assert (big.config.hidden_size, big.config.num_attention_heads, big.dtype) == (96, 12, torch.bfloat16)
    assert (tmp_path / "big" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()

    shown = told("verify", str(model), str(tmp_path / "big"), "--text", str(tmp_path / "text.txt"), "--json")
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["preserved"] is True
    assert found["float32"]["relative"] < 1e-5
    assert found["gradients"]["mean"] < 1e-4  # whatever the shares, their gradients add up
    assert found["gradients"]["single"] > 0.05
    assert 0.2 < found["asymmetry"] < 0.6
    assert found["floor"]["max_logit_difference"] > found["float32"]["max_logit_difference"]
    shown = told(
        *("verify", str(model), str(tmp_path / "big"), "--text", str(tmp_path / "text.txt"), "--json", "--by-module")
    )
    assert (shown.exit_code, json.loads(shown.stdout)) == (0, {**found, "gradients": None})

    again = told("grow", str(model), str(tmp_path / "big"), "--width", "3", "--seed", "5")
    assert (again.exit_code, again.stdout.split(":")[0]) == (0, "nothing to do")
    other = told("grow", str(model), str(tmp_path / "big"), "--width", "2")
    assert other.exit_code == 2
    assert "holds another checkpoint (made by grow); choose another folder" in other.stderr

    weights = load_file(tmp_path / "big" / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, tmp_path / "big" / "model.safetensors", metadata={"format": "pt"})
    shown = told("verify", str(model), str(tmp_path / "big"), env={"COLUMNS": "120"})
    assert shown.exit_code == 1
    assert "function: NOT preserved" in shown.stdout
    assert "small, bfloat16 (noise floor)" in shown.stdout


def test_what_is_not_promised_is_no_failure(model, tmp_path):
    assert told("grow", str(model), str(tmp_path / "s"), "--width", "3", "--method", "symmetric").exit_code == 0
    found = told("verify", str(model), str(tmp_path / "s"), "--json")
    assert found.exit_code == 0
    assert json.loads(found.stdout)["preserved"] is None
    assert json.loads(found.stdout)["asymmetry"] == 0
    # A model that was grown by another tool: its factors are seen from its shape.
    (tmp_path / "s" / "growmerge.json").unlink()
    assert json.loads(told("verify", str(model), str(tmp_path / "s"), "--json").stdout)["asymmetry"] == 0


def test_padded_and_deeper(model, tmp_path):
    """Where the function stays `verify` says so; where layers are repeated it says what the loss becomes."""
    sizes = ("--width", "2", "--to-hidden", "80", "--to-ffn", "99", "--depth", "identity", "--layers", "4")
    assert told("grow", str(model), str(tmp_path / "big"), *sizes).exit_code == 0
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    assert (big.config.hidden_size, big.config.intermediate_size, big.config.num_hidden_layers) == (80, 99, 4)
    recipe = json.loads((tmp_path / "big" / "growmerge.json").read_text())["recipe"]
    assert {key: recipe[key] for key in ("hidden", "to_hidden", "depth", "layers")} == {"hidden": 2} | {
        "to_hidden": 80,
        "depth": "identity",
        "layers": 4,
    }
    text = ("--text", str(tmp_path / "text.txt"))
    found = json.loads(told("verify", str(model), str(tmp_path / "big"), *text, "--json").stdout)
    assert (found["preserved"], found["asymmetry"], found["gradients"]) == (None, None, None)
    assert found["float32"]["relative"] < 0.02  # norms times sqrt(64 / 80), in bfloat16
    for name, *how in (("deep", "identity", "--layers", "4"), ("twice", "stack", "--layers", "4")):
        assert told("grow", str(model), str(tmp_path / name), "--depth", *how).exit_code == 0
    found = json.loads(told("verify", str(model), str(tmp_path / "deep"), *text, "--json").stdout)
    assert found["preserved"] is True
    assert found["float32"]["relative"] < 1e-5
    shown = told("verify", str(model), str(tmp_path / "twice"), *text, env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    assert "function: not promised by this recipe" in shown.stdout
    before, after = map(float, re.search(r"loss (\S+) -> (\S+) nats a token", shown.stdout).groups())
    assert after != before
    assert "copies and gradients: not checked, as sizes were padded or layers or experts added" in shown.stdout


def test_there_and_back_gives_the_same_bytes(model, tmp_path):
    for source, target, *options in (
        ("small", "z", "--format", "zero3", "--dp", "3"),
        ("z", "u", "--format", "universal"),
        ("u", "t", "--format", "zero3", "--dp", "2", "--tp", "2"),
        ("t", "back", "--shard-gb", "1e-5"),
        ("back", "single", "--workers", "1"),
    ):
        ran = told("convert", str(tmp_path / source), str(tmp_path / target), *options)
        assert ran.exit_code == 0, ran.stderr
    assert len(list((tmp_path / "t").glob("zero_pp_rank_?_mp_rank_??_model_states.pt"))) == 4
    shown = told("inspect", str(tmp_path / "t"), "--check", env={"COLUMNS": "120"}).stdout
    assert "zero3_tp" in shown
    assert "2 data-parallel x 2 tensor-parallel" in shown
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    ours, theirs = load_file(tmp_path / "single" / "model.safetensors"), load_file(model / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    other = ("convert", str(tmp_path / "u"), str(tmp_path / "t"), "--format", "zero3", "--dp", "2", "--tp")
    assert told(*other, "2").stdout.startswith("nothing to do")
    assert "holds another checkpoint (made by convert); choose another folder" in told(*other, "1").stderr


def test_killed_half_way_it_goes_on_with_what_is_missing(model, tmp_path):
    arguments = ("grow", str(model), str(tmp_path / "big"), "--width", "2", "--shard-gb", "4e-5", "--workers", "2")
    marker = tmp_path / "reached"
    second = "write/model-00002-of-00005.safetensors"
    process = subprocess.Popen(command(*arguments), env={**os.environ, "GROWMERGE_FAULT": f"{marker}:{second}"})
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert told("inspect", str(tmp_path / "big")).exit_code == 2  # it does not look like a checkpoint
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "big").glob("model-0000[12]*")}
    assert len(kept) == 2
    ended = told(*arguments)
    assert ended.exit_code == 0, ended.stderr
    assert {name: (tmp_path / "big" / name).stat().st_mtime_ns for name in kept} == kept
    whole = told("grow", str(model), str(tmp_path / "other"), *arguments[3:-1], "1")
    assert whole.exit_code == 0, whole.stderr
    for path in (tmp_path / "other").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "big" / path.name).read_bytes(), path.name
    assert not list((tmp_path / "big").glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("grow", "small", "new", "--width", "0"), "growth factor of hidden is 0: allowed are whole numbers from 1 on"),
        (("grow", "small", "new", "--method", "diagnal"), "unknown growth method 'diagnal': *did you mean 'diagonal'?"),
        (("grow", "small", "new", "--with-optimizer"), "small: has no optimizer state to grow; leave out *"),
        (("grow", "small", "small"), "small: is the source itself; choose another folder"),
        (("grow", "small", "full"), "full: is not empty and not an unfinished checkpoint; choose another folder"),
        (("convert", "small", "new", "--format", "zero"), "unknown format 'zero': *did you mean 'zero3'?"),
        (("convert", "small", "new", "--dtype", "fp16"), "unknown dtype 'fp16': allowed are *"),
        (("convert", "gone", "new"), "gone: no such checkpoint folder"),
        (("convert", "full", "new"), "full: not a checkpoint of a known format (*"),
        (("convert", "small", "new", "--format", "zero3", "--dp", "0"), "a ZeRO-3 checkpoint of 0 ranks cannot be *"),
        (("convert", "small", "new", "--format", "zero3", "--tp", "0"), "a ZeRO-3 checkpoint of 0 tensor-parallel *"),
        (
            ("convert", "small", "new", "--format", "zero3", "--tp", "3"),
            "model.layers.0.self_attn.q_proj.weight has*",
        ),
        (("grow", "small", "new", "--tp", "2"), "--tp is of --format zero3 and nanotron, *; safetensors has none"),
        (("convert", "small", "new", "--format", "universal", "--tp", "2"), "--tp is of --format zero3 and *"),
        (("verify", "small", "small", "--text", "gone.txt"), "gone.txt: cannot be read as UTF-8 text (*"),
    ],
)
def test_a_mistake_is_one_line(model, tmp_path, monkeypatch, arguments, line):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    found = told(*arguments)
    assert found.exit_code == 2
    assert found.stderr.count("\n") == 1
    assert fnmatch(found.stderr.strip().replace("[", "("), f"growmerge: {line}"), found.stderr
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_full_disk_leaves_nothing_that_looks_complete(model, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], check=True)
    try:
        full = growmerge("grow", str(model), str(disk / "big"), "--width", "2")
        assert full.returncode == 2
        assert full.stderr.count("\n") == 1
        assert "no space left" in full.stderr
        assert told("inspect", str(disk / "big")).exit_code == 2
        subprocess.run(["mount", "-o", "remount,size=5m", str(disk)], check=True)
        assert told("grow", str(model), str(disk / "big"), "--width", "2").exit_code == 0
        source = open_checkpoint(disk / "big")
        assert read_tensor(source, "model.norm.weight").shape == (64,)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    shutil.rmtree(disk)


def test_a_nan_is_refused_where_asked(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = f"growmerge: {model}: model.layers.1.mlp.up_proj.weight has weight nan at [3, 2]\n"
    for arguments in (
        ["inspect", str(model), "--finite"],
        ["convert", str(model), str(tmp_path / "to"), "--finite", "--format", "zero3", "--dp", "2"],
        ["convert", str(model), str(tmp_path / "to"), "--finite", "--format", "universal"],
        ["grow", str(model), str(tmp_path / "to"), "--finite", "--width", "2"],
    ):
        found = told(*arguments)
        assert (found.exit_code, found.stderr) == (2, line), arguments
        assert not (tmp_path / "to").exists()
    assert told("convert", str(model), str(tmp_path / "to")).exit_code == 0
    again = told("convert", str(model), str(tmp_path / "to"), "--finite")
    assert (again.exit_code, again.stderr) == (2, line.replace(str(model), str(tmp_path / "to")))


@pytest.mark.parametrize(("free", "gradients"), [(10**12, True), (10**5, False)])
def test_models_that_do_not_fit_are_read_a_module_at_a_time(model, tmp_path, monkeypatch, free, gradients):
    assert told("grow", str(model), str(tmp_path / "big"), "--width", "2").exit_code == 0
    monkeypatch.setattr("growmerge.verify.available_memory", lambda: free)
    shown = told("verify", str(model), str(tmp_path / "big"), "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["preserved"] is True
    assert (found["gradients"] is not None) == gradients
