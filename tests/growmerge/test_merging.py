"""`growmerge merge`: mergekit's recipes on the command line, from any format to any other, nothing half-done."""

import json
import os
import shutil
import subprocess
import time
from fnmatch import fnmatch

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from toy import command, growmerge
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint.open import open_checkpoint
from checkpoint.source import read_tensor
from growmerge.cli import main
from merge.merge import merge
from train.data.tokenizer import train_tokenizer

TIES = """
models:
  - {model: swe, parameters: {weight: 0.4}}
  - {model: est, parameters: {weight: 0.6}}
merge_method: ties
base_model: base
parameters: {density: 0.5}
dtype: bfloat16
"""
LINEAR = "models: [{model: swe}, {model: est}]\nmerge_method: linear\nparameters: {weight: 1}\n"
TEXTS = {"base": "the house by the sea", "swe": "ett hus vid havet", "est": "maja mere ääres"}


@pytest.fixture
def models(tiny_folder, tmp_path, monkeypatch):
    """Three Hugging Face folders beside one another, with tokenizers of their own of one size."""
    for seed, (name, text) in enumerate(TEXTS.items()):
        folder = tiny_folder(name, seed, torch.bfloat16, vocab_size=300)
        train_tokenizer([f"{text} {number}" for number in range(300)], vocab_size=300, folder=folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(*arguments, **given):
    """What the command line says, without a process of its own: its imports take longer than its work."""
    return CliRunner().invoke(main, arguments, **given)


def recipe(folder, text=TIES):
    (folder / "recipe.yaml").write_text(text)
    return "recipe.yaml"


def same_weights(one, other):
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_recipe_becomes_a_plain_folder(models):
    found = told("merge", recipe(models), "out")
    assert found.exit_code == 0, found.stderr
    assert found.stdout.startswith("out: safetensors, ")
    merged = AutoModelForCausalLM.from_pretrained("out")
    assert merged.dtype == torch.bfloat16
    swe, est, base = (open_checkpoint(models / name) for name in ("swe", "est", "base"))
    wanted = merge([swe, est], "ties", base=base, weights=[0.4, 0.6], parameters={"density": 0.5})
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(merged.state_dict()[name], read_tensor(wanted, name, dtype=torch.bfloat16))
    assert (models / "out" / "tokenizer.json").read_bytes() == (models / "base" / "tokenizer.json").read_bytes()
    assert (models / "out" / "mergekit_config.yml").read_text() == TIES
    record = json.loads((models / "out" / "growmerge.json").read_text())
    assert (record["verb"], record["recipe"]["method"], record["recipe"]["seed"]) == ("merge", "ties", 0)
    assert [parent["name"] for parent in record["parents"]] == ["base", "swe", "est"]
    card = (models / "out" / "README.md").read_text()
    assert "- base (base)" in card and "density: 0.5" in card and "arXiv 2306.01708" in card
    assert told("merge", "recipe.yaml", "out").stdout == "nothing to do: out is there and whole\n"
    assert "holds another checkpoint" in told("merge", recipe(models, LINEAR), "out").stderr


def test_any_format_is_read_and_written_without_a_copy_between(models):
    assert told("merge", recipe(models), "plain").exit_code == 0
    for name, ranks in (("base", "1"), ("swe", "3"), ("est", "2")):
        assert told("convert", name, f"{name}-z", "--format", "zero3", "--dp", ranks).exit_code == 0
    text = TIES.replace("swe,", "swe-z,").replace("est,", "est-z,").replace("_model: base", "_model: base-z")
    found = told("merge", recipe(models, text), "sharded", "--format", "zero3", "--dp", "2")
    assert found.exit_code == 0, found.stderr
    assert told("convert", "sharded", "back").exit_code == 0
    assert same_weights(models / "plain", models / "back")


def test_an_adapter_is_applied_on_the_fly(models):
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model(1, torch.bfloat16, vocab_size=300), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, value in adapted.named_parameters():
        if "lora" in name:
            value.data.normal_()
    adapted.save_pretrained(models / "adapter")
    adapted.merge_and_unload().save_pretrained(models / "unloaded")
    text = "models: [{model: swe+adapter}]\nmerge_method: passthrough\n"
    assert told("merge", recipe(models, text), "out").exit_code == 0
    name = "model.layers.1.self_attn.q_proj.weight"
    out, wanted = (load_file(models / folder / "model.safetensors")[name] for folder in ("out", "unloaded"))
    assert (out.float() - wanted.float()).abs().max() < 2**-7 * wanted.abs().max()  # peft rounds its product as well
    assert not torch.equal(out, load_file(models / "swe" / "model.safetensors")[name])


def test_a_union_of_vocabularies(models):
    found = told("merge", recipe(models, LINEAR + "tokenizer_source: union\n"), "out")
    assert found.exit_code == 0, found.stderr
    tokenizer = AutoTokenizer.from_pretrained("out")
    merged = AutoModelForCausalLM.from_pretrained("out")
    assert len(tokenizer) == merged.config.vocab_size > 300
    rows = {}
    for name in ("swe", "est"):
        own = AutoTokenizer.from_pretrained(name)
        rows[name] = {token: own.convert_tokens_to_ids(token) for token in own.get_vocab()}
    embeddings = {name: load_file(models / name / "model.safetensors")["model.embed_tokens.weight"] for name in rows}
    only = next(token for token in rows["est"] if token not in rows["swe"])
    both = next(token for token in rows["est"] if token in rows["swe"] and rows["est"][token] != rows["swe"][token])
    out = merged.model.embed_tokens.weight
    assert torch.equal(out[tokenizer.convert_tokens_to_ids(only)], embeddings["est"][rows["est"][only]])
    mean = (embeddings["swe"][rows["swe"][both]].float() + embeddings["est"][rows["est"][both]].float()) / 2
    assert torch.equal(out[tokenizer.convert_tokens_to_ids(both)].float(), mean.bfloat16().float())


@pytest.mark.parametrize("name", ["alpaca", "chatml", "exaone", "llama3", "mistral"])
def test_chat_templates(models, name):
    assert told("merge", recipe(models, LINEAR + f"chat_template: {name}\n"), "out").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained("out")
    talk = [{"role": "user", "content": "Hej!"}, {"role": "assistant", "content": "Hallo!"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert 0 <= text.index("Hej!") < text.index("Hallo!")
    begun = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(begun)


def test_the_template_that_most_models_have(models):
    for name, template in (("swe", "{{ 'a' }}"), ("est", "{{ 'a' }}"), ("base", "{{ 'b' }}")):
        (models / name / "chat_template.jinja").write_text(template)
    assert told("merge", recipe(models, TIES + "chat_template: auto\n"), "out").exit_code == 0
    assert (models / "out" / "chat_template.jinja").read_text() == "{{ 'a' }}"


def test_the_seed_decides_what_is_drawn(models):
    recipe(models, TIES.replace("ties", "dare_ties"))
    for out, *options in (("a", "--workers", "1"), ("b", "--workers", "3"), ("c", "--seed", "1")):
        assert told("merge", "recipe.yaml", out, *options).exit_code == 0
    assert same_weights(models / "a", models / "b")
    assert not same_weights(models / "a", models / "c")


def test_a_dry_run_checks_and_writes_nothing(models):
    found = told("merge", recipe(models, LINEAR + "dtype: float16\n"), "out", "--dry-run")
    assert (found.exit_code, found.stdout) == (0, "recipe.yaml: nothing is wrong with it\n")
    assert "note: recipe.yaml:4: float16 loses digits" in found.stderr
    assert not (models / "out").exists()


def test_killed_half_way_it_goes_on_with_what_is_missing(models):
    arguments = ("merge", recipe(models), "out", "--shard-gb", "2e-5", "--workers", "2")
    marker = models / "reached"
    second = next(f"model-00002-of-{count:05d}.safetensors" for count in (_shards(models),))
    environment = {**os.environ, "GROWMERGE_FAULT": f"{marker}:write/{second}"}
    process = subprocess.Popen(command(*arguments), env=environment)
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert told("inspect", "out").exit_code == 2
    kept = {path.name: path.stat().st_mtime_ns for path in (models / "out").glob("model-0000[12]*")}
    assert len(kept) == 2
    ended = growmerge(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert {name: (models / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert told("merge", "recipe.yaml", "whole", "--shard-gb", "2e-5").exit_code == 0
    for path in (models / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (models / "out" / path.name).read_bytes(), path.name


def _shards(models):
    assert told("merge", "recipe.yaml", "count", "--shard-gb", "2e-5").exit_code == 0
    return len(list((models / "count").glob("model-*.safetensors")))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (LINEAR.replace("est", "nor"), "recipe.yaml:1: nor: no such folder, neither beside the recipe nor here"),
        (LINEAR.replace("est", "org/est"), "recipe.yaml:1: org/est: hub:org/est: not in the cache of this machine: *"),
        (LINEAR.replace("linear", "lineer"), "recipe.yaml:2: unknown merge_method 'lineer': * did you mean 'linear'?"),
        (LINEAR.replace("est", "swe+est"), "recipe.yaml:1: swe+est: *adapter_config.json*"),
        (LINEAR + "tokenizer_source: unino\n", "recipe.yaml:4: unknown source of the tokenizer 'unino': *'union'?"),
        (LINEAR + "chat_template: chatl\n", "recipe.yaml:4: unknown chat_template 'chatl': *'chatml'?*"),
        (LINEAR + "tokenizer: {sorce: union}\n", "recipe.yaml:4: tokenizer: unknown key 'sorce': *'source'?"),
        ("", "recipe.yaml: the file is empty"),
    ],
)
def test_a_mistake_is_one_line(models, text, line):
    found = told("merge", recipe(models, text), "out")
    assert found.exit_code == 2
    assert [one for one in found.stderr.splitlines() if not one.startswith("note: ")] == [found.stderr.splitlines()[-1]]
    assert fnmatch(found.stderr.splitlines()[-1].replace("[", "("), f"growmerge: {line}"), found.stderr
    assert not (models / "out").exists()


def damage(path, how):
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "truncated":
        os.truncate(path, path.stat().st_size - 1000)
        return
    weights = load_file(path)
    if how == "nan":
        weights[name][3, 2] = float("nan")
    elif how == "shape":
        weights[name] = weights[name][:-1].contiguous()
    elif how == "missing":
        del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("truncated", "*model.safetensors: truncated (*"),
        ("nan", "est: model.layers.1.mlp.up_proj.weight holds a value that is not finite; such a model cannot be *"),
        ("shape", "*model.layers.1.mlp.up_proj.weight has shape (47, 32), config.json says (48, 32)"),
        ("missing", "*tensor model.layers.1.mlp.up_proj.weight is missing"),
    ],
)
def test_a_damaged_model_is_one_line_and_leaves_nothing_complete(models, how, line):
    damage(models / "est" / "model.safetensors", how)
    found = told("merge", recipe(models), "out")
    assert found.exit_code == 2
    assert fnmatch(found.stderr.splitlines()[-1], f"growmerge: {line}"), found.stderr
    assert told("inspect", "out").exit_code == 2
    damaged = load_file(models / "swe" / "model.safetensors")
    shutil.copy(models / "swe" / "model.safetensors", models / "est" / "model.safetensors")
    assert told("merge", "recipe.yaml", "out").exit_code == 0 and damaged  # mended, the same command goes on


def test_a_full_disk_is_one_line(models):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = models / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30k", "tmpfs", str(disk)], check=True)
    try:
        full = growmerge("merge", recipe(models), str(disk / "out"))
        assert full.returncode == 2
        assert [line for line in full.stderr.splitlines() if not line.startswith("note: ")] == [
            full.stderr.splitlines()[-1]
        ]
        assert "no space left" in full.stderr
        subprocess.run(["mount", "-o", "remount,size=5m", str(disk)], check=True)
        assert told("merge", "recipe.yaml", str(disk / "out")).exit_code == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


SEARCH = """
models: [{model: swe}, {model: est, parameters: {weight: 0.5}}]
merge_method: search
base_model: base
parameters: {weight: 1, density: 0.5}
search: {method: ties, texts: {swe: swe.txt, est: est.jsonl}, evaluations: 20, kinds: true, tokens: 200}
"""


def write_texts(folder):
    (folder / "swe.txt").write_text("ett hus vid havet\n\nett annat hus\n" * 20)
    (folder / "est.jsonl").write_text('{"text": "maja mere ääres"}\n' * 40)


def test_a_search_ends_in_a_plain_recipe_of_what_it_found(models):
    write_texts(models)
    found = told("merge", recipe(models, SEARCH), "out")
    assert found.exit_code == 0, found.stderr
    said = found.stdout.splitlines()[0]
    assert fnmatch(said, "searched: * -> * bits per byte on the development texts, 20 merges in *")
    result = json.loads((models / "out" / "search.json").read_text())
    assert result["merges"] == len(result["curve"]) == 20
    assert result["best"]["mean"] == pytest.approx(min(result["curve"]), abs=1e-6)
    assert result["best"]["mean"] < result["start"]["mean"] == pytest.approx(result["curve"][0], abs=1e-6)
    kinds = ("attention", "feed-forward", "norms")
    assert [*result["best"]["factors"]] == ["outside", *(f"layers, {kind}" for kind in kinds)]
    # What it found, as a recipe that says nothing of a search, makes the same model.
    shutil.copy(models / "out" / "mergekit_config.yml", models / "found.yml")
    assert "search" not in (models / "found.yml").read_text()
    again = told("merge", "found.yml", "again")
    assert again.exit_code == 0, again.stderr
    assert "applies to no tensor" not in again.stderr
    assert same_weights(models / "out", models / "again")
    assert not same_weights(models / "out", models / "swe")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("swe.txt", "nor.txt", "recipe.yaml:6: nor.txt: no such file, neither beside the recipe nor here"),
        ("method: ties,", "method: tise,", "recipe.yaml:6: search: unknown method with weights 'tise': *'ties'?"),
        ("evaluations", "evaluation", "recipe.yaml:6: unknown key of search 'evaluation': *'evaluations'?*"),
        (
            "merge_method: search",
            "merge_method: ties",
            "recipe.yaml:6: search has a meaning with merge_method search *",
        ),
        ("\nsearch:", "\nserch:", "recipe.yaml:6: unknown key 'serch': *"),
    ],
)
def test_a_mistake_in_a_search_is_one_line(models, old, new, line):
    write_texts(models)
    found = told("merge", recipe(models, SEARCH.replace(old, new)), "out")
    assert found.exit_code == 2
    assert fnmatch(found.stderr.splitlines()[-1], f"growmerge: {line}"), found.stderr
    assert not (models / "out").exists()
