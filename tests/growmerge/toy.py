"""A toy pipeline that runs every kind of stage in about a minute: made-up languages, tiny models, real ranks."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

LANGUAGES = ("eng", "swe", "est")

PIPELINE = """
name: toy
title: Toy
seed: 3
corpora:
  eng:
    name: Toy English
    splits: {first: 0.7, rest: 0.3}
    sources: [{files: eng/*.txt, licence: CC0-1.0, edition: made up}]
  swe: {name: Toy Swedish, sources: [{files: swe/*.txt, licence: CC0-1.0, edition: made up}]}
  est: {name: Toy Estonian, sources: [{files: est/*.txt, licence: CC0-1.0, edition: made up}]}
heldout: {share: 0.1, max_bytes: 6000}
tokenizer: {vocab_size: 320}
model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 48
  max_position_embeddings: 128
mixtures:
  first: {eng.first: 1}
  rest: {eng.rest: 1}
  swe: {swe: 0.9, eng.first: 0.1}
  est: {est: 0.9, eng.first: 0.1}
training:
  sequence_length: 32
  global_batch: 8
  lr: 2.0e-2
  warmup: 2
  precision: float32
  checkpoint_every: 5
stages:
  seed: {train: {from: scratch, data: first, training: {steps: 40}}}
  base-1x: {train: {from: seed, data: rest, training: {steps: 6}}}
  seed-2x: {grow: {from: seed, width: 2}}
  base-2x: {train: {from: seed-2x, data: rest, training: {steps: 6}}}
  "{setup}-{data}":
    each: {setup: [1x, 2x], data: [swe, est]}
    train: {from: "base-{setup}", data: "{data}", training: {steps: 8, evaluate_every: 4}}
  "{setup}-{method}":
    each: {setup: [1x, 2x], method: [linear, ties]}
    merge: {from: ["{setup}-swe", "{setup}-est"], base: "base-{setup}", method: "{method}"}
evaluation:
  pairs: 20
  resamples: 200
  sample_tokens: 5
  tasks: {order: {kind: pairs, files: order.tsv, language: swe, good: right, bad: wrong, phenomenon: rule}}
study: {source_language: eng, languages: [swe, est], setups: [1x, 2x], methods: [linear, ties]}
checks:
  - {models: [seed], language: eng, beats: unigram, by: 0.2}
resources: {ranks: 2, threads: 1}
"""


def write_toy(folder: Path, text: str = PIPELINE) -> Path:
    """Write the pipeline and its text; return the pipeline file.

    A language has 60 words; each word is followed by one of three, so that there is something to learn.
    """
    for number, language in enumerate(LANGUAGES):
        draw = random.Random(number)
        words = ["".join(draw.choice("bdfgklmnrst") + draw.choice("aeiou") for _ in range(3)) for _ in range(60)]
        follow = {word: draw.sample(words, 3) for word in words}
        (folder / language).mkdir(parents=True, exist_ok=True)
        for document in range(60):
            sentences = []
            for _ in range(8):
                word = draw.choice(words)
                sentence = [word.capitalize()]
                for _ in range(draw.randint(5, 11)):
                    word = draw.choice(follow[word])
                    sentence.append(word)
                sentences.append(" ".join(sentence) + ".")
            (folder / language / f"{document:03d}.txt").write_text("\n\n".join(sentences) + "\n")
        if language == "swe":
            _write_pairs(folder / "order.tsv", follow, draw)
    path = folder / "toy.yaml"
    path.write_text(text)
    return path


def _write_pairs(path: Path, follow: dict[str, list[str]], draw: random.Random) -> None:
    """Write minimal pairs of a language: words that follow one another, and the same words turned round."""
    lines = ["right\twrong\trule"]
    for number in range(24):
        words = [draw.choice([*follow])]
        for _ in range(5):
            words.append(draw.choice(follow[words[-1]]))
        lines.append(f"{' '.join(words)}.\t{' '.join(words[::-1])}.\t{('even', 'odd')[number % 2]}")
    path.write_text("\n".join(lines) + "\n")


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "growmerge"), *arguments]


def growmerge(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line and return what it printed."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env={**os.environ, **environment}, check=False, cwd=cwd
    )


def numbers(workdir: Path) -> dict[str, Any]:
    """Return results.json without its timings."""
    results = json.loads((workdir / "results.json").read_text())
    del results["timings"]
    return results


def started(workdir: Path) -> list[str]:
    """Return the stages that the last run started."""
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    last = max(number for number, line in enumerate(lines) if line["event"] == "run")
    return [line["stage"] for line in lines[last:] if line["event"] == "start"]
