"""Universal checkpoints: those that DeepSpeed makes, read; ours, loaded by DeepSpeed; and damaged or hostile files."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import on_ranks, tiny_config
from trained import Trained, assert_same, ds_to_universal

from checkpoint.memory import ScratchSource
from checkpoint.open import format_of, open_checkpoint
from checkpoint.source import SLOTS, Group, read_tensor
from checkpoint.universal_layout import UniversalLayout
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from parallel.errors import InputError
from train.batch import plain_batch
from train.engine import Engine, EngineConfig

BATCH, LENGTH = 12, 16
UNIVERSAL = {"checkpoint": {"load_universal": True}}
NAME = "model.layers.1.mlp.down_proj.weight"  # [32, 48], cut along dim 1 by tensor parallelism


def engine_config(micro_batch, precision):
    return EngineConfig(
        micro_batch=micro_batch,
        accumulation=1,
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=0.5,
        precision=precision,
    )


def batch_of(step, rank, ranks):
    ids = torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    share = BATCH // ranks
    return ids[rank * share : (rank + 1) * share]


def run(ranks, start, first, last, precision, save=None):
    """Train our engine over steps [first, last), saving to `save` = (folder, step) on the way; return losses."""
    source = open_checkpoint(start) if start else ScratchSource(config=tiny_config(), seed=1)
    engine = Engine(source, engine_config(BATCH // ranks.world_size, precision), ranks)
    losses = []
    for step in range(first, last):
        ids = batch_of(step, ranks.rank, ranks.world_size)
        losses.append(engine.step([plain_batch(ids)], 1e-2).loss)
        if save and step + 1 == save[1]:
            files = {"config.json": json.dumps(dict(source.config)).encode()}
            engine.save(Path(save[0]), f"step-{save[1]}", {"tokens": 7, "samples": 9, "seed": 1}, files)
    return losses


def deepspeed_run(ranks, start, first, last, changes, tp=1, precision="float32", save=None):
    """The same steps on DeepSpeed alone, no engine of ours, started from a folder by its own loader; return losses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.build import build_model, parameter_groups
    from train.engine import deepspeed_config, import_deepspeed

    deepspeed = import_deepspeed()
    config, dp = tiny_config(), ranks.world_size // tp
    ds_config = {**deepspeed_config(engine_config(BATCH // dp, precision)), **changes}
    if tp == 1 and ds_config["zero_optimization"]["stage"] == 3:
        model = build_model(config, {key: value for key, value in ds_config.items() if key != "checkpoint"})
    else:
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    groups = parameter_groups(
        dict(model.named_parameters()), ScratchSource(config=config, seed=0), weight_decay=0.1, eps=1e-8
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if start:
        loaded, client = engine.load_checkpoint(str(Path(start).parent), tag=Path(start).name)
        assert loaded is not None
        assert (engine.global_steps, client["growmerge"]["tokens"]) == (first, 7)
        # DeepSpeed's stage 3 overwrites all groups with the first of the file; ours holds only what they share.
        decays = {group["name"]: group["weight_decay"] for group in engine.optimizer.param_groups}
        assert decays == {"decay": 0.1, "no_decay": 0.0}
        # It also lets all sub-groups share ONE step tensor, which each then counts up: undone here, or Adam's bias
        # correction is wrong from the second step on, whoever wrote the file.
        for state in engine.optimizer.optimizer.state.values():
            assert float(state["step"]) == first
            state["step"] = state["step"].clone()
    losses = []
    for step in range(first, last):
        ids = batch_of(step, ranks.rank // tp, dp)
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        logits = engine(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(float(ranks.sum(loss.detach().double())) / ranks.world_size)
        if save and step + 1 == save[1]:
            engine.save_checkpoint(save[0], tag="saved", client_state={"growmerge": {"tokens": 7}})
    return losses


def test_a_real_run_goes_through_deepspeeds_tool_and_ours_and_trains_on_elsewhere(tmp_path):
    losses = on_ranks(tmp_path, 2, run, None, 0, 5, "float32", (str(tmp_path), 3))[0]
    source = open_checkpoint(tmp_path / "step-3")

    ds_to_universal(tmp_path / "step-3", tmp_path / "theirs")
    assert isinstance(torch.load(tmp_path / "theirs" / "zero" / NAME / "fp32.pt"), torch.Tensor)  # the bare kind
    assert (tmp_path / "theirs" / "zero_pp_rank_1_mp_rank_00_model_states.pt").is_file()
    assert format_of(tmp_path / "theirs") == "universal"
    assert_same(open_checkpoint(tmp_path / "theirs"), source)

    write_checkpoint(source, tmp_path / "ours", UniversalLayout(), workers=2)
    assert_same(open_checkpoint(tmp_path / "ours"), source)
    write_checkpoint(open_checkpoint(tmp_path / "ours"), tmp_path / "back", Zero3Layout(ranks=2))
    assert_same(open_checkpoint(tmp_path / "back"), source)

    found = on_ranks(tmp_path, 3, deepspeed_run, str(tmp_path / "ours"), 3, 5, UNIVERSAL)
    assert found[0] == pytest.approx(losses[3:], abs=1e-5)


PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.(q|k|v|gate|up)_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.(o|down)_proj\.weight$"], "partition_type": "row"},
        {"patterns": [r".*(embed_tokens|lm_head)\.weight$"], "partition_type": "skip"},
    ],
}
TENSOR_PARALLEL = {"tensor_parallel": {"autotp_size": 2, "partition_config": PARTITION}}


@pytest.mark.slow
def test_ours_loads_at_any_stage_number_of_ranks_and_tensor_parallelism(tmp_path):
    losses = on_ranks(tmp_path, 2, run, None, 0, 6, "float32", (str(tmp_path), 3))[0]
    folder = tmp_path / "ours"
    write_checkpoint(open_checkpoint(tmp_path / "step-3"), folder, UniversalLayout())
    for world, tp, changes in (
        (1, 1, {}),
        (2, 1, {}),
        (2, 1, {"zero_optimization": {"stage": 1}}),
        (2, 1, {"zero_optimization": {"stage": 2}}),
        (2, 2, TENSOR_PARALLEL),
        (4, 2, TENSOR_PARALLEL),
    ):
        found = on_ranks(tmp_path, world, deepspeed_run, str(folder), 3, 6, {**UNIVERSAL, **changes}, tp)
        assert found[0] == pytest.approx(losses[3:], abs=1e-5), (world, tp, changes)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "tp"), [(TENSOR_PARALLEL, 2), ({"zero_optimization": {"stage": 1}}, 1)])
def test_runs_that_deepspeed_converts_to_the_other_kind_are_read_and_go_on(tmp_path, changes, tp):
    """Tensor-parallel ZeRO-3 and ZeRO-1: dicts of full tensors, the latter with steps of their own."""
    save = (str(tmp_path), 3)
    losses = on_ranks(tmp_path, 2, deepspeed_run, None, 0, 5, changes, tp, "float32", save)[0]
    ds_to_universal(tmp_path / "saved", tmp_path / "theirs")
    assert isinstance(torch.load(tmp_path / "theirs" / "zero" / NAME / "fp32.pt"), dict)
    source = open_checkpoint(tmp_path / "theirs")
    assert {name: (group.step, group.weight_decay) for name, group in source.groups.items()} == {
        "decay": (3, 0.1),
        "no_decay": (3, 0.0),
    }
    assert (source.run.step, source.run.tokens) == (3, 7)
    found = on_ranks(tmp_path, 2, run, str(tmp_path / "theirs"), 3, 5, "float32")
    assert found[0] == pytest.approx(losses[3:], abs=1e-5)


@pytest.mark.slow
def test_a_bfloat16_run(tmp_path):
    losses = on_ranks(tmp_path, 2, run, None, 0, 4, "bfloat16", (str(tmp_path), 2))[0]
    source = open_checkpoint(tmp_path / "step-2")
    assert source.infos[NAME].slots["weight"] == torch.bfloat16
    ds_to_universal(tmp_path / "step-2", tmp_path / "theirs")
    assert_same(open_checkpoint(tmp_path / "theirs"), source)
    write_checkpoint(source, tmp_path / "ours", UniversalLayout(bf16=True))
    assert_same(open_checkpoint(tmp_path / "ours"), source)
    found = on_ranks(tmp_path, 2, deepspeed_run, str(tmp_path / "ours"), 2, 4, UNIVERSAL, 1, "bfloat16")
    assert found[0] == pytest.approx(losses[2:], abs=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "tied", "bf16"),
    [(1, 3, True, False), (2, 2, False, True), (3, 1, True, True), (5, 4, False, False)],
)
def test_from_zero3_to_universal_and_back(tmp_path, first, second, tied, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    source = Trained(config=tiny_config(tie_word_embeddings=tied), dtype=dtype)
    write_checkpoint(source, tmp_path / "zero3", Zero3Layout(ranks=first, bf16=bf16))
    write_checkpoint(open_checkpoint(tmp_path / "zero3"), tmp_path / "universal", UniversalLayout(bf16=bf16))
    write_checkpoint(open_checkpoint(tmp_path / "universal"), tmp_path / "again", Zero3Layout(ranks=second, bf16=bf16))
    for name in ("universal", "again"):
        assert_same(open_checkpoint(tmp_path / name), source)


def test_the_bytes_do_not_depend_on_the_workers_and_name_no_class(tmp_path):
    source = Trained(config=tiny_config())
    hashes = {write_checkpoint(source, tmp_path / str(count), UniversalLayout(), workers=count) for count in (1, 3)}
    assert len(hashes) == 1
    paths = sorted((tmp_path / "1").rglob("*.pt"))
    assert len(paths) == 20 * 4 + 3
    for path in paths:
        assert path.read_bytes() == (tmp_path / "3" / path.relative_to(tmp_path / "1")).read_bytes(), path
        torch.load(path, weights_only=True)  # with no class allowed


def test_weights_alone_come_with_a_fresh_adam(tmp_path, tiny_folder):
    source = open_checkpoint(tiny_folder(dtype=torch.bfloat16))
    write_checkpoint(source, tmp_path / "universal", UniversalLayout(bf16=True))
    found = open_checkpoint(tmp_path / "universal")
    assert found.groups["default"].step == 0
    for name, info in source.infos.items():
        if info.tied_to is None:
            weight = read_tensor(source, name)
            for slot, expected in zip(SLOTS, (weight, weight, 0 * weight, 0 * weight), strict=True):
                assert torch.equal(read_tensor(found, name, slot), expected)
            assert found.infos[name].slots["weight"] == torch.bfloat16


@pytest.fixture
def folder(tmp_path):
    """A sound universal checkpoint of our own."""
    write_checkpoint(Trained(config=tiny_config()), tmp_path / "sound", UniversalLayout())
    return tmp_path / "sound"


def change(path, edit):
    """Replace what a file holds by what `edit` makes of it."""
    torch.save(edit(torch.load(path, weights_only=True)), path)


def test_a_parameter_that_never_had_a_gradient_has_no_moments(folder):
    """So stages 1 and 2 leave it: no moments and no step, while others have theirs."""
    for file in ("exp_avg.pt", "exp_avg_sq.pt", "step.pt"):
        (folder / "zero" / NAME / file).unlink()
    source = open_checkpoint(folder)
    assert set(source.infos[NAME].slots) == {"weight", "master"}
    assert len(source.infos["model.norm.weight"].slots) == 4


def test_steps_are_found_where_stages_1_and_2_keep_them(folder):
    change(folder / "zero" / "optimizer_state.pt", lambda state: {"param_groups": state["param_groups"]})
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    change(folder / "zero" / NAME / "step.pt", lambda step: int(step))  # DeepSpeed's own Adam counts in plain numbers
    assert_same(open_checkpoint(folder), Trained(config=tiny_config()))


MODEL, OPTIMIZER = "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero/optimizer_state.pt"
FP32, MOMENT = f"zero/{NAME}/fp32.pt", f"zero/{NAME}/exp_avg_sq.pt"
NOT_DEEPSPEED = "not what DeepSpeed 0.19 writes"


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (FP32, lambda state: {"param": state["param"].T}, r"has shape \(48, 32\), not \(32, 48\)"),
        (FP32, lambda state: state["param"], r"has shape \(32, 48\), not \(1536,\)"),
        (FP32, lambda state: state["param"].flatten()[1:], r"has shape \(1535,\), not \(1536,\)"),
        (MOMENT, lambda state: {"param": state["param"].bfloat16()}, "holds torch.bfloat16, not torch.float32"),
        (MOMENT, lambda state: {"param": 1.0}, "holds no plain tensor"),
        (MOMENT, lambda state: {"param": state["param"].to_sparse()}, "holds no plain tensor"),
        (MOMENT, lambda state: {}, f"{NOT_DEEPSPEED} .KeyError: 'param'"),
        (f"zero/{NAME}/step.pt", lambda step: None, NOT_DEEPSPEED),
        (OPTIMIZER, lambda state: [], NOT_DEEPSPEED),
        (OPTIMIZER, lambda state: {"param_groups": state["param_groups"][:1]}, NOT_DEEPSPEED),
        (MODEL, lambda state: {**state, "param_shapes": None}, NOT_DEEPSPEED),
        (
            MODEL,
            lambda state: {**state, "param_shapes": [{"model.norm.weight": 1}, {}]},
            "model.embed_tokens.weight belongs to no parameter group",
        ),
    ],
)
def test_a_file_with_something_else_in_it_is_named(folder, file, edit, message):
    if file.endswith("step.pt"):  # asked only where the groups do not say
        change(folder / OPTIMIZER, lambda state: {"param_groups": state["param_groups"]})
        for path in (folder / "zero").glob("*/step.pt"):
            change(path, edit)
    else:
        change(folder / file, edit)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, FP32, MOMENT])
