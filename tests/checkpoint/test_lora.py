"""LoRA adapters, judged by peft: what it saves, what it merges, and what the adapted model computes."""

import json
import os
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint import lora
from checkpoint.adapter_files import READ, REFUSED, WITHOUT_EFFECT
from checkpoint.lora import apply_lora
from checkpoint.memory import MemorySource
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import TILE, Group, RunState, Wrapped, box_shape, full_box, read_tensor
from checkpoint.writer import write_checkpoint
from parallel.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, of tied and targeted embeddings

WEIGHTS = "adapter_model.safetensors"
Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def source_of(model, dtype=torch.float32):
    """The model's tensors in memory; of another dtype, rounded."""
    tensors = {name: parameter.detach().to(dtype).clone() for name, parameter in model.named_parameters()}
    return MemorySource(config=model.config.to_dict(), tensors=tensors)


def saved_adapter(folder, model, seed=1, **options):
    """Save an adapter of random numbers, as peft does, and return its folder."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif parameter.requires_grad or "lora_" in name:
            parameter.data.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    return folder


def merged_by_peft(model, folder):
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}


def check(source, theirs):
    """Every tensor within a relative 1e-6 of peft's, and the parts of a tensor bit by bit those of the whole."""
    owned = [name for name, info in source.infos.items() if info.tied_to is None]
    assert sorted(owned) == sorted(theirs)
    for name in owned:
        whole = read_tensor(source, name)
        torch.testing.assert_close(whole, theirs[name], rtol=1e-6, atol=1e-6 * float(theirs[name].abs().max()))
        size = whole.shape[0]
        for rows in (slice(0, 1), slice(3, size - 2), slice(size - 1, size)):
            for columns in (slice(0, 1), slice(5, 17)):
                box = (rows, columns)[: whole.ndim]
                out = torch.empty(box_shape(box))
                source.read(name, box, {"weight": out})
                assert torch.equal(out, whole[box]), (name, box)


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "every linear layer": {"target_modules": "all-linear"},
    "targets by a pattern": {"target_modules": r".*\.1\..*(up|down)_proj"},
    "ranks": {"rank_pattern": {r"^model\.layers\.1.*": 7, "layers.0.*v_proj": 3, "proj": 1, "q_proj": 2}},
    "ranks, first match": {"rank_pattern": {r"layers\.\d\..*": 3, "q_proj": 5, "j": 9}, "use_rslora": True},
    "alphas": {"alpha_pattern": {"down_proj|v_proj": 3, "model.layers.1.self_attn.q_proj": 11.5}},
    # peft sorts what it saves: the first match is that of the file.
    "alphas, first match": {"alpha_pattern": {"q_proj": 3, "layers.1.*": 16}},
    "both": {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"mlp.*": 16}},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "biases": {"bias": "all", "model": {"attention_bias": True, "mlp_bias": True}},
    "biases of adapted layers": {"bias": "lora_only", "model": {"attention_bias": True}},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"], "model": {"attention_bias": True}},
    "lora_bias, biases": {
        "lora_bias": True,
        "bias": "all",
        "use_rslora": True,
        "target_modules": ["q_proj", "gate_proj"],
        "model": {"attention_bias": True, "mlp_bias": True},
    },
    "norms": {"modules_to_save": ["input_layernorm", "model.norm"]},
    "an mlp": {"modules_to_save": ["layers.0.mlp"]},
    "saved and targeted": {"modules_to_save": ["down_proj"]},
    "nothing of the model": {"modules_to_save": ["classifier", "score"]},
    "the head": {"modules_to_save": ["lm_head"], "model": {"tie_word_embeddings": False}},
    "LoRA of the embedding": {"target_modules": ["embed_tokens", "q_proj"], "model": {"tie_word_embeddings": False}},
    "LoRA of the head": {"target_modules": ["lm_head", "q_proj"], "model": {"tie_word_embeddings": False}},
    "DoRA": {"use_dora": True},
    "DoRA, ranks": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 6}, "fan_in_fan_out": True},
    "DoRA everywhere": {
        "use_dora": True,
        "target_modules": ["embed_tokens", "lm_head", "o_proj", "up_proj"],
        "model": {"tie_word_embeddings": False},
    },
}


