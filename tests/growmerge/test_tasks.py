"""Keys of tasks: a change re-runs what depends on it, and nothing else."""

import os
from pathlib import Path

import pytest
from toy import PIPELINE, write_toy

from growmerge.config import load_pipeline
from growmerge.graph import expand
from growmerge.tasks import Task, build_tasks

STUDY = PIPELINE[PIPELINE.index("study:") : PIPELINE.index("checks:")]


def tasks(folder: Path, text: str = PIPELINE) -> dict[str, Task]:
    path = folder / "toy.yaml"
    path.write_text(text)
    pipeline, marks = load_pipeline(path)
    return build_tasks(pipeline, expand(pipeline, marks, path), folder / "run", folder)


def differing(before: dict[str, Task], after: dict[str, Task]) -> set[str]:
    return {name for name in before if after[name].key != before[name].key}


MERGES = {f"{setup}-{method}" for setup in ("1x", "2x") for method in ("linear", "ties")}
MODELS = {"seed", "base-1x", "seed-2x", "base-2x", "1x-swe", "1x-est", "2x-swe", "2x-est", *MERGES}

GROWN = {name for name in MODELS if "2x" in name}


@pytest.mark.parametrize(
    ("old", "new", "models"),
    [
        ("licence: CC0-1.0", "licence: MIT", set()),
        ("name: Toy Swedish", "name: Svenska", set()),
        ("checkpoint_every: 5", "checkpoint_every: 7", set()),
        ("ranks: 2, threads: 1", "ranks: 3, threads: 2", set()),
        ("title: Toy", "title: Other", set()),
        ('method: "{method}"}', 'method: "{method}", parameters: {lambda: 0.5}}', {"1x-ties", "2x-ties"}),
        (
            "steps: 8, evaluate_every: 4",
            "steps: 9, evaluate_every: 4",
            MODELS - {"seed", "seed-2x", "base-1x", "base-2x"},
        ),
        ("swe: {swe: 0.9, eng.first: 0.1}", "swe: {swe: 1}", {"1x-swe", "2x-swe", *MERGES}),
        ("lr: 2.0e-2", "lr: 1.0e-2", MODELS),
        ("width: 2", "width: 2, hidden: 2, method: exact-split", GROWN),
        ("width: 2", "width: 2, optimizer: scaled", GROWN),
        ("training: {steps: 40}", "training: {steps: 40, dynamics: mup}", MODELS),
        # What older files mean without saying it does not count as a change.
        ("width: 2", "width: 2, heads: null, optimizer: reset", set()),
        ("lr: 2.0e-2", "lr: 2.0e-2\n  dynamics: free", set()),
    ],
)
def test_a_change_concerns_what_depends_on_it(tmp_path: Path, old: str, new: str, models: set[str]) -> None:
    write_toy(tmp_path)
    assert old in PIPELINE
    changed = differing(tasks(tmp_path), tasks(tmp_path, PIPELINE.replace(old, new)))
    assert changed & MODELS == models
    assert {name for name in changed if name.startswith("evaluate/")} == {f"evaluate/{name}" for name in models}
    assert not changed & {"text", "tokens", "pairs", "baselines"}


def test_what_the_file_asks_of_models_concerns_their_evaluation_alone(tmp_path: Path) -> None:
    write_toy(tmp_path)
    before = tasks(tmp_path)
    evaluations = {name for name in before if name.startswith("evaluate/")}
    after = tasks(tmp_path, PIPELINE.replace("good: right, bad: wrong", "good: wrong, bad: right"))
    assert differing(before, after) == {*evaluations, "report"}
    with (tmp_path / "order.tsv").open("a") as file:
        file.write("a b.\tb a.\teven\n")
    assert differing(before, tasks(tmp_path)) == {*evaluations, "report"}


def test_the_study_decides_what_is_measured_in_training(tmp_path: Path) -> None:
    """Forgetting is of the study's source language: without it, a training in other text does not measure it."""
    write_toy(tmp_path)
    text = PIPELINE.replace("swe: {swe: 0.9, eng.first: 0.1}", "swe: {swe: 1}")
    with_study, without = tasks(tmp_path, text), tasks(tmp_path, text.replace(STUDY, ""))
    assert with_study["1x-swe"].config["evaluation"]["languages"] == ["eng", "swe"]
    assert without["1x-swe"].config["evaluation"]["languages"] == ["swe"]
    assert differing(with_study, without) & {"seed", "1x-swe", "1x-est"} == {"1x-swe"}


def test_a_stage_keeps_its_own_precision(tmp_path: Path) -> None:
    write_toy(tmp_path)
    text = PIPELINE.replace("training: {steps: 40}", "training: {steps: 40, precision: bfloat16}")
    found = tasks(tmp_path, text)
    assert found["seed"].config["precision"] == "bfloat16"
    assert found["base-1x"].config["precision"] == "float32"