def test_a_missing_truncated_or_hostile_file_is_refused_and_nothing_runs(folder, tmp_path, file):
    path = folder / file
    torch.save({"param": Trap(str(tmp_path / "trapped"))}, path)
    with pytest.raises(InputError, match=r"\.pt: damaged, or not a plain DeepSpeed file") as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()
    os.truncate(path, 100)
    with pytest.raises(InputError, match=r"\.pt: damaged"):
        open_checkpoint(folder)
    path.unlink()
    (folder / "mp_rank_00_model_states.pt").unlink()  # the same as MODEL, which stands in for it
    with pytest.raises(InputError, match=r"\.pt: missing$"):
        open_checkpoint(folder)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_other_damage(folder, tmp_path):
    (folder / "zero" / "model.layers.9.mlp.up_proj.weight").mkdir()
    with pytest.raises(InputError, match=r"layers.9.mlp.up_proj.weight: the model of its config.json has no such"):
        open_checkpoint(folder)
    shutil.rmtree(folder / "zero" / "model.layers.9.mlp.up_proj.weight")
    for slot in ("exp_avg", "exp_avg_sq"):  # without them, but with a step: lost, not untouched
        (folder / "zero" / NAME / f"{slot}.pt").unlink()
    with pytest.raises(InputError, match=r"exp_avg.pt: missing"):
        open_checkpoint(folder)
    shutil.rmtree(folder / "zero" / NAME)
    with pytest.raises(InputError, match=r"down_proj.weight/fp32.pt: missing"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config.json here or above"):
        open_checkpoint(folder)


def test_a_head_of_its_own_is_not_dropped_for_a_config_that_ties_it(tmp_path):
    source = Trained(config=tiny_config(tie_word_embeddings=False))
    write_checkpoint(source, tmp_path / "untied", UniversalLayout())
    (tmp_path / "untied" / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(InputError, match=r"lm_head.weight was trained on its own, though config.json ties it"):
        open_checkpoint(tmp_path / "untied")


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_not_trained_is_kept(tmp_path, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    source = Trained(config=tiny_config(), dtype=dtype)
    source.groups["frozen"] = Group()
    for name in ("model.embed_tokens.weight", NAME):
        slots = {"weight": dtype}
        source.infos[name] = replace(source.infos[name], slots=slots, group="frozen", trainable=False)
    write_checkpoint(source, tmp_path / "universal", UniversalLayout(bf16=bf16))
    assert [path.name for path in (tmp_path / "universal" / "zero" / NAME).iterdir()] == ["fp32.pt"]
    write_checkpoint(open_checkpoint(tmp_path / "universal"), tmp_path / "zero3", Zero3Layout(ranks=2, bf16=bf16))
    for folder in ("universal", "zero3"):
        assert_same(open_checkpoint(tmp_path / folder), source)

    # DeepSpeed's tool makes no file of them at stage 3.
    ds_to_universal(tmp_path / "zero3", tmp_path / "theirs")
    with pytest.raises(InputError, match=r"tokens.weight/fp32.pt: missing, as DeepSpeed's tool leaves out .* convert"):
        open_checkpoint(tmp_path / "theirs")


def test_one_group_and_its_values_reach_every_stage(tmp_path):
    """With one group there is nothing to lose: stage 3's list holds all that the outer one does."""
    source = Trained(config=tiny_config(), groups={"decay": Group(lr=0.5, step=2)})
    for name, info in source.infos.items():
        source.infos[name] = replace(info, group="decay")
    write_checkpoint(source, tmp_path / "one", UniversalLayout())
    state = torch.load(tmp_path / "one" / OPTIMIZER, weights_only=True)
    assert state["optimizer_state_dict"]["param_groups"] == state["param_groups"]
    assert state["param_groups"][0]["lr"] == 0.5
