"""A step that is vetoed, or whose gradient is not finite, leaves nothing behind, in any stage and precision."""

from itertools import product

import pytest
import torch
from tiny import on_ranks, tiny_config

from checkpoint.memory import ScratchSource
from parallel.mesh import Mesh, mesh_of
from train.batch import plain_batch
from train.engine import Engine, EngineConfig

BAD = 2
STAGES = {
    f"zero {zero}{', offload' * offload}, {precision}": {"zero": zero, "offload": offload, "precision": precision}
    for zero, offload, precision in product((0, 1, 2, 3), (False, True), ("bfloat16", "float32"))
    if zero or (precision == "float32" and not offload)
} | {"sp, zero 1, bfloat16": {"zero": 1, "mesh": Mesh(sp=2), "precision": "bfloat16"}}


def steps(ranks, stages):
    """Run each stage with a vetoed step, with one of an infinite gradient, and without it; return norms and losses."""
    found = {}
    for (name, changes), bad in product(stages.items(), ("veto", "infinite", "left out")):
        mesh = mesh_of(ranks.world_size, zero=changes["zero"], sp=changes.get("mesh", Mesh()).sp)
        how = {
            "micro_batch": 4 // mesh.dp,
            "accumulation": 1,
            "lr": 1e-2,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip": 0.5,
            "sequence_length": 16,
            **changes,
            "mesh": mesh,
        }
        engine = Engine(ScratchSource(config=tiny_config(), seed=1), EngineConfig(**how), ranks)
        found[name, bad] = []
        for step in range(5):
            if step == BAD and bad == "left out":
                continue
            ids = torch.randint(0, 131, (4, 17), generator=torch.Generator().manual_seed(step))
            hook = None
            if step == BAD and bad == "infinite":  # of a finite loss
                hook = engine.model.model.norm.register_full_backward_hook(
                    lambda module, into, out: tuple(None if one is None else one * float("inf") for one in into)
                )
            veto = step == BAD and bad == "veto"
            batch = plain_batch(ids.chunk(mesh.dp)[mesh.data_rank(ranks.rank)])
            taken = engine.step([batch], how["lr"], keep=lambda loss, norm, veto=veto: not veto)
            if hook is not None:
                hook.remove()
            found[name, bad].append((taken.loss, taken.grad_norm, taken.kept))
        engine.close()
    return found


FAST = ("zero 0, float32", "zero 1, bfloat16", "zero 2, offload, bfloat16", "zero 3, offload, float32")
"""One of each kind of hook."""


@pytest.mark.parametrize(
    "names",
    [pytest.param(FAST, marks=pytest.mark.covered), pytest.param(tuple(STAGES), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_bad_step_is_as_if_it_had_not_been_and_norms_are_the_same_in_all_stages(tmp_path, names):
    found = on_ranks(tmp_path, 2, steps, {name: STAGES[name] for name in names})[0]
    for name in names:
        for bad in ("veto", "infinite"):
            check_bad_step(found, name, bad)
        for one, other in zip(found[name, "left out"], found["zero 0, float32", "left out"], strict=True):
            assert one[0] == pytest.approx(other[0], rel=1e-2), name
            assert one[1] == pytest.approx(other[1], rel=5e-2 if "bfloat16" in name else 1e-4), name


def check_bad_step(found, name, bad):
    before, after, expected = found[name, bad][:BAD], found[name, bad][BAD + 1 :], found[name, "left out"]
    loss, norm, kept = found[name, bad][BAD]
    assert not kept, (name, bad)
    assert loss > 0 and (norm == float("inf")) == (bad == "infinite")
    assert [one[2] for one in [*before, *after]] == [True] * 4
    for one, other in zip([*before, *after], expected, strict=True):
        assert one[:2] == pytest.approx(other[:2], rel=2e-3 if "bfloat16" in name else 1e-5), (name, bad)
