"""`growmerge import hyperllama`: published models become plain Llamas, and the published recipes run unchanged."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from click.testing import CliRunner
from hyperllama_models import (
    LANGUAGES,
    METHODS,
    VOCABULARY,
    adapted,
    cloned,
    logits_of,
    new_weights,
    write_exported,
    write_nanotron,
    write_recipes,
    write_tokenizer,
)
from safetensors.torch import load_file, save_file
from test_fetch import Hub
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from growmerge.cli import main
from growmerge.merging import apply_file
from growmerge.published import PUBLISHED

NORM = "model.norm.weight"
NAMES = """
HyperLlama-180M-english-1x-base HyperLlama-180M-english-1x HyperLlama-572M-english-2x
HyperLlama-180M-estonian-1x HyperLlama-180M-faroese-1x HyperLlama-180M-icelandic-1x HyperLlama-180M-multilingual-1x
HyperLlama-180M-persian-1x HyperLlama-180M-swedish-1x
HyperLlama-572M-estonian-1x-cloned HyperLlama-572M-faroese-1x-cloned HyperLlama-572M-icelandic-1x-cloned
HyperLlama-572M-multilingual-1x-cloned HyperLlama-572M-persian-1x-cloned HyperLlama-572M-swedish-1x-cloned
HyperLlama-572M-estonian-2x HyperLlama-572M-faroese-2x HyperLlama-572M-icelandic-2x
HyperLlama-572M-multilingual-2x HyperLlama-572M-persian-2x HyperLlama-572M-swedish-2x
"""
"""The names of the training configs."""
BASES = ("HyperLlama-180M-english-1x", "HyperLlama-572M-english-1x-cloned", "HyperLlama-572M-english-2x")


def told(*arguments):
    """What the command line says, without a process of its own: its imports take longer than its work."""
    return CliRunner().invoke(main, [str(one) for one in arguments])


def imported(*arguments):
    found = told("import", "hyperllama", *arguments, "--workers", "1")
    assert found.exit_code == 0, found.output
    return found


def logits(folder, ids, dtype=torch.float32):
    """What stock transformers makes of a folder."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(input_ids=ids[None]).logits[0]


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def large():
    return adapted(cloned(new_weights(0)), 1)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_hyperllama_becomes_a_plain_llama_with_its_logits(tmp_path, large, ids, factor):
    folder = tmp_path / "HyperLlama-572M-icelandic-2x"
    ran = write_exported(folder, large, factor)
    write_tokenizer(folder, auto_map={"AutoTokenizer": ["tokenization_hyperllama.Own", None]}, tokenizer_class="Own")
    found = imported(folder, tmp_path / "plain")
    out = tmp_path / "plain" / folder.name
    words = f"{out}: safetensors, * bytes; its logits are the published model's, bit for bit\n"
    assert fnmatch(found.stdout, words), found.stdout
    assert found.stderr.splitlines() == [
        f"note: {folder.name}: bos_token_id is 256 (<|begin_of_text|>), as its tokenizer says; it was 0 (!)",
        f"note: {folder.name}: eos_token_id is 257 (<|eot_id|>), as its tokenizer says; it was 0 (!)",
    ]
    torch.testing.assert_close(logits(out, ids), logits_of(large, ids, factor), rtol=1e-5, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not {"auto_map", "lm_head_normalization_factor"} & config.keys()
    assert (config["hidden_act"], config["tie_word_embeddings"], config["dtype"]) == ("gelu", True, "bfloat16")
    for name in ("config.json", "generation_config.json"):
        about = json.loads((out / name).read_text())
        assert (about["bos_token_id"], about["eos_token_id"]) == (256, 257)
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == large.keys()
    for name, values in large.items():
        assert torch.equal(stored[name], values / factor if name == NORM else values), name
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token_id, tokenizer.decode(tokenizer.encode("Já!"))) == (257, "Já!")
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    assert not list(out.glob("*.py")) and not ran.exists()
    record = json.loads((out / "growmerge.json").read_text())
    assert (record["verb"], record["source"]) == ("import", {"name": folder.name})
    assert record["recipe"]["token_ids"] == {"bos_token_id": 256, "eos_token_id": 257}
    assert record["trained_from"]["name"] == "HyperLlama-572M-english-2x"
    again = imported(folder, tmp_path / "plain")
    assert again.stdout.startswith(f"nothing to do: {out} is there and whole; its logits")


