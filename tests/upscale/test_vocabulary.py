"""Rows for a new vocabulary: kept rows to the bit, means against numpy, every slot, any box, any layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_config

from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import SLOTS, RunState, Wrapped, box_shape, read_tensor
from checkpoint.writer import write_checkpoint
from checkpoint.zero3_layout import Zero3Layout
from parallel.errors import InputError
from upscale.vocabulary import rows_of, with_vocabulary

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PIECES = [[5], [0], [130, 2, 2, 7], [], [3, 4], *[[number] for number in range(20, 120)], [9, 8, 7], [0], [129]]


class AllSlots(Wrapped):
    """A model from scratch with random masters and moments; its weights are the masters, rounded."""

    dtype = torch.float32

    @property
    def infos(self):
        slots = {"weight": self.dtype, **dict.fromkeys(SLOTS[1:], torch.float32)}
        return {name: replace(info, slots={} if info.tied_to else slots) for name, info in self.source.infos.items()}

    @property
    def run(self):
        return RunState(step=5, tokens=70, provenance={"name": "trained", "hash": "abc", "ancestors": ["root"]})

    def read(self, name, box, out, stats=None):
        for slot, target in out.items():
            number = SLOTS.index("master" if slot == "weight" else slot)
            draw = torch.Generator().manual_seed(4 * list(self.infos).index(name) + number)
            values = torch.randn(self.infos[name].shape, generator=draw)[box]
            target.copy_(values.to(self.dtype) if slot == "weight" else values)


def trained(dtype=torch.float32, **changes):
    return {torch.float32: AllSlots, torch.bfloat16: Rounded}[dtype](
        ScratchSource(config=tiny_config(**changes), seed=1)
    )


class Rounded(AllSlots):
    """The same of a bfloat16 run."""

    dtype = torch.bfloat16


def means(values: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Each row by numpy, piece after piece in float32."""
    old = values.float().numpy()
    rows = []
    for row in PIECES:
        total = np.zeros(old.shape[1], dtype=np.float32)
        for piece in row:
            total += old[piece]
        rows.append(total / np.float32(len(row)) if row else empty.numpy())
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_slot_of_every_row(tied, dtype):
    source = trained(dtype, tie_word_embeddings=tied)
    found = with_vocabulary(source, rows_of(PIECES))
    assert found.config == {**source.config, "vocab_size": len(PIECES)}
    kept = torch.tensor([len(row) == 1 for row in PIECES])
    first = [row[0] if row else 0 for row in PIECES]
    for name in [EMBED] if tied else [EMBED, HEAD]:
        assert found.infos[name].shape == (len(PIECES), 32)
        old = {slot: read_tensor(source, name, slot) for slot in SLOTS}
        new = {slot: read_tensor(found, name, slot, found.infos[name].slots[slot]) for slot in SLOTS}
        master = means(old["master"], old["master"].double().mean(0).float())
        assert torch.equal(new["master"], master)
        assert torch.equal(new["weight"][kept].float(), old["weight"][first][kept])
        assert torch.equal(new["weight"][~kept], master[~kept].to(dtype))
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new[slot], old[slot][first] * kept[:, None])
        assert new["exp_avg"][kept].abs().min() > 0
    if tied:
        assert found.infos[HEAD].tied_to == EMBED and found.infos[HEAD].shape == (len(PIECES), 32)
    others = [name for name in source.infos if name not in (EMBED, HEAD)]
    assert all(torch.equal(read_tensor(found, name), read_tensor(source, name)) for name in others)
    assert all(found.infos[name] == source.infos[name] for name in others)
    assert (found.groups, found.run.step) == (source.groups, source.run.step)


def test_any_box_is_that_part_of_the_whole():
    found = with_vocabulary(trained(torch.bfloat16), rows_of(PIECES))
    stats = found.collect(EMBED, map)
    draw = np.random.default_rng(0)
    whole = {slot: read_tensor(found, EMBED, slot) for slot in SLOTS}
    for _ in range(60):
        (top, bottom), (left, right) = (sorted(draw.choice(size + 1, 2, replace=False)) for size in (len(PIECES), 32))
        box = (slice(int(top), int(bottom)), slice(int(left), int(right)))
        for given in (stats, None):
            out = {slot: torch.empty(box_shape(box)) for slot in draw.permutation(SLOTS)[: draw.integers(1, 5)]}
            found.read(EMBED, box, out, given)
            assert all(torch.equal(values, whole[slot][box]) for slot, values in out.items())


