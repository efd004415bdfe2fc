"""Writing torch.distributed.checkpoint (DCP) folders: the files laid out first, then filled from any source.

The state dict is {"model": ..., "optim": ...}, as torch's get_model_state_dict and get_optimizer_state_dict return them
for a model of transformers, so that `torch.distributed.checkpoint.load` fills an FSDP2 run on any number of ranks. Its
optimizer has to be an AdamW with the same groups in the same order. A run whose learning rate is scheduled also asks
for each group's `initial_lr`, which no source knows: load it with DefaultLoadPlanner(allow_partial_load=True).

Every entry is what torch.save makes of a chunk or of a value (`checkpoint.dcp_files`). Tensors are cut into chunks of
whole rows: a rank that loads a part of one reads whole chunks.
"""

import functools
import io
import json
import math
import pickle
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.dcp import OURS
from checkpoint.dcp_files import METADATA
from checkpoint.layout import FilePlan, Fragment
from checkpoint.shard import STATE_SLOTS
from checkpoint.source import Group, Slot, Source
from checkpoint.zero3_layout import topology_of
from checkpoint.zero_state import param_groups, save_skeleton

ALIGN = 64
"""Bytes: an entry begins at a multiple, as its data does in what torch.save writes."""
Key = tuple[str | int, ...]
"""The way to an entry in the state dict."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is stored at one place, for one key or for several with the same content."""

    keys: tuple[Key, ...]
    head: bytes
    """All of it; of a chunk what precedes its data."""
    tail: bytes = b""
    data: int = 0
    """Bytes between head and tail that are filled from the source."""
    offsets: tuple[int, ...] | None = None
    """Of a chunk in its tensor."""
    sizes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    """Of the whole tensor."""
    dtype: torch.dtype = torch.float32
    tensor: str = ""
    slot: Slot = "weight"

    @property
    def length(self) -> int:
        return len(self.head) + self.data + len(self.tail)


