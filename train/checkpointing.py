"""Our checkpoint engine for DeepSpeed: shards synced, the manifest last, then the pointer.

DeepSpeed's own engines write `latest` before all shards exist and unpickle freely (reference: DeepSpeed 0.19,
engine.py). This one is set on the running engine and gets create, save, save, commit for every checkpoint.
"""

import functools
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from checkpoint import manifest
from checkpoint.files import write_bytes
from checkpoint.shard import STATE_SLOTS, Topology, numel, part_size
from parallel.errors import InputError
from parallel.ranks import Ranks
from train.parts import POINTER, delete
from train.saver import PATIENCE_S, Outcome, Saver

READERS = 8
"""Threads that read a checkpoint, at least: what a network file system gives grows with the requests."""


def shard_bytes(topology: Topology) -> int:
    """Return the bytes that a rank's shards of ZeRO-3 take: master weights and moments in float32, some beside."""
    tensors = [shape for sub_group in topology.sub_groups for _, shape in sub_group.tensors]
    elements = sum(part_size(numel(shape), topology.ranks) for shape in tensors)
    return 4 * len(STATE_SLOTS) * elements + 2**20


def file_bytes(elements: int, *, zero: int, ranks: int, width: int, first: bool) -> int:
    """Return the bytes that a rank's files take with ZeRO 0 to 2: its part of the optimizer's state, all weights once.

    Args:
        elements: of the weights that this rank computes with.
        ranks: that ZeRO cuts over.
        width: bytes of a weight.
        first: whether this is the rank of them that writes the weights, and with ZeRO-0 all there is.
    """
    weights = width * elements if first else 0
    state = 4 * len(STATE_SLOTS) * -(-elements // ranks) if zero else 8 * elements * first  # ZeRO-0: no masters
    return weights + state + 2**20


class ShardEngine(CheckpointEngine):
    """Writes this rank's shards and, when all ranks have theirs, the manifest and the pointer."""

    def __init__(
        self,
        ranks: Ranks,
        *,
        background: bool = False,
        expected: int = 0,
        patience_s: float = PATIENCE_S,
        keep: int | None = None,
        every: int | None = None,
    ) -> None:
        """Make the engine, and in the background the buffers that it copies into.

        Args:
            background: a save copies and returns, and `settle` tells how it ended; otherwise it returns when the
                checkpoint is complete, and raises if it is not.
            expected: bytes of this rank's shards (`shard_bytes`, `file_bytes`), as far as they are known.
            patience_s: see `train.saver.PATIENCE_S`.
            keep: with it a complete checkpoint has the older ones pruned, in the background too.
            every: see `prune`.
        """
        super().__init__()
        self.name = "growmerge"
        self.files: dict[str, bytes] = {}
        """Small files of a checkpoint, of rank 0."""
        self.own_files: dict[str, bytes] = {}
        """Small files of a checkpoint that this rank alone has; no other may have one of the same name."""
        self.expected = expected
        self._ranks = ranks
        self._weights_cut = False
        self.saver = Saver(
            ranks,
            background=background,
            expected=expected,
            patience_s=patience_s,
            published=lambda folder: None if keep is None else prune(folder.parent, keep, every),
        )

    def attach(self, engine: Any) -> None:
        """Set this on DeepSpeed's engine, which is filled already and then saves through it."""
        engine.checkpoint_engine = self
        engine._copy_recovery_script = lambda *_: None
        self._weights_cut = engine.zero_optimization_partition_weights()
        if self._weights_cut:
            # Around a save DeepSpeed cuts the parameters that every rank holds whole, and gathers them anew. A save
            # needs none of it, and it took twice as long as copying.
            engine.optimizer.checkpoint_event_prologue = lambda: None
            engine.optimizer.checkpoint_event_epilogue = lambda: None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: `create` makes the one folder, and an error of one rank alone would leave the others waiting."""

    def preserves_storage_sharing(self) -> bool:
        """Return whether DeepSpeed has to clone what is a view of something larger; a copy is none."""
        return not self.saver.background

    def create(self, info: Any) -> None:
        self.saver.begin(Path(info.save_dir) / info.tag)

    def save(self, state_dict: Any, path: str) -> None:
        if self._weights_cut and state_dict.get("module") is not None:
            # The weights are those of the master copies; a rank that holds some whole is not to write them.
            buffers = set(state_dict["buffer_names"])
            module = type(state_dict["module"])(
                (name, tensor if name in buffers else tensor.new_empty(0))
                for name, tensor in state_dict["module"].items()
            )
            state_dict = {**state_dict, "module": module}
        self.saver.add(state_dict, Path(path))

    def commit(self, info: Any) -> bool:
        self.saver.commit(self.files, self.own_files)
        return True

    def settle(self) -> list[Outcome]:
        """Return how the saves since the last call ended; all ranks together, see `Saver.settle`."""
        return self.saver.settle()

    def finished(self) -> Outcome | None:
        """Return what this rank alone knows of the last save, see `Saver.finished`."""
        return self.saver.finished()

    def load(self, path: str, map_location: Any = None) -> Any:
        """Refuse: a live engine is filled from a Source (`train.fill`), and nothing unpickles for it."""
        raise AssertionError(f"{path}: DeepSpeed was asked to load it")


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest sound checkpoint of a run's folder, and a line for each damaged one that was passed over.

    Every byte is read and compared: a resume is rare, and a flipped bit would be trained on for weeks.
    """
    damaged: list[str] = []
    if folder.is_dir():
        for path in sorted((path for path in folder.iterdir() if manifest.is_complete(path)), reverse=True):
            try:
                _check_blocks(path, manifest.check(path))
                return path, damaged
            except InputError as error:
                damaged.append(str(error))
    return None, damaged


def _check_blocks(folder: Path, found: Mapping[str, Any]) -> None:
    """Compare all blocks of all files with a manifest whose sizes are right, by several threads.

    Raises:
        InputError: a file is damaged, or the manifest is.
    """
    buffers = threading.local()
    with ThreadPoolExecutor(max_workers=max(READERS, os.cpu_count() or 1)) as pool:
        for name, entry in found["files"].items():
            said = entry.get("xxh3")
            blocks = range(-(-entry["size"] // manifest.BLOCK))
            if not isinstance(said, list) or len(said) != len(blocks):
                raise InputError(f"{folder / manifest.NAME}: damaged (not every block of {name} has a checksum)")
            with (folder / name).open("rb") as file:
                for number, digest in enumerate(pool.map(functools.partial(_block_of, file.fileno(), buffers), blocks)):
                    if digest != said[number]:
                        line = f"damaged (checksum of block {number} differs from {manifest.NAME})"
                        raise InputError(f"{folder / name}: {line}")


def _block_of(handle: int, buffers: threading.local, number: int) -> str:
    if not hasattr(buffers, "own"):
        buffers.own = bytearray(manifest.BLOCK)
    count = os.preadv(handle, [buffers.own], number * manifest.BLOCK)
    return manifest.block_hash(memoryview(buffers.own)[:count])


def clear_after(folder: Path, found: Path | None) -> None:
    """Delete what lies above the checkpoint that a run resumes from: damaged ones, and what a kill left unfinished."""
    if found is not None:
        write_bytes(folder / POINTER, found.name.encode())
    else:
        (folder / POINTER).unlink(missing_ok=True)
    for path in _checkpoints(folder):
        if found is None or path.name > found.name:
            delete(path)


def prune(folder: Path, keep: int, every: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, the pointer's, and those whose step is a multiple of `every`.

    An unfinished one above the newest is being written, and stays; below it, a kill left it.
    """
    complete = [path for path in _checkpoints(folder) if manifest.is_complete(path)]
    pointer = folder / POINTER
    named = pointer.read_text().strip() if pointer.is_file() else ""
    kept = {path.name for path in complete if every and _step(path) % every == 0} | {named}
    kept |= {path.name for path in complete[-keep:]}
    for path in _checkpoints(folder):
        if path.name not in kept and complete and path.name < complete[-1].name:
            delete(path)


def _step(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