def test_only_the_rows_that_are_needed_are_read():
    asked = []

    class Watched(Wrapped):
        def read(self, name, box, out, stats=None):
            asked.append((name, box, set(out)))
            super().read(name, box, out, stats)

    found = with_vocabulary(Watched(trained()), rows_of([[7], [8], [9], [40, 60], [41]]))
    assert found.collect(EMBED, map) == (None, None) and not asked  # no row is the mean of all
    found.read(EMBED, (slice(1, 5), slice(4, 9)), {"weight": torch.empty(4, 5)})
    columns = slice(4, 9)
    assert asked == [
        (EMBED, (slice(8, 10), columns), {"weight", "master"}),
        (EMBED, (slice(40, 42), columns), {"weight", "master"}),
        (EMBED, (slice(60, 61), columns), {"weight", "master"}),
    ]
    asked.clear()
    found.read("model.norm.weight", (slice(0, 3),), {"weight": torch.empty(3)})
    assert asked == [("model.norm.weight", (slice(0, 3),), {"weight"})]


def test_padding_is_the_mean_of_all_rows():
    source = trained()
    rows = rows_of([[1], [2, 3], [4]], multiple=8)
    assert rows.pieces == ((1,), (2, 3), (4,), (), (), (), (), ())
    new = read_tensor(with_vocabulary(source, rows), EMBED)
    mean = read_tensor(source, EMBED).double().mean(0).float()
    assert torch.equal(new[3:], mean.expand(5, -1))
    assert rows_of([[1], [2]], multiple=2).pieces == ((1,), (2,))


@pytest.mark.parametrize("workers", [1, 3])
def test_written_and_read_again(tmp_path, workers):
    source = with_vocabulary(
        trained(torch.bfloat16), rows_of(PIECES, multiple=64, config={"eos_token_id": 4}, about={"init": "mean"})
    )
    write_checkpoint(source, tmp_path / "zero", Zero3Layout(ranks=3, bf16=True), workers=workers)
    write_checkpoint(source, tmp_path / "hf", SafetensorsLayout(), workers=workers, about=source.run.provenance)
    zero, plain = open_checkpoint(tmp_path / "zero"), open_checkpoint(tmp_path / "hf")
    assert (plain.config["vocab_size"], plain.config["eos_token_id"]) == (128, 4)
    assert plain.run.provenance["verb"] == "vocabulary" and plain.run.provenance["recipe"] == {"init": "mean"}
    for name, info in source.infos.items():
        if info.tied_to is None:
            weight = read_tensor(source, name, dtype=torch.bfloat16)
            assert torch.equal(read_tensor(plain, name, dtype=torch.bfloat16), weight)
            for slot in SLOTS[1:]:
                assert torch.equal(read_tensor(zero, name, slot), read_tensor(source, name, slot))


def test_descent_and_weights_alone():
    scratch = ScratchSource(config=tiny_config(), seed=1)
    found = with_vocabulary(scratch, rows_of(PIECES))
    old = read_tensor(scratch, EMBED)
    assert set(found.infos[EMBED].slots) == {"weight"}
    assert torch.equal(read_tensor(found, EMBED), means(old, old.double().mean(0).float()))
    run = with_vocabulary(trained(), rows_of(PIECES, about={"init": "mean"})).run
    assert (run.step, run.tokens) == (5, 70)
    assert run.provenance == {
        "verb": "vocabulary",
        "recipe": {"init": "mean"},
        "parents": [{"name": "trained", "hash": "abc"}],
        "ancestors": ["abc", "root"],
    }


def test_bad_input():
    with pytest.raises(InputError) as error:
        with_vocabulary(trained(), rows_of([[3], [131, 2]]))
    assert str(error.value) == "the old tokenizer has a token 131, but the model's vocabulary has 131 entries"
    with pytest.raises(InputError) as error:
        rows_of([[3]], multiple=0)
    assert str(error.value) == "rows padded to a multiple of 0: allowed are whole numbers from 1 on"
