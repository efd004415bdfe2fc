"""A small whole pipeline file, and copies of it with one thing changed."""

from pathlib import Path

from growmerge.config import load_pipeline
from growmerge.graph import Node, expand
from growmerge.schema import Pipeline

SMALL = """\
name: small
seed: 3
corpora:
  eng:
    name: English
    splits: {first: 0.8, rest: 0.2}
    sources:
      - files: texts/eng/*.txt
  swe:
    name: Swedish
    sources:
      - {package: texts==1.0, files: sv.json, reader: json-strings}
tokenizer: {vocab_size: 512}
model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 48
  max_position_embeddings: 128
mixtures:
  english: {eng.first: 1}
  swe: {swe: 0.9, eng.rest: 0.1}
training:
  sequence_length: 64
  global_batch: 4
  lr: 6e-3
  warmup: 2
stages:
  seed:
    train: {from: scratch, data: english, training: {steps: 10}}
  "base-{setup}":
    each: {setup: [1x, 2x]}
    train:
      from: seed
      data: english
      training: {steps: 5, betas: [0.9, 0.99]}
  grown:
    grow: {from: seed, width: 2}
  "{setup}-{method}":
    each: {setup: [1x, 2x], method: [linear, ties]}
    merge:
      from: [seed, "base-{setup}"]
      base: seed
      method: "{method}"
checks:
  - {models: [seed], language: eng, by: 0.4}
  - models: ["base-{setup}"]
    language: swe
    by: 0.2
resources: {ranks: 2, threads: 1, slurm: {partition: gpu, nice: 5}}
"""
STUDY = """\
study:
  source_language: eng
  languages: [swe]
  setups: [1x, 2x]
  adapted: "base-{setup}"
  methods: [linear]
"""


def write(folder: Path, text: str) -> Path:
    """Write a pipeline file and the text that its English corpus reads."""
    (folder / "texts" / "eng").mkdir(parents=True, exist_ok=True)
    (folder / "texts" / "eng" / "a.txt").write_text("A text.\n")
    path = folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def change(old: str, new: str, text: str = SMALL) -> str:
    """Return the text with one place changed; each old text has to be there once."""
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    return text.replace(old, new)


def load(path: Path) -> tuple[Pipeline, dict[str, Node]]:
    pipeline, marks = load_pipeline(path)
    return pipeline, expand(pipeline, marks, path)
