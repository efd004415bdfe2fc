"""A pipeline on prepared corpora: steps from the mixture, branches, seeds, subsets, and what it says of itself."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import growmerge
from pipeline_files import change
from test_config import matches
from toy import numbers, write_toy

from checkpoint.open import open_checkpoint
from growmerge.prepared import prepared_text
from growmerge.run import load
from parallel.errors import InputError
from train.data.tokenizer import train_tokenizer
from train.data.tokens import open_tokens
from train.tracker import read_metrics

DATA = """
folder: data
tokenizer: tokenizer
seed: 1
corpora:
  eng:
    name: Toy English
    sources: [{files: eng/*.txt, licence: CC0-1.0, edition: made up}]
    splits: {first: 0.7, rest: 0.3}
    heldout: {share: 0.1, max_bytes: 6000}
  swe: {sources: [{files: swe/*.txt}], heldout: {share: 0.1, max_bytes: 6000}}
"""
PREPARED = """
name: prepared
seed: 3
corpora:
  eng: {name: Toy English, splits: {first: 0.7, rest: 0.3}}
  swe: {name: Toy Swedish}
  est: {name: Toy Estonian, sources: [{files: est/*.txt, licence: CC0-1.0, edition: made up}]}
prepared: {folder: data, sample_bytes: 8000}
heldout: {share: 0.1, max_bytes: 6000}
tokenizer: {path: tokenizer}
model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 48
  max_position_embeddings: 128
  hidden_act: gelu
mixtures:
  first: {eng.first: 1}
  joint:
    sampling: unimax
    corpora: [swe]
    budget_characters: 60000
    max_epochs: 4
    replay: [{corpus: eng.first, share: 0.05}]
  est: {est: 1}
training:
  sequence_length: 32
  global_batch: 16
  lr: 2.0e-2
  warmup: 2
  precision: float32
  decay_norms: true
  checkpoint_every: 4
  keep_every: 4
stages:
  seed: {train: {from: scratch, data: first, training: {decay: 0.25}}}
  seed-2x: {grow: {from: seed, width: 2}}
  base-1x: {train: {from: seed, data: first, training: {steps: 2, warmup: 0}}}
  base-2x: {train: {from: seed-2x, data: first, training: {steps: 2, warmup: 0}}}
  "{setup}-swe": {each: {setup: [1x, 2x]}, train: {from: "base-{setup}", data: joint}}
  "{setup}-swe-{at}":
    each: {setup: [1x, 2x], at: ["4"]}
    train: {from: "{setup}-swe", data: joint, at: "{at}"}
  1x-swe-again: {train: {from: base-1x, data: joint, seed: 1}}
  1x-est: {train: {from: base-1x, data: est, training: {steps: 4}}}
  "1x-linear-{languages}":
    each: {languages: {subsets: [swe, est], least: 1}}
    merge: {from: ["1x-{languages}"], method: linear}
evaluation: {pairs: 10, resamples: 200, sample_tokens: 0}
study:
  source_language: eng
  languages: [swe]
  setups: [1x, 2x]
  branches: ["{setup}-{language}-{at}", "{setup}-{language}"]
resources: {ranks: 1, threads: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text prepared, and one run of the pipeline on it."""
    folder = tmp_path_factory.mktemp("prepared")
    write_toy(folder)
    texts = [path.read_text() for path in sorted(folder.glob("*/*.txt"))]
    train_tokenizer(texts, vocab_size=320, folder=folder / "tokenizer")
    (folder / "data.yaml").write_text(DATA)
    (folder / "x.yaml").write_text(PREPARED)
    with pytest.raises(InputError, match="no number of steps: give `steps` here"):
        load(folder / "x.yaml", None)
    made = growmerge("data", "prepare", "data.yaml", cwd=folder)
    assert made.returncode == 0, made.stderr
    ran = growmerge("run", "x.yaml", "--workdir", "run", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def trained(folder: Path, stage: str) -> Path:
    found = [path for path in (folder / "run" / "stages" / stage).iterdir() if (path / "metrics.jsonl").is_file()]
    assert len(found) == 1
    return found[0]


def steps(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(trained(folder, stage) / "metrics.jsonl") if "loss" in line]


def about(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / "data" / f"{name}.json").read_text()))


def test_a_run_sees_what_its_mixture_comes_to(folder: Path) -> None:
    first, swe = about(folder, "eng.first"), about(folder, "swe")
    assert len(steps(folder, "seed")) == math.ceil(round(first["tokens"] / 32) / 16)
    epochs = min(4, 60_000 / swe["characters"])
    share = round(round(first["tokens"] * 0.05 / 32) * epochs)
    assert len(steps(folder, "1x-swe")) == math.ceil((round(round(swe["tokens"] / 32) * epochs) + share) / 16)


def test_tokens_stay_where_they_were_prepared(folder: Path) -> None:
    made = next((folder / "run" / "stages" / "tokens").iterdir())
    assert sorted(path.name for path in made.glob("*.bin")) == ["est.bin"], "what has sources is made by the pipeline"
    corpora = numbers(folder / "run")["corpora"]
    assert corpora["swe"]["tokens"] == about(folder, "swe")["tokens"]
    assert corpora["eng"]["tokens"] == sum(about(folder, f"eng.{split}")["tokens"] for split in ("first", "rest"))
    assert corpora["eng"]["sources"][0]["licence"] == "CC0-1.0"
    held = [json.loads(line)["text"] for line in (folder / "data" / "swe.heldout.jsonl").read_text().splitlines()]
    scored = numbers(folder / "run")["scores"]["1x-swe"]["swe"]
    assert sum(row[2] for row in scored) == sum(len(text.encode()) for text in held)


def test_the_sample_is_of_whole_documents_from_all_over(folder: Path) -> None:
    place = next((folder / "run" / "stages" / "text").iterdir())
    lines = [json.loads(line) for line in (place / "swe" / "train.jsonl").read_text().splitlines()]
    texts = {path.read_text().strip() for path in (folder / "swe").glob("*.txt")}
    count = open_tokens(folder / "data" / "swe").metadata["documents"]
    numbers_ = [int(line["id"].partition("/")[2]) for line in lines]
    assert 3 < len(lines) < count and numbers_[0] == 0 and max(numbers_) > count / 2
    known = {"".join(text.split()) for text in texts}
    assert sum("".join(line["text"].split()) in known for line in lines) == len(lines), "as it was written"
    assert sum(len(line["text"].encode()) for line in lines) < 2 * 8000


def test_a_branch_goes_on_with_its_run_and_decays(folder: Path) -> None:
    whole, branch = steps(folder, "1x-swe"), steps(folder, "1x-swe-4")
    assert [line["step"] for line in branch] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in branch[:4]] == [line["loss"] for line in whole[:4]]
    rates = [line["lr"] for line in branch]
    assert rates[3] == 2e-2 and rates[4] <= 2e-2
    model = open_checkpoint(trained(folder, "1x-swe-4") / "checkpoints" / "step-00000005")
    assert model.run.step == 5 and model.config["hidden_act"] == "gelu"


