"""nanotron checkpoints, of huggingface/nanotron and of the fork that the paper trained with, read lazily.

Layout of a step's folder: `model_config.json`, the model's sizes; `model/`, the parameters (how:
`checkpoint.nanotron_shards`; what they are called: `checkpoint.nanotron_model`); `optimizer/`, Adam's state
(`checkpoint.nanotron_optim`); `checkpoint_metadata.json`, how far the run was. A run's folder has a folder for each
saved step, and `latest.txt`.

Rows of q and k are put in Hugging Face's order where the model interleaves its rotary embeddings, and a head that
divides by a number (HyperCloning) is folded into the final norm. The vocabulary may be padded: nanotron keeps no other
size of it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import read_json
from checkpoint.hyperllama import folded
from checkpoint.nanotron_model import MODEL_CONFIG, Parameter, parameters_of, read_model_config
from checkpoint.nanotron_optim import Optimizer, open_optimizer
from checkpoint.nanotron_shards import Shards, find_shards, mapped, matrix
from checkpoint.source import Box, Group, Info, Map, RunState, Slot, Source, row_major_tiles
from parallel.errors import InputError
from parallel.families import family_of
from parallel.family import Family

METADATA = "checkpoint_metadata.json"
LATEST = "latest.txt"
TURNED = (".self_attn.q_proj.", ".self_attn.k_proj.")
"""In the names of what rotary embeddings turn."""
MUP = re.compile(r"^\s*use_mup:\s*true\s*$", re.MULTILINE | re.IGNORECASE)
"""In config.yaml: attention is then scaled by 1/head_dim, which only the training's config says."""


@dataclass(frozen=True, kw_only=True)
class NanotronSource:
    """A saved step of a nanotron run."""

    folder: Path
    config: Mapping[str, Any]
    interleaved: bool
    """Rows of q and k lie as `checkpoint.nanotron_model` says."""
    run: RunState
    optimizer: Optimizer | None
    _mapped: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Shards of weights, by parameter and rank, in their files until read."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def groups(self) -> Mapping[str, Group]:
        return self.optimizer.groups if self.optimizer else {"default": Group()}

    @cached_property
    def _parameters(self) -> Mapping[str, Parameter]:
        parameters = parameters_of(self.family, self.config)
        known = {(parameter.folder, parameter.leaf) for parameter in parameters.values()}
        for path in sorted((self.folder / "model").rglob("*.safetensors")):
            leaf = path.name.removesuffix(".safetensors").partition("_pp-rank-")[0]
            if (path.parent.relative_to(self.folder).as_posix(), leaf) not in known:
                raise InputError(f"{path}: no tensor of the {self.family.name} model of {MODEL_CONFIG}")
        return parameters

    @cached_property
    def _shards(self) -> Mapping[str, tuple[Shards, int]]:
        """Tensor -> the parameter that it is in, and its first row there."""
        found = {}
        tensors = self.family.tensors(self.config)
        for parameter in self._parameters.values():
            shards, row = find_shards(self.folder, parameter), 0
            for name in parameter.tensors:
                found[name] = shards, row
                row += tensors[name].shape[0]
        return found

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, tensor in self.family.tensors(self.config).items():
            if tensor.tied_to is not None:
                infos[name] = Info(shape=tensor.shape, slots={}, tied_to=tensor.tied_to)
                continue
            shards, _ = self._shards[name]
            info = Info(shape=tensor.shape, slots={"weight": shards.dtype})
            if self.optimizer:
                group = self.optimizer.group_of.get(shards.parameter.name)
                if group is None:
                    raise InputError(f"{self.optimizer.folder}: no state of {shards.parameter.name}")
                info = replace(info, slots={**info.slots, **self.optimizer.slots(shards)}, group=group)
            infos[name] = info
        return infos

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return None

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        shards, row = self._shards[name]
        columns = box[1] if len(box) == 2 else slice(0, 1)
        half = self.family.axes(self.config)["head_dim"] // 2
        turned = self.interleaved and any(part in name for part in TURNED)
        pieces = list(interleaved_rows(box[0], half)) if turned else [(0, box[0])]
        for slot, target in out.items():
            if slot != "weight" and self.optimizer:
                take = partial(self.optimizer.take, shards, slot)
            else:
                take = partial(self._take, shards)
            for at, rows in pieces:
                count = len(range(rows.start, rows.stop, rows.step or 1))
                within = slice(rows.start + row, rows.stop + row, rows.step)
                shards.fill(within, columns, matrix(target)[at : at + count], take)

    def _take(self, shards: Shards, rank: int, rows: slice, columns: slice) -> torch.Tensor:
        key = shards.parameter.name, rank
        if key not in self._mapped:
            self._mapped[key] = mapped(shards.stored[rank])
        return self._mapped[key][rows, columns]


def interleaved_rows(rows: slice, half: int) -> Iterator[tuple[int, slice]]:
    """Return where rows of q or k, in Hugging Face's order, lie if rotary embeddings interleave.

    Row i of a head's first half is its row 2i there, and row i of the second half is row 2i + 1.

    Returns:
        pieces: how many rows are before it, and its rows there, every other one.
    """
    row = rows.start
    while row < rows.stop:
        number, at = divmod(row, half)
        head, second = divmod(number, 2)
        count = min(half - at, rows.stop - row)
        begin = 2 * half * head + 2 * at + second
        yield row - rows.start, slice(begin, begin + 2 * count - 1, 2)
        row += count


def is_nanotron(folder: Path) -> bool:
    """Return whether a folder holds a step of a nanotron run, or the steps of one."""
    return (folder / MODEL_CONFIG).is_file() or (folder / "model" / "model").is_dir() or _newest(folder) is not None


def _newest(folder: Path) -> Path | None:
    """Return the folder of a run's newest step, if a folder is that of a run."""
    try:
        step = (folder / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / step if step.isdecimal() and (folder / step).is_dir() else None


def open_nanotron(folder: Path) -> Source:
    """Open a step of a nanotron run lazily.

    Raises:
        InputError: model_config.json is missing or of a model that is not read; files of the optimizer are missing or
            damaged; later, when files of a tensor are missing, damaged or of another shape than model_config.json says.
    """
    newest = _newest(folder)
    if newest is not None and not (folder / MODEL_CONFIG).is_file():
        raise InputError(f"{folder}: the folder of a nanotron run; open one of its steps, the newest is {newest}")
    model = read_model_config(folder)
    training = folder / "config.yaml"
    if training.is_file() and MUP.search(training.read_text(errors="replace")):
        raise InputError(f"{training}: use_mup is true: a model of spectral muP scales attention as no Llama does")
    source = NanotronSource(
        folder=folder,
        config=model.config,
        interleaved=model.interleaved,
        run=_run_of(folder),
        optimizer=open_optimizer(folder),
    )
    return folded(source, model.head_divisor)


def _run_of(folder: Path) -> RunState:
    """Return how far the run was; nothing if the checkpoint does not say."""
    about = read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {}
    if not (folder / METADATA).is_file():
        return RunState(provenance=about)
    found = read_json(folder / METADATA)
    metas = found.get("metas") if isinstance(found, dict) else None
    if not isinstance(metas, dict):
        raise InputError(f"{folder / METADATA}: no metas, so it does not say how far the run was")
    stages = metas.get("data_stages") or []
    tokens = sum(sum((stage.get("consumed_tokens_per_dataset_folder") or {}).values()) for stage in stages)
    return RunState(
        step=metas.get("last_train_step", 0),
        tokens=metas.get("consumed_tokens_total") or tokens,
        samples=metas.get("consumed_train_samples", 0),
        provenance=about,
    )
