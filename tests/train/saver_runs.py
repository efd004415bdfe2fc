"""Savers alone on real ranks, without DeepSpeed: a group of them starts in a second."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import torch

from checkpoint import manifest
from checkpoint.pickles import load_pickle
from parallel import faults
from parallel.errors import InputError
from parallel.ranks import connect
from train import saver as saver_module
from train.parts import write_shard
from train.saver import Saver

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed", "train.saver"])


def _rank(rank, world, rendezvous, body, given):
    torch.set_num_threads(1)
    ranks = connect(rank, world, rendezvous=Path(rendezvous))
    torch.save(body(ranks, *given), f"{rendezvous}.{rank}")
    os._exit(0)


class Group:
    """Ranks that run `body(ranks, *given)`."""

    def __init__(self, folder, body, *given, world=2):
        self._rendezvous = str(folder / f"meet-{len(list(folder.iterdir()))}")
        self.ranks = [
            FORKS.Process(target=_rank, args=(rank, world, self._rendezvous, body, given)) for rank in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def result(self, rank):
        self.ranks[rank].join()
        return torch.load(f"{self._rendezvous}.{rank}", weights_only=False)

    def results(self):
        return [self.result(rank) for rank in range(len(self.ranks))]

    def kill(self):
        for rank in self.ranks:
            os.kill(rank.pid, signal.SIGSTOP)  # none may notice that another is gone
        for rank in self.ranks:
            rank.kill()
            rank.join()


class largest_file:
    """Let this process write no file longer than so many bytes, as a quota of a user would."""

    def __init__(self, size):
        self._size = size

    def __enter__(self):
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def write(saver, ranks, folder, number, size=1000, files=None):
    """Save a checkpoint whose tensors are full of its number."""
    place = folder / f"step-{number}"
    saver.begin(place)
    saver.add({"number": number}, place / f"rank-{ranks.rank}_model_states.pt")
    saver.add({"flat": torch.full((size,), float(number))}, place / f"rank-{ranks.rank}_optim_states.pt")
    saver.commit(files or {"config.json": b"{}"}, {})


def held_by(folder):
    return {
        path.name: float(load_pickle(path / "rank-1_optim_states.pt")["flat"][-1])
        for path in sorted(folder.iterdir())
        if manifest.is_complete(path)
    }


def killed_at(ranks, folder, point, marker):
    saver = Saver(ranks, background=True)
    write(saver, ranks, folder, 1)
    saver.settle()
    os.environ[faults.VARIABLE] = f"{marker}:{point}"
    write(saver, ranks, folder, 2)
    saver.settle()
    time.sleep(60)


def dies(ranks, folder, marker):
    patient, saver = Saver(ranks, background=True), Saver(ranks, background=True, patience_s=1)
    write(patient, ranks, folder, 1)
    patient.settle()
    os.environ[faults.VARIABLE] = f"{marker}:save/optim/1"
    write(saver, ranks, folder, 2)
    if ranks.rank == 1:
        time.sleep(60)
    while saver.finished() is None:
        time.sleep(0.01)
    return saver.finished()


def slow(ranks, folder):
    """Rank 1 takes longer than rank 0 waits, and longer than the next save waits for it."""
    if ranks.rank == 1:

        def late(state, path, part):
            if "step-2" in str(path) and "optim" in path.name:
                time.sleep(3)
            write_shard(state, path, part)

        saver_module.write_shard = late
    patient, saver = Saver(ranks, background=True), Saver(ranks, background=True, patience_s=0.5)
    write(patient, ranks, folder, 1)
    patient.settle()
    write(saver, ranks, folder, 2)
    told = saver.settle()
    write(saver, ranks, folder, 3)  # finds the buffers of rank 1 in use
    while saver.finished() is None:
        time.sleep(0.01)
    ranks.barrier()
    told += saver.settle()
    write(patient, ranks, folder, 4)
    told += patient.settle()
    return [(outcome.folder.name, outcome.complete, outcome.error) for outcome in told], saver.settle()


def hindered(ranks, folder):
    saver = Saver(ranks, background=True)
    write(saver, ranks, folder, 1)
    saver.settle()
    told = []
    with largest_file(100_000 if ranks.rank == 1 else 10**9):
        write(saver, ranks, folder, 2, size=100_000)
        told += saver.settle()
    left = sorted(path.name for path in folder.iterdir())
    # Of rank 0 alone, after its shard.
    with largest_file(100_000 if ranks.rank == 0 else 10**9):
        write(saver, ranks, folder, 3, files={"large": bytes(10**6)})
        told += saver.settle()
    write(saver, ranks, folder, 4, size=100_000)
    told += saver.settle()
    return [(outcome.folder.name, outcome.complete, outcome.error) for outcome in told], left


def full(ranks, disk, background):
    saver = Saver(ranks, background=background, expected=300_000)
    folder, told = disk / "run", []
    for number, (size, files) in enumerate([(100_000, None), (10_000, {"large": bytes(2 * 10**6)}), (1_000, None)]):
        if number == 1:  # looks as if there were room, and there is none for all of it
            saver = Saver(ranks, background=background)
        try:
            write(saver, ranks, folder, number, size=size, files=files)
        except InputError as error:
            told.append(str(error))
        told += [outcome.error for outcome in saver.settle()]
    return told, held_by(folder)