def test_a_seed_is_a_run_of_its_own(folder: Path) -> None:
    one, other = steps(folder, "1x-swe"), steps(folder, "1x-swe-again")
    assert len(one) == len(other) and one[0]["loss"] != other[0]["loss"], "other samples"


def test_norms_are_decayed_when_asked_for(folder: Path) -> None:
    source = open_checkpoint(trained(folder, "seed") / "checkpoints" / f"step-{len(steps(folder, 'seed')):08d}")
    groups = {source.groups[info.group].weight_decay for info in source.infos.values() if info.tied_to is None}
    assert groups == {0.1}


def test_models_are_compared_at_several_lengths(folder: Path) -> None:
    found = numbers(folder / "run")
    assert found["study"]["branches"] == {"swe": {setup: [f"{setup}-swe-4", f"{setup}-swe"] for setup in ("1x", "2x")}}
    models = found["models"]
    branch, run, base = (models[name] for name in ("1x-swe-4", "1x-swe", "base-1x"))
    assert (branch["tokens"], branch["adaptation_tokens"]) == (16 * 32, 5 * 16 * 32)
    assert run["adaptation_tokens"] == run["tokens"] == len(steps(folder, "1x-swe")) * 16 * 32
    assert branch["adaptation_flops"] == branch["adaptation_tokens"] * branch["flops_per_token"]
    assert branch["total_flops"] == base["total_flops"] + branch["adaptation_flops"], "not all of the run it is of"


