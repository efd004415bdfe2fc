"""A run saved at one mesh, stage or number of ranks goes on at another: same samples, same losses, its groups."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_parallel import BATCH, LENGTH, UNTIED
from tiny import on_ranks, tiny_config

from checkpoint.memory import ScratchSource
from checkpoint.open import format_of, open_checkpoint
from parallel.errors import InputError
from parallel.mesh import Mesh, mesh_of
from train.batch import Sample, batch_of
from train.engine import Engine, EngineConfig
from train.pipeline import PipelineEngine

STOP, END = 3, 6
KINDS = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero2-offload": {"zero": 2, "offload": True},
    "zero2-tp": {"zero": 2, "mesh": Mesh(tp=2)},
    "zero3": {},
    "zero3-tp": {"mesh": Mesh(tp=2)},
    "zero3-sp": {"mesh": Mesh(sp=2)},
    "pp": {"zero": 1, "mesh": Mesh(pp=2)},
}
FORMATS = {"zero0": "zero0", "pp": "pipeline", "zero3": "zero3", "zero3-tp": "zero3_tp", "zero3-sp": "zero3"}


def run(ranks, start, first, last, kind, *, save=None, precision="float32", model=None):
    """Train steps [first, last) from a folder, or from scratch, at a mesh; return losses and where each group is."""
    changes = KINDS[kind]
    asked, zero = changes.get("mesh", Mesh()), changes.get("zero", 3)
    mesh = mesh_of(ranks.world_size, zero=zero, tp=asked.tp, sp=asked.sp, pp=asked.pp)
    share = -(-BATCH // mesh.dp)
    how = EngineConfig(
        micro_batch=share,
        accumulation=1,
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=0.5,
        precision=precision,
        sequence_length=LENGTH,
        **{**changes, "mesh": mesh},
    )
    source = open_checkpoint(start) if start else ScratchSource(config=tiny_config(**(model or {})), seed=1)
    engine = (PipelineEngine if mesh.pp > 1 else Engine)(source, how, ranks)
    losses = []
    for step in range(first, last):
        ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step)).numpy()
        places = range(mesh.data_rank(ranks.rank) * share, (mesh.data_rank(ranks.rank) + 1) * share)
        real = [place < BATCH for place in places]
        samples = [Sample(ids=ids[place if counts else 0]) for place, counts in zip(places, real, strict=True)]
        losses.append(engine.step([batch_of(samples, real)], how.lr).loss)
    if save:
        files = {"config.json": json.dumps(dict(source.config)).encode()}
        engine.save(Path(save), kind, {"tokens": 7, "samples": last * BATCH, "seed": 1}, files)
    engine.close()
    return losses


def undisturbed(ranks, model=None):
    return run(ranks, None, 0, END, "zero3", model=model)


def saved(ranks, folder, kinds, precision="float32", model=None):
    return {kind: run(ranks, None, 0, STOP, kind, save=folder, precision=precision, model=model) for kind in kinds}


def resumed(ranks, folders, kinds, precision="float32"):
    return {
        (Path(folder).name, kind): run(ranks, folder, STOP, END, kind, precision=precision)
        for folder in folders
        for kind in kinds
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 2 ranks, stopped at STOP; and the losses of one rank that went on."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(folder, 2, saved, str(folder / "runs"), [*KINDS])
    return folder / "runs", on_ranks(folder, 1, undisturbed)[0]


def close(found, expected):
    for key, losses in found.items():
        assert losses == pytest.approx(expected[STOP:], abs=1e-5), key


def test_every_kind_goes_on_at_one_rank(runs, tmp_path):
    folder, expected = runs
    folders = [str(folder / kind) for kind in KINDS]
    for kind in KINDS:
        assert format_of(folder / kind) == FORMATS.get(
            kind, "zero12" if "zero2" in kind or kind == "zero1" else "zero3"
        )
        source = open_checkpoint(folder / kind)
        assert {name: (group.step, group.weight_decay) for name, group in source.groups.items()} == {
            "decay": (STOP, pytest.approx(0.1)),
            "no_decay": (STOP, 0.0),
        }
        assert (source.run.step, source.run.tokens, source.run.samples) == (STOP, 7, STOP * BATCH)
    close(on_ranks(tmp_path, 1, resumed, folders, ["zero3"])[0], expected)


@pytest.mark.slow
def test_one_goes_on_as_every_kind(runs, tmp_path):
    folder, expected = runs
    close(on_ranks(tmp_path, 2, resumed, [str(folder / "pp")], [*KINDS])[0], expected)


@pytest.mark.slow
def test_from_two_ranks_to_three_and_four(runs, tmp_path):
    folder, expected = runs
    folders = [str(folder / kind) for kind in ("zero3-tp", "pp", "zero3")]
    close(on_ranks(tmp_path, 3, resumed, folders, ["zero3", "zero1"])[0], expected)
    close(on_ranks(tmp_path, 4, resumed, folders[:2], ["zero3-tp", "pp"])[0], expected)


@pytest.mark.slow
def test_untied_heads_too(tmp_path):
    kinds = ["pp", "zero2-tp", "zero0"]
    expected = on_ranks(tmp_path, 1, undisturbed, UNTIED)[0]
    on_ranks(tmp_path, 2, saved, str(tmp_path / "runs"), kinds, model=UNTIED)
    folders = [str(tmp_path / "runs" / kind) for kind in kinds]
    close(on_ranks(tmp_path, 2, resumed, folders, ["zero3", "pp"])[0], expected)


@pytest.mark.slow
def test_bfloat16_goes_on_digit_for_digit_at_the_same_place(tmp_path):
    kinds = ["zero1", "zero2", "zero3", "pp"]
    whole = {kind: on_ranks(tmp_path, 2, run, None, 0, END, kind, precision="bfloat16")[0] for kind in kinds}
    on_ranks(tmp_path, 2, saved, str(tmp_path / "runs"), kinds, "bfloat16")
    for kind in kinds:
        again = on_ranks(tmp_path, 2, resumed, [str(tmp_path / "runs" / kind)], [kind], "bfloat16")[0]
        assert again[kind, kind] == whole[kind][STOP:]


@pytest.mark.parametrize(
    ("kind", "missing", "words"),
    [
        ("pp", "mp_rank_01_model_states.pt", ("mp_rank_01_model_states.pt", "missing", "2 model-parallel ranks")),
        ("pp", "zero_pp_rank_0_mp_rank_01_optim_states.pt", ("zero_pp_rank_0_mp_rank_01", "missing")),
        ("zero2-tp", "mp_rank_01_model_states.pt", ("mp_rank_01_model_states.pt", "missing")),
    ],
)
def test_a_missing_file_is_one_line(runs, tmp_path, kind, missing, words):
    shutil.copytree(runs[0] / kind, tmp_path / kind)
    (tmp_path / kind / missing).unlink()
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(tmp_path / kind).infos
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)
