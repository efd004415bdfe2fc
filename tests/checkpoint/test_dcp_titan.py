"""DCP folders of torchtitan's Llama 3: what its own way of computing says of the weights, transformers says too.

The model here is written from what torchtitan does: parameters' names, pairs of neighbouring elements of a head as
complex numbers that positions turn, and, in one form, rows of queries, key and value of each kv head in one matrix.
"""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import tiny_config, tiny_model
from trained import Trained
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from checkpoint.open import open_checkpoint
from checkpoint.source import Group, read_tensor
from checkpoint.titan_layout import TitanLayout, TitanView
from checkpoint.writer import write_checkpoint
from parallel.errors import InputError

CONFIG = tiny_config(tie_word_embeddings=False)
HEADS, KV_HEADS, HEAD, HIDDEN, FFN, VOCAB = 4, 2, 8, 32, 48, 131
THETA = 10_000.0
MOMENTS = ("exp_avg", "exp_avg_sq")


def titan_state(form="separate"):
    """Return random weights, float32, by the names of one version of torchtitan."""
    generator = torch.Generator().manual_seed(11)
    shapes = {"tok_embeddings": (VOCAB, HIDDEN), "norm": (HIDDEN,), "output": (VOCAB, HIDDEN)}
    for layer in range(2):
        attention = {"wq": (HEADS * HEAD, HIDDEN), "wk": (KV_HEADS * HEAD, HIDDEN), "wv": (KV_HEADS * HEAD, HIDDEN)}
        if form == "fused":
            attention = {"wqkv": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN)}
        before = f"layers.{layer}.attention." + ("" if form == "separate" else "qkv_linear.")
        shapes |= {before + name: shape for name, shape in attention.items()}
        shapes[f"layers.{layer}.attention.wo"] = (HIDDEN, HEADS * HEAD)
        shapes |= {f"layers.{layer}.feed_forward.{name}": (FFN, HIDDEN) for name in ("w1", "w3")}
        shapes[f"layers.{layer}.feed_forward.w2"] = (HIDDEN, FFN)
        shapes |= {f"layers.{layer}.{name}": (HIDDEN,) for name in ("attention_norm", "ffn_norm")}
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        state[f"{name}.weight"] = 1 + 0.1 * value if "norm" in name else 0.3 * value
    return state


def heads_of(state, layer, x):
    """Return queries, keys and values [T, heads, head_dim] of positions [T, hidden], not turned."""
    before = f"layers.{layer}.attention."
    if f"{before}qkv_linear.wqkv.weight" in state:
        fused = (x @ state[f"{before}qkv_linear.wqkv.weight"].T).view(len(x), KV_HEADS, HEADS // KV_HEADS + 2, HEAD)
        return fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
    before = before if f"{before}wq.weight" in state else f"{before}qkv_linear."
    return tuple((x @ state[f"{before}{name}.weight"].T).view(len(x), -1, HEAD) for name in ("wq", "wk", "wv"))


def turned(x):
    """Turn heads [T, heads, head_dim] by position, each pair of neighbouring elements a complex number."""
    angles = torch.outer(
        torch.arange(len(x), dtype=x.dtype), THETA ** -(torch.arange(0, HEAD, 2, dtype=x.dtype) / HEAD)
    )
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)