def test_subsets_are_merges_of_their_names(folder: Path) -> None:
    merges = {name: model["parents"] for name, model in numbers(folder / "run")["models"].items()}
    assert merges["1x-linear-swe+est"] == ["1x-swe", "1x-est"]
    assert merges["1x-linear-swe"] == ["1x-swe"]
    plain = {name: open_checkpoint(folder / "run" / "models" / name) for name in ("1x-swe", "1x-est")}
    merged = open_checkpoint(folder / "run" / "models" / "1x-linear-swe+est")
    assert np.isclose(norm(merged), np.mean([norm(one) for one in plain.values()]), atol=1e-6)


def norm(source: Any) -> float:
    """Return the mean weight of the final norm, which a linear merge takes the mean of."""
    values = torch.empty(32)
    source.read("model.norm.weight", (slice(0, 32),), {"weight": values}, source.collect("model.norm.weight", map))
    return float(values.double().mean())


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "folder: data,",
            "folder: nowhere,",
            "no number of steps: give `steps` here or in `training:`, or under p*",
        ),
        ("tokenizer: {path: tokenizer}", "tokenizer: {vocab_size: 320}", "prepared: the text is tokenised: it needs*"),
        ("tokenizer: {path: tokenizer}", "tokenizer: {path: tokenizer, vocab_size: 9999}", "320 entries, *says 9999"),
        ("prepared: {folder: data, sample_bytes: 8000}", "", "language without text: no `sources`, and no `prepared`*"),
        ("sample_bytes: 8000", "sizes: {swa: {tokens: 9}}", "unknown corpus or split 'swa': *did you mean 'swe'?"),
        ('at: ["4"]', 'at: ["3"]', "1x-swe keeps no checkpoint of step 3 (keep_every: 4, checkpoint_every: 4): it is*"),
        ('at: ["4"]', 'at: ["8000"]', "no branch at step 8000: the stable phase goes from step 2 to *"),
        ('from: "{setup}-swe", data: joint', "from: seed-2x, data: joint", "a branch goes on with the run of a tra*"),
        ('at: "{at}"}', 'at: "{at}", training: {lr: 1}}', "a branch goes on as its run does, with lr 0.02"),
        ("seed: 1}}", "seed: -1}}", "-1 is out of range: allowed is at least 0"),
        ("least: 1", "least: 3", "the list of values is empty"),
        ("subsets: [swe, est]", "subsets: [swe, swe]", "a name is given twice"),
        ("least: 1", "most: 3", "3 of 2 names"),
        ("hidden_act: gelu", "hidden_act: geglu", "unknown hidden_act 'geglu': *did you mean 'gelu'?"),
        ('"{setup}-{language}-{at}"', '"{setup}-{language}-at"', "unknown stage '{setup}-{language}-at'*"),
        ('"{setup}-{language}-{at}"', '"1x-linear-{language}"', "1x-linear-swe does not train: branches are*"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, old: str, new: str, line: str, tmp_path: Path) -> None:
    path = folder / f"{tmp_path.name}.yaml"
    path.write_text(change(old, new, PREPARED))
    with pytest.raises(InputError) as error:
        load(path, None)
    assert matches(str(error.value), "*" + line), str(error.value)


def test_text_prepared_with_another_tokenizer_is_refused(folder: Path) -> None:
    texts = [path.read_text() for path in sorted(folder.glob("swe/*.txt"))]
    train_tokenizer(texts, vocab_size=320, folder=folder / "other")
    (folder / "y.yaml").write_text(change("path: tokenizer", "path: other", PREPARED))
    pipeline = load(folder / "y.yaml", None).pipeline
    with pytest.raises(InputError, match=r"swe\.json: prepared with another tokenizer than other"):
        prepared_text(pipeline, "swe", folder)
    (folder / "z.yaml").write_text(change("folder: data,", "folder: bare,", PREPARED))
    shutil.copytree(folder / "data", folder / "bare")
    (folder / "bare" / "swe.heldout.jsonl").unlink()
    with pytest.raises(InputError, match="language swe has no held-out text: prepare it with"):
        prepared_text(load(folder / "z.yaml", None).pipeline, "swe", folder)
