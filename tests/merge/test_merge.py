"""Merged models against float64 oracles on whole tensors; what does not fit together is refused by name."""

from dataclasses import replace

import pytest
import torch
from models import CONFIG, EMBEDDING, MATRIX, NORM, model
from test_oracles import CASES, merged_of

import checkpoint.blocks as blocks
import merge.merge as merging
import merge.stack as stack
from checkpoint import manifest
from checkpoint.memory import MemorySource
from checkpoint.safetensors import SafetensorsLayout, open_safetensors
from checkpoint.source import box_shape, full_box, read_tensor, read_together, row_major_tiles
from checkpoint.writer import write_checkpoint
from merge.merge import merge
from merge.reads import all_finite
from merge.statistics_files import digest
from merge.table import METHODS
from parallel.errors import InputError


def test_weights_are_1_by_default() -> None:
    sources = [model(1), model(2)]
    given = merge(sources, "linear", weights=[1, 1])
    assert torch.equal(read_tensor(merge(sources, "linear"), MATRIX), read_tensor(given, MATRIX))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_workers_and_boxes_do_not_matter(case, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 2**11)  # so that each of three processes has several
    monkeypatch.setattr(manifest, "BLOCK", 2**11)
    monkeypatch.setattr(merging, "row_major_tiles", lambda shape: row_major_tiles(shape, 64))
    monkeypatch.setattr(stack, "row_major_tiles", lambda shape: row_major_tiles(shape, 64))
    hashes = set()
    for workers in (1, 3):
        merged, _, _ = merged_of(*case, torch.float32)
        assert len(merged.tiles(MATRIX)) > 2
        hashes.add(write_checkpoint(merged, tmp_path / str(workers), SafetensorsLayout(), workers=workers))
    assert len(hashes) == 1
    whole = open_safetensors(tmp_path / "3")
    for name in (MATRIX, NORM):
        stats = merged.collect(name, map)
        for box in ((slice(3, 9), slice(2, 11)), (slice(0, 16), slice(5, 6)))[: None if name == MATRIX else 1]:
            box = box[: len(merged.infos[name].shape)]
            out = torch.empty(box_shape(box))
            merged.read(name, box, {"weight": out}, stats)
            assert torch.equal(out, read_tensor(whole, name)[box])


@pytest.mark.parametrize("method", ["dare_ties", "ties", "multislerp"])
def test_a_tensor_of_several_blocks_and_tiles(method, tmp_path) -> None:
    sources = [model(seed, vocab_size=400_000, num_hidden_layers=1) for seed in (0, 1, 2)]
    given = {"base": sources[0], "parameters": {} if method == "multislerp" else {"density": 0.5}}
    hashes = {
        write_checkpoint(
            merge(sources[1:], method, **given), tmp_path / str(workers), SafetensorsLayout(), workers=workers
        )
        for workers in (1, 2)
    }
    assert len(hashes) == 1


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    sources = [model(seed, torch.bfloat16) for seed in (1, 2, 3)]
    merged = merge(sources, "linear", weights=[0.2, 0.3, 0.5])
    assert merged.infos[MATRIX].slots == {"weight": torch.bfloat16}
    wanted = sum(s.tensors[MATRIX].float() * w for s, w in zip(sources, [0.2, 0.3, 0.5], strict=True))
    assert torch.equal(read_tensor(merged, MATRIX, dtype=torch.bfloat16), wanted.bfloat16())


