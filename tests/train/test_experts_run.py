"""Models with experts on real DeepSpeed ranks: trained, saved, gone on with, and left as stock folders."""

import json
from pathlib import Path

import pytest
import torch
from tiny import on_ranks, tiny_config
from transformers import AutoModelForCausalLM

from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import WithoutState, read_tensor
from checkpoint.writer import write_checkpoint
from eval.model import load_model
from parallel.errors import InputError
from train.batch import plain_batch
from train.engine import Engine, EngineConfig
from train.pipeline import build_pipeline
from upscale.factors import Recipe
from upscale.grow import grow

BATCH, LENGTH, STOP = 6, 16, 3
SPARSE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def run(ranks, folder, first, last, zero=3, precision="float32"):
    """Train steps [first, last) of a dense model with experts made of it, or from the checkpoint; return losses."""
    if first:
        source = open_checkpoint(Path(folder) / "stop")
    else:
        source = grow(ScratchSource(config=tiny_config(), seed=1), Recipe(experts=4))
    share = BATCH // ranks.world_size
    how = EngineConfig(
        micro_batch=share,
        accumulation=1,
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=0.5,
        precision=precision,
        zero=zero,
    )
    engine = Engine(source, how, ranks)
    losses = []
    for step in range(first, last):
        ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step % 3))
        taken = engine.step([plain_batch(ids[ranks.rank * share : (ranks.rank + 1) * share])], how.lr)
        losses.append(taken.loss)
        if not first and step + 1 == STOP:
            files = {"config.json": json.dumps(dict(source.config)).encode()}
            engine.save(Path(folder), "stop", {"tokens": 7, "samples": 9, "seed": 1}, files)
    engine.close()
    return losses


def test_an_upcycled_model_trains_resumes_and_leaves_a_stock_folder(tmp_path):
    losses = on_ranks(tmp_path, 1, run, str(tmp_path), 0, 2 * STOP)[0]
    assert losses[-1] < losses[0]
    assert on_ranks(tmp_path, 2, run, str(tmp_path), STOP, 2 * STOP)[0] == pytest.approx(losses[STOP:], abs=1e-4)

    source = open_checkpoint(tmp_path / "stop")
    assert source.family.name == "mixtral" and source.run.tokens == 7
    experts = read_tensor(source, "model.layers.0.mlp.experts.down_proj")
    assert not torch.equal(experts[0], experts[1]), "they have been trained on other tokens"
    assert all(read_tensor(source, name, "exp_avg_sq").sum() > 0 for name in source.infos if "experts" in name)
    write_checkpoint(WithoutState(source), tmp_path / "model", SafetensorsLayout())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "MixtralForCausalLM"
    for name, parameter in model.named_parameters():
        assert torch.equal(read_tensor(source, name), parameter), name


def test_the_first_loss_is_the_dense_model_s(tmp_path):
    """In bfloat16 on two ranks with ZeRO-2, whose masters are filled range by range."""
    sparse = on_ranks(tmp_path, 2, run, str(tmp_path), 0, 1, 2, "bfloat16")[0]
    ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    dense = load_model(ScratchSource(config=tiny_config(), seed=1))
    with torch.no_grad():
        logits = dense(input_ids=ids[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert sparse[0] == pytest.approx(float(wanted), abs=0.05)


def test_pipeline_stages_are_refused_in_one_line():
    config = tiny_config(**SPARSE)
    with pytest.raises(InputError, match=r"parallel\.pp: the family mixtral has experts, which no stage is"):
        build_pipeline(config, 2, None, recompute=False)
