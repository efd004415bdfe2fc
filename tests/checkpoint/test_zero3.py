"""ZeRO-3 folders that real DeepSpeed wrote: read, resumed, at other numbers of ranks; and hostile files."""

import json
import os

import pytest
import torch
from tiny import on_ranks, tiny_config

from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from parallel.errors import InputError
from train.batch import plain_batch
from train.engine import Engine, EngineConfig

BATCH, LENGTH = 12, 16


def batch_of(step, ranks):
    ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    share = BATCH // ranks.world_size
    return ids[ranks.rank * share : (ranks.rank + 1) * share], torch.ones(share)


def run(ranks, folder, first, last, precision, save_at=None, tied=True):
    """Train steps [first, last) from scratch or from the checkpoint of step `first`; return losses."""
    config = tiny_config(tie_word_embeddings=tied)
    source = open_checkpoint(f"{folder}/step-{first}") if first else ScratchSource(config=config, seed=1)
    how = EngineConfig(
        micro_batch=BATCH // ranks.world_size,
        accumulation=1,
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=0.5,
        precision=precision,
    )
    engine = Engine(source, how, ranks)
    losses = []
    for step in range(first, last):
        losses.append(engine.step([plain_batch(batch_of(step, ranks)[0])], 1e-2).loss)
        if step + 1 == save_at:
            files = {"config.json": json.dumps(config).encode()}
            from pathlib import Path

            engine.save(Path(folder), f"step-{save_at}", {"tokens": 7, "samples": 9, "seed": 1}, files)
    shapes = {name: tuple(parameter.ds_shape) for name, parameter in engine.model.named_parameters()}
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    weights = {}
    for name, parameter in engine.model.named_parameters():
        with GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    engine.close()
    return losses, shapes, weights