@pytest.mark.parametrize("tile", [TILE, 200])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_what_peft_merges(tmp_path, monkeypatch, case, tile):
    monkeypatch.setattr(lora, "TILE", tile)
    options = dict(CASES[case])
    changes = options.pop("model", {})
    folder = saved_adapter(tmp_path / "adapter", tiny_model(**changes), **options)
    source = apply_lora(source_of(tiny_model(**changes)), folder)
    assert source.changes
    check(source, merged_by_peft(tiny_model(**changes), folder))


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "granite", "gemma2", "gemma3_text", "olmo2"])
def test_other_families(tmp_path, model_type):
    def model():
        changes = {**tiny_config(), "model_type": model_type, "tie_word_embeddings": False, "pad_token_id": 0}
        torch.manual_seed(0)
        config = AutoConfig.for_model(**{key: value for key, value in changes.items() if key != "architectures"})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    targets = ["embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    folder = saved_adapter(tmp_path / "adapter", model(), target_modules=targets, bias="all")
    check(apply_lora(source_of(model()), folder), merged_by_peft(model(), folder))


@pytest.mark.parametrize("dora", [False, True])
def test_large_tensors_are_read_a_tile_at_a_time(tmp_path, dora):
    changes = {"vocab_size": 20_000, "tie_word_embeddings": False}
    targets = ["embed_tokens", "lm_head", "q_proj"]
    folder = saved_adapter(tmp_path / "adapter", tiny_model(**changes), target_modules=targets, use_dora=dora)
    # peft saves targeted embeddings whole: then the base's are not read.
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "base_layer" not in name}, folder / WEIGHTS)
    sizes = []

    class Watched(Wrapped):
        def read(self, name, box, out, stats=None):
            sizes.append(torch.Size(box_shape(box)).numel())
            super().read(name, box, out, stats)

    source = apply_lora(Watched(source_of(tiny_model(**changes))), folder)
    check(source, merged_by_peft(tiny_model(**changes), folder))
    out, box = torch.empty(20_000, 32), full_box((20_000, 32))
    source.read(HEAD, box, {"weight": out})
    assert torch.equal(out, read_tensor(source, HEAD))
    assert TILE // 2 < max(sizes) <= TILE


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_once(tmp_path, options, adapters):
    folder = saved_adapter(tmp_path / "adapter", tiny_model(dtype=torch.bfloat16), **options)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor.to(adapters) for name, tensor in tensors.items()}, folder / WEIGHTS)
    source = apply_lora(source_of(tiny_model(), torch.bfloat16), folder)
    rounded = tiny_model(dtype=torch.bfloat16)
    check(source, merged_by_peft(rounded.float(), folder))
    for name in (Q, DOWN):
        assert source.infos[name].slots == {"weight": torch.bfloat16}
        assert torch.equal(read_tensor(source, name, dtype=torch.bfloat16), read_tensor(source, name).bfloat16())


