"""Saves in the background on real ranks: what they write, how they fail, and what a kill leaves."""

import os
import re
import subprocess
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saver_runs import Group, dies, full, held_by, hindered, killed_at, largest_file, slow, write
from tiny import on_ranks, tiny_model

from checkpoint import manifest
from checkpoint.pickles import load_pickle
from parallel.errors import InputError
from parallel.ranks import ALONE
from train.buffers import HostBuffers
from train.checkpointing import ShardEngine, clear_after, newest
from train.engine import import_deepspeed
from train.parts import HashedFile, Part, write_shard
from train.saver import Saver

MODEL, OPTIM = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def test_copies_are_whole_tensors_of_their_own_in_buffers_that_are_used_again():
    flat = torch.arange(1000.0)
    weight = torch.nn.Parameter(torch.randn(3, 5))
    state = {
        "views": OrderedDict(first=flat[10:20], turned=flat[:12].view(3, 4).t(), tied=flat[10:20]),
        "list": [torch.tensor(7), weight, (torch.ones(3, dtype=torch.bfloat16), torch.empty(0, 4))],
        "object": SimpleNamespace(scale=2.0),
        "plain": {"lr": 0.1, "betas": (0.9, 0.95)},
    }
    buffers = HostBuffers()
    buffers.reserve(100)  # too few: more are added
    copy = buffers.copied(state)
    held = buffers.size
    expected = [flat[10:20].clone(), flat[:12].view(3, 4).t().clone(), weight.detach().clone()]
    flat.zero_()
    weight.data.zero_()
    state["plain"]["lr"], state["object"].scale = 0.2, 3.0
    assert torch.equal(copy["views"]["first"], expected[0])
    assert torch.equal(copy["views"]["turned"], expected[1])
    assert copy["views"]["tied"] is copy["views"]["first"]
    assert copy["views"]["first"].untyped_storage().nbytes() == 40
    assert torch.equal(copy["list"][1].detach(), expected[2])
    assert copy["list"][1].requires_grad
    assert copy["list"][0].item() == 7
    assert torch.equal(copy["list"][2][0], torch.ones(3, dtype=torch.bfloat16))
    assert copy["list"][2][1].shape == (0, 4)
    assert copy["plain"] == {"lr": 0.1, "betas": (0.9, 0.95)}
    assert copy["object"].scale == 2.0
    buffers.rewind()
    again = buffers.copied(state)
    assert buffers.size == held
    assert again["views"]["first"].data_ptr() == copy["views"]["first"].data_ptr()
    assert torch.equal(copy["views"]["first"], torch.zeros(10))


@pytest.mark.parametrize("size", [0, 1, manifest.BLOCK - 1, manifest.BLOCK, 2 * manifest.BLOCK + 3])
def test_checksums_taken_while_writing_are_those_of_the_file(tmp_path, size):
    path, data = tmp_path / "file", os.urandom(size)
    file = HashedFile(path)
    for at in range(0, size, 300_007):
        assert file.write(data[at : at + 300_007]) == len(data[at : at + 300_007])
    file.close()
    assert path.read_bytes() == data
    assert file.size == size
    assert file.hashes == manifest.block_hashes(path)


def test_a_shard_that_the_disk_does_not_take_is_one_line_and_leaves_nothing(tmp_path):
    path, part = tmp_path / "shard.pt", Part(save="a")
    with largest_file(100_000), pytest.raises(InputError, match=r"shard.pt: file too large while writing; nothing"):
        write_shard({"tensor": torch.ones(100_000)}, path, part)
    assert not path.exists()
    assert part == Part(save="a")
    with pytest.raises(InputError, match=r"none/shard.pt: not written \(No such file or directory\)"):
        write_shard({}, tmp_path / "none" / "shard.pt", part)


def deepspeed_engine(ranks, zero):
    """Return plain DeepSpeed's engine and its own checkpoint engine."""
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = tiny_model().train()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": zero == 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "name": "all"}], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    own = engine.checkpoint_engine
    return engine, own


