"""`growmerge sweep`: what single merges make, in one pass; nothing done twice."""

import json
import os
import subprocess
import time
from fnmatch import fnmatch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_merging import models, told  # noqa: F401
from tiny import tiny_model
from toy import command

from checkpoint import manifest
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsSource
from merge import merge, sparsify, stack
from merge.sums import Signed, Weighted

SPEC = """\
models: {a: swe, b: est, c: base}
base_model: base
methods:
  linear: {}
  task_arithmetic: {lambda: 0.7}
  ties: {density: [0.3, 0.5]}
  dare_ties: {density: 0.5}
  della_linear: {density: 0.5}
  multislerp: {}
  nuslerp: {}
dtype: bfloat16
"""


@pytest.fixture
def folder(models):  # noqa: F811
    other = models / "fin"
    (models / "fin").mkdir()
    for path in (models / "est").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (models / "spec.yaml").write_text(SPEC.replace("c: base", "c: fin"))
    return models


def shown(folder):
    return json.loads((folder / "sweep.json").read_text())


def test_each_is_what_its_recipe_makes_alone(folder, monkeypatch):
    read = 0
    plain = SafetensorsSource.read

    def counted(self, name, box, out, stats=None):
        nonlocal read
        read += 1
        plain(self, name, box, out, stats)

    monkeypatch.setattr(SafetensorsSource, "read", counted)
    found = told("sweep", "spec.yaml", "out", "--workers", "1", "--seed", "3")
    assert found.exit_code == 0, found.stderr
    entries = shown(folder / "out")
    assert found.stdout == f"out: {len(entries)} merges\n" and len(entries) == 31
    together, read = read, 0
    assert told("sweep", "spec.yaml", "recipes", "--recipes", "--seed", "3").exit_code == 0
    for entry in entries:
        name = entry["name"]
        assert told("merge", f"recipes/{name}.yml", f"alone/{name}").exit_code == 0
        one, alone = (folder / where / name / "model.safetensors" for where in ("out", "alone"))
        assert one.read_bytes() == alone.read_bytes(), name
        manifest.check(folder / "out" / name)
    assert read > 2 * together
    ties = next(entry for entry in entries if entry["name"] == "ties-density0.3-a_b")
    assert (ties["method"], ties["models"], ties["parameters"]) == ("ties", ["a", "b"], {"density": 0.3})
    assert (folder / "out" / "linear-a_b" / "tokenizer.json").is_file()
    assert told("sweep", "spec.yaml", "out", "--seed", "3").stdout.startswith("31 of 31 are there and whole\n")


def test_killed_it_goes_on(folder):
    marker = folder / "reached"
    arguments = ("sweep", "spec.yaml", "out", "--shard-gb", "2e-5")
    environment = {**os.environ, "GROWMERGE_FAULT": f"{marker}:write/model-00002-of-00003.safetensors"}
    process = subprocess.Popen(command(*arguments), env=environment)
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*/model-00001*")}
    assert len(kept) == 31 and not list((folder / "out").glob("*/manifest.json"))
    ended = told(*arguments)
    assert ended.exit_code == 0, ended.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert told("sweep", "spec.yaml", "whole").exit_code == 0
    for entry in shown(folder / "out"):
        cut, whole = (open_checkpoint(folder / where / entry["name"]) for where in ("out", "whole"))
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(cut._mapped(name), whole._mapped(name))


def test_a_dry_run_lists_them(folder):
    found = told("sweep", "spec.yaml", "out", "--dry-run")
    assert found.exit_code == 0, found.stderr
    assert "ties-density0.3-a_b: ties of a, b (density 0.3)\n" in found.stdout
    assert found.stdout.endswith("31 merges\n") and not (folder / "out").exists()
    assert "note: swe: not known whether it stems from base" in found.stderr


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("c: fin", "c: nor", "spec.yaml: nor: no such folder, neither beside the recipe nor here"),
        (
            "nuslerp: {}",
            "slerp: {t: 0}",
            "spec.yaml:10: no subset has as many models as slerp takes: 1 beside the base",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, old, new, line):
    path = folder / "spec.yaml"
    path.write_text(path.read_text().replace(old, new))
    found = told("sweep", "spec.yaml", "out")
    assert found.exit_code == 2
    assert fnmatch(found.stderr.strip(), f"growmerge: {line}"), found.stderr
    assert not (folder / "out").exists()


def test_models_of_several_dtypes_each_keep_theirs(folder):
    weights = load_file(folder / "base" / "model.safetensors")
    save_file({name: value.float() for name, value in weights.items()}, folder / "base" / "model.safetensors")
    (folder / "spec.yaml").write_text(
        "models: {a: swe, b: est}\nbase_model: base\nmethods: {linear: {}, ties: {density: 0.5}, tsv: {}}\n"
    )
    found = told("sweep", "spec.yaml", "out")
    assert found.exit_code == 0, found.stderr
    for method, dtype in (("linear", torch.bfloat16), ("ties", torch.float32), ("tsv", torch.float32)):
        tensors = load_file(folder / "out" / f"{method}-a_b" / "model.safetensors")
        assert {value.dtype for value in tensors.values()} == {dtype}
        manifest.check(folder / "out" / f"{method}-a_b")