def test_what_was_not_cloned_is_a_plain_llama_already(tmp_path, ids):
    weights = new_weights(0)
    write_exported(tmp_path / "HyperLlama-180M-english-1x", weights, 1, auto_map={"AutoConfig": "x.Y"})
    found = imported(tmp_path / "HyperLlama-180M-english-1x", tmp_path / "plain", "--no-verify")
    out = tmp_path / "plain" / "HyperLlama-180M-english-1x"
    assert "logits" not in found.stdout
    assert found.stderr.count("_token_id stays 0: there is no tokenizer; give --tokenizer\n") == 2
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    torch.testing.assert_close(logits(out, ids), logits_of(weights, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_nanotron_step_is_the_same_model(tmp_path, ids, factor):
    weights = adapted(cloned(new_weights(0)) if factor == 2 else new_weights(0), 1)
    start = {"checkpoints": {"resume_checkpoint_path": "checkpoints/HyperLlama-572M-english-1x-cloned/3572"}}
    step = tmp_path / "HyperLlama-572M-icelandic-2x" / "2514"
    write_nanotron(step, weights, factor, start)
    write_tokenizer(tmp_path / "llama3")
    write_exported(tmp_path / "HyperLlama-572M-exported", weights, factor)
    imported(step, tmp_path / "HyperLlama-572M-exported", tmp_path / "plain", "--tokenizer", tmp_path / "llama3")
    out, other = (tmp_path / "plain" / name for name in ("HyperLlama-572M-icelandic-2x", "HyperLlama-572M-exported"))
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert AutoConfig.from_pretrained(out).eos_token_id == 257
    assert (out / "tokenizer.json").is_file()
    torch.testing.assert_close(logits(out, ids), logits_of(weights, ids, factor), rtol=1e-5, atol=1e-5)
    record = json.loads((out / "growmerge.json").read_text())
    assert record["trained_from"] == {
        "name": "HyperLlama-572M-english-1x-cloned",
        "grown": False,
        "said_by": "config.yaml",
    }


CLONED = {"embedding_dimension_cloning_factor": 2, "path": "checkpoints/base/3572", "up_projection_cloning_factor": 2}
AGAIN = {"resume_checkpoint_path": "checkpoints/own/250"}
STARTS = [
    ({"model": {"init_method": CLONED}}, {"name": "base", "grown": True, "said_by": "config.yaml"}),
    (
        {"model": {"init_method": CLONED}, "checkpoints": AGAIN},
        {"name": "base", "grown": True, "said_by": "config.yaml"},
    ),
    ({"model": {"init_method": {"path": "base/7"}}}, {"name": "base", "grown": False, "said_by": "config.yaml"}),
    ({"checkpoints": AGAIN}, None),
    ({"checkpoints": "none", "model": [1]}, None),
]


@pytest.mark.parametrize(("config", "start"), STARTS)
def test_where_a_run_started_is_read_from_its_config(tmp_path, config, start):
    write_nanotron(tmp_path / "own" / "7", new_weights(0), 1, config)
    imported(tmp_path / "own" / "7", tmp_path / "plain", "--no-verify")
    assert json.loads((tmp_path / "plain/own/growmerge.json").read_text()).get("trained_from") == start


def test_a_config_that_is_no_yaml_says_nothing(tmp_path):
    write_nanotron(tmp_path / "own" / "7", new_weights(0), 1)
    (tmp_path / "own" / "7" / "config.yaml").write_text("a: !!python/object:os.system [x]\n")
    imported(tmp_path / "own" / "7", tmp_path / "plain", "--no-verify")
    assert "trained_from" not in json.loads((tmp_path / "plain/own/growmerge.json").read_text())


def test_logits_that_are_not_the_published_ones_are_an_exit_code(tmp_path, large):
    write_exported(tmp_path / "three", large, 3)
    found = told("import", "hyperllama", tmp_path / "three", tmp_path / "plain")
    assert found.exit_code == 1
    assert "note: three: 1e-05 is what float32 explains; a norm that is divided by 3 is rounded" in found.stderr
    imported(tmp_path / "three", tmp_path / "float32", "--dtype", "float32")
    write_exported(tmp_path / "nan", {**large, NORM: torch.full_like(large[NORM], torch.nan)}, 2)
    found = told("import", "hyperllama", tmp_path / "nan", tmp_path / "plain")
    assert found.exit_code == 1 and "by nan of the largest" in found.stdout
    write_exported(tmp_path / "wide", {name: values.float() / 3 for name, values in large.items()}, 2)
    found = imported(tmp_path / "wide", tmp_path / "plain", "--dtype", "bfloat16")
    assert found.stdout.endswith(" of the largest: rounded to bfloat16\n")
    # A file that was changed behind our back, sizes, times and all.
    write_exported(tmp_path / "two", large, 2)
    imported(tmp_path / "two", tmp_path / "plain")
    path = tmp_path / "plain" / "two" / "model.safetensors"
    stat = path.stat()
    save_file({**load_file(path), NORM: large[NORM]}, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = told("import", "hyperllama", tmp_path / "two", tmp_path / "plain")
    assert found.exit_code == 1
    assert "differ from the published model's by 1.0e+00 of the largest" in found.stdout
    assert "this is not the published model, do not use it" in found.stderr


def test_the_published_names():
    assert sorted(PUBLISHED) == sorted(NAMES.split())
    shown = told("import", "hyperllama", "--list")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert sorted(line.split()[0] for line in lines[1:22]) == sorted(NAMES.split())
    line = next(line for line in lines if line.startswith("HyperLlama-572M-faroese-1x-cloned"))
    assert line.split("  ")[0] and "572,494,464" in line and "HyperLlama-180M-english-1x, grown" in line
    assert "liu-nlp/NAME" in shown.stdout


@pytest.fixture
def wrong(tmp_path, large, monkeypatch):
    """Folders that are not imported, each for a reason of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("good", "other/good", "untied", "renamed", "taken", "factor"):
        write_exported(tmp_path / name, large, 2)
    for name, changes in (("renamed", {"model_type": "llama"}), ("factor", {"lm_head_normalization_factor": 0})):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (tmp_path / "qwen").mkdir()
    about = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **json.loads(Path("good/config.json").read_text()),
    }
    (tmp_path / "qwen" / "config.json").write_text(json.dumps({**about, "model_type": "qwen2"}))
    save_file(large, tmp_path / "qwen" / "model.safetensors")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text(Path("good/config.json").read_text())
    torch.save(large, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "plain" / "taken").mkdir(parents=True)
    (tmp_path / "plain" / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    write_nanotron(tmp_path / "run" / "7", large)
    (tmp_path / "run" / "latest.txt").write_text("7")
    write_tokenizer(tmp_path / "longer")
    found = json.loads((tmp_path / "longer" / "tokenizer.json").read_text())
    found["model"]["vocab"] |= {"a" * number: 255 + number for number in range(3, 9)}
    (tmp_path / "longer" / "tokenizer.json").write_text(json.dumps(found))


WRONG = [
    (["plain"], "import hyperllama: give SOURCEs or --all, not both; --list names what is published"),
    (["--all", "good", "plain"], "import hyperllama: give SOURCEs or --all, not both; *"),
    (["a/b/c", "plain"], "a/b/c: no such folder, and no name of the Hub, ORGANISATION/NAME or *"),
    (["hub:org/..", "plain"], "hub:org/..: no such folder, and no name of the Hub, *"),
    (["liu-nlp/none", "plain"], "liu-nlp/none: no such folder; hub:liu-nlp/none: *"),
    (["hub:liu-nlp/none", "plain"], "hub:liu-nlp/none: *"),
    (
        ["good", "other/good", "plain"],
        "good and other/good are both called good: import one of them into another folder",
    ),
    (
        ["renamed", "plain"],
        "renamed/config.json: model_type llama has no lm_head_normalization_factor, and here it is 2: *",
    ),
    (["factor", "plain"], "factor/config.json: lm_head_normalization_factor is 0: allowed are numbers above 0"),
    (["qwen", "plain"], "qwen: a model of the qwen2 family; the published models are Llamas"),
    (["bin", "plain"], "bin: a checkpoint of format torch_bin; imported are hyperllama, nanotron, safetensors, *"),
    (["empty", "plain"], "empty: not a checkpoint of a known format (*"),
    (["run", "plain"], "run: the folder of a nanotron run; open one of its steps, the newest is run/7"),
    (["taken", "plain"], "plain/taken: is not empty and not an unfinished checkpoint; choose another folder"),
    (["good", "."], "good: is the source itself; choose another folder"),
    (["good", "plain", "--tokenizer", "empty"], "--tokenizer empty: holds no tokenizer.json"),
    (
        ["good", "plain", "--tokenizer", "longer"],
        "good: has 258 rows of embeddings, and the tokenizer given as its own *",
    ),
    (["good", "plain", "--dtype", "int8"], "unknown dtype 'int8'*"),
    (["good", "plain", "--workers", "0"], "--workers is 0: allowed are 1 to *"),
]


@pytest.mark.parametrize(("arguments", "line"), WRONG)
def test_what_cannot_be_imported_is_one_line(wrong, arguments, line):
    found = told("import", "hyperllama", *arguments)
    assert found.exit_code == 2
    assert found.stderr.count("\n") == 1
    assert fnmatch(found.stderr, f"growmerge: {line}\n"), found.stderr
    assert not Path("plain/good/model.safetensors").exists()


def test_a_tokenizer_that_names_no_end_leaves_the_id(tmp_path, large):
    write_exported(tmp_path / "model", large)
    write_tokenizer(tmp_path / "model", eos_token=None)
    found = imported(tmp_path / "model", tmp_path / "plain", "--no-verify")
    assert "note: model: eos_token_id stays 0: its tokenizer names no EOS\n" in found.stderr
    config = json.loads((tmp_path / "plain/model/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 0)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    found = imported(tmp_path / "model", tmp_path / "other", "--no-verify")
    assert "note: model: its special tokens are not known: " in found.stderr


IMPORT_EACH = """
import sys
from click.testing import CliRunner
from growmerge.cli import main
for place, name in enumerate(sys.argv[1:]):
    found = CliRunner().invoke(main, ["import", "hyperllama", name, str(place)])
    if found.exit_code:
        sys.exit(found.output)
"""


def test_a_model_of_the_hub_is_fetched_without_its_code(tmp_path, large, ids):
    folder = tmp_path / "hub" / "liu-nlp" / "HyperLlama-572M-icelandic-2x"
    write_exported(folder, large)
    handler = type("Here", (Hub,), {"root": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    name = "liu-nlp/HyperLlama-572M-icelandic-2x"
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    found = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, name, f"hub:{name}"],
        cwd=tmp_path,
        env={**os.environ, **environment, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    assert found.returncode == 0, found.stderr
    assert max(map(handler.asked.count, handler.asked)) == 2  # a HEAD and a GET: the second time it is in the cache
    assert not list((tmp_path / "cache").rglob("*.py")) and not any(".py" in path for path in handler.asked)
    snapshot = next((tmp_path / "cache").rglob("snapshots/*"))
    for place, given in (("0", name), ("1", f"hub:{name}")):
        out = tmp_path / place / "HyperLlama-572M-icelandic-2x"
        torch.testing.assert_close(logits(out, ids), logits_of(large, ids, 2), rtol=1e-5, atol=1e-5)
        record = json.loads((out / "growmerge.json").read_text())
        assert record["source"] == {"name": given, "commit": snapshot.name}
    # By its path in the cache it has the model's name, too.
    found = imported(snapshot, tmp_path / "1", "--no-verify")
    assert found.stdout == f"nothing to do: {tmp_path / '1' / 'HyperLlama-572M-icelandic-2x'} is there and whole\n"


# The recipes.


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The models that recipes name, as published, and imported; english-1x-cloned is english-1x, grown."""
    root = tmp_path_factory.mktemp("published")
    weights = {"HyperLlama-180M-english-1x": new_weights(0)}
    weights["HyperLlama-572M-english-2x"] = adapted(cloned(adapted(weights[BASES[0]], 90)), 91)
    starts = {"1x": weights[BASES[0]], "1x-cloned": cloned(weights[BASES[0]]), "2x": weights[BASES[2]]}
    for number, (setup, start) in enumerate(starts.items()):
        for seed, language in enumerate(LANGUAGES.values(), 10 * number):
            weights[f"HyperLlama-{'180M' if setup == '1x' else '572M'}-{language}-{setup}"] = adapted(start, seed)
    for name, values in weights.items():
        write_exported(root / "liu-nlp" / name, values, 1 if "180M" in name else 2)
        write_tokenizer(root / "liu-nlp" / name)
    imported(*(root / "liu-nlp" / name for name in weights), root / "plain", "--no-verify")
    grown = told(
        *("grow", root / "plain" / BASES[0], root / "plain" / BASES[1], "--width", "2", "--method", "symmetric"),
        *("--workers", "1"),
    )
    assert grown.exit_code == 0, grown.output
    weights[BASES[1]] = starts["1x-cloned"]
    return root, weights


def test_growing_a_base_is_what_the_paper_trained_from(published, tmp_path):
    root, weights = published
    write_exported(tmp_path / BASES[1], cloned(weights[BASES[0]]), 2)
    imported(tmp_path / BASES[1], tmp_path / "plain")
    ours, theirs = (load_file(at / BASES[1] / "model.safetensors") for at in (root / "plain", tmp_path / "plain"))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """The 390 recipes by name."""
    return {path.stem: path for path in write_recipes(tmp_path_factory.mktemp("recipes") / "mergekit_configs")}


def test_all_390_recipes_are_read_as_they_are(published, recipes):
    root, _ = published
    paths = [*recipes.values()]
    assert len(paths) == 390
    reasons = {
        "int8_mask": "int8_mask changes nothing",
        "density": "density changes nothing in task_arithmetic",
        "float16": "float16 loses digits below 6e-5",
        "linear": "task_arithmetic with normalize and lambda 1 is linear",
        "int8_mask of others": "has no parameter int8_mask: it changes nothing",
        "normalize": "multislerp has no parameter normalize: it changes nothing",
        "base": "; nothing says that the base_model liu-nlp/HyperLlama-572M-english-1x-cloned is that model",
    }
    for path in paths:
        applied, _ = apply_file(path, folder=root / "plain")
        method = next(name for name in sorted(METHODS, key=len, reverse=True) if path.name.startswith(name))
        setup = next(name for name in ("1x_cloned", "1x", "2x") if path.name.startswith(f"{method}_{name}_"))
        assert applied.recipe.method == method
        languages = path.stem.removeprefix(f"{method}_{setup}_").split("_")
        assert len(applied.recipe.models) == len(languages) + (method not in ("linear", "multislerp"))
        notes = applied.merged.notes
        found = {reason for reason, words in reasons.items() if any(words in note for note in notes)}
        wanted = {"float16"}
        if method in ("linear", "multislerp"):
            wanted |= {"int8_mask of others", *(["normalize"] if method == "multislerp" else [])}
        else:
            wanted |= {"int8_mask"}
            # Of 78 recipes of the 2x models that have a base, two name the one that these were trained from.
            wanted |= {"base"} if setup == "2x" and not (method != "task_arithmetic" and len(languages) == 5) else set()
        wanted |= {"density", "linear"} if method == "task_arithmetic" else set()
        assert found == wanted, path.name
        assert not any("not known whether" in note for note in notes)


def ties_of(base, tensors):
    """TIES at density 0.5 in float64; of equal elements those with the lowest index stay."""
    kept = []
    for tensor in tensors:
        delta = (tensor - base).flatten()
        order = (-delta.abs()).argsort(stable=True)
        delta[order[len(delta) // 2 :]] = 0
        kept.append(delta.view_as(base))
    deltas = torch.stack(kept)
    agrees = deltas.sign() == torch.where(deltas.sum(0) < 0, -1, 1)
    return base + torch.where(agrees, deltas, 0).sum(0) / (agrees & (deltas != 0)).sum(0).clamp(min=1)


def multislerp_of(_, tensors):
    flat = torch.stack([tensor.flatten() for tensor in tensors])
    norms = flat.norm(dim=1)
    mean = (flat / norms[:, None]).mean(0)
    return (mean / mean.norm() * norms.mean()).view_as(tensors[0])


def mean_of(_, tensors):
    return torch.stack(tensors).mean(0)


ORACLES = {
    "linear": mean_of,
    "task_arithmetic": mean_of,
    "multislerp": multislerp_of,
    "ties": ties_of,
    "dare_ties": None,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setup", ["1x", "1x_cloned", "2x"])
def test_a_recipe_of_each_method_runs_unchanged(published, recipes, tmp_path, ids, method, setup):
    root, weights = published
    path = recipes[f"{method}_{setup}_ekk_isl_swe"]
    out = tmp_path / "out"
    found = told("merge", path, out, "--models", root / "plain", "--workers", "1")
    assert found.exit_code == 0, found.output
    assert (out / "mergekit_config.yml").read_text() == path.read_text()
    assert AutoConfig.from_pretrained(out).eos_token_id == 257
    merged = load_file(out / "model.safetensors")
    assert {values.dtype for values in merged.values()} == {torch.float16}
    size, end = ("180M" if setup == "1x" else "572M"), setup.replace("_", "-")
    named = [f"HyperLlama-{size}-{LANGUAGES[code]}-{end}" for code in ("ekk", "isl", "swe")]
    divisor = 1 if setup == "1x" else 2
    base = weights[BASES[0] if setup == "1x" else BASES[1]]
    oracle = ORACLES[method]
    if oracle is None:  # what it draws is its own affair, and depends on the seed alone
        told("merge", path, tmp_path / "seed", "--models", root / "plain", "--seed", "1")
        other = load_file(tmp_path / "seed" / "model.safetensors")
        assert any(not torch.equal(merged[name], other[name]) for name in merged)
        assert all(values.isfinite().all() for values in merged.values())
        assert told("merge", path, tmp_path / "again", "--models", root / "plain", "--seed", "0").exit_code == 0
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert all(torch.equal(merged[name], again[name]) for name in merged)
        return
    wanted = {name: oracle(base[name].double(), [weights[one][name].double() for one in named]) for name in base}
    for name, values in wanted.items():
        expected = values / divisor if name == NORM else values
        # Both are rounded to float16; what lies between two numbers of it may go either way.
        torch.testing.assert_close(merged[name].double(), expected, rtol=2**-10, atol=2**-24, msg=f"{method} {name}")
    torch.testing.assert_close(logits(out, ids), logits_of(wanted, ids, divisor), rtol=2e-2, atol=2e-2)


def test_models_are_looked_for_by_name_and_by_its_last_part(published, recipes, tmp_path, monkeypatch):
    root, _ = published
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes["linear_1x_ekk_fao"].read_text())
    missing = told("merge", path, "out", "--dry-run")
    assert missing.exit_code == 2 and "no such folder, neither beside the recipe nor here" in missing.stderr
    missing = told("merge", path, "out", "--models", tmp_path, "--dry-run")
    assert f"{path}:" in missing.stderr
    assert f"no such folder, neither in {tmp_path} nor beside the recipe nor here" in missing.stderr
    for models in (root, root / "plain"):  # as liu-nlp/NAME, as published; and as NAME, imported
        assert told("merge", path, "out", "--models", models, "--dry-run").exit_code == 0
    # A path that begins with a dot means the file's own place.
    text = path.read_text()
    path.write_text(text.replace("liu-nlp/", "./liu-nlp/"))
    assert told("merge", path, "out", "--models", root / "plain", "--dry-run").exit_code == 2
    path.write_text(text.replace("liu-nlp/", "hub:liu-nlp/"))
    assert told("merge", path, "out", "--models", root / "plain", "--dry-run").exit_code == 0
    monkeypatch.chdir(root)  # a folder called liu-nlp does without the option
    path.write_text(text)
    assert told("merge", path, tmp_path / "out", "--dry-run").exit_code == 0
    assert told("merge", path, "out", "--models", root / "none", "--dry-run").exit_code == 2


def test_a_base_is_told_by_name_where_no_hash_tells(published, recipes, tmp_path, monkeypatch):
    root, _ = published

    def notes(name, base="HyperLlama-572M-english-1x-cloned", models=root / "plain"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipes[name].read_text().replace("HyperLlama-572M-english-1x-cloned", base))
        found = told("merge", path, tmp_path / "out", "--models", models, "--dry-run")
        assert found.exit_code == 0, found.output
        return [line.partition(": ")[2] for line in found.stderr.splitlines() if "was trained from" in line]

    assert notes("ties_1x_ekk_fao") == notes("ties_1x_cloned_ekk_fao") == notes("ties_2x_ekk_fao_fas_isl_swe") == []
    by = "(says its training config in liu-nlp/multilingual-scaling)"
    two = notes("ties_2x_ekk_fao")
    assert len(two) == 2 and two[0].endswith(
        f"liu-nlp/HyperLlama-572M-estonian-2x was trained from HyperLlama-572M-english-2x {by}; "
        "nothing says that the base_model liu-nlp/HyperLlama-572M-english-1x-cloned is that model"
    )
    two = notes("ties_1x_cloned_ekk_fao", base="HyperLlama-572M-english-2x")
    assert len(two) == 2 and f"was trained from HyperLlama-180M-english-1x, grown {by}; nothing says" in two[0]
    assert notes("task_arithmetic_2x_ekk_fao", base="HyperLlama-572M-english-2x") == []
    # As docs/published-models.md has it: a folder with another base under the recipes' name, looked at first.
    (tmp_path / "for-2x").mkdir()
    (tmp_path / "for-2x" / BASES[1]).symlink_to(root / "plain" / BASES[2])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "liu-nlp").symlink_to(root / "plain")
    assert notes("ties_2x_ekk_fao", models="for-2x") == []
    assert len(notes("ties_1x_cloned_ekk_fao", models="for-2x")) == 2
