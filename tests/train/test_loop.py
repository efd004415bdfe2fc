"""Training runs on real ranks: exact and elastic resume, evaluation of the running engine, schedules."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import on_ranks, tiny_config

from checkpoint import manifest
from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.pickles import load_pickle
from eval.evaluate import evaluate_model
from eval.model import load_model
from parallel.errors import InputError
from train.batch import Sample
from train.checkpointing import clear_after, newest
from train.data.readers import Document
from train.loop import train
from train.plan import RunPlan
from train.schedule import wsd
from train.tracker import read_metrics

PLAN = RunPlan(
    steps=6,
    sequence_length=16,
    global_batch=5,  # does not divide by 2 or 3: short ranks get samples of weight 0
    micro_batch=None,
    lr=1e-2,
    warmup=2,
    decay=0.5,
    decay_shape="linear",
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.1,
    clip=0.5,
    precision="float32",
    checkpoint_every=2,
    evaluate_every=3,
)


class Letters:
    """A tokenizer whose ids are code points."""

    bos, eos = 0, 1

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


DOCUMENTS = [Document(id=str(n), passages=("growing and merging " * (n + 1),)) for n in range(3)]


def sample(number):
    return Sample(ids=np.random.default_rng(number).integers(2, 131, PLAN.sequence_length + 1))


def go(ranks, folder, plan=PLAN):
    def evaluate(model, readers):
        return evaluate_model(
            model,
            Letters(),
            {"eng": DOCUMENTS},
            window=16,
            stride=8,
            batch_tokens=64,
            rank=readers.rank,
            world=readers.world_size,
            gather=readers.gather,
            even=True,
        )

    config = tiny_config()
    result = train(
        lambda: ScratchSource(config=config, seed=2),
        plan,
        sample,
        ranks,
        Path(folder),
        seed=2,
        files={"config.json": json.dumps(config).encode()},
        evaluate=evaluate,
        report=lambda event: None,
    )
    assert result.finished
    return str(result.checkpoint)


def test_a_run_resumes_exactly_and_evaluates_as_the_saved_model(tmp_path):
    whole = tmp_path / "whole"
    (last, _) = on_ranks(tmp_path, 2, go, str(whole))
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert abs(lines[1]["loss"] - np.log(131)) < 0.5

    # What the running ZeRO-3 engine scores is what the saved model scores, loaded on its own.
    model = load_model(open_checkpoint(last))
    alone = evaluate_model(model, Letters(), {"eng": DOCUMENTS}, window=16, stride=8, batch_tokens=64)
    for ours, theirs in zip(
        lines[-1]["evaluation"]["languages"]["eng"]["documents"], alone["languages"]["eng"]["documents"], strict=True
    ):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-6)

    # Cut back to the checkpoint of step 4, as a kill in step 5 or 6 leaves it; the log runs ahead and is cut as well.
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    on_ranks(tmp_path, 2, go, str(cut))
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        ours, theirs = (load_pickle(root / "checkpoints" / "step-00000006" / name) for root in (cut, whole))
        for one, other in zip(
            ours["optimizer_state_dict"]["fp32_flat_groups"],
            theirs["optimizer_state_dict"]["fp32_flat_groups"],
            strict=True,
        ):
            assert torch.equal(one, other)

    # A damaged newest checkpoint is passed over for the one before it, and the end is the same.
    newest = cut / "checkpoints" / "step-00000006" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    newest.write_bytes(newest.read_bytes()[:-50])
    on_ranks(tmp_path, 3, go, str(cut))  # and on another number of ranks, short ones filled up
    again = [line["loss"] for line in read_metrics(cut / "metrics.jsonl") if "loss" in line]
    assert again == pytest.approx([line["loss"] for line in lines if "loss" in line], abs=1e-5)
    assert not (cut / "checkpoints" / "step-00000002").exists()
    manifest.check(cut / "checkpoints" / "step-00000006", deep=True)


def test_checkpoints_above_the_one_that_a_run_resumes_from_are_gone(tmp_path):
    """Damaged newer ones must not crowd out what the resumed run writes; a half-deleted one is not left for ever."""
    run = tmp_path / "run"
    on_ranks(tmp_path, 1, go, str(run))
    checkpoints = run / "checkpoints"
    for step in (4, 6):
        path = checkpoints / f"step-{step:08d}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        path.write_bytes(path.read_bytes()[:-50])
    (checkpoints / "step-00000001").mkdir()
    found, damaged = newest(checkpoints)
    assert found is None
    assert len(damaged) == 2
    clear_after(checkpoints, found)
    assert not [path for path in checkpoints.iterdir() if path.is_dir()]
    on_ranks(tmp_path, 1, go, str(run), replace(PLAN, steps=3, checkpoint_every=1))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    (checkpoints / "step-00000003" / "manifest.json").write_text('{"format": 2, "files": {"config.json": {}}}')
    found, damaged = newest(checkpoints)
    assert found == checkpoints / "step-00000002"
    assert "manifest.json: damaged (KeyError('size'))" in damaged[0]
    clear_after(checkpoints, found)
    assert (checkpoints / "latest").read_text() == "step-00000002"
    assert not (checkpoints / "step-00000003").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    plan = replace(PLAN, lr=float("inf"), warmup=0, steps=20, decay=0.0, evaluate_every=0)
    (error,) = on_ranks(tmp_path, 1, go, str(tmp_path / "run"), plan)
    assert isinstance(error, InputError)
    assert "bad steps in a row: 8 (steps 2 to 9, samples 5 to 44); the last was skipped since its loss is nan" in str(
        error
    )
    (error,) = on_ranks(tmp_path, 1, go, str(tmp_path / "short"), replace(plan, steps=4))
    assert "the loss is not finite at the last step (4)" in str(error)


def test_a_plan_warms_up_again():
    rates = replace(PLAN, steps=20, rewarm=({"at": 8, "steps": 4, "start": 0.5},)).rates
    assert [rates.factor(step) for step in range(6, 13)] == pytest.approx([1, 1, 0.625, 0.75, 0.875, 0.9, 0.8])


def test_schedule_is_wsd():
    shape = {"steps": 100, "warmup": 10, "decay": 0.2}
    assert [wsd(step, **shape) for step in (0, 4, 9, 10, 79, 80)] == [0.1, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert wsd(90, **shape) == 0.5
    assert wsd(99, **shape) == pytest.approx(0.05)
    assert wsd(90, **shape, shape="cosine") == pytest.approx(0.5)
    assert wsd(85, **shape, shape="sqrt") == pytest.approx(0.5)
