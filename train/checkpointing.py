"""Our checkpoint engine for DeepSpeed: shards synced, the manifest last, then the pointer; loads served from a Source.

DeepSpeed's own engines write `latest` before all shards exist and unpickle freely (reference: DeepSpeed 0.19,
engine.py). This one is set on the running engine and gets create, save, save, commit for every checkpoint.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from checkpoint import manifest
from checkpoint.files import disk_errors, write_bytes
from checkpoint.shard import Topology, read_shard
from checkpoint.source import Source
from parallel.errors import InputError
from parallel.faults import point
from parallel.ranks import Ranks

POINTER = "latest"


class ShardEngine(CheckpointEngine):
    """Writes this rank's shards and, when all ranks have theirs, the manifest and the pointer."""

    def __init__(self, topology: Topology, ranks: Ranks) -> None:
        super().__init__()
        self.name = "growmerge"
        self.files: dict[str, bytes] = {}
        self._topology = topology
        self._ranks = ranks
        self._source: Source | None = None
        self._engine: Any = None
        self._error: InputError | None = None

    @contextlib.contextmanager
    def serving(self, source: Source, engine: Any) -> Iterator[None]:
        """Let DeepSpeed's next load come from a source instead of files."""
        self._source, self._engine = source, engine
        try:
            yield
        finally:
            self._source = self._engine = None

    def create(self, info: Any) -> None:
        self._error = None
        if self._ranks.first:
            # What an interrupted save left behind: without a manifest it is no checkpoint.
            shutil.rmtree(Path(info.save_dir) / info.tag, ignore_errors=True)
        self._ranks.barrier()

    def save(self, state_dict: Any, path: str) -> None:
        target = Path(path)
        try:
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
        except InputError as error:
            self._error = error  # every rank has to get to commit, where all learn of it
        kind = "optim" if "optim_states" in target.name else "model"
        point(f"save/{kind}/{self._ranks.rank}")

    def commit(self, info: Any) -> bool:
        errors = [error for error in self._ranks.gather(str(self._error) if self._error else None) if error]
        folder = Path(info.save_dir) / info.tag
        if not errors:
            errors = [error for error in [self._ranks.broadcast(self._publish(folder))] if error]
        if errors:
            if self._ranks.first:
                shutil.rmtree(folder, ignore_errors=True)
            raise InputError(errors[0])
        return True

    def _publish(self, folder: Path) -> str | None:
        """Write what is written once, manifest and pointer last; return what went wrong, if something did."""
        if not self._ranks.first:
            return None
        try:
            for name, data in self.files.items():
                write_bytes(folder / name, data)
            point("save/manifest")
            manifest.write_manifest(folder)
            point("save/pointer")
            write_bytes(folder.parent / POINTER, folder.name.encode())
        except InputError as error:
            return str(error)
        return None

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return what DeepSpeed would have found in the file, made from the source for this rank."""
        assert self._source is not None and self._engine is not None, "a load outside serving()"
        if "optim_states" not in Path(path).name:
            return self._model_states()
        return {"optimizer_state_dict": self._optim_states()}

    def _model_states(self) -> dict[str, Any]:
        source, engine = self._source, self._engine
        assert source is not None
        return {
            "module": {name: torch.empty(0) for name in engine.module.state_dict()},
            "dp_world_size": self._topology.ranks,
            "mp_world_size": 1,
            "global_steps": source.run.step,
            "global_samples": source.run.samples,
            "skipped_steps": 0,
            "lr_scheduler": None,
            "optimizer": None,
            "frozen_param_shapes": {},
            "frozen_param_fragments": {},
            "buffer_names": [],
        }

    def _optim_states(self) -> dict[str, Any]:
        source, optimizer = self._source, self._engine.optimizer
        assert source is not None
        shards = read_shard(source, self._topology, self._ranks.rank)
        state = {}
        groups = {
            group["name"]: {**{key: value for key, value in group.items() if key != "params"}, "params": []}
            for group in optimizer.param_groups
        }
        for index, (sub_group, flat) in enumerate(zip(self._topology.sub_groups, shards, strict=True)):
            # By the tensors' own groups: a checkpoint of another tool may call its groups otherwise, and one that was
            # not trained there has taken no steps.
            names = {source.infos[name].group for name, _ in sub_group.tensors}
            step = max(source.groups[name].step if name in source.groups else 0 for name in names)
            state[index] = {
                "step": torch.tensor(float(step)),
                "exp_avg": flat["exp_avg"],
                "exp_avg_sq": flat["exp_avg_sq"],
            }
            groups[sub_group.group]["params"].append(index)
        return {
            "zero_stage": 3,
            "loss_scaler": optimizer.loss_scaler,
            "dynamic_loss_scale": optimizer.dynamic_loss_scale,
            "overflow": False,
            "partition_count": optimizer.partition_count,
            "optimizer_state_dict": {"state": state, "param_groups": list(groups.values())},
            "fp32_flat_groups": [flat["master"] for flat in shards],
        }


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest sound checkpoint of a run's folder, and a line for each damaged one that was passed over.

    Every byte is read and compared: a resume is rare, and a flipped bit would be trained on for weeks.
    """
    damaged: list[str] = []
    if folder.is_dir():
        for path in sorted((path for path in folder.iterdir() if manifest.is_complete(path)), reverse=True):
            try:
                manifest.check(path, deep=True)
                return path, damaged
            except InputError as error:
                damaged.append(str(error))
    return None, damaged


def clear_after(folder: Path, found: Path | None) -> None:
    """Delete what lies above the checkpoint that a run resumes from: damaged ones, and what a kill left unfinished."""
    for path in _checkpoints(folder):
        if found is None or path.name > found.name:
            _delete(path)
    if found is not None:
        write_bytes(folder / POINTER, found.name.encode())


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    kept = [path for path in _checkpoints(folder) if manifest.is_complete(path)][-keep:]
    for path in _checkpoints(folder):
        if path not in kept:
            _delete(path)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _delete(path: Path) -> None:
    """Delete a checkpoint, its manifest first, so that it never looks complete half-deleted."""
    (path / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)  # on NFS a file that is still mapped stays for a while
