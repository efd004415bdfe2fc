"""Every mesh and stage trains the same tiny model to the same losses as one rank; meshes that cannot be are refused."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import on_ranks, tiny_config

import parallel.sizes
from checkpoint.memory import ScratchSource
from eval.model import load_model
from parallel.mesh import Mesh, mesh_of
from train.batch import plain_batch
from train.engine import Engine, EngineConfig
from train.pipeline import PipelineEngine

BATCH, LENGTH, STEPS = 8, 16, 20
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def losses(ranks, variants, folder):
    """Train each variant and return its losses, norms, and squared norms by tensor."""
    found = {}
    for name, (given, model) in variants.items():
        changes = dict(given)
        parallel.sizes.CHUNK = changes.pop("chunk", WHOLE)
        mesh = changes.get("mesh", Mesh())
        mesh = mesh_of(ranks.world_size, zero=changes.get("zero", 3), tp=mesh.tp, sp=mesh.sp, pp=mesh.pp)
        dp = mesh.dp
        passes = changes.get("accumulation", 1)
        how = EngineConfig(
            **{
                "micro_batch": BATCH // dp // passes,
                "accumulation": passes,
                "lr": 3e-3,
                "betas": (0.9, 0.95),
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip": 0.5,
                "precision": "float32",
                "sequence_length": LENGTH,
                **changes,
                "mesh": mesh,
            }
        )
        kind = PipelineEngine if mesh.pp > 1 else Engine
        engine = kind(ScratchSource(config=tiny_config(**model), seed=1), how, ranks)
        found[name] = []
        for step in range(STEPS):
            ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step % 7))
            mine = ids.chunk(dp)[mesh.data_rank(ranks.rank)].chunk(passes)
            taken = engine.step([plain_batch(part) for part in mine], how.lr)
            found[name].append((taken.loss, taken.grad_norm, taken.squares))
        asked = engine._shards.saver._size
        engine.save(Path(folder), name, {"seed": 0}, {})
        (saved,) = engine.settle()
        found[name].append((asked, saved.bytes))
        engine.close()
    return found


WHOLE, CHUNK = 2**28, 4 * 131 * 5
"""Bytes of logits in a chunk: more than there are, and five tokens of them."""
UNTIED = {"tie_word_embeddings": False}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
MESHES = {
    "zero 0": ({"zero": 0}, {}),
    "zero 1": ({"zero": 1}, {}),
    "zero 2, two passes": ({"zero": 2, "accumulation": 2}, {}),
    "zero 3": ({}, {}),
    "zero 2, offload": ({"zero": 2, "offload": True}, {}),
    "zero 3, offload": ({"offload": True}, {}),
    "recompute": ({"recompute": True}, {}),
    "tp": ({"mesh": Mesh(tp=2)}, {}),
    "tp untied": ({"mesh": Mesh(tp=2)}, UNTIED),
    "tp, norms of heads": ({"mesh": Mesh(tp=2)}, QWEN3),
    "tp zero 1, norms of heads": ({"mesh": Mesh(tp=2), "zero": 1}, QWEN3),
    "sp": ({"mesh": Mesh(sp=2)}, {}),
    "sp zero 1": ({"mesh": Mesh(sp=2), "zero": 1}, {}),
    "sp zero 2": ({"mesh": Mesh(sp=2), "zero": 2}, {}),
    "zero 3, logits in chunks": ({"chunk": CHUNK}, {}),
    "tp untied, recompute, logits in chunks": ({"mesh": Mesh(tp=2), "recompute": True, "chunk": CHUNK}, UNTIED),
    "pp": ({"mesh": Mesh(pp=2), "zero": 1}, {}),
    "pp untied, two passes": ({"mesh": Mesh(pp=2), "zero": 1, "accumulation": 2}, UNTIED),
    "pp, recompute": ({"mesh": Mesh(pp=2), "zero": 1, "recompute": True}, {}),
}


SOME = (
    *("zero 0", "zero 1", "zero 2, two passes", "zero 3, offload", "tp, norms of heads"),
    *("tp untied, recompute, logits in chunks", "sp", "pp untied, two passes"),
)
"""Each stage, axis and option once."""
OTHERS = tuple(name for name in MESHES if name not in SOME)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank trained to."""
    folder = tmp_path_factory.mktemp("one")
    one = {"tied": ({"zero": 0}, {}), "untied": ({"zero": 0}, UNTIED), "norms of heads": ({"zero": 0}, QWEN3)}
    return on_ranks(folder, 1, losses, one, str(folder))[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What variants train to, together, on four ranks, where each axis has two data ranks beside it."""

    @cache
    def train(names):
        folder = tmp_path_factory.mktemp("four")
        return on_ranks(folder, 4, losses, {name: MESHES[name] for name in names}, str(folder))[0]

    return train


on_four_ranks = pytest.mark.parametrize(
    ("names", "name"),
    [
        *(pytest.param(SOME, name, id=name) for name in SOME),
        *(pytest.param(OTHERS, name, id=name, marks=pytest.mark.slow) for name in OTHERS),
    ],
)


@on_four_ranks
def test_a_mesh_trains_as_one_rank_does(alone, found, names, name):
    reference = alone[next((kind for kind in ("untied", "norms of heads") if kind in name), "tied")]
    for (loss, norm, squares), (expected, expected_norm, expected_squares) in zip(
        found(names)[name][:-1], reference[:-1], strict=True
    ):
        assert loss == pytest.approx(expected, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
        assert squares == pytest.approx(expected_squares, rel=1e-2, abs=1e-8)


@on_four_ranks
def test_a_save_takes_the_bytes_that_it_asks_the_disk_for(found, names, name):
    asked, saved = found(names)[name][-1]
    tensors = asked - 4 * 2**20  # a megabyte a rank is for what is beside them
    assert 0.5 * saved < tensors < saved


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_gradient_norms_by_tensor_are_those_of_autograd(alone, name):
    model = load_model(ScratchSource(config=tiny_config(**(UNTIED if name == "untied" else {})), seed=1))
    ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {key: float(parameter.grad.double().square().sum()) for key, parameter in model.named_parameters()}
    _, norm, squares = alone[name][0]
    assert squares == pytest.approx(expected, rel=1e-4)
    assert norm == pytest.approx(sum(expected.values()) ** 0.5, rel=1e-5)


FAMILIES = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": QWEN3,
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
    "granite": {"model_type": "granite", "logits_scaling": 3.0},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 8},
}
SCALED = ("granite", "gemma2", "gemma3")
"""Those that a pipeline refuses."""


@pytest.mark.slow
def test_every_family_trains_on_every_mesh_as_on_one_rank(tmp_path):
    meshes = {
        "tp": {"mesh": Mesh(tp=2), "zero": 1},
        "tp, zero 3, chunks": {"mesh": Mesh(tp=2), "chunk": CHUNK},
        "sp": {"mesh": Mesh(sp=2)},
        "pp": {"mesh": Mesh(pp=2), "zero": 1},
        "chunks": {"chunk": CHUNK},
    }
    one = {family: ({"zero": 0}, model) for family, model in FAMILIES.items()}
    many = {
        f"{family}, {mesh}": (changes, model)
        for (family, model), (mesh, changes) in product(FAMILIES.items(), meshes.items())
        if not (family in SCALED and mesh == "pp") and not (family == "gemma2" and mesh == "sp")  # its own attention
    }
    expected = on_ranks(tmp_path, 1, losses, one, str(tmp_path / "one"))[0]
    found = on_ranks(tmp_path, 2, losses, many, str(tmp_path / "two"))[0]
    for name, taken in found.items():
        for one_step, other in zip(taken[:-1], expected[name.partition(",")[0]][:-1], strict=True):
            assert one_step[0] == pytest.approx(other[0], rel=1e-4), name
            assert one_step[1] == pytest.approx(other[1], rel=1e-3), name