def step(engine, ranks, number):
    ids = torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(2 * number + ranks.rank))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def save(engine, folder, tag):
    engine.save_checkpoint(str(folder), tag=tag, client_state={"tokens": 7}, save_latest=False)


def detach(engine, own):
    engine.checkpoint_engine = own
    for name in ("checkpoint_event_prologue", "checkpoint_event_epilogue"):
        vars(engine.optimizer).pop(name, None)


def in_the_background(ranks, folder):
    found = {}
    for zero in (2, 3):
        place = Path(folder) / str(zero)
        engine, own = deepspeed_engine(ranks, zero)
        step(engine, ranks, 0)
        save(engine, Path(folder) / "theirs", str(zero))
        ShardEngine(ranks).attach(engine)
        save(engine, Path(folder) / "now", str(zero))
        detach(engine, own)
        shards = ShardEngine(ranks, background=True, keep=3)
        shards.attach(engine)
        shards.files, shards.own_files = {"config.json": b"{}"}, {f"rng-{ranks.rank}": bytes([ranks.rank])}
        save(engine, place, "step-1")
        after = step(engine, ranks, 1)  # changes what was copied
        save(engine, place, "step-2")  # waits for the first
        first_is_there = manifest.is_complete(place / "step-1")
        outcomes = shards.settle()
        held = shards.saver.buffers.size
        # DeepSpeed's own engine reads what was written, and goes on as it went on.
        detach(engine, own)
        engine.load_checkpoint(str(place), tag="step-1")
        again = step(engine, ranks, 1)
        shards.attach(engine)
        save(engine, place, "step-3")
        outcomes += shards.settle()
        shards.saver.close()
        found[zero] = (outcomes, first_is_there, after, again, held, shards.saver.buffers.size)
        engine.destroy()
    return found


