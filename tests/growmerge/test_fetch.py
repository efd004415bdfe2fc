"""What jobs would look for on the network is fetched beforehand, and then read without any; a small Hub of our own."""

import hashlib
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
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
    import os

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


def test_what_is_not_there_is_one_line(hub, tmp_path):
    _, environment = hub
    path = tmp_path / "run.yaml"
    path.write_text("model: hub:org/none\n")
    found = growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0")
    assert found.returncode == 2
    assert found.stderr.startswith("growmerge: hub:org/none: 404") and found.stderr.count("\n") == 1
    path.write_text("model: hub:small\n")
    assert "is hub:ORGANISATION/NAME" in growmerge("fetch", str(path), **environment, HF_HUB_OFFLINE="0").stderr


def line_of(path, text):
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)