def test_resume_is_exact_and_elastic_and_every_tensor_is_read(tmp_path):
    (losses, shapes, _), _ = on_ranks(tmp_path, 2, run, str(tmp_path / "run"), 0, 6, "float32", 3)
    assert abs(losses[0] - 4.875) < 0.6  # from scratch: near ln 131
    assert losses[-1] < losses[0]
    resumed = on_ranks(tmp_path, 2, run, str(tmp_path / "run"), 3, 6, "float32")
    assert resumed[0][0] == losses[3:]  # digit for digit
    for world in (1, 3):
        elastic = on_ranks(tmp_path, world, run, str(tmp_path / "run"), 3, 6, "float32")
        assert elastic[0][0] == pytest.approx(losses[3:], abs=1e-5)

    source = open_checkpoint(tmp_path / "run" / "step-3")
    stopped = on_ranks(tmp_path, 1, run, str(tmp_path / "run"), 3, 3, "float32")
    for name, weight in stopped[0][2].items():
        assert torch.equal(read_tensor(source, name), weight), name
        assert source.infos[name].shape == shapes[name]
        assert float(read_tensor(source, name, "exp_avg_sq").sum()) > 0, name
    assert source.infos["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert source.run.step == 3
    assert source.run.tokens == 7
    assert {name: group.step for name, group in source.groups.items()} == {"decay": 3, "no_decay": 3}
    assert source.groups["no_decay"].weight_decay == 0.0


def run_in_small_sub_groups(*arguments):
    """As large models run: DeepSpeed cuts each parameter group into several sub-groups."""
    from train import engine

    plain = engine.deepspeed_config
    small = {"sub_group_size": 3000}
    engine.deepspeed_config = lambda how: {
        **plain(how),
        "zero_optimization": {**plain(how)["zero_optimization"], **small},
    }
    return run(*arguments)


def test_several_sub_groups_a_group_start_and_resume_exactly(tmp_path):
    (losses, _, _), _ = on_ranks(tmp_path, 2, run_in_small_sub_groups, str(tmp_path / "run"), 0, 3, "float32", 2)
    source = open_checkpoint(tmp_path / "run" / "step-2")
    assert len(source.topology.sub_groups) > len(source.groups) == 2
    resumed = on_ranks(tmp_path, 2, run_in_small_sub_groups, str(tmp_path / "run"), 2, 3, "float32")
    assert resumed[0][0] == losses[2:]


def test_bfloat16_resumes_exactly_and_weights_are_rounded_masters(tmp_path):
    (losses, _, _), _ = on_ranks(tmp_path, 2, run, str(tmp_path / "run"), 0, 4, "bfloat16", 2, False)
    resumed = on_ranks(tmp_path, 2, run, str(tmp_path / "run"), 2, 4, "bfloat16", None, False)
    assert resumed[0][0] == losses[2:]
    source = open_checkpoint(tmp_path / "run" / "step-2")
    name = "lm_head.weight"
    assert source.infos[name].slots == {
        "weight": torch.bfloat16,
        "master": torch.float32,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
    }
    weight, master = read_tensor(source, name, dtype=torch.bfloat16), read_tensor(source, name, "master")
    assert torch.equal(weight, master.to(torch.bfloat16))
    assert not torch.equal(weight.float(), master)


def plain_deepspeed(ranks, folder, tag, first, last):
    """Load a folder with DeepSpeed's own loader and train on; return losses."""
    from train.build import build_model, parameter_groups
    from train.engine import deepspeed_config, import_deepspeed

    deepspeed = import_deepspeed()  # which compiles no collective, for a minute or two
    config = tiny_config()
    how = EngineConfig(
        micro_batch=BATCH // ranks.world_size,
        accumulation=1,
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=0.5,
        precision="float32",
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = build_model(config, deepspeed_config(how))
    optimizer = torch.optim.AdamW(
        parameter_groups(
            dict(model.named_parameters()), ScratchSource(config=config, seed=0), weight_decay=0.1, eps=1e-8
        ),
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(how))
    loaded, client = engine.load_checkpoint(folder, tag=tag)
    assert loaded is not None
    assert client["growmerge"]["tokens"] == 7
    assert engine.global_steps == first
    losses = []
    for step in range(first, last):
        ids, _ = batch_of(step, ranks)
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        logits = engine(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(float(ranks.sum(loss.detach().double())) / ranks.world_size)
    return losses


def test_what_we_write_for_other_ranks_deepspeed_itself_loads_and_trains_on(tmp_path):
    (losses, _, _), _ = on_ranks(tmp_path, 2, run, str(tmp_path / "run"), 0, 5, "float32", 3)
    source = open_checkpoint(tmp_path / "run" / "step-3")
    three, back = tmp_path / "three", tmp_path / "back"
    write_checkpoint(source, three / "t", Zero3Layout(ranks=3), workers=2)
    found = on_ranks(tmp_path, 3, plain_deepspeed, str(three), "t", 3, 5)
    assert found[0] == pytest.approx(losses[3:], abs=1e-5)

    # There and back: every element of every slot, and step, groups and run.
    write_checkpoint(open_checkpoint(three / "t"), back / "t", Zero3Layout(ranks=2))
    again = open_checkpoint(back / "t")
    assert (again.groups, again.run.tokens, again.run.step) == (source.groups, 7, 3)
    for name, info in source.infos.items():
        assert again.infos[name] == info
        for slot in info.slots:
            assert torch.equal(read_tensor(again, name, slot), read_tensor(source, name, slot)), (name, slot)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    on_ranks(tmp_path, 1, run, str(tmp_path / "run"), 0, 1, "float32", 1)
    folder = tmp_path / "run" / "step-1"
    victim = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Trap(str(tmp_path / "trapped"))}, victim)
    with pytest.raises(InputError, match=r"optim_states.pt: damaged, or not a plain DeepSpeed file") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()

    os.truncate(victim, 100)
    with pytest.raises(InputError, match=r"optim_states.pt: damaged"):
        open_checkpoint(folder)
    victim.unlink()
    with pytest.raises(InputError, match=r"optim_states.pt: missing"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config.json here or above"):
        open_checkpoint(folder)


def build_on_wrong_source(ranks, folder):
    config = tiny_config()
    source = open_checkpoint(folder)
    object.__setattr__(source, "config", {**source.config, "num_hidden_layers": 2})
    del config
    how = EngineConfig(
        micro_batch=1, accumulation=1, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0, clip=1, precision="float32"
    )
    Engine(source, how, ranks)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, tiny_folder):
    folder = tiny_folder(num_hidden_layers=1)
    (error,) = on_ranks(tmp_path, 1, build_on_wrong_source, str(folder))
    assert isinstance(error, InputError)
    assert "model.layers.1.self_attn.q_proj.weight is missing" in str(error)
