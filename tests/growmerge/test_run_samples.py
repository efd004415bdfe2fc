"""The samples of a run from mixtures and token files: right text, right name, documents masked; and a run of it all."""

import json
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import PIPELINE, growmerge, write_toy

from checkpoint.memory import ScratchSource
from eval.model import load_model
from growmerge.mixtures import pipeline_order, prepared_sizes, training_order
from growmerge.run_of_ranks import run_samples
from growmerge.samples import open_corpora, samples, sequences_of
from growmerge.schema_mixture import AnyMixture, MixtureConfig, Replay, StageOfMixtures
from growmerge.schema_train import TrainConfig, TrainData, Training
from train.data.order import PERIOD, Mixture
from train.data.staged import Staged
from train.data.tokenizer import train_tokenizer
from train.data.tokens import TokenFile, write_tokens
from train.plan import RunPlan
from train.tracker import read_metrics

LENGTH = 16
WORDS = ["grow", "merge", "north", "sea", "stone", "river", "winter", "light"]
EARLIER = Replay(corpus="eng.first", share=0.5)
MIXTURES: dict[str, AnyMixture] = {
    "short": {"swe": 0.98, "eng.first": 0.02},
    "replayed": MixtureConfig(sampling="temperature", temperature=2, corpora=("swe", "est"), replay=(EARLIER,)),
    "less": MixtureConfig(sampling="weights", weights={"swe": 1}, replay=(Replay(corpus="eng.first", share=0.25),)),
    "staged": MixtureConfig(
        stages=(StageOfMixtures(from_step=0, mixture="replayed"), StageOfMixtures(from_step=50, mixture="less"))
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of three corpora; documents are of some 12 tokens, so that most samples have a start inside."""
    folder = tmp_path_factory.mktemp("tokens")
    texts = {
        name: [
            " ".join(WORDS[(number * place + shift) % len(WORDS)] for place in range(1, 8 + number % 5))
            for number in range(1, 150)
        ]
        for shift, name in enumerate(("swe", "est", "eng.first"))
    }
    tokenizer = train_tokenizer([*chain.from_iterable(texts.values())], vocab_size=300, folder=folder / "tokenizer")
    for name, lines in texts.items():
        write_tokens(lines, tokenizer, folder / name)
    return folder


def opened(folder: Path, name: str) -> tuple[Mixture | Staged, dict[str, TokenFile]]:
    sizes = prepared_sizes(folder)
    files = open_corpora(folder, sizes)
    wholes = sequences_of(files, LENGTH)
    return pipeline_order(name, MIXTURES, sizes, wholes, seed=5, global_batch=4), files


def test_a_short_form_keeps_its_order_and_a_long_form_goes_by_its_smallest_share(folder: Path) -> None:
    order, files = opened(folder, "short")
    wholes = tuple(files[name].sequences(LENGTH) for name in ("swe", "eng.first"))
    plain = Mixture(names=("swe", "eng.first"), weights=(0.98, 0.02), sizes=wholes, seed=5)
    assert order == plain and plain.period == PERIOD
    long = training_order(
        "short", MIXTURES, prepared_sizes(folder), sequences_of(files, LENGTH), seed=5, global_batch=4
    )
    assert isinstance(long, Mixture) and long.period == 10 * PERIOD


@pytest.mark.parametrize("name", ["short", "replayed", "staged"])
def test_a_sample_is_a_sequence_of_the_corpus_that_it_is_counted_for(name: str, folder: Path) -> None:
    order, files = opened(folder, name)
    sample, names = samples(order, files, length=LENGTH, documents="packed")
    sequences = {
        corpus: {file.sequence(number, LENGTH).tobytes() for number in range(file.sequences(LENGTH))}
        for corpus, file in files.items()
    }
    seen = set()
    for number in range(400):
        found = sample(number)
        seen.add(names[found.corpus])
        corpus, sequence, _ = order.sample(number)
        assert names[found.corpus].partition(" for ")[0] == corpus
        assert found.ids.tobytes() == files[corpus].sequence(sequence, LENGTH).tobytes()
        assert found.ids.tobytes() in sequences[corpus] and found.starts is None
    assert seen == set(names)


def test_parts_of_two_stages_share_a_name(folder: Path) -> None:
    order, files = opened(folder, "staged")
    assert order.names.count("eng.first for swe") == 2  # a half and a quarter
    _, names = samples(order, files, length=LENGTH, documents="packed")
    assert names == ("swe", "est", "eng.first for swe", "eng.first for est")


def test_masked_samples_say_where_documents_start(folder: Path) -> None:
    """Each document begins with the token after an EOS, which is how the starts are found again."""
    order, files = opened(folder, "replayed")
    sample, _ = samples(order, files, length=LENGTH, documents="masked")
    inside = 0
    for number in range(200):
        found = sample(number)
        corpus, _, _ = order.sample(number)
        ends = np.flatnonzero(found.ids == files[corpus].metadata["eos"]) + 1
        assert found.starts is not None
        assert [start for start in found.starts.tolist() if start > 0] == [end for end in ends if end <= LENGTH]
        inside += len(ends)
    assert inside > 100


def test_growmerge_train_reads_replay_from_its_corpus(folder: Path) -> None:
    how = Training(steps=4, sequence_length=LENGTH, global_batch=4, precision="float32", documents="masked")
    data = TrainData(folder=folder.name, mixture="replayed")
    config = TrainConfig(name="x", seed=5, model="m", data=data, mixtures=MIXTURES, training=how)
    plan = RunPlan(**vars(how))
    sample, names, languages, _ = run_samples(config, folder.parent, plan, 400)
    order, files = opened(folder, "replayed")
    same, same_names = samples(order, files, length=LENGTH, documents="masked")
    assert names == same_names and languages == ("swe", "est", "eng")
    for number in range(300):
        one, other = sample(number), same(number)
        assert one.corpus == other.corpus and np.array_equal(one.ids, other.ids)
        assert one.starts is not None and other.starts is not None and np.array_equal(one.starts, other.starts)


RUN = (
    PIPELINE[: PIPELINE.index("mixtures:")]
    + """\
mixtures:
  first: {eng.first: 1}
  joint:
    sampling: unimax
    corpora: [swe, est]
    budget_characters: 1e5
    max_epochs: 4
    replay: [{corpus: eng.rest, share: 0.5}]
  swe: {part_of: joint, corpora: [swe]}
  late: {stages: [{from_step: 0, mixture: first}, {from_step: 2, mixture: swe}, {from_step: 9, mixture: joint}]}
training:
  sequence_length: 32
  global_batch: 8
  lr: 2.0e-2
  precision: float32
  documents: masked
stages:
  seed: {train: {from: scratch, data: late, training: {steps: 5}}}
evaluation: {pairs: 4, resamples: 100, sample_tokens: 2}
resources: {ranks: 1, threads: 1}
"""
)


def first_loss(workdir: Path, model: Path) -> float:
    """Return the loss of the run's first 8 samples before any step, each document scored on its own."""
    (folder,) = (workdir / "stages" / "tokens").iterdir()
    file = open_corpora(folder, ["eng.first"])["eng.first"]
    order = Mixture(names=("eng.first",), weights=(1,), sizes=(file.sequences(32),), seed=3)
    fresh = load_model(ScratchSource(config=json.loads((model / "config.json").read_text()), seed=3))
    total, count, begun = 0.0, 0, 0
    for number in range(8):
        ids = file.sequence(order.sample(number)[1], 32).astype(np.int64)
        cuts = sorted({0, len(ids), *(np.flatnonzero(ids == file.metadata["eos"]) + 1).tolist()})
        begun += len(cuts) - 2
        for start, stop in pairwise(cuts):
            document = torch.from_numpy(ids[start:stop])[None]
            if document.shape[1] > 1:
                logits = fresh(input_ids=document[:, :-1]).logits[0].float()
                total += torch.nn.functional.cross_entropy(logits, document[0, 1:], reduction="sum").item()
                count += document.shape[1] - 1
    assert begun > 0, "no document begins in the first step: packed would give the same"
    return total / count


@pytest.mark.slow
def test_a_pipeline_trains_on_a_long_mixture_with_masked_documents(tmp_path: Path) -> None:
    path = write_toy(tmp_path, RUN)
    done = growmerge("run", str(path), "--workdir", str(tmp_path / "run"), "--executor", "local")
    assert done.returncode == 0, done.stderr
    model = (tmp_path / "run" / "models" / "seed").resolve()
    lines = read_metrics(model.parent / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    names = [set(line["losses"]) for line in steps]
    assert names[0] == names[1] == {"eng.first"} and set.union(*names[2:]) == {"swe", "eng.rest for swe"}
    assert steps[0]["loss"] == pytest.approx(first_loss(tmp_path / "run", model), rel=1e-5)
    assert [set(line["evaluation"]["languages"]) for line in lines if "evaluation" in line] == [{"eng", "swe"}] * 2
    card = (model / "README.md").read_text()
    assert "- eng\n- swe\ntags:" in card and "Toy Estonian" not in card
    assert "| mixture.stages |" in card
