"""Files laid over one another: what stands where afterwards, and which file and line an error names."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from pipeline_files import SMALL, write

from growmerge.cli import main
from growmerge.config import load_pipeline, merged_training
from growmerge.graph import expand
from growmerge.run import load
from parallel.errors import InputError

OVER = """\
extends: x.yaml
title: Another
training: {lr: 1e-3}
stages:
  seed:
    train: {from: scratch, data: swe, training: {warmup: 5}}
scales:
  tiny:
    model: {hidden_size: 16}
    stages:
      "base-{setup}":
        train: {training: {steps: 2}}
  named: {name: by-hand, training: {betas: [0.8, 0.9]}}
"""


def over(folder: Path, text: str = OVER) -> Path:
    write(folder, SMALL)
    path = folder / "over.yaml"
    path.write_text(text)
    return path


def test_what_stands_above_wins_key_by_key(tmp_path: Path) -> None:
    pipeline, marks = load_pipeline(over(tmp_path))
    assert (pipeline.name, pipeline.title, pipeline.seed) == ("small", "Another", 3)
    assert (pipeline.training.lr, pipeline.training.sequence_length) == (1e-3, 64)
    assert pipeline.model and pipeline.model.hidden_size == 32
    seed = pipeline.stages["seed"].train
    assert seed and seed.data == "swe" and dict(seed.training) == {"steps": 10, "warmup": 5}
    assert list(pipeline.stages) == ["seed", "base-{setup}", "grown", "{setup}-{method}"]
    assert marks.at("training.lr") == f"{tmp_path / 'over.yaml'}:3"
    assert marks.at("training.warmup") == f"{tmp_path / 'x.yaml'}:28"
    assert marks.at("stages.seed.train.training.steps") == f"{tmp_path / 'x.yaml'}:31"


def test_a_scale_is_laid_over_the_file_and_has_a_folder_of_its_own(tmp_path: Path) -> None:
    path = over(tmp_path)
    pipeline, marks = load_pipeline(path, "tiny")
    assert pipeline.name == "small-tiny"
    assert pipeline.model and (pipeline.model.hidden_size, pipeline.model.intermediate_size) == (16, 48)
    nodes = expand(pipeline, marks, path)
    stage = nodes["base-2x"].stage
    training = merged_training(pipeline, stage)  # type: ignore[arg-type]
    assert (training.steps, training.betas, training.lr) == (2, (0.9, 0.99), 1e-3), "what the grid had stays"
    pipeline, _ = load_pipeline(path, "named")
    assert (pipeline.name, pipeline.training.betas) == ("by-hand", (0.8, 0.9)), "a list takes the place of a list"
    assert load(path, None, scale="tiny").workdir.name == "small-tiny"


def test_the_dry_run_is_that_of_the_scale(tmp_path: Path) -> None:
    path = over(tmp_path)
    said = [CliRunner().invoke(main, ["run", str(path), "--dry-run", *scale]) for scale in ([], ["--scale", "tiny"])]
    assert [one.exit_code for one in said] == [0, 0], said[0].output + said[1].output
    lines = [next(line for line in one.stdout.splitlines() if "base-2x " in line).split() for one in said]
    assert ["5" in lines[0], "2" in lines[1]] == [True, True] and lines[0] != lines[1]


@pytest.mark.parametrize(
    ("old", "new", "scale", "line"),
    [
        ("title:", "titel:", None, r"over\.yaml:2: unknown key 'titel': .*did you mean 'title'"),
        ("lr: 1e-3", "lr: -1", None, r"over\.yaml:3: training\.lr: -1 is out of range"),
        ("x.yaml", "y.yaml", None, r"over\.yaml:1: extends: .*y\.yaml: no such file"),
        ("x.yaml", "over.yaml", None, r"over\.yaml: extends itself"),
        ("x.yaml", "[x.yaml]", None, r"over\.yaml:1: extends: a list is given; allowed is a file"),
        ("x.yaml", "x.yaml", "tiyn", r"over\.yaml: unknown scale 'tiyn': allowed are tiny, named; did you mean 'tiny'"),
        ("hidden_size: 16", "hiden_size: 16", "tiny", r"over\.yaml:9: model: unknown key 'hiden_size'"),
        ("steps: 2", "steps: 0", "tiny", r"over\.yaml:12: .*steps: 0 is out of range"),
        ("  named: {", "  named: 3\n  other: {", "named", r"over\.yaml:13: scales\.named: 3 is given"),
    ],
)
def test_each_mistake_is_a_line(tmp_path: Path, old: str, new: str, scale: str | None, line: str) -> None:
    assert OVER.count(old) == 1
    with pytest.raises(InputError, match=line):
        load(over(tmp_path, OVER.replace(old, new)), None, scale=scale)


def test_an_error_in_the_file_below_names_that_file(tmp_path: Path) -> None:
    path = over(tmp_path)
    write(tmp_path, SMALL.replace("warmup: 2", "warmup: -2"))
    with pytest.raises(InputError, match=r"x\.yaml:28: training\.warmup: -2 is out of range"):
        load_pipeline(path)


def test_a_file_without_scales_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.yaml: has no scales, so no --scale tiny"):
        load_pipeline(write(tmp_path, SMALL), "tiny")