def same(one, other):
    """Return whether two saved states hold the same."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.requires_grad == other.requires_grad and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or type(one).__name__ == "_Stub" == type(other).__name__


def test_a_save_in_the_background_writes_what_a_synchronous_one_writes(tmp_path):
    ours, theirs = on_ranks(tmp_path, 2, in_the_background, str(tmp_path))
    for zero, (outcomes, first_is_there, after, again, held, released) in ours.items():
        place = tmp_path / str(zero)
        assert [outcome.folder.name for outcome in outcomes] == ["step-1", "step-2", "step-3"]
        assert all(outcome.complete and outcome.error is None for outcome in outcomes)
        assert outcomes == theirs[zero][0]
        assert first_is_there
        assert after == again
        assert 0 == released < held
        assert (place / "latest").read_text() == "step-3"
        assert sorted(path.name for path in place.iterdir()) == ["latest", "step-1", "step-2", "step-3"]  # keep: 3
        found = manifest.check(place / "step-3", deep=True)
        shards = {name: entry for name, entry in found["files"].items() if name.endswith("_states.pt")}
        assert outcomes[2].bytes == sum(entry["size"] for entry in shards.values()) + 2
        assert outcomes[2].record.keys() == {"blocked_s", "waited_s", "written_s", "bytes"}
        assert len(shards) == (4 if zero == 3 else 3)
        assert found["files"].keys() - shards.keys() == {"config.json", "rng-0", "rng-1"}
        assert (place / "step-3" / "rng-1").read_bytes() == b"\x01"
        assert not list((place / "step-3").glob(".*"))
        for name in shards:
            assert zipfile.ZipFile(place / "step-1" / name).testzip() is None
            written = load_pickle(place / "step-1" / name)
            assert same(written, load_pickle(tmp_path / "now" / str(zero) / name))
            # DeepSpeed writes no cut weights either, and tells what is a tensor to be trained.
            assert same(written, load_pickle(tmp_path / "theirs" / str(zero) / name))


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("save/model/1", "step-1"),
        ("save/optim/0", "step-1"),
        ("save/part/0", "step-1"),
        ("save/manifest", "step-1"),
        ("save/pointer", "step-2"),  # complete, and the pointer not yet moved
    ],
)
def test_a_kill_in_the_background_leaves_nothing_that_looks_complete_and_is_not(tmp_path, point, left):
    run, marker = tmp_path / "run", tmp_path / "reached"
    group = Group(tmp_path, killed_at, run, point, marker)
    while not marker.exists():
        time.sleep(0.01)
    group.kill()
    found, damaged = newest(run)
    assert damaged == []
    assert (run / "latest").read_text() == "step-1"
    assert found.name == left
    clear_after(run, found)
    assert {path.name for path in run.iterdir()} == {"latest", *(f"step-{n + 1}" for n in range(int(found.name[-1])))}
    assert (run / "latest").read_text() == found.name


def test_a_rank_that_dies_in_a_save_is_missed_at_the_deadline(tmp_path):
    run, marker = tmp_path / "run", tmp_path / "reached"
    group = Group(tmp_path, dies, run, marker)
    while not marker.exists():
        time.sleep(0.01)
    group.ranks[1].kill()
    outcome = group.result(0)
    assert not outcome.complete
    assert outcome.error == f"{run / 'step-2'}: the shard of rank 1 is not written after 1 s, which rank 0 waited"
    assert newest(run)[0] == run / "step-1"


def test_a_slow_rank_costs_its_save_and_the_run_goes_on(tmp_path):
    run = tmp_path / "run"
    ours, theirs = Group(tmp_path, slow, run).results()
    assert ours == theirs
    told, nothing = ours
    assert nothing == []
    still, *told = told
    assert re.search(r"step-2: rank (0, )?1 still writing after 0\.5 s$", still[2])
    assert told == [
        ("step-2", False, f"{run / 'step-2'}: the shard of rank 1 is not written after 0.5 s, which rank 0 waited"),
        ("step-3", False, f"{run / 'step-3'}: not saved, as step-2 is still being written"),
        ("step-4", True, None),
    ]
    assert held_by(run) == {"step-1": 1.0, "step-4": 4.0}
    assert not (run / "step-2").exists()


def test_what_one_rank_cannot_write_fails_the_save_on_all_and_leaves_the_old_ones(tmp_path):
    run = tmp_path / "run"
    ours, theirs = Group(tmp_path, hindered, run).results()
    assert ours[0] == theirs[0]
    why = "file too large while writing; nothing that was complete is lost"
    assert ours[0] == [
        ("step-2", False, f"{run / 'step-2' / 'rank-1_optim_states.pt'}: {why}"),
        ("step-3", False, f"{run / 'step-3' / 'large'}: {why}"),
        ("step-4", True, None),
    ]
    assert ours[1] == ["latest", "step-1"]
    assert held_by(run) == {"step-1": 1.0, "step-4": 4.0}
    assert (run / "latest").read_text() == "step-4"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_before_or_while_writing(tmp_path, background):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], check=True)
    try:
        (told, held), theirs = Group(tmp_path, full, disk, background).results()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert told == theirs[0]
    assert told[0].startswith(f"{disk / 'run' / 'step-0'}: no space left for a checkpoint (0.0006 GB, 0.000")
    assert told[1] == (
        f"{disk / 'run' / 'step-1' / 'large'}: no space left while writing; nothing that was complete is lost"
    )
    assert told[2:] == [None]
    assert held == {"step-2": 2.0}


def test_saving_alone_and_at_once_needs_no_buffers_and_raises(tmp_path):
    saver = Saver(ALONE, expected=10**6)
    write(saver, SimpleNamespace(rank=1), tmp_path / "run", 1)
    assert held_by(tmp_path / "run") == {"step-1": 1.0}
    assert saver.buffers.size == 0
    assert saver.finished() is None
    (outcome,) = saver.settle()
    assert (outcome.folder.name, outcome.complete, outcome.error) == ("step-1", True, None)
    with largest_file(100_000), pytest.raises(InputError, match=r"rank-1_optim_states\.pt: file too large"):
        write(saver, SimpleNamespace(rank=1), tmp_path / "run", 2, size=100_000)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"latest", "step-1"}
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/step-3: cannot be written \(Not a directory\)"):
        write(saver, SimpleNamespace(rank=1), tmp_path / "file", 3)
