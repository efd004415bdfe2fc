"""Optimizer state grown with the weights: real DeepSpeed runs, stopped, grown to other ranks, and gone on with."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from state_runs import HOW, STOP, run
from tiny import on_ranks

from checkpoint.open import open_checkpoint
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from upscale.factors import Recipe
from upscale.grow import grow
from upscale.state import Rule


def grown_to(small: Path, target: Path, ranks: int, **recipe: object) -> Path:
    source = open_checkpoint(small / "stop")
    write_checkpoint(grow(source, Recipe(width=2, **recipe)), target, Zero3Layout(ranks=ranks, bf16=source.bf16))
    return target


# By hand, for a factor of 2: (pattern, copies by dim, divisor of exp_avg, do copies of the last dim share a value?).
TABLE = {
    True: [
        (r"self_attn\.|mlp\.", (2, 2), 2, True),
        (r"embed_tokens", (1, 2), 2, False),
        (r"layernorm", (2,), 2, False),
        (r"^model\.norm", (2,), 1, True),
    ],
    False: [
        (r"self_attn\.|mlp\.", (2, 2), 2, True),
        (r"embed_tokens", (1, 2), 2, False),
        (r"lm_head", (1, 2), 1, True),
        (r"norm", (2,), 2, False),
    ],
}


@pytest.mark.parametrize(("precision", "tied"), [("float32", True), ("bfloat16", False)])
def test_moments_follow_the_formula_element_by_element(tmp_path, precision, tied):
    on_ranks(tmp_path, 2, run, None, str(tmp_path), 0, STOP, precision, tie_word_embeddings=tied)
    small = open_checkpoint(tmp_path / "stop")
    grown = open_checkpoint(grown_to(tmp_path, tmp_path / "grown", 3, state="scaled"))
    assert (grown.run.step, grown.run.tokens) == (STOP, 7)
    assert {group.step for group in grown.groups.values()} == {STOP}
    checked = 0
    for name, info in grown.infos.items():
        if info.tied_to is not None:
            continue
        copies, divisor, shared = next(row[1:] for row in TABLE[tied] if re.search(row[0], name))
        first, second = read_tensor(small, name, "exp_avg"), read_tensor(small, name, "exp_avg_sq")
        assert torch.equal(read_tensor(grown, name, "exp_avg"), first.repeat(copies) / divisor), name
        assert torch.equal(read_tensor(grown, name, "exp_avg_sq"), second.repeat(copies) / divisor**2), name
        assert second.sum() > 0
        # The master is grown from the master: its shares add up to it, beyond what the weight's dtype holds.
        master, whole = read_tensor(grown, name, "master"), read_tensor(small, name, "master")
        if shared:
            added = master.double().unflatten(-1, (2, -1)).sum(-2)
            wanted = whole.repeat(*copies[:-1], 1).double()
            rounding = 1e-7 if precision == "float32" else 2**-9
            torch.testing.assert_close(added, wanted, rtol=rounding, atol=1e-9)
        else:
            assert torch.equal(master, whole.repeat(copies))
        assert torch.equal(read_tensor(grown, name, dtype=torch.bfloat16), master.bfloat16())
        checked += 1
    assert checked == (20 if tied else 21)


def test_asymmetric_reset_keeps_the_state_of_the_first_copy_alone(tmp_path):
    on_ranks(tmp_path, 1, run, None, str(tmp_path), 0, STOP)
    source = open_checkpoint(tmp_path / "stop")
    name = "model.layers.0.mlp.up_proj.weight"
    for slot, divisor in (("exp_avg", 2), ("exp_avg_sq", 4)):
        found = read_tensor(grow(source, Recipe(width=2, state="asymmetric")), name, slot).view(2, 48, 2, 32)
        assert torch.equal(found[0, :, 0], read_tensor(source, name, slot) / divisor)
        assert not found[1].any()
        assert not found[0, :, 1].any()


def test_the_grown_run_goes_on_as_the_small_one_would(tmp_path, monkeypatch):
    """2 ranks, two groups, weight decay, clipping active; grown symmetrically to 3 ranks; losses 2 to 50."""
    last = STOP + 50
    (small, norms), _ = on_ranks(tmp_path, 2, run, None, str(tmp_path), 0, last)
    assert min(norms[STOP:]) > HOW.clip  # clipping is active all the time
    assert small[-1] < small[STOP] - 0.5

    def goes_on(name, dynamics="preserve", end=STOP + 8, **recipe):
        folder = grown_to(tmp_path, tmp_path / name, 3, method="symmetric", **recipe)
        losses = on_ranks(tmp_path, 3, run, str(folder), None, STOP, end, "float32", dynamics)[0][0]
        return max(abs(ours - theirs) for ours, theirs in zip(losses, small[STOP:end], strict=True))

    assert goes_on("scaled", end=last, state="scaled") <= 1e-5
    # Without the state, without its divisors, without the factors it is another run.
    assert goes_on("reset", state="reset") > 1e-3
    assert goes_on("free", dynamics="free", state="scaled") > 1e-3
    assert goes_on("mup", dynamics="mup", state="scaled") > 1e-5
    monkeypatch.setattr(Rule, "divisor", lambda self, slot: 1)
    assert goes_on("undivided", state="scaled") > 1e-3


def test_a_grown_gemma_goes_on_as_the_small_one_would(tmp_path):
    """Its residual stream is sqrt(2) times as large: norms of what is added to it are, too, and so are their steps."""
    last = STOP + 12
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 1}
    (small, norms), _ = on_ranks(tmp_path, 2, run, None, str(tmp_path), 0, last, **gemma)
    assert min(norms[STOP:]) > HOW.clip
    folder = grown_to(tmp_path, tmp_path / "grown", 3, method="symmetric", state="scaled")
    losses = on_ranks(tmp_path, 3, run, str(folder), None, STOP, last, "float32", "preserve")[0][0]
    assert losses == pytest.approx(small[STOP:], abs=1e-5)
    grown, source = open_checkpoint(folder), open_checkpoint(tmp_path / "stop")
    name = "model.layers.0.post_attention_layernorm.weight"
    before, after = (read_tensor(each, name, "exp_avg").double() for each in (source, grown))
    torch.testing.assert_close(after, before.repeat(2) / 2**1.5, rtol=1e-6, atol=0)


def test_factors_compose_when_a_grown_run_is_grown_again(tmp_path):
    on_ranks(tmp_path, 1, run, None, str(tmp_path), 0, STOP)
    source = open_checkpoint(tmp_path / "stop")
    once = grow(source, Recipe(width=2, state="scaled"))
    twice = grow(once, Recipe(width=3, state="scaled"))
    group = twice.groups[twice.infos["model.layers.0.mlp.up_proj.weight"].group]
    assert (group.lr_factor, group.weight_decay_factor, group.eps_factor) == pytest.approx((1 / 6, 6, 1 / 6))
    assert group.norm_weight == pytest.approx(1)
    embedding = twice.groups[twice.infos["model.embed_tokens.weight"].group]
    assert (embedding.lr_factor, embedding.eps_factor, embedding.norm_weight) == pytest.approx((1, 1 / 6, 6))
    norm = twice.groups[twice.infos["model.norm.weight"].group]
    assert (norm.lr_factor, norm.eps_factor, norm.norm_weight) == pytest.approx((1 / 6, 1, 1 / 6))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.allclose(
        read_tensor(twice, name, "exp_avg"), read_tensor(source, name, "exp_avg").repeat(6, 6) / 6, rtol=1e-6, atol=0
    )
    # What is written keeps the factors, and what reads it has the group's own values.
    write_checkpoint(twice, tmp_path / "twice", Zero3Layout(ranks=2))
    again = open_checkpoint(tmp_path / "twice").groups
    assert list(again) == list(twice.groups)
    for name, group in twice.groups.items():
        assert again[name].betas == group.betas
        assert asdict(replace(again[name], betas=0)) == pytest.approx(asdict(replace(group, betas=0))), name
    assert twice.groups[twice.infos["model.embed_tokens.weight"].group].weight_decay == pytest.approx(0.1)
