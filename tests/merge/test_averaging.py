"""The last checkpoints of a run as models of a recipe: ZeRO-3 shards as a run leaves them, and runs without so many."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from models import EMBEDDING, MATRIX, NORM, model
from tiny import on_ranks, tiny_config

from checkpoint.memory import ScratchSource
from checkpoint.open import format_of, open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from merge.apply import Applied, apply_recipe
from merge.merge import merge
from merge.recipe_files import read_recipe
from parallel.errors import InputError
from train.batch import plain_batch
from train.engine import Engine, EngineConfig
from train.loop import last_checkpoint

HOW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip": 0.5, "accumulation": 1}


def train_three_steps(ranks, folder):
    """A run of three steps that saves the last two; as train.loop does it, without its data."""
    config = tiny_config()
    how = EngineConfig(**HOW, micro_batch=2, precision="bfloat16")
    engine = Engine(ScratchSource(config=config, seed=1), how, ranks)
    for step in (1, 2, 3):
        ids = torch.randint(0, 131, (4, 17), generator=torch.Generator().manual_seed(step))
        engine.step(
            [
                plain_batch(
                    ids[2 * ranks.rank : 2 * ranks.rank + 2],
                )
            ],
            1e-2,
        )
        if step > 1:
            path = last_checkpoint(Path(folder), step)
            files = {"config.json": json.dumps(config).encode()}
            engine.save(path.parent, path.name, {"tokens": step, "samples": step, "seed": 1}, files)
    engine.close()


def applied(tmp_path, text: str, **options) -> Applied:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return apply_recipe(
        read_recipe(path), lambda name: open_checkpoint(tmp_path / name), place=lambda name: tmp_path / name, **options
    )


def test_zero3_checkpoints(tmp_path):
    on_ranks(tmp_path, 2, train_three_steps, str(tmp_path / "runs" / "swe"))
    folders = [last_checkpoint(tmp_path / "runs" / "swe", step) for step in (2, 3)]
    assert [format_of(folder) for folder in folders] == ["zero3", "zero3"]
    text = "models: [{model: runs/swe, checkpoints: 2, parameters: {weight: 1}}]\nmerge_method: linear\n"
    found = applied(tmp_path, text)
    assert found.recipe.models == tuple(f"runs/swe/checkpoints/step-0000000{step}" for step in (2, 3))
    first, second = map(open_checkpoint, folders)
    assert found.merged.infos[EMBEDDING].slots == {"weight": torch.bfloat16}
    for name, info in found.merged.infos.items():
        if info.tied_to is None:
            one, other = (read_tensor(source, name, dtype=torch.bfloat16) for source in (first, second))
            assert not torch.equal(one, other)
            mean = (one.float() + other.float()) / 2
            assert torch.equal(read_tensor(found.merged, name, dtype=torch.bfloat16), mean.bfloat16()), name


@pytest.fixture
def runs(tmp_path):
    """Checkpoints of two runs, each a model, and two folders that a kill has left."""
    for run, seeds in (("swe", (1, 2, 3)), ("est", (4, 5))):
        for step, seed in enumerate(seeds, 9):  # names of steps are sorted as numbers are
            write_checkpoint(model(seed), last_checkpoint(tmp_path / run, step * 10), SafetensorsLayout())
        last_checkpoint(tmp_path / run, 999).mkdir()
    return tmp_path


def test_each_checkpoint_is_a_model_with_the_run_s_parameters(runs):
    text = """
models:
  - {model: swe/, checkpoints: 2, parameters: {weight: [{filter: mlp, value: 3}, {value: 1}]}}
  - {model: est, checkpoints: 1, parameters: {weight: 2}}
merge_method: linear
"""
    found = applied(runs, text).merged
    for name, weight in ((MATRIX, 3), (NORM, 1), (EMBEDDING, 1)):
        wanted = merge([model(2), model(3), model(5)], "linear", weights=[weight, weight, 2])
        assert torch.equal(read_tensor(found, name), read_tensor(wanted, name))


def test_checkpoints_in_slices(runs):
    text = """
slices: [{sources: [{model: swe, checkpoints: 3, layer_range: [1, 2]}]}]
merge_method: linear
parameters: {weight: 1}
"""
    found = applied(runs, text).merged
    wanted = merge([model(1), model(2), model(3)], "linear")
    assert torch.equal(read_tensor(found, MATRIX.replace(".1.", ".0.")), read_tensor(wanted, MATRIX))


@pytest.mark.parametrize(
    ("model_of", "line"),
    [
        (
            "swe, checkpoints: 4",
            "swe: RUN/swe: checkpoints is 4, but 3 of this run are complete: "
            "step-00000090, step-00000100, step-00000110",
        ),
        ("nor, checkpoints: 4", "nor: RUN/nor: no training run: it has no folder checkpoints"),
        ("swe/checkpoints, checkpoints: 1", "swe/checkpoints: RUN/swe/checkpoints: no training run: *"),
        ("swe, checkpoints: 0", "checkpoints is 0: a whole number, 1 or more, is needed"),
        ("swe, checkpoints: two", "checkpoints is 'two': a whole number, 1 or more, is needed"),
        ("swe, checkpoint: 2", "unknown key of a model 'checkpoint': *did you mean 'checkpoints'?*"),
        ("swe, checkpoints: 1}, {model: swe/checkpoints/step-00000110", "swe/*/step-00000110 is given twice *"),
    ],
)
def test_a_mistake_is_one_line(model_of, line, runs):
    (runs / "none" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        applied(runs, f"models: [{{model: {model_of}}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n")
    wanted = f"{runs / 'recipe.yaml'}:1: {line.replace('RUN', str(runs))}"
    assert fnmatchcase(str(error.value), wanted.replace("[", "[[]")) and "\n" not in str(error.value), error.value
    with pytest.raises(InputError, match=r"checkpoints is 1, but 0 of this run are complete$"):
        applied(runs, "models: [{model: none, checkpoints: 1}]\nmerge_method: linear\n")
