"""Writing DeepSpeed pipeline checkpoints (PipelineModule with ZeRO-1): what our own pipeline training saves.

The format: `checkpoint.pipeline` and `checkpoint.zero12`; stages and names: `checkpoint.pipeline_stages`. Layer n has
the file `layer_{n:02d}-model_states.pt` with its weights as the run computes with them; a tied head has none.

DeepSpeed's own loader fills an engine by position: it needs the same stages, data-parallel ranks and parameter groups,
in the same order. Our training reads the folder on any mesh (`checkpoint.open`, `train.fill`).

Facts of DeepSpeed 0.19.8: runtime/engine.py (_common_checkpoint_state), runtime/zero/stage_1_and_2.py (state_dict, of a
float32 run) and runtime/bf16_optimizer.py (state_dict, of a bfloat16 run whose gradients are summed in float32).
"""

import functools
import json
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.layout import FilePlan, Fragment
from checkpoint.pipeline_stages import Layer, Stage, layers_of, stages_of
from checkpoint.shard import STATE_SLOTS
from checkpoint.source import Group, Info, Slot, Source
from checkpoint.zero12 import FlatGroup, whole_name
from checkpoint.zero_files import PARAMETER_NAMES, optim_name
from checkpoint.zero_state import DEEPSPEED, model_state, param_groups, save_skeleton
from parallel.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PipelineLayout:
    """A folder for pipeline stages times data-parallel ranks, of a bfloat16 or a float32 run.

    A source without masters gives its weights as masters; one without moments gives none, as before the first step.
    """

    stages: int = 1
    ranks: int = 1
    """Data-parallel ranks."""
    bf16: bool = False

    def files(self, source: Source) -> list[FilePlan]:
        """Return a file for each layer, and for each stage one with names and counters and one for each of its ranks.

        Raises:
            InputError: there are fewer than 1 of something, or our training could not run the model so.
        """
        self._check(source)
        plans = []
        for number, (layers, stage) in enumerate(stages_of(source, layers_of(source), self.stages)):
            plans += [self._layer_plan(source, layer, layer.file) for layer in layers if layer.file is not None]
            create = functools.partial(_create_model, state=self._model_state(stage))
            plans.append(FilePlan(name=whole_name(number), tensors=(), create=create))
            for rank in range(self.ranks):
                optim = functools.partial(_create_optim, stage=stage, ranks=self.ranks, rank=rank, bf16=self.bf16)
                name = optim_name(rank, self.bf16, number)
                plans.append(FilePlan(name=name, tensors=tuple(stage.infos), create=optim))
        return plans

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        return {"config.json": (json.dumps(dict(source.config), indent=2, ensure_ascii=False) + "\n").encode()}

    def _check(self, source: Source) -> None:
        for what, count in (("stages", self.stages), ("ranks", self.ranks)):
            if count < 1:
                raise InputError(f"a pipeline checkpoint of {count} {what} cannot be written: at least 1 is needed")
        family, layers = source.family, source.config["num_hidden_layers"]
        if self.stages > layers:
            raise InputError(f"{self.stages} pipeline stages: the model has {layers} layers; at most {layers} work")
        if family.scaled_embeddings or family.logits_divisor:
            raise InputError(f"pipeline: the family {family.name} scales between its layers, which no stage does")
        for name, info in source.infos.items():
            if not info.trainable:
                raise InputError(f"pipeline: {name} is not trained, and our pipeline trains every tensor")

    def _layer_plan(self, source: Source, layer: Layer, file: str) -> FilePlan:
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        create = functools.partial(_create_layer, source=source, names=layer.names, dtype=dtype)
        return FilePlan(name=file, tensors=tuple(layer.names.values()), create=create)

    def _model_state(self, stage: Stage) -> dict[str, Any]:
        """Return a stage's model file; its weights are in the layers' files."""
        state = model_state(stage, stage.topology, torch.float32)
        shapes = [
            OrderedDict((stage.own[name], torch.Size(shape)) for name, shape in group.tensors)
            for group in stage.topology.sub_groups
        ]
        return state | {
            "module": None,
            "param_shapes": shapes,
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "dp_world_size": self.ranks,
            "mp_world_size": self.stages,
            "checkpoint_parallel_dimensions": {"pp_degree": self.stages, "tp_degree": 1},
            "growmerge": {**state["growmerge"], PARAMETER_NAMES: dict(stage.names)},
        }


def _master(info: Info) -> Slot:
    """Return the slot that a master copy is taken from."""
    return "master" if "master" in info.slots else "weight"


def _create_model(path: Path, *, state: Mapping[str, Any]) -> list[Fragment]:
    with path.open("wb") as file:
        torch.save(state, file)
    return []