@pytest.mark.parametrize("at_once", [8, 2])
def test_statistics_are_found_once(folder, monkeypatch, at_once):
    monkeypatch.setattr(stack, "PASS", at_once)
    found = 0
    plain = sparsify.find_cuts

    def counted(*arguments):
        nonlocal found
        found += len(arguments[3])  # task vectors
        return plain(*arguments)

    monkeypatch.setattr(sparsify, "find_cuts", counted)
    (folder / "spec.yaml").write_text(
        "models: {a: swe, b: est, c: fin}\nbase_model: base\nmethods: {ties: {density: 0.5}}\n"
    )
    assert told("sweep", "spec.yaml", "out", "--workers", "1").exit_code == 0
    tensors = [info for info in open_checkpoint(folder / "base").infos.values() if info.tied_to is None]
    assert found == 3 * len(tensors)


@pytest.mark.parametrize(("method", "kind"), [("linear: {}", Weighted), ("ties: {density: 0.5}", Signed)])
def test_subsets_go_on_from_their_common_beginnings(folder, monkeypatch, method, kind):
    steps = boxes = 0
    add, merged_of = kind.add, merge.merged_of

    def counted_add(*arguments):
        nonlocal steps
        steps += 1
        add(*arguments)

    def counted_boxes(merges, box):
        nonlocal boxes
        assert len(merges) == 4
        boxes += 1
        return merged_of(merges, box)

    monkeypatch.setattr(kind, "add", counted_add)
    monkeypatch.setattr(merge, "merged_of", counted_boxes)
    (folder / "spec.yaml").write_text(f"models: {{a: swe, b: est, c: fin}}\nbase_model: base\nmethods: {{{method}}}\n")
    assert told("sweep", "spec.yaml", "out", "--workers", "1").exit_code == 0
    # ab, abc, ac and bc are a, b, c more, c again behind a, and b, c: 6 steps instead of 9.
    assert boxes > 0
    assert steps == boxes * 6


def test_recipes_find_adapters_from_where_they_are(folder):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(tiny_model(1, torch.bfloat16, vocab_size=300), lora).save_pretrained(folder / "adapter")
    text = "models: {a: swe+adapter, b: est}\nmethods: {linear: {}}\n"
    (folder / "spec.yaml").write_text(text)
    assert told("sweep", "spec.yaml", "deep/recipes", "--recipes").exit_code == 0
    found = told("merge", "deep/recipes/linear-a_b.yml", "out")
    assert found.exit_code == 0, found.stderr


@pytest.mark.parametrize("order", ["b: untied, c: other, a: swe", "a: swe, b: untied, c: other"])
def test_of_models_with_and_without_a_head_of_their_own(folder, order):
    for number, name in enumerate(("untied", "other", "start")):
        tiny_model(number, torch.bfloat16, vocab_size=300, tie_word_embeddings=False).save_pretrained(folder / name)
    spec = (
        f"models: {{{order}}}\nbase_model: start\nmethods: {{ties: {{density: 0.5}}, multislerp: {{}}, linear: {{}}}}\n"
    )
    (folder / "spec.yaml").write_text(spec)
    assert told("sweep", "spec.yaml", "recipes", "--recipes").exit_code == 0
    found = told("sweep", "spec.yaml", "out", "--workers", "1")
    assert found.exit_code == 0, found.stderr
    with (folder / "spec.yaml").open("a") as spec:
        spec.write("materialize: false\n")
    assert told("sweep", "spec.yaml", "also").exit_code == 0
    assert {path.name: path.read_bytes() for path in (folder / "also").iterdir()} == {
        path.name: path.read_bytes() for path in (folder / "recipes").iterdir()
    }
    for path in sorted((folder / "recipes").glob("*.yml")):
        assert told("merge", str(path), f"alone/{path.stem}").exit_code == 0
        one, alone = (folder / where / path.stem / "model.safetensors" for where in ("out", "alone"))
        assert one.read_bytes() == alone.read_bytes(), path.stem


def test_subsets_of_other_shapes(folder):
    for number, name in enumerate(("wide", "wider")):
        tiny_model(number, torch.bfloat16, vocab_size=300, intermediate_size=96).save_pretrained(folder / name)
    text = "models: {a: swe, b: est, c: wide, d: wider}\nsubsets: [[a, b], [c, d]]\nmethods: {linear: {}}\n"
    (folder / "spec.yaml").write_text(text)
    found = told("sweep", "spec.yaml", "out", "--workers", "1")
    assert found.exit_code == 0, found.stderr
    shapes = [open_checkpoint(folder / "out" / f"linear-{pair}").config["intermediate_size"] for pair in ("a_b", "c_d")]
    assert shapes[0] != shapes[1] == 96
