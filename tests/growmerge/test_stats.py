"""`growmerge stats` on real folders: what it writes, that a SIGKILL changes no bit of it, and its error lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoint import manifest
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import open_safetensors
from checkpoint.source import read_tensor
from eval.bits_per_byte import document_requests
from eval.model import load_model
from growmerge import statistics
from growmerge.cli import Main
from growmerge.cli_stats import stats
from growmerge.convert import Target, convert_checkpoint
from growmerge.sample_text import TEXT
from growmerge.tokenizer_report import read_text
from growmerge.windows import batched, cut
from merge.gram import open_gram
from merge.statistics import fisher, gram
from merge.statistics_files import check_model
from train.data.tokenizer import load_tokenizer, train_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"
PROGRAM = "from growmerge.cli_stats import stats; stats()"
main = Main("growmerge", commands={"stats": stats}, params=[click.Option(["--debug"], is_flag=True)])


def call(*arguments):
    return CliRunner().invoke(main, ["stats", *map(str, arguments)])


def refused(*arguments):
    made = call(*arguments)
    assert made.exit_code == 2 and made.stderr.count("\n") == 1, made.output
    return made.stderr.removeprefix("growmerge: ").rstrip("\n")


@pytest.fixture
def model(tiny_folder):
    """A Hugging Face folder with a tokenizer, untied and in bfloat16."""
    folder = tiny_folder("small", vocab_size=300, tie_word_embeddings=False, dtype=torch.bfloat16)
    train_tokenizer([TEXT], vocab_size=300, folder=folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:4000], encoding="utf-8")
    return path


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": part}) for part in TEXT[:3000].split(". ")), encoding="utf-8")
    return path


def test_fisher(model, text, lines, tmp_path):
    made = call("fisher", model, lines, text, tmp_path / "out", "--sequence-length", 32, "--tokens", 1500)
    assert made.exit_code == 0, made.output
    tokenizer = load_tokenizer(model)
    requests = list(cut(read_text(lines) + read_text(text), tokenizer, length=32, tokens=1500))
    size = sum(path["size"] for path in manifest.check(tmp_path / "out", deep=True)["files"].values())
    windows = len(requests)
    assert made.stdout == f"{tmp_path / 'out'}: fisher over 1,500 tokens in {windows} windows, {size:,} bytes\n"
    out, source = open_checkpoint(tmp_path / "out"), open_checkpoint(model)
    wanted = fisher(load_model(source), [[one] for one in requests])
    assert out.infos.keys() == source.infos.keys() == wanted.keys()
    assert all(torch.equal(read_tensor(out, name), value) for name, value in wanted.items())
    assert out.infos[UP].slots == {"weight": torch.float32}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    about = out.run.provenance
    assert about["verb"] == "stats fisher"
    assert about["recipe"] == {"tokens": 1500, "sequence_length": 32, "labels": "text", "seed": None}
    assert about["counts"] == {"tokens": 1500, "sequences": windows}
    assert [one["name"] for one in about["statistic"]["texts"]] == ["lines.jsonl", "text.txt"]
    assert about["parents"] == [{"name": "small", "hash": None}]
    check_model(tmp_path / "out", about["statistic"]["model"], source)
    hidden = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")}
    assert hidden == {".statistics.jsonl"}
    log = [json.loads(line) for line in (tmp_path / "out" / ".statistics.jsonl").read_text().splitlines()]
    assert [log[0]["done"], log[-1]["done"], log[-1]["total"]] == [0, 1500, 1500]

    (tmp_path / "out" / ".statistics.safetensors").touch()  # as by a kill after the manifest
    again = call("fisher", model, lines, text, tmp_path / "out", "--sequence-length", 32, "--tokens", 1500)
    assert not (tmp_path / "out" / ".statistics.safetensors").exists()
    assert again.stdout == f"nothing to do: {tmp_path / 'out'} is there and whole\n"
    sampled = call("fisher", model, text, tmp_path / "drawn", "--labels", "sampled", "--seed", 5, "--tokens", 90)
    assert sampled.exit_code == 0, sampled.output
    recipe = open_checkpoint(tmp_path / "drawn").run.provenance["recipe"]
    assert recipe == {"tokens": 90, "sequence_length": 128, "labels": "sampled", "seed": 5}


def test_a_tied_tensor_is_stored_once(tiny_folder, text, tmp_path):
    folder = tiny_folder(vocab_size=300)
    train_tokenizer([TEXT], vocab_size=300, folder=folder)
    assert call("fisher", folder, text, tmp_path / "out", "--tokens", 50).exit_code == 0
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert open_checkpoint(tmp_path / "out").infos["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert call("gram", folder, text, tmp_path / "gram", "--tokens", 50).exit_code == 0
    assert "lm_head.weight" not in open_gram(tmp_path / "gram").weights


def test_gram(model, lines, tmp_path):
    made = call("gram", model, lines, tmp_path / "out", "--sequence-length", 40)
    assert made.exit_code == 0, made.output
    requests = list(cut(read_text(lines), load_tokenizer(model), length=40, tokens=None))
    out = open_gram(tmp_path / "out", open_checkpoint(model))
    assert out.tokens == sum(len(load_tokenizer(model).encode(one.text)) for one in read_text(lines))
    wanted = gram(load_model(open_checkpoint(model)), batched(requests, 4096))
    assert all(torch.equal(out.matrix(weight), wanted[name]) for weight, name in out.weights.items())
    assert json.loads((tmp_path / "out" / "growmerge.json").read_text())["verb"] == "stats gram"
    index = json.loads((tmp_path / "out" / "gram.json").read_text())
    assert set(index["files"]) == set(wanted) and index["sequences"] == len(requests)
    converted = tmp_path / "zero3"  # the same model in another format
    convert_checkpoint(model, Target(folder=converted, format="zero3", ranks=2))
    open_gram(tmp_path / "out", open_checkpoint(converted))
    assert call("gram", converted, lines, tmp_path / "again", "--sequence-length", 40).exit_code == 0
    again = open_gram(tmp_path / "again", open_checkpoint(model))
    assert torch.equal(again.matrix(UP), out.matrix(UP))


def test_windows(model, text):
    tokenizer, (document,) = load_tokenizer(model), read_text(text)
    plain = document_requests(document, tokenizer, window=32, stride=16)
    assert list(cut([document], tokenizer, length=32, tokens=None)) == plain
    some = list(cut([document] * 2, tokenizer, length=32, tokens=100))
    assert sum(len(one.tokens) - one.context for one in some) == 100
    assert some[:-1] == plain[: len(some) - 1] and some[0].tokens[0] == tokenizer.bos
    batches = list(batched(plain, 100))
    assert [one for batch in batches for one in batch] == plain and len(batches[0]) == 3


@pytest.mark.parametrize(
    ("statistic", "place"),
    [
        ("fisher", "stats/5"),
        ("fisher", "write/manifest"),
        ("gram", "write/.statistics.safetensors"),
        pytest.param("fisher", "write/.statistics.safetensors", marks=pytest.mark.slow),
        pytest.param("gram", "stats/5", marks=pytest.mark.slow),
        pytest.param("gram", "write/manifest", marks=pytest.mark.slow),
    ],
)
def test_killed_and_gone_on(statistic, place, model, text, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    program = f"import growmerge.statistics; growmerge.statistics.BATCH = 128; {PROGRAM}"
    options = ("--sequence-length", "32", "--every", "2", "--tokens", "800")
    if statistic == "fisher":
        options += ("--labels", "sampled")
    command = [sys.executable, "-c", program, statistic, str(model), str(text)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    stuck = tmp_path / "stuck"
    run = subprocess.Popen(
        [*command, str(tmp_path / "out"), *options], env={**environment, "GROWMERGE_FAULT": f"{stuck}:{place}"}
    )
    deadline = time.monotonic() + 120
    while not stuck.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run.poll() is None and stuck.exists()
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not manifest.is_complete(tmp_path / "out")
    assert (tmp_path / "out" / ".statistics.safetensors").exists() == (place != "write/.statistics.safetensors")
    assert "is an unfinished stats" in refused(statistic, model, text, tmp_path / "out", "--tokens", "9")

    monkeypatch.setattr(statistics, "BATCH", 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("out", "whole"):
            made = call(statistic, model, text, tmp_path / name, *options)
            assert made.exit_code == 0, made.output
            assert ("goes on after" in made.stderr) == (name == "out" and place != "write/.statistics.safetensors")
    finally:
        torch.set_num_threads(threads)
    files = manifest.check(tmp_path / "whole", deep=True)["files"]
    assert files.keys() == manifest.check(tmp_path / "out", deep=True)["files"].keys()
    for name in files.keys() - {"growmerge.json"}:  # which says the folder's name
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, "manifest.json", ".statistics.jsonl"}


def test_error_lines(model, text, tiny_folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "nothing.txt").write_text("")
    assert refused("fisher", model, tmp_path / "empty.txt", out) == f"{tmp_path / 'empty.txt'}: holds no text"
    assert refused("gram", model, tmp_path / "nothing.txt", out) == f"{tmp_path / 'nothing.txt'}: the file is empty"
    assert refused("gram", model, tmp_path / "none.txt", out) == f"{tmp_path / 'none.txt'}: no such file"
    bare = tiny_folder("bare")
    line = f"{bare}: holds no tokenizer.json (a fast Hugging Face tokenizer is needed)"
    assert refused("gram", bare, text, out) == line
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (bare / name).write_bytes((model / name).read_bytes())
    assert "is outside the model's vocabulary of 131; is this the tokenizer" in refused("gram", bare, text, out)
    line = "window 129 is not possible: allowed are 2 to 128 tokens (the model's positions)"
    assert refused("gram", model, text, tmp_path / "new", "--sequence-length", 129) == line
    assert refused("gram", model, text, tmp_path / "new", "--tokens", 0) == "--tokens is 0: it has to be at least 1"
    assert refused("gram", model, text, tmp_path / "new", "--every", 0) == "--every is 0: it has to be at least 1"
    assert refused("gram", tmp_path / "no", text, out) == f"{tmp_path / 'no'}: no such checkpoint folder"
    assert not (tmp_path / "new").exists() and not out.exists()


def test_folders_that_are_taken(model, text, tmp_path):
    assert refused("gram", model, text, model) == f"{model}: is the model itself; choose another folder"
    assert refused("gram", model, text, text) == f"{text}: is a file; choose another folder"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    assert refused("fisher", model, text, taken) == f"{taken}: is not empty; choose another folder"
    done = tmp_path / "done"
    assert call("gram", model, text, done, "--tokens", 40).exit_code == 0
    line = f"{done}: is stats gram of another model, text or options; choose another folder"
    assert refused("gram", model, text, done, "--tokens", 41) == line
    assert refused("fisher", model, text, done, "--tokens", 40) == line
    text.write_text("Other words are here. " * 20)
    assert refused("gram", model, text, done, "--tokens", 40) == line


def test_models_that_hold_a_nan_or_are_too_large(model, text, tmp_path, monkeypatch):
    source = open_safetensors(model)
    place = source.stored[UP]
    with place.path.open("r+b") as file:
        file.seek(place.offset + 2 * (3 * 32 + 4))
        file.write(b"\xc0\x7f")
    for statistic in ("fisher", "gram"):
        line = refused(statistic, model, text, tmp_path / "out")
        assert line == f"{model}: {UP} has weight nan at [3, 4]"
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(statistics, "available_memory", lambda: 200_000)
    line = refused("fisher", model, text, tmp_path / "out")
    assert line == f"{model}: 0.0 GB of memory are needed for this, 0.0 GB are free"
