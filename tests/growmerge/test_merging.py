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
from merge import search as merge_search
from merge.merge import merge
from train.data.tokenizer import load_tokenizer, train_tokenizer

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
    ended = told(*arguments)
    assert ended.exit_code == 0, ended.stderr
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
        (
            LINEAR.replace("est", "org/est"),
            "recipe.yaml:1: org/est: *; hub:org/est: not in the cache *: `growmerge fetch recipe.yaml` *",
        ),
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


ASKED = (
    "merge_method: search\nsearch: {method: METHOD, texts: {swe: swe.txt}, evaluations: 9, kinds: true, tokens: 60}\n"
)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("linear", "models: [{model: swe}, {model: est}]\nbase_model: base\nparameters: {weight: 1}\n"),
        ("linear", "models: [{model: swe}, {model: base}]\nbase_model: base\nparameters: {weight: [1, 2]}\n"),
        ("linear", "models: [{model: run, checkpoints: 2}, {model: est}]\nparameters: {weight: 1}\n"),
        (
            "nuslerp",
            """
models: [{model: {model: {path: swe}}}, {model: {model: est}, parameters: {weight: {filter: mlp, value: 2}}}]
base_model: base
parameters: {weight: 1}
out_dtype: float32
""",
        ),
        (
            "dare_ties",
            """
base_model: base
modules:
  default:
    models:
      - {model: swe, parameters: {weight: 1.5, density: [{filter: q_proj, value: 0.2}, {value: [0.3, 0.9]}]}}
      - {model: {model: {path: est}}, parameters: {density: {filter: mlp, value: 0.4}}}
    parameters: {weight: 0.5, density: [{filter: norm, value: 1}]}
parameters: {weight: 9, density: 0.6, lambda: [{filter: attn, value: 0.8}, {filter: "*", value: 1.1}], normalize: yes}
tokenizer: {source: union, pad_to_multiple_of: 8}
chat_template: chatml
""",
        ),
    ],
)
def test_the_recipe_that_a_search_leaves_makes_the_same_model(models, method, text):
    write_texts(models)
    for number, name in enumerate(("est", "swe"), 1):
        assert told("convert", name, f"run/checkpoints/step-0000000{number}", "--format", "zero3").exit_code == 0
    found = told("merge", recipe(models, text + ASKED.replace("METHOD", method)), "out")
    assert found.exit_code == 0, found.stderr
    shutil.copy(models / "out" / "mergekit_config.yml", models / "found.yml")
    again = told("merge", "found.yml", "again")
    assert again.exit_code == 0, again.stderr
    assert same_weights(models / "out", models / "again")
    for path in models.glob("out/*"):  # the tokenizer and the chat template, too
        if path.name not in ("README.md", "growmerge.json", "manifest.json", "search.json"):
            assert path.read_bytes() == (models / "again" / path.name).read_bytes(), path.name
    found = json.loads((models / "out" / "search.json").read_text())
    assert found["best"]["mean"] < found["start"]["mean"]


def test_a_search_reads_its_texts_in_the_tokens_of_what_it_makes(models, monkeypatch):
    from growmerge import searching

    write_texts(models)
    given = {}

    def spied(merged, search, texts, *more):
        given.update(texts)
        return search_weights(merged, search, texts, *more)

    search_weights = searching.search_weights
    monkeypatch.setattr(searching, "search_weights", spied)
    text = SEARCH.replace("tokens: 200", "tokens: 60") + "tokenizer_source: union\n"
    found = told("merge", recipe(models, text), "out")
    assert found.exit_code == 0, found.stderr
    first = given["est"].requests[0].tokens[1:]
    tokenizers = {name: load_tokenizer(models / name) for name in ("out", "base")}
    assert list(first) == list(tokenizers["out"].encode("maja mere ääres"))
    assert list(first) != list(tokenizers["base"].encode("maja mere ääres"))


def test_a_search_that_is_interrupted_goes_on_with_the_tries_that_are_left(models, monkeypatch):
    from growmerge.merging import apply_file
    from growmerge.searching import _Progress, find_weights

    write_texts(models)
    recipe(models, SEARCH)
    log, made = models / ".out.search.jsonl", []
    bits_per_byte = merge_search.bits_per_byte
    monkeypatch.setattr(merge_search, "bits_per_byte", lambda *given: made.append(1) or bits_per_byte(*given))

    def searched(path=log):
        made.clear()
        applied, files, _ = find_weights(*apply_file(models / "recipe.yaml"), path)
        return applied.recipe.text, {**json.loads(files["search.json"]), "seconds": None}

    whole = searched(None)
    assert len(made) == 2 * 20 and not log.exists()

    def stop(self, number, one):
        if number == 13:
            raise KeyboardInterrupt

    with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
        changed.setattr(_Progress, "tell", stop)
        searched()
    with log.open("a") as file:
        file.write('{"time": 1, "sea')  # cut by a kill
    assert searched() == whole
    assert len(made) == 2 * 7
    assert searched() == whole
    assert not made
    # Another text is another search, which leaves this one's tries alone.
    (models / "swe.txt").write_text("ett annat hus vid havet\n" * 40)
    assert searched() != whole
    assert len(made) == 2 * 20
    write_texts(models)
    assert searched() == whole
    assert not made


