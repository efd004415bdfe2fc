"""Every format that is written, to every other and back: nothing is lost of what both hold, whatever cuts them."""

import os
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import pytest
import torch
from tiny import tiny_config
from trained import Trained

from checkpoint.open import open_checkpoint
from checkpoint.source import Group, RunState, Source, WithoutState, read_tensor
from checkpoint.writer import write_checkpoint
from growmerge.convert import (
    LAYOUTS,
    PIPELINED,
    TENSOR_PARALLEL,
    WEIGHTS_ALONE,
    Target,
    convert_checkpoint,
    record_of,
)

MODELS = {"untied": {"tie_word_embeddings": False}, "tied": {"tie_word_embeddings": True}}
GROUPS = {
    "decay": Group(lr=1e-3, weight_decay=0.25, betas=(0.9, 0.95), step=5),
    "no_decay": Group(lr=2e-3, betas=(0.8, 0.99), eps=1e-6, step=5),
}
OURS = ("zero3", "pipeline", "universal", "dcp")
"""Those in which all that a run of ours knows has a place."""
PAIRS = [*permutations(LAYOUTS, 2)]


def target(folder, kind):
    """Return where a checkpoint goes: cut over as many ranks of each kind as the format has."""
    return Target(
        folder=folder,
        format=kind,
        ranks=3,
        tensor_ranks=2 if kind in TENSOR_PARALLEL else 1,
        stages=2 if kind in PIPELINED else 1,
        workers=1,
    )


def held(source: Source):
    """Return every tensor of every slot, in the dtype that it is stored in."""
    return {
        name: {slot: read_tensor(source, name, slot, dtype) for slot, dtype in info.slots.items()}
        for name, info in source.infos.items()
        if info.tied_to is None
    }


def groups_of(source: Source):
    """Return the group of each tensor; other tools call groups otherwise."""
    return {name: source.groups[info.group] for name, info in source.infos.items() if info.tied_to is None}


def run_of(source: Source):
    run = source.run
    return RunState(step=run.step, tokens=run.tokens, samples=run.samples, seed=run.seed), dict(source.groups)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint that is converted, and what it holds."""

    folder: str
    hash: str
    source: Source
    held: dict


@pytest.fixture(scope="module", autouse=True)
def no_syncing():
    """Thousands of small files are written, and no machine is switched off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(os, "fdatasync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def start_of(tmp_path_factory):
    @cache
    def start(model, kind):
        config = tiny_config(vocab_size=132, **MODELS[model])
        source = Trained(config=config, groups=GROUPS)
        source = WithoutState(source) if kind in WEIGHTS_ALONE else source
        folder = tmp_path_factory.mktemp("start") / kind
        digest = write_checkpoint(source, folder, LAYOUTS[kind](source, target(folder, kind)))
        opened = open_checkpoint(folder)
        return Start(folder=folder, hash=digest, source=opened, held=held(opened))

    return start


@pytest.mark.parametrize("model", ["untied", pytest.param("tied", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("first", "second"), [pytest.param(*pair, id="-".join(pair)) for pair in PAIRS])
def test_there_and_back_nothing_is_lost(start_of, tmp_path, model, first, second):
    start = start_of(model, first)
    convert_checkpoint(start.folder, target(tmp_path / "there", second))
    convert_checkpoint(tmp_path / "there", target(tmp_path / "back", first))
    found = open_checkpoint(tmp_path / "back")
    alone = {first, second} & {*WEIGHTS_ALONE}
    assert list(found.infos) == list(start.source.infos)
    for name, slots in start.held.items():
        for slot, tensor in slots.items():
            if slot == "weight" or not alone:
                assert found.infos[name].slots[slot] == tensor.dtype, (name, slot)
                assert torch.equal(read_tensor(found, name, slot, tensor.dtype), tensor), (name, slot)
    if not alone:
        assert groups_of(found) == groups_of(start.source)
        assert {group.step for group in found.groups.values()} == {5}
    if not alone and {first, second} <= {*OURS}:
        assert run_of(found) == run_of(start.source)
    if first in WEIGHTS_ALONE or (not alone and run_of(found) == run_of(start.source)):
        assert record_of(tmp_path / "back")["hash"] == start.hash  # byte for byte


def test_the_slots_of_an_optimizer_are_among_what_is_compared(start_of):
    for kind in {*LAYOUTS} - {*WEIGHTS_ALONE}:
        slots = start_of("untied", kind).held["model.norm.weight"]
        assert {"exp_avg", "exp_avg_sq"} <= slots.keys(), kind
        assert not torch.equal(slots["exp_avg"], slots["exp_avg_sq"])
