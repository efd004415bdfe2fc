"""Merged models against float64 oracles on whole tensors; what does not fit together is refused by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import merge.merge as merging
from checkpoint.memory import MemorySource
from checkpoint.safetensors import SafetensorsLayout, open_safetensors
from checkpoint.source import RunState, read_tensor, row_major_tiles
from checkpoint.writer import write_checkpoint
from merge.merge import merge
from parallel.errors import InputError

CONFIG = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
NAME = "model.layers.1.mlp.down_proj.weight"


def model(
    seed: int, dtype: torch.dtype = torch.float32, provenance: dict | None = None, **changes: object
) -> MemorySource:
    """A base (seed 0), or a model that differs from it by small, coarse steps: zeros and ties are many."""
    config = {**CONFIG, **changes}
    tensors = {}
    for name, tensor in MemorySource(config=config, tensors={}).family.tensors(config).items():
        if tensor.tied_to is None:
            value = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
            if seed:
                step = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 * seed + len(name)))
                value = value.bfloat16().float() + (step * 4).round() / 64
            tensors[name] = value.bfloat16().float().to(dtype)
    return MemorySource(config=config, tensors=tensors, run=RunState(provenance=provenance or {}))


def ties_oracle(base, others, weights, density, scale, normalize) -> np.ndarray:
    """TIES by brute force in float64: sort, elect, average."""
    flat, deltas = base.double().flatten().numpy(), []
    for other in others:
        delta = other.double().flatten().numpy() - flat
        keep = max(1, int(density * delta.size))
        ranked = sorted(range(delta.size), key=lambda place: (-abs(delta[place]), place))
        trimmed = np.zeros_like(delta)
        trimmed[ranked[:keep]] = delta[ranked[:keep]]
        deltas.append(trimmed)
    merged = []
    for place, values in enumerate(zip(*deltas, strict=True)):
        weighted = [value * weight for value, weight in zip(values, weights, strict=True)]
        sign = 1.0 if sum(weighted) >= 0 else -1.0
        agree = [number for number, value in enumerate(weighted) if np.sign(value) == sign]
        divisor = sum(weights[number] for number in agree) if normalize else 1.0
        merged.append(flat[place] + scale * sum(weighted[number] for number in agree) / (divisor or 1.0))
    return np.array(merged).reshape(base.shape)


@pytest.mark.parametrize("weights", [None, [0.25, 0.75], [2.0, -0.5]])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(weights, normalize) -> None:
    sources = [model(1), model(2)]
    merged = merge(sources, "linear", weights=weights, normalize=normalize)
    w = weights or [1.0, 1.0]
    for name, info in merged.infos.items():
        if info.tied_to is None:
            wanted = sum(source.tensors[name].double() * x for source, x in zip(sources, w, strict=True))
            found = read_tensor(merged, name).double()
            torch.testing.assert_close(found, wanted / (sum(w) if normalize else 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("weights", "normalize", "scale"), [(None, True, 1.0), ([0.5, 0.25], False, 0.5)])
def test_ties(density, weights, normalize, scale) -> None:
    base, others = model(0), [model(1), model(2)]
    merged = merge(others, "ties", base=base, weights=weights, density=density, scale=scale, normalize=normalize)
    for name, info in merged.infos.items():
        if info.tied_to is None:
            tensors = [other.tensors[name] for other in others]
            wanted = ties_oracle(base.tensors[name], tensors, weights or [1, 1], density, scale, normalize)
            np.testing.assert_allclose(read_tensor(merged, name), wanted, rtol=1e-6, atol=1e-6)
    plain = merge(others, "linear", base=base)
    assert not torch.equal(read_tensor(plain, NAME), read_tensor(merged, NAME))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_tiles_and_workers_do_not_matter(method, tmp_path, monkeypatch) -> None:
    merged = merge([model(1), model(2), model(3)], method, base=model(0), density=0.3)
    hashes = {write_checkpoint(merged, tmp_path / "whole", SafetensorsLayout())}
    for tile in (12, 64):
        monkeypatch.setattr(merging, "row_major_tiles", lambda shape, tile=tile: row_major_tiles(shape, tile))
        assert len(merged.tiles(NAME)) > 2
        for workers in (1, 3):
            folder = tmp_path / f"{tile}-{workers}"
            hashes.add(write_checkpoint(merged, folder, SafetensorsLayout(), workers=workers))
    assert len(hashes) == 1


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    sources = [model(seed, torch.bfloat16) for seed in (1, 2, 3)]
    merged = merge(sources, "linear", weights=[0.2, 0.3, 0.5])
    assert merged.infos[NAME].slots == {"weight": torch.bfloat16}
    wanted = sum(s.tensors[NAME].float() * w for s, w in zip(sources, [0.2, 0.3, 0.5], strict=True))
    assert torch.equal(read_tensor(merged, NAME, dtype=torch.bfloat16), wanted.bfloat16())


def test_dtype_and_config_are_the_base_s() -> None:
    base = replace(model(0, torch.bfloat16), config={**CONFIG, "bos_token_id": 1})
    merged = merge([model(1), model(2)], "linear", base=base)
    assert merged.config["bos_token_id"] == 1 and merged.infos[NAME].slots == {"weight": torch.bfloat16}
    assert merged.infos["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert merge([model(1), model(2)], "linear").infos[NAME].slots == {"weight": torch.float32}


def test_linear_does_not_use_the_base_s_values() -> None:
    with_base = read_tensor(merge([model(1), model(2)], "linear", base=model(0)), NAME)
    assert torch.equal(with_base, read_tensor(merge([model(1), model(2)], "linear"), NAME))


def test_merges_can_be_merged() -> None:
    inner = merge([model(1), model(2)], "ties", base=model(0), density=0.3)
    outer = merge([inner, model(3)], "ties", base=model(0), density=0.3)
    flat = replace(model(1), tensors={n: read_tensor(inner, n) for n, i in inner.infos.items() if not i.tied_to})
    wanted = read_tensor(merge([flat, model(3)], "ties", base=model(0), density=0.3), NAME)
    assert torch.equal(read_tensor(outer, NAME), wanted)


class Mastered(MemorySource):
    """A source with masters beside its weights."""

    @property
    def infos(self):
        slots = {"weight": torch.float32, "master": torch.float32}
        return {name: info if info.tied_to else replace(info, slots=slots) for name, info in super().infos.items()}


def test_merged_models_have_weights_alone() -> None:
    merged = merge([Mastered(config=CONFIG, tensors=model(1).tensors)], "linear")
    assert merged.infos[NAME].slots == {"weight": torch.float32}


def with_tensor(source: MemorySource, name: str, value: torch.Tensor) -> MemorySource:
    return replace(source, tensors={**source.tensors, name: value})


def refused(*args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        merge(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_settings_that_make_no_sense() -> None:
    two = [model(1), model(2)]
    assert refused(two, "tie") == "unknown merge method 'tie': allowed are linear, ties; did you mean 'ties'?"
    assert refused([], "linear") == "no models to merge: at least one is needed"
    assert refused(two, "ties") == "merge method ties needs a base: the model that all models started from"
    assert refused(two, "linear", weights=[1]) == "1 weights given for 2 models: one weight a model is needed"
    assert refused(two, "linear", weights=[1, float("nan")]) == "weights [1, nan]: finite numbers are needed"
    line = "weights {} add up to 0: nothing to divide by; give others or normalize: false"
    assert refused(two, "linear", weights=[1, -1]) == line.format([1, -1])
    three = [*two, model(3)]
    assert refused(three, "linear", weights=[0.1, 0.2, -0.3]) == line.format([0.1, 0.2, -0.3])
    merge(two, "linear", weights=[1, -1], normalize=False)
    assert refused(two, "ties", base=model(0), density=0) == "density is 0: allowed are numbers above 0, up to 1"
    assert refused(two, "ties", base=model(0), density=1.5).startswith("density is 1.5:")
    assert refused(two, "ties", base=model(0), scale=float("inf")) == "scale is inf: a finite number is needed"


def test_models_that_do_not_fit(tmp_path) -> None:
    write_checkpoint(model(2, vocab_size=31), tmp_path / "larger", SafetensorsLayout())
    line = refused([model(1), open_safetensors(tmp_path / "larger")], "linear")
    assert line == f"model 2 ({tmp_path / 'larger'}) has vocab 31, model 1 has 30: they cannot be merged"
    named = model(1, provenance={"name": "swe"})
    line = refused([named, model(2, tie_word_embeddings=False)], "linear")
    assert line == "model 2 has tie_word_embeddings False, model 1 (swe) has True: they cannot be merged"
    line = refused([model(1, num_attention_heads=2, head_dim=8, num_key_value_heads=1)], "linear", base=model(0))
    assert line == "model 1 has head_dim 8, base has 4: they cannot be merged"
    line = refused([model(1), model(2, rope_theta=5e5)], "linear", base=model(0, rope_theta=1e4))
    assert line == "model 2 has rope_theta 500000.0, base has 10000.0: they cannot be merged"
    line = refused([model(1), model(2, num_hidden_layers=3)], "linear")
    assert line == "model 2 has the tensor model.layers.2.self_attn.q_proj.weight, which model 1 lacks"
    line = refused([model(1, num_hidden_layers=3), model(2)], "linear")
    assert line == "model 2 lacks the tensor model.layers.2.self_attn.q_proj.weight, which model 1 has"


def test_values_that_are_not_finite() -> None:
    value = model(2).tensors[NAME].clone()
    value[3, 2] = torch.nan
    merged = merge([model(1), with_tensor(model(2), NAME, value)], "ties", base=model(0))
    with pytest.raises(InputError) as error:
        read_tensor(merged, NAME)
    assert str(error.value) == f"model 2: {NAME} holds a value that is not finite; such a model cannot be merged"


BASE = {"name": "base", "hash": "b", "parents": [], "ancestors": []}
CHILD = {"name": "swe", "hash": "s", "parents": [{"name": "base", "hash": "b"}], "ancestors": ["b"]}
STRANGER = {"name": "fin", "hash": "f", "parents": [{"name": "other", "hash": "o"}], "ancestors": ["o"]}


def test_provenance() -> None:
    base, child, stranger = (model(n, provenance=record) for n, record in enumerate((BASE, CHILD, STRANGER)))
    merged = merge([child, base], "ties", base=base)
    assert merged.notes == ()
    assert merged.run.provenance == {
        "verb": "merge",
        "recipe": {"method": "ties", "weights": [1.0, 1.0], "density": 0.5, "scale": 1.0, "normalize": True},
        "parents": [{"name": "swe", "hash": "s"}, {"name": "base", "hash": "b"}, {"name": "base", "hash": "b"}],
        "ancestors": ["b", "s"],
    }
    line = refused([child, stranger], "linear", base=base)
    assert line == "model 2 (fin) does not stem from base (base): merge models of one base, or allow unrelated models"
    allowed = merge([child, stranger], "linear", base=base, allow_unrelated=True)
    assert allowed.notes == ("model 2 (fin) does not stem from base (base)",)
    unknown = merge([child, model(2)], "linear", base=base)
    assert unknown.notes == ("model 2: not known whether it stems from base (base)",)
    assert merge([child, stranger], "linear").notes == ()
