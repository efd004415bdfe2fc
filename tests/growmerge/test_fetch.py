"""What jobs would look for on the network is fetched beforehand, and then read without any; a small Hub of our own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import forked
import pytest
import torch
from safetensors.torch import save_file
from toy import PIPELINE, growmerge, write_toy

from checkpoint.memory import ScratchSource
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.writer import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


class Hub(BaseHTTPRequestHandler):
    """Serves folders as repositories of one commit, and notes what it was asked for."""

    root: Path
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        type(self).asked.append(path)
        kind, _, rest = path.removeprefix("/api/").partition("/") if path.startswith("/api/") else ("", "", "")
        folder = self.root.joinpath(*rest.split("/")[:2])
        if kind in ("models", "datasets") and rest and folder.is_dir():
            files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": name} for name, file in files.items()
            ]
            about = {"id": rest, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            found = tree if "/tree/" in rest else about
            return self.send(json.dumps(found).encode(), body, {"Content-Type": "application/json"})
        repository, _, name = path.removeprefix("/datasets").strip("/").partition(f"/resolve/{COMMIT}/")
        file = self.root / repository / name
        if not name or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        data = file.read_bytes()
        return self.send(data, body, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def send(self, data, body, headers):
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The Hub's address and its folder, and the variables of a command that fetches from it."""
    root = tmp_path_factory.mktemp("hub")
    source = ScratchSource(config=CONFIG, seed=0)
    write_checkpoint(source, root / "org" / "small", SafetensorsLayout(dtype=torch.float32), workers=1)
    (root / "org" / "small" / "modeling_small.py").write_text("raise SystemExit('code of the Hub was run')\n")
    (root / "org" / "texts").mkdir()
    lines = [json.dumps({"text": f"Text number {number} of all. It is short."}) for number in range(80)]
    (root / "org" / "texts" / "train.jsonl").write_text("\n".join(lines) + "\n")
    handler = type("Here", (Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("cache")
    yield handler, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
    server.shutdown()


NO_SOCKETS = """
import socket
def refuse(*given): raise OSError("this node has no network")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from growmerge.cli import main
main()
"""
"""A command as on a node without a network: it cannot even try."""


def offline(*arguments, cwd, environment):
    return subprocess.run(
        [sys.executable, "-c", NO_SOCKETS, *arguments],
        cwd=cwd,
        env={**os.environ, **environment, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.fixture
def pipeline(tmp_path):
    text = PIPELINE[: PIPELINE.index("stages:")]
    text += "stages:\n  swe: {train: {from: 'hub:org/small', data: swe, training: {steps: 2}}}\n"
    text += "evaluation: {pairs: 5, resamples: 100, sample_tokens: 2}\nresources: {ranks: 1, threads: 1}\n"
    return write_toy(tmp_path, text)


def test_a_pipeline_names_a_model_of_the_hub(hub, pipeline, tmp_path):
    _, environment = hub
    path = pipeline
    missing = offline("run", str(path), "--executor", "local", cwd=tmp_path, environment=environment)
    assert missing.returncode == 2
    line = f"{path}:{line_of(path, 'swe: {train')}: stages.swe.train.from: hub:org/small: not in the cache"
    assert missing.stderr.startswith(f"growmerge: {line}"), missing.stderr
    assert "growmerge fetch" in missing.stderr
    fetched = growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0")
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout.startswith("hub:org/small: ") and fetched.stdout.endswith("1 things are here\n")
    assert not list(Path(environment["HF_HOME"]).rglob("*.py"))
    found = offline("run", str(path), "--dry-run", cwd=tmp_path, environment=environment)
    assert found.returncode == 0, found.stderr


def test_of_a_tokenizer_no_weights_are_fetched(hub, tmp_path):
    """The tokenizer of a study may be that of a model of 70 billion parameters."""
    from train.data.tokenizer import train_tokenizer

    handler, environment = hub
    environment = {**environment, "HF_HOME": str(tmp_path / "cache")}
    shutil.copytree(handler.root / "org" / "small", handler.root / "org" / "huge")
    train_tokenizer(["Text number 1 of all. It is short."], vocab_size=300, folder=handler.root / "org" / "huge")
    (tmp_path / "a.txt").write_text("".join(f"Text number {number} of all. It is short.\n" for number in range(40)))
    path = tmp_path / "data.yaml"
    path.write_text(
        "folder: tokens\ntokenizer: hub:org/huge\nworkers: 1\n"
        "corpora: {swe: {sources: [{files: a.txt}], heldout: {share: 0}}}\n"
    )
    fetched = growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0")
    assert fetched.returncode == 0, fetched.stderr
    kept = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert "tokenizer.json" in kept and not {"config.json", "model.safetensors"} & kept
    made = offline("data", "prepare", str(path), cwd=tmp_path, environment=environment)
    assert made.returncode == 0, made.stderr
    text = path.read_text() + "model: hub:org/huge\n"
    path.write_text(text)  # where it is named as a model, too, all of it is
    assert growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0").returncode == 0
    assert "model.safetensors" in {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}


@pytest.mark.slow
def test_what_was_fetched_is_trained_on_without_the_hub(hub, pipeline, tmp_path):
    handler, environment = hub
    assert growmerge("fetch", str(pipeline), **environment, HF_HUB_OFFLINE="0").returncode == 0
    handler.asked.clear()
    found = growmerge("run", str(pipeline), "--executor", "local", cwd=tmp_path, **environment, HF_HUB_OFFLINE="1")
    assert found.returncode == 0, found.stderr
    assert handler.asked == []


def test_a_data_set_of_the_hub_is_prepared_without_a_network(hub, tmp_path):
    from train.data.tokenizer import train_tokenizer

    _, environment = hub
    train_tokenizer(["Text number 1 of all. It is short."], vocab_size=300, folder=tmp_path / "tokenizer")
    path = tmp_path / "data.yaml"
    path.write_text(
        "folder: tokens\ntokenizer: tokenizer\nworkers: 1\n"
        "corpora: {eng: {sources: [{hub: org/texts, data_files: ['*.jsonl']}], heldout: {share: 0}}}\n"
    )
    fetched = growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0")
    assert fetched.returncode == 0, fetched.stderr
    found = offline("data", "prepare", str(path), cwd=tmp_path, environment=environment)
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "tokens" / "eng.json").read_text())["documents"] == 80


RECIPE = """\
models:
  - {model: org/swe@main, parameters: {weight: 0.4}}
  - {model: org/small+org/adapter, parameters: {weight: 0.6}}
  - {model: local, parameters: {weight: 0.5}}
merge_method: task_arithmetic
base_model: {model: {path: org/small}}
tokenizer_source: org/swe@main
unheard_of: 1
"""
SWEEP = """\
each: {language: [swe]}
models:
  swe: org/{language}
  adapted: org/small+org/adapter
base_model: hub:org/small
methods: {linear: {}, task_arithmetic: {}}
"""


SEARCH = """\
models: [{model: org/swe}, {model: org/none}]
merge_method: search
search: {method: linear, texts: {swe: swe.txt}}
"""


@pytest.fixture(scope="module")
def merged(hub):
    """The Hub with what recipes name: two models with tokenizers, an adapter of one, one whose weights are a pickle."""
    from train.data.tokenizer import train_tokenizer

    handler, environment = hub
    org = handler.root / "org"
    for number, name in enumerate(("small", "swe", "local")):
        source = ScratchSource(config={**CONFIG, "vocab_size": 300}, seed=number)
        shutil.rmtree(org / name, ignore_errors=True)
        write_checkpoint(source, org / name, SafetensorsLayout(dtype=torch.float32), workers=1)
        train_tokenizer([f"{name} hus {number}" for number in range(300)], vocab_size=300, folder=org / name)
    (org / "adapter").mkdir()
    (org / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    shapes = {f"{layer}.lora_A.weight": (2, 32), f"{layer}.lora_B.weight": (32, 2)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, org / "adapter/adapter_model.safetensors")
    (org / "pickled").mkdir()
    shutil.copy(org / "swe" / "config.json", org / "pickled")
    (org / "pickled" / "pytorch_model.bin").write_bytes(b"no one reads this")
    return handler, environment


@pytest.mark.parametrize(("verb", "text"), [("merge", RECIPE), ("sweep", SWEEP)])
def test_what_merges_name_is_fetched(merged, tmp_path, tmp_path_factory, verb, text):
    handler, environment = merged
    environment = {**environment, "HF_HOME": str(tmp_path_factory.mktemp("cache"))}
    shutil.copytree(handler.root / "org" / "local", tmp_path / "local")
    path = tmp_path / "file.yaml"
    path.write_text(text)
    lenient = ["--lenient"] if verb == "merge" else []
    missing = offline(verb, "file.yaml", "out", *lenient, cwd=tmp_path, environment=environment)
    assert missing.returncode == 2
    assert missing.stderr.endswith(
        "not in the cache of this machine: `growmerge fetch file.yaml` where there is a network\n"
    )
    fetched = growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0")
    assert fetched.returncode == 0, fetched.stderr
    names = [line.split(": /")[0] for line in fetched.stdout.splitlines()]
    if verb == "merge":
        assert names == ["org/small", "org/swe@main", "org/adapter", "3 things are here"]
    else:
        assert names == ["org/swe", "org/small", "org/adapter", "hub:org/small", "4 things are here"]
    assert not list(Path(environment["HF_HOME"]).rglob("*.py"))
    found = offline(verb, "file.yaml", "out", *lenient, cwd=tmp_path, environment=environment)
    assert found.returncode == 0, found.stderr
    # From folders of the same names it is the same.
    shutil.copytree(handler.root / "org", tmp_path / "org")
    path.write_text(text.replace("@main", "").replace("hub:", ""))
    found = forked.growmerge(verb, "file.yaml", "same", *lenient, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert found.returncode == 0, found.stderr
    written = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert len(written) == (1 if verb == "merge" else 2)
    for file in written:
        assert file.read_bytes() == (tmp_path / "same" / file.relative_to(tmp_path / "out")).read_bytes()


def test_what_is_not_there_is_one_line(hub, tmp_path):
    _, environment = hub
    path = tmp_path / "run.yaml"
    path.write_text("model: hub:org/none\n")
    found = growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0")
    assert found.returncode == 2
    assert found.stderr.startswith("growmerge: hub:org/none: 404") and found.stderr.count("\n") == 1
    path.write_text("model: hub:small\n")
    assert "is hub:ORGANISATION/NAME" in growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0").stderr


MISSING = [
    (RECIPE.replace("org/swe@main", "swe"), "2: swe: no such folder, neither beside the recipe nor here"),
    (RECIPE.replace("org/adapter", "org/none"), "3: org/none: no such folder, *; hub:org/none: 404 *"),
    (RECIPE.replace("path: org/small", "path: ../small"), "6: ../small: no such folder, *; hub:../small: *"),
    (RECIPE.replace("local", "org/pickled"), "4: org/pickled: *: its weights are not there as safetensors, *"),
    (RECIPE.replace("task_arithmetic", "lineer"), "5: unknown merge_method 'lineer': *"),
    (SEARCH, "1: org/none: no such folder, *; hub:org/none: 404 *"),
    (SWEEP.replace("[swe]", "[swe, none]"), "3: org/none: no such folder, *; hub:org/none: 404 *"),
    (SWEEP.replace("hub:org/small", "small"), "5: small: no such folder, neither beside the recipe nor here"),
    (SWEEP.replace("linear", "lineer"), "6: unknown merge method 'lineer': *"),
]
FETCH_EACH = """
import sys
from click.testing import CliRunner
from growmerge.cli import main
for path in sys.argv[1:]:
    found = CliRunner().invoke(main, ["fetch", path])
    print(found.exit_code, found.stderr.strip())
"""


def test_what_merges_name_and_is_not_there_is_one_line(merged, tmp_path):
    handler, environment = merged
    shutil.copytree(handler.root / "org" / "local", tmp_path / "local")
    paths = [tmp_path / f"{number}.yaml" for number in range(len(MISSING))]
    for path, (text, _) in zip(paths, MISSING, strict=True):
        path.write_text(text)
    own = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    told = subprocess.run(
        [sys.executable, "-c", FETCH_EACH, *map(str, paths)],
        env={**os.environ, **environment, **own},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(told) == len(MISSING), told
    for one, path, (_, line) in zip(told, paths, MISSING, strict=True):
        assert fnmatch(one, f"2 growmerge: {path}:{line}"), one


def line_of(path, text):
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)
