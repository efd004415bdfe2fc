"""Batches: documents masked from one another score as each does alone; what fills up a short rank counts nothing."""

import numpy as np
import pytest
import torch
from tiny import on_ranks, tiny_config, tiny_model

from checkpoint.memory import ScratchSource
from parallel.mesh import Mesh, mesh_of
from train.batch import Sample, batch_of, count_tokens, restarting
from train.engine import Engine, EngineConfig
from train.pipeline import PipelineEngine

LENGTH = 24
STARTS = (0, 7, 8, 19)
"""A document of one token is among them."""


def packed(seed=0):
    return np.random.default_rng(seed).integers(2, 131, LENGTH + 1)


def sample(seed=0, starts=STARTS, corpus=0):
    return Sample(ids=packed(seed), starts=np.array(starts), corpus=corpus)


def alone(model, ids, starts):
    """Return the loss of each document scored on its own, and how many targets they have."""
    total, count = 0.0, 0
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        document = torch.from_numpy(ids[start:stop])[None]
        if document.shape[1] > 1:
            logits = model(input_ids=document[:, :-1]).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, document[0, 1:], reduction="sum"))
            count += document.shape[1] - 1
    return total, count


def test_positions_restart_and_a_documents_first_token_is_no_target():
    positions, unpredicted = restarting(np.array([0, 3, 5]), 6)
    assert positions.tolist() == [0, 1, 2, 0, 1, 0]
    assert unpredicted.tolist() == [2, 4]
    # A document may begin at the last target.
    assert restarting(np.array([6]), 6)[1].tolist() == [5]


def test_what_fills_up_counts_nothing_and_corpora_are_counted_apart():
    batch = batch_of([sample(0), sample(1, starts=(0,), corpus=1), sample(2)], [True, True, False])
    assert count_tokens([batch], 2).tolist() == [LENGTH - 3, LENGTH]
    plain = batch_of([Sample(ids=packed())], [True])
    assert plain.positions is None
    assert count_tokens([plain], 1).tolist() == [LENGTH]


def losses(ranks, variants):
    found = {}
    for name, changes in variants.items():
        asked = changes.get("mesh", Mesh())
        mesh = mesh_of(ranks.world_size, zero=changes.get("zero", 3), tp=asked.tp, pp=asked.pp)
        how = EngineConfig(
            micro_batch=2,
            accumulation=1,
            lr=0.0,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.0,
            clip=1.0,
            precision="float32",
            **{**changes, "mesh": mesh},
        )
        engine = (PipelineEngine if mesh.pp > 1 else Engine)(ScratchSource(config=tiny_config(), seed=1), how, ranks)
        batch = batch_of([sample(0), sample(1, starts=(5,), corpus=1)], [True, True])
        taken = engine.step([batch], 0.0, corpora=2)
        found[name] = (taken.losses.tolist(), taken.counts.tolist(), taken.grad_norm)
        engine.close()
    return found


def test_masked_documents_score_as_each_does_alone_whatever_the_mesh(tmp_path):
    model = tiny_model()
    weights = ScratchSource(config=tiny_config(), seed=1)
    for name, parameter in model.named_parameters():
        box = tuple(slice(0, size) for size in parameter.shape)
        weights.read(name, box, {"weight": parameter.data})
    expected = [alone(model, packed(0), STARTS), alone(model, packed(1), (0, 5))]
    variants = {"zero3": {}, "recompute": {"recompute": True}}
    one = on_ranks(tmp_path, 1, losses, variants)[0]
    two = on_ranks(tmp_path, 2, losses, {"pp": {"zero": 1, "mesh": Mesh(pp=2)}, "tp": {"mesh": Mesh(tp=2)}})[0]
    for sums, counts, norm in [*one.values(), *two.values()]:
        assert counts == [count for _, count in expected]
        assert sums == pytest.approx([total for total, _ in expected], rel=1e-5)
        assert norm == pytest.approx(one["zero3"][2], rel=1e-4)