TIED = {
    "LoRA of the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "LoRA of the head": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "LoRA of both": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "LoRA of both, tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "DoRA of the embedding": ({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, False),
    "the embedding": ({"modules_to_save": ["embed_tokens"]}, False),
    "the head": ({"modules_to_save": ["lm_head"]}, False),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "neither": ({}, True),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_computes_what_the_adapted_one_does(tmp_path, case):
    options, tied = TIED[case]
    folder = saved_adapter(tmp_path / "adapter", tiny_model(), **options)
    source = apply_lora(source_of(tiny_model()), folder)
    assert source.config["tie_word_embeddings"] == tied
    assert source.infos[HEAD].tied_to == (EMBED if tied else None)
    write_checkpoint(source, tmp_path / "merged", SafetensorsLayout())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    theirs = PeftModel.from_pretrained(tiny_model(), folder).eval()
    tokens = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    if "LoRA" not in case and "DoRA" not in case:
        check(source, merged_by_peft(tiny_model(), folder))


def test_a_saved_base_takes_the_place_of_the_models(tmp_path):
    """What save_embedding_layers stores is the tied tensor of both, as it is when peft loads it."""
    folder = saved_adapter(tmp_path / "adapter", tiny_model(seed=3), target_modules=["embed_tokens", "q_proj"])
    source = apply_lora(source_of(tiny_model()), folder)
    theirs = tiny_model(seed=3).state_dict()[HEAD]
    assert torch.equal(read_tensor(source, HEAD), theirs)
    tensors = load_file(folder / WEIGHTS)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors
    tensors["base_model.model.lm_head.weight"] = theirs + 1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=f"{WEIGHTS}: {EMBED} and {HEAD} differ, though the model has one tensor"):
        apply_lora(source_of(tiny_model()), folder)


def test_a_bin_file_and_names_of_other_versions_of_peft(tmp_path):
    folder = saved_adapter(tmp_path / "adapter", tiny_model(), use_dora=True)
    theirs = merged_by_peft(tiny_model(), folder)
    tensors = load_file(folder / WEIGHTS)
    renamed = {f"{name}.weight" if name.endswith("_vector") else name: tensor for name, tensor in tensors.items()}
    torch.save(renamed, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    check(apply_lora(source_of(tiny_model()), folder), theirs)


class Trained(Wrapped):
    """A source in the middle of a run."""

    @property
    def infos(self):
        slots = dict.fromkeys(("weight", "master", "exp_avg", "exp_avg_sq"), torch.float32)
        return {name: info if info.tied_to else replace(info, slots=slots) for name, info in self.source.infos.items()}

    @property
    def groups(self):
        return {"default": Group(lr=1e-3, step=9)}

    @property
    def run(self):
        return RunState(step=9, tokens=99, provenance={"name": "base", "hash": "b", "ancestors": ["a"]})


def test_masters_and_moments_stay_behind_and_both_parents_are_named(tmp_path):
    folder = saved_adapter(tmp_path / "french", tiny_model())
    source = apply_lora(Trained(source_of(tiny_model())), folder)
    assert {slot for info in source.infos.values() for slot in info.slots} == {"weight"}
    assert source.groups == {"default": Group(lr=1e-3)}
    parents = [{"name": "base", "hash": "b"}, {"name": "french", "hash": None}]
    recipe = {"verb": "lora", "recipe": {"adapter": "french"}}
    assert source.run == RunState(provenance={**recipe, "parents": parents, "ancestors": ["a", "b"]})
    (folder / "growmerge.json").write_text('{"name": "run-7", "hash": "c"}')
    provenance = apply_lora(Trained(source_of(tiny_model())), folder).run.provenance
    assert provenance["parents"] == [{"name": "base", "hash": "b"}, {"name": "french", "hash": "c"}]
    assert provenance["ancestors"] == ["a", "b", "c"]


def test_workers_do_not_change_a_byte(tmp_path, tiny_folder):
    folder = saved_adapter(tmp_path / "adapter", tiny_model(), target_modules=["embed_tokens", "q_proj"], use_dora=True)
    source = apply_lora(open_checkpoint(tiny_folder()), folder)
    hashes = {write_checkpoint(source, tmp_path / str(n), SafetensorsLayout(), workers=n) for n in (1, 3)}
    assert len(hashes) == 1


def settings(**changes):
    """Return what changes an adapter's config; None takes a key away."""

    def damage(folder):
        config = {**json.loads((folder / "adapter_config.json").read_text()), **changes}
        config = {key: value for key, value in config.items() if key not in changes or value is not None}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return damage


def tensors(**changes):
    """Return what changes an adapter's tensors: by the end of a name, None for taking it away; or a new one."""

    def damage(folder):
        held = load_file(folder / WEIGHTS)
        for end, value in changes.items():
            names = [name for name in held if name.endswith(end)] or [end]
            for name in names[:1]:
                held.pop(name, None)
                if value is not None:
                    held[name] = value
        save_file(held, folder / WEIGHTS)

    return damage


def truncated(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 10)


def without(name):
    return lambda folder: (folder / name).unlink()


def as_bin(value):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        if isinstance(value, bytes):
            (folder / "adapter_model.bin").write_bytes(value)
        else:
            torch.save(value, folder / "adapter_model.bin")

    return damage


class Unknown:
    pass


A0 = "layers.0.self_attn.q_proj.lora_A.weight"
KEY = f"base_model.model.model.{A0}"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
ERRORS = [
    (without("adapter_config.json"), ["adapter_config.json: no such file"]),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), ["adapter_config.json: not valid JSON"]),
    (lambda folder: (folder / "adapter_config.json").write_text("[]"), ["adapter_config.json: no peft_type"]),
    (settings(peft_type=None), ["adapter_config.json: no peft_type, so it is not the config of a PEFT adapter"]),
    (settings(peft_type="ADALORA"), ["adapter_config.json: peft_type 'ADALORA': allowed is 'LORA'"]),
    *((settings(**{key: [1]}), [f"adapter_config.json: {key} is set: ", "without it"]) for key in REFUSED),
    (settings(use_dorra=True), ["unknown setting 'use_dorra'", "did you mean 'use_dora'?"]),
    *(
        (settings(init_lora_weights=init), [f"init_lora_weights '{init}'", "path_initial_model_for_weight_conversion"])
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    ),
    (settings(rank_pattern=[1]), ["rank_pattern is [1]: allowed is a dict"]),
    (settings(alpha_pattern="x"), ["alpha_pattern is 'x': allowed is a dict"]),
    (settings(modules_to_save="lm_head"), ["modules_to_save is 'lm_head': allowed is a list"]),
    (settings(bias="some"), ["unknown bias 'some': allowed are none, all, lora_only"]),
    (settings(use_dora=True, lora_bias=True), ["use_dora and lora_bias are both set"]),
    (settings(rank_pattern={"(": 3}), ["adapter_config.json: rank_pattern: '(' is no pattern"]),
    (settings(r=0), ["adapter_config.json: rank 0 for model.layers.", "whole numbers from 1 on"]),
    (settings(r=2.5), ["rank 2.5 for model.layers."]),
    (settings(lora_alpha=None), ["adapter_config.json: lora_alpha None for model.layers.", "allowed are numbers"]),
    (settings(r=5), [f"{WEIGHTS}: base_model.model.model.layers.", "has shape (4, ", "rank 5 in adapter_config.json"]),
    (settings(use_dora=True), [f"{WEIGHTS}: base_model.model.model.layers.", "lora_magnitude_vector is missing"]),
    (settings(lora_bias=True), ["lora_B.bias is missing (of this module there are: lora_A.weight, lora_B.weight)"]),
    (settings(modules_to_save=["norm"]), ["norm.weight is missing, though modules_to_save names it"]),
    (settings(modules_to_save=["q_proj"]), ["q_proj.weight is missing, though modules_to_save names it"]),
    (without(WEIGHTS), ["neither adapter_model.safetensors nor adapter_model.bin"]),
    (truncated, [f"{WEIGHTS}: truncated"]),
    (lambda folder: save_file({}, folder / WEIGHTS), [f"{WEIGHTS}: holds no tensors"]),
    (tensors(**{A0: None}), [f"{WEIGHTS}: {KEY} is missing (of this module there are: lora_B.weight)"]),
    (tensors(**{f"{MODULE}.lora_B.weight": None}), [f"{MODULE}.lora_B.weight is missing"]),
    (tensors(**{A0: torch.zeros(4, 31)}), [f"{KEY} has shape (4, 31), rank 4 in adapter_config.json", "(4, 32)"]),
    (tensors(**{A0: torch.zeros(0)}), [f"{KEY} has shape (0,)"]),
    (tensors(**{"base_model.model.x.lora_A.weight": torch.zeros(1)}), ["x.lora_A.weight matches no tensor of the lla"]),
    (tensors(**{f"{MODULE}.lora_C.weight": torch.zeros(1)}), ["lora_C.weight matches no tensor"]),
    (tensors(**{f"{MODULE}.bias": torch.zeros(32)}), [f"{MODULE}.bias matches no tensor of the llama model"]),
    (tensors(**{"model.norm.weight": torch.zeros(32)}), [f"{WEIGHTS}: model.norm.weight matches no tensor"]),
    (tensors(**{f"{MODULE}.weight": torch.zeros(4, 4)}), [f"{MODULE}.weight has shape (4, 4), the model has (32, 32)"]),
    (
        tensors(**{f"{MODULE}.weight": torch.zeros(1), f"{MODULE}.base_layer.weight": torch.zeros(1)}),
        [f"{MODULE}.", "weight is there twice"],
    ),
    (
        tensors(**{f"{MODULE}.lora_embedding_A": torch.zeros(4, 32)}),
        ["q_proj.lora_embedding_A: to a torch.nn.Linear, adapter_config.json allows lora_A.weight, lora_B.weight"],
    ),
    (tensors(**{f"{MODULE}.lora_magnitude_vector": torch.zeros(32)}), ["lora_magnitude_vector: to a torch.nn.Linear"]),
    (
        tensors(**{"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 131)}),
        ["lora_A.weight: to a torch.nn.Embedding, adapter_config.json allows lora_embedding_A, lora_embedding_B"],
    ),
    (
        tensors(**{"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 32)}),
        ["model.norm has a LoRA, which linear layers and embeddings alone can have"],
    ),
    (as_bin(b"not a pickle"), ["adapter_model.bin: damaged, or not a plain PyTorch file"]),
    (as_bin({"x": Unknown()}), ["adapter_model.bin: damaged, or not a plain PyTorch file"]),
    (as_bin([1]), ["adapter_model.bin: holds other things than tensors by name"]),
    (as_bin({"x": torch.zeros(2, dtype=torch.int64)}), ["adapter_model.bin: x is torch.int64"]),
]


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory):
    return saved_adapter(tmp_path_factory.mktemp("peft") / "adapter", tiny_model())


@pytest.mark.parametrize(("damage", "words"), ERRORS)
def test_what_cannot_be_merged_is_one_line_that_names_the_file(tmp_path, plain_adapter, damage, words):
    for path in plain_adapter.glob("adapter_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        apply_lora(source_of(tiny_model()), tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(tmp_path))
    assert all(word in line for word in words), line


def test_lines_of_biases_and_saved_modules(tmp_path):
    biased = {"attention_bias": True}
    folder = saved_adapter(tmp_path / "a", tiny_model(**biased), lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"q_proj.lora_B.bias has no bias in the model to be added to"):
        apply_lora(source_of(tiny_model()), folder)
    folder = saved_adapter(tmp_path / "b", tiny_model(**biased), bias="lora_only")
    tensors(**{"layers.1.self_attn.q_proj.base_layer.bias": None})(folder)
    with pytest.raises(InputError, match=r"layers.1.self_attn.q_proj.bias is missing, though bias is 'lora_only'"):
        apply_lora(source_of(tiny_model(**biased)), folder)
    settings(bias="all")(folder)
    with pytest.raises(InputError, match=r"k_proj.bias is missing, though bias is 'all'"):
        apply_lora(source_of(tiny_model(**biased)), folder)
    folder = saved_adapter(tmp_path / "c", tiny_model())
    tensors(**{f"{MODULE}.weight": torch.zeros(32, 32)})(folder)
    settings(modules_to_save=["layers.0.self_attn.q_proj"])(folder)
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj has a LoRA, though modules_to_save replaces it"):
        apply_lora(source_of(tiny_model()), folder)


def test_every_setting_of_peft_is_known():
    config = LoraConfig().to_dict()
    assert {*config} <= {*READ, *WITHOUT_EFFECT, *REFUSED}
