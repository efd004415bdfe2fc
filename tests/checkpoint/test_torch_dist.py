"""Distributed checkpoints of Megatron-Core, judged by their owner: read equal to what it saved, and it loads ours."""

import json
import os
import pickle
from argparse import Namespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from megatron_core_runs import LR, STEPS, core_weights, keys_of, run_tasks
from megatron_engine import ids_of
from megatron_runs import arguments, config_of, model_of, padded, param_group, state_of
from plain_runs import Trap
from tiny import tiny_config
from trained import Trained, assert_same
from transformers import AutoModelForCausalLM

from checkpoint.dcp import is_dcp
from checkpoint.manifest import check
from checkpoint.open import format_of, open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Group, Info, RunState, read_tensor
from checkpoint.torch_dist_layout import TorchDistLayout
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from growmerge.cli import main
from growmerge.convert import Target, convert_checkpoint
from parallel.errors import InputError

SMALL = {"file_size": 40_000, "chunk_size": 1000}
"""Layout of many files and chunks."""
SLOTS = ("weight", "master", "exp_avg", "exp_avg_sq")
SPLIT = {"singleton_local_shards": True}
SAVED = {
    "llama": ("llama", {}),
    "untied": ("untied", {"metadata": SPLIT}),
    "biased": ("biased", {"with_args": False}),
    "qwen2": ("qwen2", {"metadata": {"non_homogeneous_layers": True}}),
    "qwen3": ("qwen3", {}),
    "stepped": ("llama", {"kind": "float32"}),
    "stepped_split": ("untied", {"kind": "float32", "metadata": SPLIT}),
    "distributed": ("llama", {"kind": "distributed", "metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}),
    "buckets": ("llama", {"kind": "distributed", "metadata": {"distrib_optim_sharding_type": "dp_reshardable"}}),
}
"""Model, and how Megatron-Core is told to save it."""


def dtype_of(kind):
    return torch.bfloat16 if kind == "distributed" else torch.float32


def args_of(config, dtype=torch.float32, **changes):
    return arguments(config, params_dtype=dtype, attention_dropout=0.0, hidden_dropout=0.0, **changes)


def close(found, expected):
    return (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def logits_of(config):
    with torch.no_grad():
        return model_of(config)(input_ids=ids_of(config["vocab_size"])).logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Have Megatron-Core save each, and load two of ours, in one process: it takes long to import."""
    root = tmp_path_factory.mktemp("saved")
    tasks = []
    for name, (kind, how) in SAVED.items():
        config = config_of(kind)
        args = args_of(config, dtype_of(how.get("kind")))
        folder = root / name / "iter_0000007"
        tasks.append({"do": "save", "folder": folder, "config": config, "state": state_of(config), "args": args, **how})
    ours = [weights_to_load(root / "ours", "llama"), state_to_load(root / "ours", "float32")]
    results = run_tasks(root, [*tasks, *(task for task, _ in ours)])
    found = {}
    for task, (logits, slots) in zip(tasks, results[: len(tasks)], strict=True):
        run = task["folder"].parent
        (run / "latest_checkpointed_iteration.txt").write_text("7")
        if not task.get("with_args", True):
            (run / "config.json").write_text(json.dumps(task["config"]))
        found[run.name] = run, task["config"], logits, slots
    return found, [(result, wanted) for result, (_, wanted) in zip(results[len(tasks) :], ours, strict=True)]


@pytest.fixture(scope="module")
def saved(runs):
    """Return folder of the run, config, logits and slots of each that Megatron-Core has saved."""
    return runs[0]


def weights_to_load(root, kind):
    """Write transformers' weights of a model; return how Megatron-Core is to load them, and the config."""
    config = config_of(kind)
    (root / kind).mkdir(parents=True)
    target = Target(folder=root / kind / "core", format="torch_dist", workers=1)
    convert_checkpoint(hugging_face(root / kind, config), target)
    assert (target.folder / "latest_checkpointed_iteration.txt").read_text() == "release"
    task = {"do": "load", "folder": target.folder / "release", "config": config, "state": zeros(config)}
    return {**task, "args": args_of(config)}, config


def state_to_load(root, kind):
    """Write all that a trained model has; return how Megatron-Core is to load it with an optimizer, and the source."""
    source = Trained(config=config_of("llama"), dtype=dtype_of(kind))
    write_checkpoint(source, root / kind, TorchDistLayout(**SMALL))
    assert (root / kind / "latest_checkpointed_iteration.txt").read_text() == "5"
    task = {
        "do": "load",
        "folder": root / kind / "iter_0000005",
        "config": source.config,
        "state": zeros(source.config),
    }
    return {**task, "args": args_of(source.config, dtype_of(kind)), "kind": kind}, source


def assert_loaded(result, wanted):
    """Compare what Megatron-Core has loaded with transformers' model of a config, or with all that a source has."""
    logits, slots, steps, unasked, args = result
    assert all("_extra_state" in key or key.startswith("optimizer.") for key in unasked), unasked
    if isinstance(wanted, dict):
        assert close(logits, logits_of(wanted))
        same = ("num_query_groups", "qk_layernorm", "add_qkv_bias", "add_bias_linear", "norm_epsilon", "rotary_base")
        assert {name: args[name] for name in same} == {name: getattr(arguments(wanted), name) for name in same}
    else:
        assert steps == {5}
        assert slots.keys() == set(SLOTS)
        assert_slots(wanted, slots)


def assert_slots(source, slots):
    """Compare every element of every slot with tensors by slot and name."""
    for slot, tensors in slots.items():
        for name, tensor in tensors.items():
            assert torch.equal(read_tensor(source, name, slot, tensor.dtype), tensor), (name, slot)


@pytest.mark.parametrize("name", SAVED)
def test_what_megatron_saved_is_read_equal(saved, name):
    folder, config, _, slots = saved[name]
    kind = SAVED[name][1].get("kind")
    for place in (folder, folder / "iter_0000007"):
        assert format_of(place) == "torch_dist"
    assert not is_dcp(folder / "iter_0000007")
    source = open_checkpoint(folder)
    assert list(source.infos) == list(source.family.tensors(config))
    assert {name for name, info in source.infos.items() if not info.tied_to} == slots["weight"].keys()
    if name == "buckets":
        slots = {"weight": slots["weight"]}
    assert_slots(source, slots)
    expected = {"weight": dtype_of(kind), **(dict.fromkeys(SLOTS[1:], torch.float32) if kind else {})}
    if name == "buckets":
        del expected["master"]
    assert source.infos["model.norm.weight"].slots == expected
    if SAVED[name][1].get("with_args", True):
        assert source.run == RunState(step=7, tokens=70 * 64, samples=70, seed=1234)
    if kind and name != "buckets":
        group = Group(lr=LR, weight_decay=0.1, betas=(0.9, 0.95), step=STEPS)
        assert source.groups["decay"] == group
        assert source.groups["no_decay"] == Group(lr=LR, betas=(0.9, 0.95), step=STEPS)
        assert (source.infos["model.norm.weight"].group, source.infos["model.embed_tokens.weight"].group) == (
            "no_decay",
            "decay",
        )


@pytest.mark.parametrize("name", [name for name, (_, how) in SAVED.items() if "kind" not in how])
def test_the_logits_are_those_of_megatron(saved, tmp_path, name):
    """The config that the arguments give, too: transformers builds its model of it."""
    folder, config, logits, _ = saved[name]
    assert close(logits, logits_of(config))
    convert_checkpoint(folder, Target(folder=tmp_path / "plain", format="safetensors", workers=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=ids_of(config["vocab_size"])).logits[..., : config["vocab_size"]]
    assert close(found, logits)


def test_state_in_buckets_is_refused_and_the_weights_are_read(saved, tmp_path):
    folder, *_ = saved["buckets"]
    words = "the distributed optimizer's state is in buckets, which are not read; save with --dist-ckpt-optim-fully-"
    with pytest.raises(InputError, match=words):
        convert_checkpoint(folder, Target(folder=tmp_path / "zero3", format="zero3", workers=1))
    convert_checkpoint(folder, Target(folder=tmp_path / "plain", format="safetensors", workers=1))
    assert open_checkpoint(tmp_path / "plain").infos["model.norm.weight"].slots == {"weight": torch.bfloat16}


def test_any_box_of_any_slot_is_read(saved):
    folder, _, _, slots = saved["distributed"]
    source = open_checkpoint(folder)
    name = "model.layers.1.self_attn.q_proj.weight"  # 32 rows, 16 of each key/value head
    out = torch.empty(20, 5, dtype=torch.bfloat16)
    source.read(name, (slice(9, 29), slice(7, 12)), {"exp_avg": out})
    assert torch.equal(out, slots["exp_avg"][name][9:29, 7:12].to(torch.bfloat16))


@pytest.mark.slow
def test_two_tensor_parallel_ranks_save_and_load(tmp_path):
    config = config_of("untied")
    args = args_of(config, tp=2)
    told = {"config": config, "state": state_of(config), "args": args}
    convert_checkpoint(hugging_face(tmp_path, config), Target(folder=tmp_path / "ours", format="torch_dist", workers=1))
    tasks = [
        {"do": "save", "folder": tmp_path / "saved", **told},
        {"do": "save", "folder": tmp_path / "split", "metadata": SPLIT, **told},
        {"do": "load", "folder": tmp_path / "ours" / "release", **told, "state": zeros(config)},
    ]
    (first, _), (second, _), (third, *_) = run_tasks(tmp_path, tasks, world=2)
    for logits in (first, second, third):
        assert close(logits, logits_of(config))
    for name in ("saved", "split"):
        assert_slots(open_checkpoint(tmp_path / name), {"weight": state_of(config)})


def hugging_face(folder, config):
    model_of(config).save_pretrained(folder / "hf")
    return folder / "hf"


def zeros(config):
    return {name: torch.zeros_like(tensor) for name, tensor in state_of(config).items()}


def test_megatron_loads_what_is_written_and_its_logits_are_those_of_transformers(runs):
    for result, wanted in runs[1]:
        assert_loaded(result, wanted)


@pytest.mark.slow
def test_megatron_loads_other_models_and_its_distributed_optimizer_the_state(tmp_path):
    told = [weights_to_load(tmp_path, kind) for kind in ("qwen2", "qwen3", "biased")]
    told.append(state_to_load(tmp_path, "distributed"))
    for result, (_, wanted) in zip(run_tasks(tmp_path, [task for task, _ in told]), told, strict=True):
        assert_loaded(result, wanted)


def test_megatron_goes_on_with_its_own_losses(saved, tmp_path):
    """From what it saved itself, and from that made a ZeRO-3 run of 3 ranks and written for it again."""
    folder, config, *_ = saved["stepped"]
    run(folder, tmp_path / "zero3", "--format", "zero3", "--dp", "3")
    run(tmp_path / "zero3", tmp_path / "again", "--format", "torch_dist")
    (again,) = (tmp_path / "again").glob("iter_*")
    told = {"do": "load", "config": config, "state": zeros(config), "args": args_of(config), "kind": "float32"}
    tasks = [{**told, "folder": place, "goes_on": 4} for place in (folder / "iter_0000007", again)]
    own, ours = run_tasks(tmp_path, tasks)
    assert ours == own
    assert max(own) - min(own) > 1e-3


def run(source, target, *options):
    ran = CliRunner().invoke(main, ["convert", str(source), str(target), *options])
    assert ran.exit_code == 0, ran.output


def test_all_that_a_source_says_comes_back(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        for tied in (True, False):
            source = Trained(config=tiny_config(tie_word_embeddings=tied), dtype=dtype)
            folder = tmp_path / f"{dtype}-{tied}"
            write_checkpoint(source, folder, TorchDistLayout(**SMALL), workers=2)
            assert len(list(folder.glob("iter_0000005/*.distcp"))) > 3
            check(folder, deep=True)
            assert_same(open_checkpoint(folder), source)


def test_weights_of_another_precision_keep_their_masters(tmp_path):
    source = Trained(config=tiny_config())
    write_checkpoint(source, tmp_path / "core", TorchDistLayout(dtype=torch.bfloat16))
    found, name = open_checkpoint(tmp_path / "core"), "model.layers.1.self_attn.v_proj.weight"
    assert found.infos[name].slots["weight"] == torch.bfloat16
    assert torch.equal(read_tensor(found, name), read_tensor(source, name).bfloat16().float())
    assert torch.equal(read_tensor(found, name, "master"), read_tensor(source, name, "master"))


def test_bytes_depend_on_neither_workers_nor_place(tmp_path):
    source = Trained(config=tiny_config())
    for name, workers in (("a", 1), ("b", 3)):
        write_checkpoint(source, tmp_path / name, TorchDistLayout(**SMALL), workers=workers)
    names = [path.name for path in (tmp_path / "a" / "iter_0000005").iterdir()]
    assert {".metadata", "common.pt", "metadata.json", "__0_0.distcp"} <= set(names)
    for name in names:
        first, second = (tmp_path / place / "iter_0000005" / name for place in "ab")
        assert first.read_bytes() == second.read_bytes(), name


def test_zero3_comes_back_the_same_bytes(tmp_path):
    for dtype in ("bfloat16", "float32"):
        here = tmp_path / dtype
        bf16 = dtype == "bfloat16"
        source = Trained(config=tiny_config(), dtype=torch.bfloat16 if bf16 else torch.float32)
        write_checkpoint(source, here / "first", Zero3Layout(ranks=2, bf16=bf16))
        convert_checkpoint(here / "first", Target(folder=here / "core", format="torch_dist", workers=2))
        convert_checkpoint(here / "core", Target(folder=here / "back", format="zero3", ranks=2, workers=1))
        assert_same_state(here / "back", here / "first")


def assert_same_state(found, expected):
    paths = sorted(expected.glob("*.pt"))
    assert paths
    for path in paths:
        one, other = (torch.load(place, weights_only=False) for place in (found / path.name, path))  # of our own
        assert flattened_state(one) == flattened_state(other), path.name


def flattened_state(value, at=()):
    """Return a file's plain values, tensors as bytes, by the way to them."""
    if isinstance(value, torch.Tensor):
        return {at: (value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: one for name, inner in pairs for key, one in flattened_state(inner, (*at, name)).items()}
    return {at: value if isinstance(value, int | float | str | bool | type(None)) else repr(type(value))}


def test_safetensors_come_back_the_same_bytes(tmp_path, tiny_folder):
    for dtype in (torch.float32, torch.bfloat16):
        folder = tiny_folder(f"tiny-{dtype}", dtype=dtype)
        write_checkpoint(open_checkpoint(folder), tmp_path / f"first-{dtype}", SafetensorsLayout())
        convert_checkpoint(folder, Target(folder=tmp_path / f"core-{dtype}", format="torch_dist"))
        target = Target(folder=tmp_path / f"back-{dtype}", format="safetensors", workers=1)
        convert_checkpoint(tmp_path / f"core-{dtype}" / "release", target)
        first, back = (tmp_path / f"{kind}-{dtype}" / "model.safetensors" for kind in ("first", "back"))
        assert first.read_bytes() == back.read_bytes()


def test_what_is_not_trained_is_known(tmp_path):
    class Frozen(Trained):
        @property
        def infos(self):
            name = "model.norm.weight"
            slots = {"weight": torch.float32}
            return {**super().infos, name: Info(shape=(32,), slots=slots, group="frozen", trainable=False)}

    source = Frozen(config=tiny_config())
    write_checkpoint(source, tmp_path / "core", TorchDistLayout())
    found = open_checkpoint(tmp_path / "core")
    assert found.infos == source.infos


def test_a_run_grows_with_its_optimizer_in_one_command(saved, tmp_path):
    folder, config, *_ = saved["stepped"]
    told = ("grow", str(folder), str(tmp_path / "big"), "--width", "2", "--format", "torch_dist", "--with-optimizer")
    ran = CliRunner().invoke(main, told)
    assert ran.exit_code == 0, ran.stderr
    found = open_checkpoint(tmp_path / "big")
    assert found.config["hidden_size"] == 2 * config["hidden_size"]
    assert {group.step for group in found.groups.values()} == {STEPS}
    assert read_tensor(found, "model.norm.weight", "exp_avg").abs().max() > 0


def stored(folder, *, moments=(), drop=(), add=None, common=None, **changes):
    """Save a model as a checkpoint of Megatron-Core, by code of its own and torch; return its tensors by key."""
    config = tiny_config(tie_word_embeddings=False, **changes)
    keys = keys_of(core_weights(state_of({**config, "rms_norm_eps": 1e-6}), config, padded(config)))
    whole = dict(keys)
    for number, name in enumerate(moments):
        for key, tensor in keys.items():
            values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
            whole[f"optimizer.state.{name}.{key}"] = values
    whole = {key: tensor for key, tensor in whole.items() if key not in drop} | (add or {})
    dcp.save(whole, checkpoint_id=folder, no_dist=True)
    args = args_of({**config, "rms_norm_eps": 1e-6})
    torch.save({"args": args, "iteration": 7, **(common or {})}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return whole


def flattened(tensor, grid):
    """Return [L, X, Y] or [X, Y] as the distributed optimizer stored it until core 0.13, its parts as in `grid`."""
    sizes = [size // cut for size, cut in zip(tensor.shape, grid, strict=True)]
    split = tensor.reshape([one for pair in zip(grid, sizes, strict=True) for one in pair])
    ranks = len(grid)
    order = [*range(0, 2 * ranks, 2), *range(1, 2 * ranks, 2)]
    return split.permute(order).reshape(*grid, -1)


def test_state_that_is_flattened_is_read(tmp_path):
    """Of two tensor-parallel ranks."""
    names = ("fp32_param", "exp_avg", "exp_avg_sq")
    whole = stored(tmp_path / "whole", moments=names)
    grids = {"linear_qkv.weight": (2, 2, 1), "linear_fc1.weight": (2, 4, 1), "linear_fc2.weight": (2, 1, 2)}
    grids |= {"linear_proj.weight": (2, 1, 2), "word_embeddings.weight": (2, 1), "output_layer.weight": (2, 1)}
    flat = {}
    for key, tensor in whole.items():
        if key.startswith("optimizer."):
            grid = next((grid for ending, grid in grids.items() if key.endswith(ending)), None)
            flat[key] = flattened(tensor, grid or (2, 1) if "layers" in key else grid or (1,))
    stored(tmp_path / "flat", add=flat)
    found, expected = open_checkpoint(tmp_path / "flat"), open_checkpoint(tmp_path / "whole")
    assert found.infos == expected.infos
    for name, info in expected.infos.items():
        for slot in info.slots:
            assert torch.equal(read_tensor(found, name, slot), read_tensor(expected, name, slot)), (name, slot)
    name = "model.layers.1.mlp.down_proj.weight"
    out = torch.empty(5, 30)
    found.read(name, (slice(3, 8), slice(10, 40)), {"exp_avg": out})
    assert torch.equal(out, read_tensor(expected, name, "exp_avg")[3:8, 10:40])


def test_groups_without_parameters_are_those_of_megatron(tmp_path):
    groups = [param_group(True, step=7), param_group(False, step=7)]
    common = {"optimizer": {"optimizer": {"param_groups": groups}}}
    stored(tmp_path / "core", moments=("exp_avg", "exp_avg_sq"), common=common)
    source = open_checkpoint(tmp_path / "core")
    assert source.groups == {
        "decay": Group(lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), step=7),
        "no_decay": Group(lr=3e-4, betas=(0.9, 0.95), step=7),
    }
    assert source.infos["model.layers.0.input_layernorm.weight"].group == "no_decay"
    assert source.infos["lm_head.weight"].group == "decay"
    assert source.infos["lm_head.weight"].slots == dict.fromkeys(SLOTS, torch.float32)


def test_weights_of_torch_until_2_2_are_read(tmp_path):
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    whole = stored(tmp_path / "core")
    path = tmp_path / "core" / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # written by the test
    for entry in metadata.state_dict_metadata.values():
        entry.properties = TensorProperties(dtype=entry.properties.dtype)
    path.write_bytes(pickle.dumps(metadata))
    source = open_checkpoint(tmp_path / "core")
    assert torch.equal(read_tensor(source, "model.norm.weight"), whole["decoder.final_layernorm.weight"])


def refused(folder):
    with pytest.raises(InputError) as caught:
        source = open_checkpoint(folder)
        for name, info in source.infos.items():
            for slot in info.slots:
                read_tensor(source, name, slot)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FC2 = "decoder.layers.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"drop": (FC2,)}, f".metadata: tensor {FC2} is missing"),
        ({"drop": ("embedding.word_embeddings.weight",)}, "tensor embedding.word_embeddings.weight is missing"),
        (
            {"add": {"decoder.layers.cross_attention.weight": torch.ones(2, 3)}},
            "cross_attention.weight, which the llama",
        ),
        ({"add": {FC2: torch.ones(3, 32, 48)}}, f"{FC2} has shape (3, 32, 48), its model's has (2, 32, 48)"),
        (
            {"add": {FC2: torch.ones(2, 32, 48, dtype=torch.int64)}},
            f"{FC2} is torch.int64; plain floating point is read",
        ),
        (
            {"vocab_size": 131, "add": {"embedding.word_embeddings.weight": torch.ones(64, 32)}},
            "(64, 32), fewer rows than",
        ),
        ({"moments": ("exp_avg",)}, "has one of Adam's two moments alone"),
        ({"moments": ("exp_avg", "exp_avg_sq", "momentum_buffer")}, "which is no state of Adam of a weight beside it"),
        (
            {"add": {"optimizer.state.exp_avg.decoder.other": torch.ones(2)}},
            "holds optimizer.state.exp_avg.decoder.other",
        ),
        (
            {"moments": ("exp_avg", "exp_avg_sq"), "add": {f"optimizer.state.exp_avg.{FC2}": torch.ones(2, 7)}},
            f"optimizer.state.exp_avg.{FC2} has shape (2, 7), its weight has (2, 32, 48)",
        ),
        (
            {"common": {"optimizer": {"param_groups": [{"betas": 3}]}}},
            "common.pt: its optimizer is none of Megatron-Core",
        ),
        (
            {"common": {"optimizer": {"param_groups": [param_group(True), param_group(True, is_decoupled_lr=True)]}}},
            "common.pt: its optimizer has other parameter groups than one that decays and one that does not",
        ),
        ({"common": {"args": Namespace(num_layers=2)}}, "common.pt: position_embedding_type is None"),
        ({"common": {"args": None}}, "common.pt: has no args, and there is no config.json here or above"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(tmp_path, how, words):
    stored(tmp_path / "core", **how)
    assert words in refused(tmp_path / "core")


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(name):
    def damage(folder):
        path = folder / name
        os.truncate(path, path.stat().st_size - 1000)

    return damage


def hostile(folder):
    torch.save({"args": Trap(str(folder / "trapped"))}, folder / "common.pt")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate("__0_0.distcp"), "__0_0.distcp: truncated"),
        (remove("__0_0.distcp"), "__0_0.distcp: missing"),
        (remove("common.pt"), "common.pt: missing"),
        (truncate("common.pt"), "common.pt: damaged, or not a plain Megatron-Core file"),
        (hostile, "common.pt: damaged, or not a plain Megatron-Core file"),
        (remove(".metadata"), ".metadata: missing"),
        (truncate(".metadata"), ".metadata: damaged, or not a plain DCP metadata"),
        (remove("metadata.json"), "metadata.json: missing, so the save was not finished"),
        (
            write("metadata.json", '{"sharded_backend": "zarr"}'),
            "metadata.json: unknown sharded_backend 'zarr': allowed are torch_dist",
        ),
        (write("metadata.json", "{"), "metadata.json: not valid JSON"),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(tmp_path, damage, words):
    stored(tmp_path / "core")
    damage(tmp_path / "core")
    assert words in refused(tmp_path / "core")
    assert not (tmp_path / "core" / "trapped").exists()


def test_the_folder_of_a_run_is_its_newest_checkpoint(tmp_path):
    stored(tmp_path / "iter_0000003")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert format_of(tmp_path) == "torch_dist"
    assert open_checkpoint(tmp_path).run.step == 7  # as common.pt says
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    assert "names iter_0000004, which is not there; open one of iter_0000003" in refused(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../3")
    assert "not a checkpoint of a known format" in refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": tiny_config(model_type="gemma2")}, "Megatron-LM has no model of the gemma2 family"),
        ({"groups": {"decay": Group(step=5), "no_decay": Group(step=6)}}, "have taken 5 and 6 steps"),
    ],
)
def test_what_megatron_could_not_load_is_not_written(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        TorchDistLayout().files(Trained(**{"config": tiny_config(), **changes}))


def test_half_of_a_parameter_without_state_is_not_written():
    class Half(Trained):
        @property
        def infos(self):
            name = "model.layers.0.self_attn.k_proj.weight"
            return {**super().infos, name: Info(shape=(16, 32), slots={"weight": torch.float32})}

    with pytest.raises(InputError, match="are parts of one tensor for Megatron-Core"):
        TorchDistLayout().files(Half(config=tiny_config()))
