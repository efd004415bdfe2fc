"""Runs that start from a grown source, on real ranks: with the optimizer's state they go on as the small run does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from test_loop import PLAN, sample
from tiny import on_ranks, tiny_config

from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.pickles import load_pickle
from checkpoint.source import full_box
from growmerge.schema_training import Dynamics
from train.build import DYNAMICS
from train.loop import last_checkpoint, train
from train.measure import blocks, clone_asymmetries, growths_of
from train.tracker import read_metrics
from upscale.factors import Recipe
from upscale.grow import grow

STOP = 6
CONSTANT = replace(PLAN, warmup=0, decay=0.0, evaluate_every=0)


def one_run(ranks, folder, start, *, first=0, plan=CONSTANT, keep_optimizer=False):
    train(
        start,
        plan,
        lambda number: sample(number + first * plan.global_batch),
        ranks,
        folder,
        seed=2,
        files={"config.json": json.dumps(dict(start().config)).encode()},
        evaluate=lambda model, readers: {},
        report=lambda event: None,
        keep_optimizer=keep_optimizer,
    )


def small_and_grown(ranks, folder):
    folder = Path(folder)
    small = replace(CONSTANT, steps=2 * STOP, checkpoint_every=STOP)
    one_run(ranks, folder / "small", lambda: ScratchSource(config=tiny_config(), seed=2), plan=small)

    def grown(method="symmetric"):
        small = open_checkpoint(last_checkpoint(folder / "small", STOP))
        once = grow(small, Recipe(width=2, method="symmetric", state="scaled"))
        return grow(once, Recipe(ffn=3, method=method, state="scaled"))

    preserve = replace(CONSTANT, dynamics="preserve")
    one_run(ranks, folder / "scaled", grown, first=STOP, plan=preserve, keep_optimizer=True)
    one_run(ranks, folder / "reset", grown, first=STOP, plan=preserve)
    one_run(ranks, folder / "free", lambda: grown("exact-split"), first=STOP, keep_optimizer=True)
    for name in ("scaled", "reset"):  # as a kill in step 5 or 6 leaves it
        if ranks.first:
            shutil.copytree(folder / name, folder / f"{name}-cut")
            shutil.rmtree(last_checkpoint(folder / f"{name}-cut", STOP))
        ranks.barrier()
        one_run(ranks, folder / f"{name}-cut", grown, first=STOP, plan=preserve, keep_optimizer=name == "scaled")


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_a_grown_run_goes_on_as_the_small_one_and_resumes_bit_for_bit(tmp_path):
    on_ranks(tmp_path, 2, small_and_grown, str(tmp_path))
    small = losses(tmp_path / "small")[STOP:]
    assert losses(tmp_path / "scaled") == pytest.approx(small, abs=1e-4)
    for other in ("reset", "free"):
        assert losses(tmp_path / other)[0] == pytest.approx(small[0], abs=1e-4)  # the function is the same
        assert max(abs(a - b) for a, b in zip(losses(tmp_path / other), small, strict=True)) > 1e-3

    # The run's own step, tokens and log begin at 0; Adam's steps are those of the small run and its own.
    ends = {name: open_checkpoint(last_checkpoint(tmp_path / name, STOP)) for name in ("scaled", "reset", "free")}
    for name, steps in {"scaled": 2 * STOP, "reset": STOP, "free": 2 * STOP}.items():
        assert (ends[name].run.step, ends[name].run.tokens) == (STOP, STOP * 5 * 16)
        assert {group.step for group in ends[name].groups.values()} == {steps}
    matrix = "model.layers.0.mlp.down_proj.weight"
    factors = {name: end.groups[end.infos[matrix].group].lr_factor for name, end in ends.items()}
    assert factors == pytest.approx({"scaled": 1 / 6, "reset": 1 / 6, "free": 1})

    for name in ("scaled", "reset"):
        cut, whole = tmp_path / f"{name}-cut", tmp_path / name
        assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        for rank in (0, 1):
            file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            ours, theirs = (
                load_pickle(last_checkpoint(root, STOP) / file)["optimizer_state_dict"] for root in (cut, whole)
            )
            for one, other in zip(ours["fp32_flat_groups"], theirs["fp32_flat_groups"], strict=True):
                assert torch.equal(one, other)
            ours, theirs = ours["optimizer_state_dict"], theirs["optimizer_state_dict"]
            assert ours["param_groups"] == theirs["param_groups"]
            for number, moments in theirs["state"].items():
                for key, value in moments.items():
                    assert torch.equal(ours["state"][number][key], value), (number, key)

    # How far the copies are apart is logged: not at all where the parts are equal; else as in the checkpoint.
    apart = {
        name: [
            line["clone_asymmetry"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" not in line
        ]
        for name in ("scaled", "free")
    }
    assert len(apart["scaled"]) == 2
    assert max(value for line in apart["scaled"] for value in line.values()) < 1e-4
    source, line = ends["free"], apart["free"][1]
    growths = growths_of({"ffn": 3}, source.config)
    assert line == pytest.approx(clone_asymmetries(whole_weights(source), growths, blocks(source.config)), rel=1e-3)
    assert line["layers/1/mlp"] > 0.01


def whole_weights(source):
    for name, info in source.infos.items():
        if info.tied_to is None:
            out = torch.empty(info.shape)
            source.read(name, full_box(info.shape), {"master": out})
            yield name, out.detach()


def test_a_pipeline_file_names_the_engines_dynamics():
    assert set(get_args(Dynamics)) == set(DYNAMICS)