def scores_of(queries, keys):
    """Return attention scores [heads, T, T]."""
    return torch.einsum("thd,shd->hts", queries, keys.repeat_interleave(HEADS // KV_HEADS, dim=1))


def norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def titan_logits(state, ids):
    """Return logits [T, vocab] of torchtitan's Llama 3."""
    x = state["tok_embeddings.weight"][ids]
    for layer in range(2):
        queries, keys, values = heads_of(state, layer, norm(x, state[f"layers.{layer}.attention_norm.weight"]))
        scores = scores_of(turned(queries), turned(keys)) * HEAD**-0.5
        mask = torch.ones(len(x), len(x)).tril() == 0
        weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
        values = values.repeat_interleave(HEADS // KV_HEADS, dim=1)
        attended = torch.einsum("hts,shd->thd", weights, values).flatten(1)
        x = x + attended @ state[f"layers.{layer}.attention.wo.weight"].T
        y = norm(x, state[f"layers.{layer}.ffn_norm.weight"])
        w1, w2, w3 = (state[f"layers.{layer}.feed_forward.{name}.weight"].T for name in ("w1", "w2", "w3"))
        x = x + (torch.nn.functional.silu(y @ w1) * (y @ w3)) @ w2
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


def saved(folder, state, **more):
    """Save as torchtitan: the model's keys at the top, the optimizer's flattened (moments that can be told apart)."""
    optimizer = {}
    for name, value in state.items():
        optimizer |= {f"state.{name}.exp_avg": 2 * value, f"state.{name}.exp_avg_sq": value.square()}
        optimizer[f"state.{name}.step"] = torch.tensor(9.0)
        fields = {"lr": 0.5, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False}
        optimizer |= {f"param_groups.{name}.{field}": value for field, value in fields.items()}
    progress = {"step": torch.tensor(9, dtype=torch.int32), "ntokens_seen": torch.tensor(1234)}
    states = {"optimizer": optimizer, "train_state": progress, "lr_scheduler": {"last_epoch": 9}, **more}
    dcp.save({**state, **states}, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("form", ["separate", "grouped", "fused"])
def test_scores_are_those_of_complex_rotation(tmp_path, form):
    state = titan_state(form)
    source = open_checkpoint(saved(tmp_path / "saved", state))
    x = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = {name: value.double() for name, value in state.items()}
    queries, keys, values = heads_of(state, 1, x)
    expected = scores_of(turned(queries), turned(keys))
    ours = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = read_tensor(source, f"model.layers.1.self_attn.{name}.weight").double()
        ours[name] = (x @ weight.T).view(len(x), -1, HEAD).transpose(0, 1)[None]  # [1, heads, T, head_dim]
    angles = torch.outer(torch.arange(16.0).double(), THETA ** -(torch.arange(0, HEAD, 2).double() / HEAD))
    angles = torch.cat([angles, angles], dim=-1)[None]
    turned_ours = apply_rotary_pos_emb(ours["q_proj"], ours["k_proj"], angles.cos(), angles.sin())
    found = scores_of(*(heads[0].transpose(0, 1) for heads in turned_ours))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(ours["v_proj"][0].transpose(0, 1), values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["separate", "grouped", "fused"])
def test_transformers_says_the_same_of_it(tmp_path, form):
    state = titan_state(form)
    source = open_checkpoint(saved(tmp_path / "saved", state))
    model = tiny_model(tie_word_embeddings=False)
    model.load_state_dict({name: read_tensor(source, name) for name in source.infos}, strict=True)
    ids = torch.arange(5, 37)
    with torch.no_grad():
        found = model(input_ids=ids[None]).logits[0]
    expected = titan_logits({name: value.double() for name, value in state.items()}, ids)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["separate", "fused"])
def test_moments_lie_as_their_weights_do(tmp_path, form):
    source = open_checkpoint(saved(tmp_path / "saved", titan_state(form)))
    assert source.groups == {"group0": Group(lr=0.5, weight_decay=0.1, step=9)}
    assert (source.run.step, source.run.tokens) == (9, 1234)
    for name, info in source.infos.items():
        weight = read_tensor(source, name)
        assert torch.equal(read_tensor(source, name, "exp_avg"), 2 * weight)
        assert torch.equal(read_tensor(source, name, "exp_avg_sq"), weight.square())
        if weight.ndim == 2:
            part = torch.empty(3, 4)
            source.read(name, (slice(6, 9), slice(5, 9)), {"exp_avg": part})
            assert torch.equal(part, 2 * weight[6:9, 5:9])
        assert info.group == "group0"


def test_older_and_newer_versions(tmp_path):
    state = titan_state()
    first = open_checkpoint(saved(tmp_path / "first", state))
    dcp.save({"model": {**state, "freqs_cis": torch.ones(4)}}, checkpoint_id=tmp_path / "old", no_dist=True)
    state["lm_head.weight"] = state.pop("output.weight")
    dcp.save(state, checkpoint_id=tmp_path / "new", no_dist=True)
    for version in ("old", "new"):
        (tmp_path / version / "config.json").write_text(json.dumps(CONFIG))
        source = open_checkpoint(tmp_path / version)
        for name in first.infos:
            assert torch.equal(read_tensor(source, name), read_tensor(first, name))


def test_what_torchtitans_llama_has_not_is_refused(tmp_path):
    folder = saved(tmp_path / "saved", titan_state())
    (folder / "config.json").write_text(json.dumps({**CONFIG, "attention_bias": True}))
    with pytest.raises(InputError, match=r"tensor model.layers.0.self_attn.q_proj.bias is missing"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen3"}))
    with pytest.raises(InputError, match=r"holds no qwen3 model as config\.json says under names that are known"):
        open_checkpoint(folder)


def written(folder, source, **layout):
    write_checkpoint(source, folder, TitanLayout(**layout))
    return folder


def test_what_we_write_computes_the_same_in_torchtitan(tmp_path):
    """Loaded by torch under torchtitan's names, computed as torchtitan does."""
    folder = written(tmp_path / "written", Trained(config=CONFIG), chunk_size=999)
    state = {name: torch.empty_like(value) for name, value in titan_state().items()}
    optimizer = {f"state.{name}.{slot}": torch.empty_like(state[name]) for name in state for slot in MOMENTS}
    optimizer |= {f"state.{name}.step": torch.tensor(0.0) for name in state}
    optimizer |= {f"param_groups.{name}.lr": 0.0 for name in state}
    progress = {"step": torch.tensor(0, dtype=torch.int32), "ntokens_seen": torch.tensor(0)}
    loaded = {**state, "optimizer": optimizer, "train_state": progress}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    state = {name: loaded[name] for name in state}
    assert (int(loaded["train_state"]["step"]), int(loaded["train_state"]["ntokens_seen"])) == (5, 70)
    optimizer = loaded["optimizer"]
    for name in state:  # as growth asks: the factor of its group is in it
        assert optimizer[f"param_groups.{name}.lr"] == (1e-3 if "norm" in name else 5e-4)
    assert {float(optimizer[f"state.{name}.step"]) for name in state} == {5.0}

    model = tiny_model(tie_word_embeddings=False)
    source = Trained(config=CONFIG)
    model.load_state_dict({name: read_tensor(source, name, "master") for name in source.infos}, strict=True)
    ids = torch.arange(5, 37)
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0].double()
    found = titan_logits({name: value.double() for name, value in state.items()}, ids)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3 * expected.abs().max())
    # Moments stand as their weights do: a query's row of torchtitan has the moment of the row that it came from.
    rows = read_tensor(source, "model.layers.1.self_attn.q_proj.weight", "master")
    moments = read_tensor(source, "model.layers.1.self_attn.q_proj.weight", "exp_avg")
    there = state["layers.1.attention.wq.weight"]
    order = [int((rows == row).all(1).nonzero()[0, 0]) for row in there]
    assert order[:4] == [0, HEAD // 2, 1, HEAD // 2 + 1]
    assert torch.equal(optimizer["state.layers.1.attention.wq.weight.exp_avg"], moments[order])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_we_write_is_read_back(tmp_path, tied):
    source = Trained(config=tiny_config(tie_word_embeddings=tied))
    found = open_checkpoint(written(tmp_path / "written", source))
    assert (found.groups, found.run) == (source.groups, source.run)
    for name, info in source.infos.items():
        assert (found.infos[name].group, found.infos[name].tied_to) == (info.group, info.tied_to)
        for slot in ("master", *MOMENTS) if info.tied_to is None else ():
            assert torch.equal(read_tensor(found, name, slot), read_tensor(source, name, slot)), name


def test_boxes_of_turned_rows_are_those_of_the_whole():
    view = TitanView(Trained(config=CONFIG))
    name = "layers.0.attention.wk.weight"
    whole = read_tensor(view, name)
    for start, stop in ((0, 16), (3, 4), (3, 5), (1, 15), (6, 11), (8, 9)):
        part = torch.empty(stop - start, 5)
        view.read(name, (slice(start, stop), slice(2, 7)), {"weight": part})
        assert torch.equal(part, whole[start:stop, 2:7])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "qwen3"}, "torchtitan's Llama 3 is of the llama family; this is a model of qwen3"),
        ({"head_dim": 16}, "4 heads of 16 do not make up hidden size 32"),
        ({"attention_bias": True}, "q_proj.bias: torchtitan's Llama 3 has no such tensor"),
    ],
)
def test_what_torchtitan_cannot_hold_is_not_written(tmp_path, changes, line):
    with pytest.raises(InputError, match=line):
        written(tmp_path / "written", Trained(config={**CONFIG, **changes}))