@dataclass(frozen=True, kw_only=True)
class DcpLayout:
    """A folder of a run that trains in `dtype`; by default of what the source trains: masters if it has them.

    A source without optimizer state and groups gives a model alone.
    """

    dtype: torch.dtype | None = None
    file_size: int = 5 * 10**9
    """Bytes in a file, about."""
    chunk_size: int = 1 << 26
    """Bytes in a chunk at most, if a row has fewer."""

    def files(self, source: Source) -> list[FilePlan]:
        return [
            FilePlan(
                name=name,
                tensors=tuple(dict.fromkeys(item.tensor for _, item in placed if item.tensor)),
                create=functools.partial(_create, placed=placed),
            )
            for name, placed in self._placed(source).items()
        ]

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        config = (json.dumps(dict(source.config), indent=2, ensure_ascii=False) + "\n").encode()
        return {"config.json": config, METADATA: pickle.dumps(_metadata(self._placed(source)), protocol=4)}

    def _placed(self, source: Source) -> dict[str, list[tuple[int, Item]]]:
        """Return the items of each file with their offsets."""
        files: list[list[tuple[int, Item]]] = [[]]
        at = 0
        for item in self._items(source):
            if files[-1] and at + item.length > self.file_size:
                files.append([])
                at = 0
            files[-1].append((at, item))
            at += -(-item.length // ALIGN) * ALIGN
        return {f"__{number}_0.distcp": placed for number, placed in enumerate(files)}

    def _items(self, source: Source) -> Iterator[Item]:
        moments = STATE_SLOTS[1:]
        for name, info in source.infos.items():
            if info.tied_to is not None:
                continue
            slot: Slot = "master" if "master" in info.slots and self.dtype in (None, torch.float32) else "weight"
            # Tied tensors are two entries of a state dict.
            alike = [name, *(alias for alias, other in source.infos.items() if other.tied_to == name)]
            dtype = self.dtype or info.slots[slot]
            yield from self._chunks(source, name, slot, dtype, self.weight_keys(alike))
            for slot in moments if info.trainable else ():
                if slot in info.slots:
                    keys = (self.state_key(name, slot),)
                    yield from self._chunks(source, name, slot, info.slots[slot], keys)
        yield from self._optimizer(source)
        yield from self.run_items(source)

    def weight_keys(self, names: Sequence[str]) -> tuple[Key, ...]:
        """Return the keys of a weight that has these names in the model."""
        return tuple(("model", name) for name in names)

    def state_key(self, name: str, what: str) -> Key:
        """Return the key of a parameter's exp_avg, exp_avg_sq or step."""
        return "optim", "state", name, what

    def group_keys(self, number: int, names: Sequence[str], field: str) -> tuple[Key, ...]:
        """Return the keys of a field of a parameter group, given its parameters' names."""
        return (("optim", "param_groups", number, field),)

    def run_items(self, source: Source) -> Iterator[Item]:
        """Yield how far the run is."""
        run = source.run
        ours = {"step": run.step, "tokens": run.tokens, "samples": run.samples, "seed": run.seed}
        yield Item(keys=((OURS,),), head=saved(ours))

    def _chunks(
        self, source: Source, name: str, slot: Slot, dtype: torch.dtype, keys: tuple[Key, ...]
    ) -> Iterator[Item]:
        shape = source.infos[name].shape
        row = max(1, math.prod(shape[1:])) * dtype.itemsize
        step = max(1, self.chunk_size // row)
        for begin in range(0, shape[0], step):
            sizes = (min(step, shape[0] - begin), *shape[1:])
            head, tail = _archive(sizes, dtype)
            yield Item(
                keys=keys,
                head=head,
                tail=tail,
                data=math.prod(sizes) * dtype.itemsize,
                offsets=(begin, *(0 for _ in shape[1:])),
                sizes=sizes,
                shape=shape,
                dtype=dtype,
                tensor=name,
                slot=slot,
            )

    def _optimizer(self, source: Source) -> Iterator[Item]:
        """Yield the step of each group, one for all of its tensors, and the groups as torch's AdamW has them."""
        moved = any("exp_avg" in info.slots for info in source.infos.values())
        if not moved and all(group == Group() for group in source.groups.values()):
            return
        topology = topology_of(source, 1, sys.maxsize)  # the groups, each with its tensors
        fresh = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
        for number, group in enumerate(param_groups(source, topology)):
            names = [name for part in group["params"] for name, _ in topology.sub_groups[part].tensors]
            moved_names = [name for name in names if "exp_avg" in source.infos[name].slots]
            if moved_names:
                step = torch.tensor(float(source.groups.get(group["name"], Group()).step))
                keys = tuple(self.state_key(name, "step") for name in moved_names)
                yield Item(keys=keys, head=saved(step), offsets=(), dtype=step.dtype)
            for field, value in {**fresh, **group, "params": names}.items():
                if keys := self.group_keys(number, names, field):
                    yield Item(keys=keys, head=saved(value))


def saved(value: Any) -> bytes:
    """Return what torch.save makes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@functools.cache
def _archive(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return what torch.save writes before and after a tensor's data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive.pt"  # its name is in it
        tensor = torch.empty(shape, dtype=dtype)  # virtual memory alone, as the file is a hole
        offset = save_skeleton(path, tensor, [tensor])[id(tensor)]
        with path.open("rb") as file:
            head = file.read(offset)
            file.seek(offset + tensor.nbytes)
            return head, file.read()


def _create(path: Path, *, placed: Sequence[tuple[int, Item]]) -> list[Fragment]:
    fragments = []
    with path.open("xb") as file:
        for at, item in placed:
            file.seek(at)
            file.write(item.head)
            file.seek(item.data, io.SEEK_CUR)
            file.write(item.tail)
            if item.tensor:
                assert item.offsets is not None
                start = item.offsets[0] * math.prod(item.shape[1:])
                fragments.append(
                    Fragment(
                        offset=at + len(item.head),
                        tensor=item.tensor,
                        slot=item.slot,
                        dtype=item.dtype,
                        start=start,
                        stop=start + math.prod(item.sizes),
                    )
                )
    return fragments


def _metadata(files: dict[str, list[tuple[int, Item]]]) -> Any:
    """Return what torch calls the metadata of files."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

    entries: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    paths: dict[str, Key] = {}
    for name, placed in files.items():
        for at, item in placed:
            for path in item.keys:
                key = ".".join(map(str, path))
                paths[key] = path
                places[dcp.MetadataIndex(key, item.offsets)] = _StorageInfo(name, at, item.length)
                if item.offsets is None:
                    entries[key] = dcp.BytesStorageMetadata()
                    continue
                properties = dcp.TensorProperties(dtype=item.dtype)
                entry = entries.setdefault(key, dcp.TensorStorageMetadata(properties, torch.Size(item.shape), []))
                assert isinstance(entry, dcp.TensorStorageMetadata)
                entry.chunks.append(dcp.ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes)))
    return dcp.Metadata(entries, planner_data=paths, storage_data=places, version=CURRENT_DCP_VERSION)