def test_tokenizers_that_differ_are_said(models):
    found = told("merge", recipe(models), "out", "--dry-run")
    assert (
        "note: recipe.yaml:2: the tokenizers differ (base; swe; est): a row is not the same token in all;"
        in found.stderr
    )
    aligned = told("merge", recipe(models, TIES + "tokenizer_source: union\n"), "out", "--dry-run")
    assert "tokenizers differ" not in aligned.stderr


def test_two_at_once_on_one_folder_are_one_too_many(models):
    marker = models / "reached"
    environment = {**os.environ, "GROWMERGE_FAULT": f"{marker}:write/model.safetensors"}
    process = subprocess.Popen(command("merge", recipe(models), "out"), env=environment)
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.05)
    second = told("merge", "recipe.yaml", "out")
    assert second.exit_code == 2
    assert "growmerge merge (pid " in second.stderr.splitlines()[-1]
    process.kill()
    process.wait()
    assert told("merge", "recipe.yaml", "out").exit_code == 0


def test_an_adapter_is_a_parent_of_its_own(models):
    adapted = get_peft_model(tiny_model(1, torch.bfloat16, vocab_size=300), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(models / "adapter")
    assert told("convert", "swe", "swe2").exit_code == 0
    text = "models: [{model: swe2+adapter}]\nmerge_method: passthrough\n"
    assert told("merge", recipe(models, text), "out").exit_code == 0
    record = json.loads((models / "out" / "growmerge.json").read_text())
    known = json.loads((models / "swe2" / "growmerge.json").read_text())["hash"]
    assert record["parents"][0]["hash"] is None and known in record["ancestors"]


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_a_number_of_workers_that_makes_no_sense(models, workers):
    found = told("merge", recipe(models), "out", "--workers", workers)
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (
        2,
        f"growmerge: --workers is {workers}: allowed are 1 to 256",
    )
    assert not (models / "out").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "meta", "gpu"])
@pytest.mark.parametrize("verb", ["merge", "sweep"])
def test_a_device_that_is_not_there(models, device, verb):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    if verb == "sweep":
        (models / "recipe.yaml").write_text("models: {a: swe, b: est}\nmethods: {linear: {}}\n")
    else:
        recipe(models)
    found = told(verb, "recipe.yaml", "out", "--device", device)
    assert found.exit_code == 2 and found.stderr.splitlines()[-1].startswith(f"growmerge: --device {device}: ")
    assert not (models / "out").exists()


def test_a_finished_search_is_not_done_again_and_a_taken_folder_is_seen_before_it(models):
    write_texts(models)
    assert told("merge", recipe(models, SEARCH), "out").exit_code == 0
    assert not list(models.glob(".out*"))
    assert told("merge", "recipe.yaml", "out").stdout == "nothing to do: out is there and whole\n"
    (models / "taken").mkdir()
    (models / "taken" / "notes.txt").write_text("mine")
    found = told("merge", "recipe.yaml", "taken")
    assert (found.exit_code, found.stdout) == (2, "")
    assert "taken: is not empty" in found.stderr


def test_a_recipe_s_own_seed_and_one_on_the_command_line(models):
    text = TIES.replace("ties", "dare_ties")
    recipe(models, text + "seed: 5\n")
    assert told("merge", "recipe.yaml", "own").exit_code == 0
    assert told("merge", "recipe.yaml", "other", "--seed", "0").exit_code == 0
    recipe(models, text)
    assert told("merge", "recipe.yaml", "given", "--seed", "5").exit_code == 0
    assert same_weights(models / "own", models / "given")
    assert not same_weights(models / "own", models / "other")
    assert json.loads((models / "own" / "growmerge.json").read_text())["recipe"]["seed"] == 5


def test_statistics_are_inputs_and_parents(models):
    write_texts(models)
    for name in ("swe", "est"):
        assert told("stats", "fisher", name, "swe.txt", f"{name}-f", "--tokens", "100").exit_code == 0
    text = "".join(f"  - {{model: {name}, parameters: {{fisher: {name}-f}}}}\n" for name in ("swe", "est"))
    found = told("merge", recipe(models, f"models:\n{text}merge_method: fisher\n"), "out")
    assert found.exit_code == 0, found.stderr
    record = json.loads((models / "out" / "growmerge.json").read_text())
    assert [parent["name"] for parent in record["parents"]] == ["swe", "est", "swe-f", "est-f"]
    shutil.rmtree(models / "swe-f")
    assert told("stats", "fisher", "swe", "est.jsonl", "swe-f", "--tokens", "100").exit_code == 0
    assert "holds another checkpoint" in told("merge", "recipe.yaml", "out").stderr


def test_a_run_s_checkpoints_have_the_tokenizer_of_its_model(models):
    run = models / "run"
    for step in (1, 2):
        assert told("convert", "swe", f"run/checkpoints/step-{step:08d}").exit_code == 0
        (run / "checkpoints" / f"step-{step:08d}" / "tokenizer.json").unlink()
    shutil.copytree(models / "swe", run / "model")
    text = "models: [{model: run, checkpoints: 2}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    assert told("merge", recipe(models, text + "tokenizer_source: union\n"), "out").exit_code == 0
    assert (models / "out" / "tokenizer.json").read_bytes() == (models / "swe" / "tokenizer.json").read_bytes()