def test_changed_text_is_noticed_and_a_moved_project_is_not(tmp_path: Path) -> None:
    old = tmp_path / "old"
    write_toy(old)
    text = PIPELINE.replace("swe/*.txt", "'**/swe/*.txt'")
    before = tasks(old, text)
    old.rename(tmp_path / "new")
    moved = tasks(tmp_path / "new", text)
    assert not differing(before, moved)
    path = tmp_path / "new" / "swe" / "003.txt"
    os.utime(path, ns=(1, 1))
    assert "text" in differing(moved, tasks(tmp_path / "new", text))


def test_the_original_that_untranslated_text_is_compared_with_counts_as_text(tmp_path: Path) -> None:
    write_toy(tmp_path)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "sv.json").write_text('{"a": "ett par ord till"}')
    (tmp_path / "json" / "en.json").write_text('{"a": "a few more words"}')
    source = "{files: json/sv.json, reader: json-strings, untranslated: json/en.json}"
    text = PIPELINE.replace("sources: [{files: swe/*.txt", f"sources: [{source}, {{files: swe/*.txt")
    before = tasks(tmp_path, text)
    (tmp_path / "json" / "en.json").write_text('{"a": "quite a few more words"}')
    assert "text" in differing(before, tasks(tmp_path, text))


LONG = PIPELINE.replace(
    "  swe: {swe: 0.9, eng.first: 0.1}\n  est: {est: 0.9, eng.first: 0.1}\n",
    """\
  joint:
    sampling: unimax
    corpora: [swe, est]
    budget_characters: 1e5
    max_epochs: 4
    replay: [{corpus: eng.first, share: 0.2, scale_by: tokens}]
  swe: {part_of: joint, corpora: [swe]}
  late: {sampling: weights, weights: {est: 0.9, eng.first: 0.1}}
  est: {stages: [{from_step: 0, mixture: rest}, {from_step: 4, mixture: late}]}
  unused: {sampling: temperature, temperature: 2, corpora: [swe, est]}
""",
)
"""The toy pipeline with long mixtures, one of each kind."""
OF_SWE = {"1x-swe", "2x-swe", *MERGES}
OF_EST = {"1x-est", "2x-est", *MERGES}


@pytest.mark.parametrize(
    ("old", "new", "models"),
    [
        ("temperature: 2", "temperature: 3", set()),
        ("max_epochs: 4", "max_epochs: 5", OF_SWE),
        ("share: 0.2", "share: 0.3", OF_SWE),
        ("corpora: [swe, est]\n    budget", "corpora: [est, swe]\n    budget", OF_SWE),
        ("weights: {est: 0.9", "weights: {est: 0.8", OF_EST),
        ("weights: {est: 0.9, eng.first: 0.1}", "weights: {eng.first: 0.1, est: 0.9}", OF_EST),
        ("from_step: 4", "from_step: 5", OF_EST),
        # A short form within a long one is its long form.
        ("{sampling: weights, weights: {est: 0.9, eng.first: 0.1}}", "{est: 0.9, eng.first: 0.1}", set()),
        ("rest: {eng.rest: 1}", "rest: {eng.rest: 2}", MODELS - {"seed", "seed-2x"}),
        ("scale_by: tokens", "scale_by: tokens, epochs: {}", set()),
    ],
)
def test_a_long_mixture_concerns_what_refers_to_it(tmp_path: Path, old: str, new: str, models: set[str]) -> None:
    write_toy(tmp_path)
    assert LONG.count(old) == 1
    changed = differing(tasks(tmp_path, LONG), tasks(tmp_path, LONG.replace(old, new)))
    assert changed & MODELS == models
    assert not changed & {"text", "tokens", "pairs", "baselines"}


def test_a_mixture_that_is_named_otherwise_is_the_same(tmp_path: Path) -> None:
    write_toy(tmp_path)
    renamed = LONG.replace("joint", "all")
    assert not differing(tasks(tmp_path, LONG), tasks(tmp_path, renamed))


def test_a_short_mixture_stands_in_the_key_as_it_always_did(tmp_path: Path) -> None:
    write_toy(tmp_path)
    assert tasks(tmp_path)["1x-swe"].config["mixture"] == {"swe": 0.9, "eng.first": 0.1}


def test_languages_are_those_that_the_mixture_reads(tmp_path: Path) -> None:
    """Replay and stages count, but not what begins after the end, or what replay leaves out."""
    write_toy(tmp_path)
    text = LONG.replace(STUDY, "")

    def languages(changed: str) -> tuple[list[str], list[str]]:
        found = tasks(tmp_path, changed)
        swe, est = found["1x-swe"].config["evaluation"], found["1x-est"].config["evaluation"]
        return swe["languages"], est["languages"]

    assert languages(text) == (["eng", "swe"], ["eng", "est"])
    without = text.replace("share: 0.2", "share: 0.2, shares: {swe: 0}").replace("from_step: 4", "from_step: 8")
    assert languages(without) == (["swe"], ["eng"])
