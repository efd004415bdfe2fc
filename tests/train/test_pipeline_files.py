"""Pipeline folders that we write, under real DeepSpeed: our training and its own loader go on; its files are ours."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_elastic import END, STOP, run
from test_parallel import BATCH, LENGTH, UNTIED
from tiny import on_ranks, tiny_config

from checkpoint.memory import ScratchSource
from checkpoint.open import format_of
from growmerge.convert import Target, convert_checkpoint
from parallel.mesh import Mesh
from train.batch import plain_batch
from train.engine import EngineConfig
from train.pipeline import PipelineEngine

UNEVEN = {
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "intermediate_size": 47,
}
"""Sizes at which a part is padded on 2 data-parallel ranks."""


def original(ranks, folder, model):
    """Save a run of ZeRO-3 at STOP; return its losses to END."""
    run(ranks, None, 0, STOP, "zero3", save=folder, model=model)
    return run(ranks, None, 0, END, "zero3", model=model)


def loaded(ranks, folder, model, precision):
    """Go on from a pipeline folder that DeepSpeed's own loader reads; return the losses."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    how = EngineConfig(
        micro_batch=BATCH,
        accumulation=1,
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=0.5,
        precision=precision,
        sequence_length=LENGTH,
        zero=1,
        mesh=Mesh(pp=2),
    )
    engine = PipelineEngine(ScratchSource(config=tiny_config(**model), seed=9), how, ranks)
    live = engine._engine
    live.checkpoint_engine = TorchCheckpointEngine()
    path, client = live.load_checkpoint(str(Path(folder).parent), tag=Path(folder).name)
    assert path is not None
    assert (client["growmerge"]["tokens"], live.global_steps) == (7, STOP)
    losses = []
    for step in range(STOP, END):
        ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        losses.append(engine.step([plain_batch(ids)], how.lr).loss)
    engine.close()
    return losses


def both(ranks, folder, model, precision="float32"):
    ours = run(ranks, folder, STOP, END, "pp", precision=precision)
    return ours, loaded(ranks, folder, model, precision)


@pytest.mark.parametrize(
    "model", [pytest.param({}, id="tied"), pytest.param(UNTIED, id="untied", marks=pytest.mark.slow)]
)
def test_a_pipeline_goes_on_from_what_one_rank_saved(tmp_path, model):
    expected = on_ranks(tmp_path, 1, original, str(tmp_path / "run"), model)[0]
    target = Target(folder=tmp_path / "run" / "written", format="pipeline", stages=2, workers=1)
    convert_checkpoint(tmp_path / "run" / "zero3", target)
    assert format_of(target.folder) == "pipeline"
    for losses in on_ranks(tmp_path, 2, both, str(target.folder), model)[0]:
        assert losses == pytest.approx(expected[STOP:], abs=1e-5)


def assert_held(ours, theirs, where):
    """Whatever our file says, theirs says too."""
    if isinstance(ours, Mapping):
        for key, value in ours.items():
            if key != "sparse_tensor_module_names":  # of engines without a pipeline
                assert key in theirs, f"{where}/{key}"
                assert_held(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_held(one, other, f"{where}/{number}")
    elif isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        assert torch.equal(ours, theirs), where
    else:
        assert ours == pytest.approx(theirs) if isinstance(ours, float) else ours == theirs, where


def files_of(folder):
    return {path.name: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}  # of this test's own runs


def saved(ranks, folder, model, precision="float32"):
    return run(ranks, None, 0, STOP, "pp", save=folder, precision=precision, model=model)


def there_and_back(folder, ranks, dtype):
    """Convert a pipeline run to ZeRO-3 on 3 ranks and back."""
    convert_checkpoint(folder / "pp", Target(folder=folder / "z", format="zero3", ranks=3, dtype=dtype, workers=1))
    again = Target(folder=folder / "again", format="pipeline", stages=2, ranks=ranks, dtype=dtype, workers=1)
    convert_checkpoint(folder / "z", again)
    return files_of(folder / "again"), files_of(folder / "pp")


@pytest.mark.parametrize(
    ("world", "model", "dtype"),
    [
        pytest.param(2, UNTIED, "float32", id="untied"),
        pytest.param(2, {}, "bfloat16", id="tied, bfloat16", marks=pytest.mark.slow),
        pytest.param(4, UNEVEN, "float32", id="uneven parts", marks=pytest.mark.slow),
        pytest.param(4, UNEVEN, "bfloat16", id="uneven parts, bfloat16", marks=pytest.mark.slow),
    ],
)
def test_files_are_those_that_deepspeed_writes(tmp_path, world, model, dtype):
    on_ranks(tmp_path, world, saved, str(tmp_path / "run"), model, dtype)
    ours, theirs = there_and_back(tmp_path / "run", world // 2, dtype)
    assert ours.keys() == theirs.keys()
    for name, state in ours.items():
        assert_held(state, theirs[name], name)


@pytest.mark.slow
def test_a_bfloat16_run_goes_on_digit_for_digit(tmp_path):
    on_ranks(tmp_path, 2, saved, str(tmp_path / "run"), UNTIED, "bfloat16")
    there_and_back(tmp_path / "run", 1, "bfloat16")
    expected = on_ranks(tmp_path, 2, run, str(tmp_path / "run" / "pp"), STOP, END, "pp", precision="bfloat16")[0]
    ours, theirs = on_ranks(tmp_path, 2, both, str(tmp_path / "run" / "again"), UNTIED, "bfloat16")[0]
    assert ours == expected
    assert theirs == pytest.approx(expected, abs=5e-3)