def test_dtype_and_config_are_the_base_s() -> None:
    base = replace(model(0, torch.bfloat16), config={**CONFIG, "bos_token_id": 1})
    merged = merge([model(1), model(2)], "linear", base=base)
    assert merged.config["bos_token_id"] == 1 and merged.infos[MATRIX].slots == {"weight": torch.bfloat16}
    assert merged.infos["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert merge([model(1), model(2)], "linear").infos[MATRIX].slots == {"weight": torch.float32}


def test_linear_does_not_use_the_base_s_values() -> None:
    with_base = read_tensor(merge([model(1), model(2)], "linear", base=model(0)), MATRIX)
    assert torch.equal(with_base, read_tensor(merge([model(1), model(2)], "linear"), MATRIX))


def test_merges_can_be_merged() -> None:
    inner = merge([model(1), model(2)], "ties", base=model(0), parameters={"density": 0.3})
    outer = merge([inner, model(3)], "ties", base=model(0), parameters={"density": 0.3})
    flat = replace(model(1), tensors={n: read_tensor(inner, n) for n, i in inner.infos.items() if not i.tied_to})
    wanted = read_tensor(merge([flat, model(3)], "ties", base=model(0), parameters={"density": 0.3}), MATRIX)
    assert torch.equal(read_tensor(outer, MATRIX), wanted)


class Mastered(MemorySource):
    """A source with masters beside its weights."""

    @property
    def infos(self):
        slots = {"weight": torch.float32, "master": torch.float32}
        return {name: info if info.tied_to else replace(info, slots=slots) for name, info in super().infos.items()}


def test_merged_models_have_weights_alone() -> None:
    merged = merge([Mastered(config=CONFIG, tensors=model(1).tensors)], "linear")
    assert merged.infos[MATRIX].slots == {"weight": torch.float32}


def with_tensor(source: MemorySource, name: str, value: torch.Tensor) -> MemorySource:
    return replace(source, tensors={**source.tensors, name: value})


def refused(*args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        merge(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_settings_that_make_no_sense() -> None:
    two = [model(1), model(2)]
    assert refused(two, "tie") == f"unknown merge method 'tie': allowed are {', '.join(METHODS)}; did you mean 'ties'?"
    assert refused([], "linear") == "no models to merge: at least one is needed"
    assert refused(two, "ties") == "merge method ties needs a base: the model that all models started from"
    assert refused(two, "linear", weights=[1]) == "1 weights given for 2 models: one weight a model is needed"
    assert refused(two, "linear", weights=[1, float("nan")]) == "weight is nan: a finite number is needed"
    line = "weights {} add up to 0: nothing to divide by; give others or normalize: false"
    assert refused(two, "linear", weights=[1, -1]) == line.format([1.0, -1.0])
    three = [*two, model(3)]
    assert refused(three, "linear", weights=[0.1, 0.2, -0.3]) == line.format([0.1, 0.2, -0.3])
    merge(two, "linear", weights=[1, -1], parameters={"normalize": False})
    assert refused(two, "ties", base=model(0), parameters={"density": -1}) == "density is -1: allowed is 0 to 1"
    assert refused(two, "ties", base=model(0), parameters={"density": 1.5}).startswith("density is 1.5:")
    assert (
        refused(two, "ties", base=model(0), parameters={"lambda": float("inf")})
        == "lambda is inf: a finite number is needed"
    )


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
    assert line == "model 2 has rope_theta 500000.0, base has 10000.0: --allow-unrelated merges them all the same"
    merge([model(1), model(2, rope_theta=5e5)], "linear", base=model(0, rope_theta=1e4), allow_unrelated=True)
    line = refused([model(1), model(2, num_hidden_layers=3)], "linear")
    assert line == "model 2 has the tensor model.layers.2.self_attn.q_proj.weight, which model 1 lacks"
    line = refused([model(1, num_hidden_layers=3), model(2)], "linear")
    assert line == "model 2 lacks the tensor model.layers.2.self_attn.q_proj.weight, which model 1 has"


def test_values_that_are_not_finite() -> None:
    value = model(2).tensors[MATRIX].clone()
    value[3, 2] = torch.nan
    merged = merge([model(1), with_tensor(model(2), MATRIX, value)], "ties", base=model(0))
    with pytest.raises(InputError) as error:
        read_tensor(merged, MATRIX)
    assert str(error.value) == f"model 2: {MATRIX} holds a value that is not finite; such a model cannot be merged"


BASE = {"name": "base", "hash": "b", "parents": [], "ancestors": []}
CHILD = {"name": "swe", "hash": "s", "parents": [{"name": "base", "hash": "b"}], "ancestors": ["b"]}
STRANGER = {"name": "fin", "hash": "f", "parents": [{"name": "other", "hash": "o"}], "ancestors": ["o"]}


def test_provenance() -> None:
    base, child, stranger = (model(n, provenance=record) for n, record in enumerate((BASE, CHILD, STRANGER)))
    merged = merge([child, base], "ties", base=base, parameters={"density": 0.5})
    assert merged.notes == ()
    assert merged.run.provenance == {
        "verb": "merge",
        "recipe": {"method": "ties", "seed": 0, "density": 0.5, "weight": [1.0, 1.0]},
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


def test_weights_among_the_parameters_count() -> None:
    sources = [model(1), model(2)]
    given = merge(sources, "linear", parameters={"weight": [0.9, 0.1]})
    assert torch.equal(read_tensor(given, MATRIX), read_tensor(merge(sources, "linear", weights=[0.9, 0.1]), MATRIX))
    assert refused(sources, "linear", weights=[1, 1], parameters={"weight": [1, 1]}).startswith(
        "weights are given twice"
    )
    assert refused(sources, "karcher", weights=[1, 1]) == "merge method karcher takes no weights"


def test_a_result_that_its_dtype_cannot_hold_is_refused() -> None:
    merged = merge([model(1)], "linear", weights=[3e7], parameters={"normalize": False})
    with pytest.raises(InputError) as error:
        read_tensor(replace(merged, dtype=torch.float16), MATRIX, dtype=torch.float16)
    assert str(error.value) == f"{MATRIX}: a merged value is too large for float16"


def test_what_is_drawn_goes_by_the_whole_model() -> None:
    """Models whose tensors begin alike are told apart, and so are draws of theirs."""
    first = model(1, vocab_size=3000)
    other = dict(first.tensors)
    other[EMBEDDING] = other[EMBEDDING].clone()
    other[EMBEDDING][-1] += 1
    assert digest(first) != digest(replace(first, tensors=other))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_value_that_is_not_finite_is_never_lost(case, value, tmp_path) -> None:
    """Wherever it is: in a model, at its smallest task vector, or in the base."""
    method, count, based, weights, parameters = case
    for spoilt in ("model 1", *(["base"] if based and (method, count) != ("multislerp", 1) else [])):
        sources = [model(seed) for seed in range(count + 1)]
        number = 1 if spoilt == "model 1" else 0
        tensor = sources[number].tensors[MATRIX].clone()
        away = (sources[1].tensors[MATRIX] - sources[0].tensors[MATRIX]).abs()
        tensor.view(-1)[away.argmin()] = value
        sources[number] = with_tensor(sources[number], MATRIX, tensor)
        merged = merge(sources[1:], method, base=sources[0] if based else None, weights=weights, parameters=parameters)
        with pytest.raises(InputError, match=f"{spoilt}.*{MATRIX} holds a value that is not finite"):
            read_tensor(merged, MATRIX)


@pytest.mark.parametrize("nothing", [{"weight": [0.0, 1.0]}, {"density": [0.0, 0.5]}])
def test_nor_in_a_model_of_which_nothing_counts(nothing) -> None:
    sources = [model(seed) for seed in range(3)]
    tensor = sources[1].tensors[MATRIX].clone()
    tensor[0, 0] = torch.nan
    spoilt = with_tensor(sources[1], MATRIX, tensor)
    merged = merge([spoilt, sources[2]], "ties", base=sources[0], parameters={"density": 0.5, **nothing})
    with pytest.raises(InputError, match=f"model 1.*{MATRIX} holds a value that is not finite"):
        read_tensor(merged, MATRIX)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_as_torch_says(dtype):
    about = torch.finfo(dtype)
    ends = torch.tensor([about.max, about.min, 0.0, -0.0, about.tiny], dtype=dtype)
    values = torch.cat([ends, torch.randn(31, generator=torch.Generator().manual_seed(0)).to(dtype)]).view(6, 6)
    assert all_finite(values)
    assert all_finite(values[:, :4])
    assert all_finite(values[:0])
    for number in ("inf", "-inf", "nan", "-nan"):
        spoilt = values.clone()
        spoilt[4, 2] = float(number)
        assert not all_finite(spoilt)
        assert not all_finite(spoilt[4, 2])
        assert all_finite(spoilt[:, 3:])


def test_several_at_once_are_what_each_is_alone() -> None:
    """Merges of models of their own share no sums, and 0.0 is another factor than -0.0."""
    sources, base = [model(seed) for seed in range(4)], model(4)
    given = {"base": base, "parameters": {"density": 0.5}}
    merges = [
        merge(sources[:2], "linear"),
        merge(sources[2:], "linear"),
        merge(sources[:3], "ties", **given),
        merge(sources[:3], "ties", weights=[1.0, 1.0, 0.5], **given),
        merge(sources[:1], "slerp", base=base, parameters={"t": 0.3}),
        *(merge([sources[0]], "linear", weights=[zero], parameters={"normalize": False}) for zero in (0.0, -0.0)),
    ]
    reads = replace(merges[-1], reads=merges[-2].reads)
    together = [*merges[:-1], reads]
    shape = merges[0].infos[MATRIX].shape
    rows = torch.empty(len(together), *shape)
    stats = [one.collect(MATRIX, map) for one in together]
    read_together(together, MATRIX, full_box(shape), {"weight": rows}, stats)
    for row, one in zip(rows, merges, strict=True):
        assert row.numpy().tobytes() == read_tensor(one, MATRIX).numpy().tobytes()


def test_extreme_parameters() -> None:
    sources, base = [model(1), model(2)], model(0)
    plain = read_tensor(merge(sources, "ties", base=base, parameters={"density": 0.5}), MATRIX)
    tiny = merge(sources, "ties", base=base, weights=[1e-38, 1e-38], parameters={"density": 0.5})
    torch.testing.assert_close(read_tensor(tiny, MATRIX), plain, rtol=1e-3, atol=1e-5)
    for method in ("ties", "task_arithmetic"):
        with pytest.raises(InputError, match=r"lambda is 1e\+39: that is too much for float32"):
            merge(sources, method, base=base, parameters={"lambda": 1e39})