def _skeleton(path: Path, state: object, tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Write a file's skeleton as `save_skeleton`, so that data begins at the same place whatever the file is called.

    torch writes a file's name into it, and one that is gone on with is laid out under another.
    """
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        made = Path(folder) / "archive.pt"
        offsets = save_skeleton(made, state, tensors)
        made.replace(path)
    return offsets


def _create_layer(path: Path, *, source: Source, names: Mapping[str, str], dtype: torch.dtype) -> list[Fragment]:
    """Write the skeleton of a layer's file; its weights are the masters, rounded."""
    tensors = OrderedDict((own, torch.empty(source.infos[name].shape, dtype=dtype)) for own, name in names.items())
    offsets = _skeleton(path, tensors, [*tensors.values()])
    return [
        Fragment(offset=offsets[id(tensors[own])], tensor=name, slot=_master(source.infos[name]), dtype=dtype)
        for own, name in names.items()
    ]


def _create_optim(path: Path, *, stage: Stage, ranks: int, rank: int, bf16: bool) -> list[Fragment]:
    """Write the skeleton of a rank's optimizer file and return where each tensor's part goes."""
    flats = stage.flats(ranks)
    adam: dict[int, dict[str, torch.Tensor]] = {}
    held: list[dict[Slot, torch.Tensor]] = []
    steps: list[tuple[torch.Tensor, int]] = []
    for number, flat in enumerate(flats):
        # Virtual memory alone: nothing is ever written to these tensors.
        slots: dict[Slot, torch.Tensor] = {"master": torch.empty(flat.part if bf16 else _filled(flat, rank))}
        if all("exp_avg" in stage.infos[name].slots for name in flat.starts):
            step = torch.empty(())
            slots |= {"exp_avg": torch.empty(flat.part), "exp_avg_sq": torch.empty(flat.part)}
            adam[number] = {"step": step, "exp_avg": slots["exp_avg"], "exp_avg_sq": slots["exp_avg_sq"]}
            steps.append((step, stage.groups.get(flat.group, Group()).step))
        held.append(slots)
    masters = [slots["master"] for slots in held]
    optimizer = _optimizer(stage, flats, adam, masters)
    optimizer |= _paddings(flats, ranks, rank, bf16) | {"param_slice_mappings": _mappings(stage, flats, rank)}
    state = {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": DEEPSPEED}
    moments = [tensor for slots in adam.values() for tensor in slots.values()]
    offsets = _skeleton(path, state, [*moments, *masters])
    with path.open("r+b") as file:
        for step, value in steps:
            file.seek(offsets[id(step)])
            file.write(torch.tensor(float(value), dtype=torch.float32).numpy().tobytes())
    fragments = []
    for flat, slots in zip(flats, held, strict=True):
        for name, start, stop, at in stage.pieces(flat, rank):
            for slot in (slot for slot in STATE_SLOTS if slot in slots):
                stored = _master(stage.infos[name]) if slot == "master" else slot
                offset = offsets[id(slots[slot])] + 4 * at
                fragments.append(
                    Fragment(offset=offset, tensor=name, slot=stored, dtype=torch.float32, start=start, stop=stop)
                )
    return fragments


def _optimizer(
    stage: Stage, flats: Sequence[FlatGroup], adam: Mapping[int, Any], masters: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Return the optimizer's state, the tensors in the order in which they are told to `save_skeleton`.

    An engine keeps its own of what is left out: how it clips, and how it scales its loss.
    """
    # An engine has no group without parameters.
    groups = [group for group in param_groups(stage, stage.topology) if group["params"]]
    return {
        "base_optimizer_state": {"state": dict(adam), "param_groups": groups},
        "single_partition_of_fp32_groups": list(masters),
        "ds_version": DEEPSPEED,
    }


def _paddings(flats: Sequence[FlatGroup], ranks: int, rank: int, bf16: bool) -> dict[str, Any]:
    """Return what is said of the padding: one optimizer keeps it in the masters, the other saves them without."""
    counts = {"partition_count": [ranks] * len(flats)}
    if bf16:
        last = rank == ranks - 1
        return {**counts, "group_paddings": [flat.part * ranks - flat.total if last else 0 for flat in flats]}
    return {
        **counts,
        "group_paddings": [flat.part - _filled(flat, rank) for flat in flats],
        "param_alignment_paddings": [[0] * len(flat.starts) for flat in flats],
        "zero_stage": 1,
    }


def _mappings(stage: Stage, flats: Sequence[FlatGroup], rank: int) -> list[OrderedDict[str, Any]]:
    """Return where each parameter lies in a rank's part of its group: DeepSpeed's tools go by it, not its loader."""
    from deepspeed.utils.tensor_fragment import fragment_address

    return [
        OrderedDict(
            (stage.own[name], fragment_address(numel=stop - start, start=at))
            for name, start, stop, at in stage.pieces(flat, rank)
        )
        for flat in flats
    ]


def _filled(flat: FlatGroup, rank: int) -> int:
    """Return the elements of a rank's part that are no padding."""
    return min(flat.part, max(0, flat.total - rank * flat.part))
