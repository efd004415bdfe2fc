"""Runs of `growmerge train` over two nodes of the virtual cluster, which are hit in one way or another."""

import json
import os
import subprocess
import time
from pathlib import Path

from toy import command

from growmerge.events import read_events
from train.data.tokenizer import train_tokenizer
from train.data.tokens import write_tokens
from train.tracker import read_metrics

STEPS, EVERY = 24, 8
"""Steps of a run, and from one checkpoint to the next."""
FILE = f"""
name: NAME
seed: 3
tokenizer: tokenizer
shape: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, intermediate_size: 64}}
data: {{folder: data, mixture: all}}
mixtures: {{all: {{eng: 1}}}}
training:
  steps: {STEPS}
  sequence_length: 32
  global_batch: 8
  lr: 3e-3
  warmup: 2
  precision: float32
  checkpoint_every: {EVERY}
resources: {{ranks: 2, nodes: 2, threads: 1, minutes: 30, lead_seconds: 5, profile: PROFILE}}
"""
PROFILE = """
description: the virtual cluster of the tests
tested: here
slurm: {mem-per-cpu: 1000}
gpus_per_node: 0
cores_per_node: 2
environment: {MASTER_ADDR: 127.0.0.1, GLOO_SOCKET_IFNAME: lo, GROWMERGE_SLOW: "step/:0.4"}
"""
"""The nodes' names do not resolve: all of them are this machine. A step is slow enough to be hit."""


def prepare(home: Path) -> None:
    """Write tokenizer, token files and the cluster's profile."""
    words = (
        "grow",
        "merge",
        "language",
        "model",
        "small",
        "large",
        "north",
        "sea",
        "house",
        "stone",
        "river",
        "winter",
    )
    texts = [" ".join(words[(number * place) % len(words)] for place in range(1, 60)) for number in range(1, 120)]
    tokenizer = train_tokenizer(texts, vocab_size=300, folder=home / "tokenizer")
    write_tokens(texts, tokenizer, home / "data" / "eng")
    (home / "profile.yaml").write_text(PROFILE)


def write(home: Path, name: str, *, training: str = "", profile: str = "", **resources: object) -> Path:
    """Write a run's file: further lines of its training, of its cluster's profile, and other resources."""
    text = FILE.replace("NAME", name).replace("training:\n", "training:\n" + training)
    for key, value in resources.items():
        old = next(part for part in text.split("resources: {")[1].rstrip("}\n").split(", ") if part.startswith(key))
        text = text.replace(old, f"{key}: {value}")
    if profile:
        text = text.replace("PROFILE", f"{name}-profile.yaml")
        (home / f"{name}-profile.yaml").write_text(profile)
    path = home / f"{name}.yaml"
    path.write_text(text.replace("PROFILE", "profile.yaml"))
    return path


class Run:
    """A run of that file, submitted and watched."""

    def __init__(self, path: Path, environment: dict[str, str], *options: str) -> None:
        self.path = path
        self.folder = path.parent / "runs" / path.stem
        self._environment = {**os.environ, **environment}
        self.process = self.start("train", path.name, "--executor", "slurm", *options)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command(*arguments),
            env=self._environment,
            cwd=self.path.parent,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def say(self, *arguments: str) -> str:
        """Run another command of growmerge and return what it prints."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    def status(self) -> dict[str, object]:
        """Return the row of `growmerge status`."""
        (row,) = json.loads(self.say("status", str(self.folder), "--json"))
        return dict(row)

    @property
    def job(self) -> str:
        ids = json.loads((self.folder / "submitted.json").read_text())["stages"][self.path.stem]["ids"]
        return str(ids[0])

    def steps(self) -> list[int]:
        """Return the steps that were done, again and again if they were, by the last submission."""
        files = sorted((self.folder / "jobs").glob("*/0000/events.jsonl"))
        return [event["step"] for event in read_events(files[-1]) if event["event"] == "step"] if files else []

    def until_step(self, step: int) -> None:
        deadline = time.monotonic() + 200
        while not self.steps() or self.steps()[-1] < step:
            assert time.monotonic() < deadline, self.status()
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def end(self, code: int = 0) -> str:
        """Wait for the end of the command that watches, and return what it said."""
        _, err = self.process.communicate(timeout=500)
        assert self.process.returncode == code, err
        return err


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()
