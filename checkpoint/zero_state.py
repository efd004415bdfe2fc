"""What is written into the files of a ZeRO checkpoint beside the tensors' data: names, shapes, counters, groups.

A `.pt` file is a zip whose records are the tensors' storages. `save_skeleton` writes it without data, at its full size;
the data then goes straight to the records' offsets, so that no tensor is ever held whole.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint.shard import Topology
from checkpoint.source import Group, Source
from checkpoint.tensor_parallel import Cut
from checkpoint.zero_files import values_of

DEEPSPEED = "0.19.8"
"""The version whose format this is; DeepSpeed compares it with its own to know old files."""
UNIVERSAL_VERSION = {"universal_checkpoint_version": 0.4}
"""Of the universal format, as DeepSpeed 0.19 counts."""


def save_skeleton(path: Path, state: object, tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Write a `.pt` file at its full size, data zero, and return the byte offset of each tensor's data, by `id`.

    `tensors` are all that the state holds, in the order in which the pickler meets them: so it numbers their storages.
    """
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # a checksum of data that is not there yet
    try:
        with torch.serialization.skip_data():
            torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(checked)
    reader: Any = torch._C.PyTorchFileReader(str(path))
    return {id(tensor): reader.get_record_offset(f"data/{number}") for number, tensor in enumerate(tensors)}


def model_state(source: Source, topology: Topology, dtype: torch.dtype, *, first: bool = True) -> dict[str, Any]:
    """Return a rank's model file, which holds no weights; the empty entries' dtype is the run's.

    DeepSpeed knows of tied tensors from the file of the `first` rank alone.
    """
    run = source.run
    aliases = {name: info.tied_to for name, info in source.infos.items() if info.tied_to is not None}
    return {
        "module": OrderedDict((name, torch.empty(0, dtype=dtype)) for name in source.infos),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [
            OrderedDict((name, torch.Size(shape)) for name, shape in sub_group.tensors)
            for sub_group in topology.sub_groups
        ],
        "frozen_param_shapes": {name: torch.Size(shape) for name, shape in topology.frozen},
        "frozen_param_fragments": {},
        "shared_params": aliases if first else {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": run.step,
        "global_samples": run.samples,
        "dp_world_size": topology.ranks,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": DEEPSPEED,
        "growmerge": {"tokens": run.tokens, "samples": run.samples, "seed": run.seed},
    }


def tensor_parallel_state(source: Source, cuts: Mapping[str, Cut], ranks: int) -> dict[str, Any]:
    """Return what a model file has besides in a run with tensor parallelism.

    Loading takes no notice of universal_checkpoint_info, but DeepSpeed's own ds_to_universal joins the pieces by it,
    each tensor by the list that names it, and without it would join even those that are whole. Column is no list.
    """
    tensors = source.family.tensors(source.config)
    lists: dict[str, list[str]] = {"row": [], "vocab": [], "whole": [], "column": []}
    for name, info in source.infos.items():
        if info.tied_to is None:
            lists[tensors[name].split if name in cuts else "whole"].append(f"^{re.escape(name)}$")
    vocab = {"original_vocab_size": source.config["vocab_size"]} if lists["vocab"] else {}
    return {
        "mp_world_size": ranks,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": ranks},
        "universal_checkpoint_info": {
            **UNIVERSAL_VERSION,
            "parameter_with_row_parallelism_patterns": sorted(lists["row"]),
            "tp_replicated_parameter_patterns": sorted(lists["whole"]),
            "vocabulary_parameter_patterns": sorted(lists["vocab"]),
            "parameter_with_sub_params": [],
            "autotp_unsupported_parameter_patterns": {},
            **vocab,
        },
    }


def param_groups(source: Source, topology: Topology) -> list[dict[str, Any]]:
    """Return torch's parameter groups, each with its sub-groups' numbers; one whose tensors are all frozen has none."""
    held = {sub_group.group for sub_group in topology.sub_groups}
    # Groups of frozen tensors alone are ours, not the optimizer's.
    apart = {info.group for info in source.infos.values() if not info.trainable} - held
    known = held <= source.groups.keys()
    numbers: dict[str, list[int]] = {name: [] for name in source.groups if known and name not in apart}
    for index, sub_group in enumerate(topology.sub_groups):
        numbers.setdefault(sub_group.group, []).append(index)
    return [
        {"name": name, **values_of(source.groups.get(name, Group())), "params": params}
        for name, params in numbers.items()
    ]
