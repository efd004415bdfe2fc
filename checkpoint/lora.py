"""A PEFT LoRA adapter as a source: any box of a model with the adapter merged into it; no merged copy is made.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`). A linear weight W [O, I]
becomes W + s B A with A [r, I], B [O, r] and s = lora_alpha / r (arXiv 2106.09685, section 4.1), or with use_rslora
lora_alpha / sqrt(r) (arXiv 2312.03732); an embedding [V, D] becomes W + s (B A)^T with A [r, V], B [D, r]. DoRA then
gives each row of a linear weight, or each column of an embedding, the norm that it learned (arXiv 2402.09353, eq. 5).

fan_in_fan_out changes nothing: peft ignores it where a layer is a torch.nn.Linear or an Embedding, and all are.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.files import read_json
from checkpoint.pickles import load_pickle
from checkpoint.provenance import descend
from checkpoint.safetensors import CODES, read_header
from checkpoint.source import TILE, Box, Info, Map, RunState, Slot, Source, WithoutState, box_shape
from parallel.errors import InputError, one_of

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The first that is there is read, as peft does."""

READ = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save"),
    *("use_dora", "lora_bias", "init_lora_weights"),
)
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "target_modules", "task_type", "velora_config"),
)
"""What a merged weight does not depend on, given the adapter's tensors."""
REFUSED = {
    "alora_invocation_tokens": "it acts on the tokens behind an invocation alone, which no weight can hold",
    "arrow_config": "it chooses among adapters for each token, which no weight can hold",
    "kasa_config": "it takes singular values out of the base's weights",
    "layer_replication": "it makes a model of other layers",
    "monteclora_config": "its weights are drawn at random",
    "target_parameters": "it changes other parameters than those of linear layers and embeddings",
    "trainable_token_indices": "it holds single rows of an embedding; train those with modules_to_save",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it pools the inputs of a quantised base",
}
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Ways of starting A and B that leave the base's weights as they are."""

_PREFIX = "base_model.model."
_PART = r"lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?"
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+?)\.(?P<part>{_PART}|(?:base_layer\.)?(?:weight|bias))")
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
_BIAS = "lora_B.bias"


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What becomes of a tensor [O, I] (or [O]); nothing by default."""

    whole: torch.Tensor | None = None
    """Takes the place of the base's tensor."""
    left: torch.Tensor | None = None
    """[O, r]; of a bias [O], which is what is added, before `scale`."""
    right: torch.Tensor | None = None
    """[r, I]"""
    scale: float = 1.0
    magnitude: torch.Tensor | None = None
    """DoRA: the norms of the rows [O] or, of an embedding, of the columns [I]."""
    by_column: bool = False

    @property
    def by_row(self) -> bool:
        return self.magnitude is not None and not self.by_column

    def added(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of what is added to the base: [rows, I], or [rows] of a bias."""
        assert self.left is not None
        left = self.left[rows].to(dtype)
        return (left if self.right is None else left @ self.right.to(dtype)) * self.scale

    def same(self, other: "Change") -> bool:
        """Return whether two changes of one base have the same result."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("whole", "left", "right", "magnitude")]
        return (self.scale, self.by_column) == (other.scale, other.by_column) and all(
            one is two if one is None or two is None else torch.equal(one, two) for one, two in pairs
        )


def apply_lora(source: Source, folder: Path) -> "LoraSource":
    """Return a model with a LoRA adapter merged into its weights: no tensor of the model is read yet.

    A merged weight is computed in float32 (float64 of a float64 model) and rounded once. Masters and Adam's moments
    belong to the weights before, and are left out.

    Where the head is the embedding and the adapter changes them differently, the result is an untied model, which is
    what the adapted model computes. (peft's merge_and_unload adds a LoRA of either one to both of them.)

    Raises:
        InputError: a file is missing or damaged; the adapter is no LoRA, or one that is not the same as other weights;
            it does not fit the model; it lacks a tensor that its config says it has.
    """
    folder = Path(folder)
    adapter = Adapter(folder=folder, config=_read_config(folder), source=source)
    changes, untied = adapter.changes()
    about = read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {}
    return LoraSource(source, changes, untied, {**about, "name": folder.resolve().name})


@dataclass(frozen=True)
class LoraSource(WithoutState):
    """A source and what becomes of its tensors, by name."""

    changes: Mapping[str, Change]
    untied: bool
    """The aliases are tensors of their own from here on."""
    adapter: Mapping[str, Any]
    """The adapter's record."""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return {**self.source.config, "tie_word_embeddings": False} if self.untied else self.source.config

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = {}
        for name, info in self.source.infos.items():
            if info.tied_to and self.untied:
                info = self.source.infos[info.tied_to]
            infos[name] = replace(info, slots={slot: info.slots[slot] for slot in info.slots if slot == "weight"})
        return infos

    @property
    def run(self) -> RunState:
        recipe = {"adapter": self.adapter["name"]}
        parents = descend([self.source.run.provenance, self.adapter])
        return RunState(provenance={"verb": "lora", "recipe": recipe, **parents})

    def _owner(self, name: str) -> str:
        return self.source.infos[name].tied_to or name

    def tiles(self, name: str) -> Sequence[Box]:
        return self.source.tiles(self._owner(name))

    def collect(self, name: str, spread: Map) -> Any:
        """Return what the base needs to know first, and the norms of all columns [I] for DoRA of an embedding."""
        change = self.changes.get(name, Change())
        inner = None if change.whole is not None else self.source.collect(self._owner(name), spread)
        if not change.by_column:
            return inner, None

        def squares(box: Box) -> torch.Tensor:
            total = torch.zeros(box_shape(box)[1], dtype=torch.float64)
            for _, values in self._sums(name, box, inner):
                total += values.double().square_().sum(0)
            return total

        total = torch.zeros(self.infos[name].shape[1], dtype=torch.float64)
        tiles = self.tiles(name)
        for box, part in zip(tiles, spread(squares, tiles), strict=True):
            total[box[1]] += part
        return inner, total.sqrt()

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        inner, norms = stats if stats is not None else self.collect(name, map)
        if name not in self.changes:
            return self.source.read(self._owner(name), box, out, inner)
        change = self.changes[name]
        # The norm of a row takes all of it, whatever part is asked for.
        wide = (box[0], slice(0, self.infos[name].shape[1])) if change.by_row else box
        for rows, values in self._sums(name, wide, inner):
            if change.magnitude is not None:
                part = box[1] if change.by_column else rows
                lengths = norms[part] if change.by_column else torch.linalg.vector_norm(values.double(), dim=1)
                factor = (change.magnitude[part].double() / lengths).to(values.dtype)
                values *= factor if change.by_column else factor[:, None]
            for target in out.values():
                there = slice(rows.start - box[0].start, rows.stop - box[0].start)
                target[there].copy_(values[:, box[1]] if change.by_row else values)
        return None

    def _sums(self, name: str, box: Box, stats: Any) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the base plus what is added to it, some rows of a box at a time, no more than a tile or one row.

        Products are taken of the same whole rows always, so that a value does not depend on the box that it is in.
        """
        change, shape = self.changes[name], self.infos[name].shape
        dtype = torch.promote_types(self.infos[name].slots["weight"], torch.float32)
        step = max(1, TILE // math.prod(shape[1:]))
        for start in range(box[0].start // step * step, box[0].stop, step):
            group = slice(start, min(start + step, shape[0]))
            rows = slice(max(start, box[0].start), min(group.stop, box[0].stop))
            here = (rows, *box[1:])
            values = torch.empty(box_shape(here), dtype=dtype)
            if change.whole is not None:
                values.copy_(change.whole[here])
            else:
                self.source.read(self._owner(name), here, {"weight": values}, stats)
            if change.left is not None:
                values += change.added(group, dtype)[(slice(rows.start - start, rows.stop - start), *box[1:])]
            yield rows, values


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter's folder, checked against the model that it is for. Its tensors stay in the file."""

    folder: Path
    config: Mapping[str, Any]
    source: Source

    @cached_property
    def path(self) -> Path:
        """Raises InputError if there are no weights."""
        for name in WEIGHTS:
            if (self.folder / name).is_file():
                return self.folder / name
        raise InputError(f"{self.folder}: neither {' nor '.join(WEIGHTS)}")

    @cached_property
    def parts(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Module -> what the adapter has for it -> the tensor.

        Raises:
            InputError: a tensor belongs to nothing in the model.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in _tensors(self.path).items():
            match = _KEY.fullmatch(key)
            module, part = match.group("module", "part") if match else ("", "")
            part = part.removeprefix("base_layer.")
            if f"{module}.{'bias' if part == 'bias' else 'weight'}" not in self.source.infos:
                raise InputError(f"{self.path}: {key} matches no tensor of the {self.source.family.name} model")
            if part.startswith(_MAGNITUDE):
                part = _MAGNITUDE
            if part in found.setdefault(module, {}):
                raise InputError(f"{self.path}: {key} is there twice, with and without .base_layer or .weight")
            found[module][part] = tensor
        if not found:
            raise InputError(f"{self.path}: holds no tensors")
        return found

    def changes(self) -> tuple[dict[str, Change], bool]:
        """Return what becomes of each tensor that changes, and whether aliases become tensors of their own.

        Raises:
            InputError: see `apply_lora`.
        """
        found: dict[str, Change] = {}
        for module, parts in self.parts.items():
            if {*parts} - {"weight", "bias"}:
                found |= self._lora(module, parts)
            for kind in ("weight", "bias"):
                if kind in parts:
                    name = f"{module}.{kind}"
                    self._expect(module, kind, self.source.infos[name].shape)
                    found[name] = replace(found.get(name, Change()), whole=parts[kind])
                    if kind == "weight" and found[name].left is not None and self._is_saved(name):
                        raise InputError(f"{self.path}: {module} has a LoRA, though modules_to_save replaces it")
        for name in self.source.infos:
            why = self._must_be_there(name)
            if why and (name not in found or found[name].whole is None):
                raise InputError(f"{self.path}: {_PREFIX}{name} is missing, though {why}")
        return self._tie(found)

    def _is_saved(self, name: str) -> bool:
        """Return whether a tensor is of a module that modules_to_save names: peft looks at how modules' names end."""
        endings = tuple(map(str, self.config.get("modules_to_save") or ()))
        return any(name[: dot.start()].endswith(endings) for dot in re.finditer(r"\.", name))

    def _must_be_there(self, name: str) -> str | None:
        """Return why the adapter must have the whole of a tensor, if it must."""
        module, _, kind = name.rpartition(".")
        bias = self.config.get("bias", "none")
        if self._is_saved(name):
            return "modules_to_save names it"
        if kind == "bias" and (bias == "all" or (bias == "lora_only" and {*self.parts.get(module, ())} & {*_LINEAR})):
            return f"bias is {bias!r}"
        return None

    def _expect(self, module: str, part: str, shape: tuple[int, ...], why: str = "the model has") -> torch.Tensor:
        """Return a module's tensor of this shape.

        Raises:
            InputError: it is missing or has another shape.
        """
        key = f"{self.path}: {_PREFIX}{module}.{part}"
        if part not in self.parts[module]:
            there = ", ".join(sorted(self.parts[module]))
            raise InputError(f"{key} is missing (of this module there are: {there})")
        given = tuple(self.parts[module][part].shape)
        if given != shape:
            raise InputError(f"{key} has shape {given}, {why} {shape}")
        return self.parts[module][part]

    def _lora(self, module: str, parts: Mapping[str, torch.Tensor]) -> dict[str, Change]:
        """Return what a LoRA makes of a module's weight and bias."""
        row = self.source.family.tensors(self.source.config)[f"{module}.weight"]
        if row.kind not in ("embedding", "matrix", "head"):
            raise InputError(f"{self.path}: {module} has a LoRA, which linear layers and embeddings alone can have")
        embedding, dora, lora_bias = row.kind == "embedding", *map(self.config.get, ("use_dora", "lora_bias"))
        names = _EMBEDDING if embedding else _LINEAR
        allowed = (*names, *[_MAGNITUDE] * bool(dora), *[_BIAS] * bool(lora_bias))
        for extra in sorted({*parts} - {*allowed, "weight", "bias"}):
            kind, end = "Embedding" if embedding else "Linear", f"{CONFIG} allows {', '.join(allowed)}"
            raise InputError(f"{self.path}: {_PREFIX}{module}.{extra}: to a torch.nn.{kind}, {end}")
        rank, scale = self._rank_and_scale(module)
        size = row.shape[::-1] if embedding else row.shape
        why = f"rank {rank} in {CONFIG} and the model make it"
        first = self._expect(module, names[0], (rank, size[1]), why)
        second = self._expect(module, names[1], (size[0], rank), why)
        left, right = (first.T, second.T) if embedding else (second, first)
        magnitude = self._expect(module, _MAGNITUDE, (size[0],)) if dora else None
        column = embedding and magnitude is not None
        change = Change(left=left, right=right, scale=scale, magnitude=magnitude, by_column=column)
        found = {f"{module}.weight": change}
        if lora_bias:
            bias = self._expect(module, _BIAS, row.shape[:1])
            if f"{module}.bias" not in self.source.infos:
                raise InputError(f"{self.path}: {_PREFIX}{module}.{_BIAS} has no bias in the model to be added to")
            found[f"{module}.bias"] = Change(left=bias, scale=scale)
        return found

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        rank = self._setting(module, "r", "rank_pattern")
        alpha = self._setting(module, "lora_alpha", "alpha_pattern")
        if not isinstance(rank, int) or rank < 1:
            raise InputError(f"{self.folder / CONFIG}: rank {rank!r} for {module}: allowed are whole numbers from 1 on")
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _setting(self, module: str, key: str, patterns: str) -> Any:
        """Return a setting for a module: of the first pattern that is its name, or the end of it behind a dot."""
        value = self.config.get(key)
        for pattern, special in (self.config.get(patterns) or {}).items():
            try:
                matches = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)
            except re.error as error:
                raise InputError(f"{self.folder / CONFIG}: {patterns}: {pattern!r} is no pattern ({error})") from error
            if matches:
                value = special
                break
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.folder / CONFIG}: {key} {value!r} for {module}: allowed are numbers")
        return value

    def _tie(self, found: dict[str, Change]) -> tuple[dict[str, Change], bool]:
        """Give a tied base that the adapter holds to both of its names, and keep them tied if they stay the same."""
        untied = False
        for alias, info in self.source.infos.items():
            owner = info.tied_to
            if owner is None or not {alias, owner} & {*found}:
                continue
            changes = {name: found.get(name, Change()) for name in (owner, alias)}
            shared = [change.whole for name, change in changes.items() if not self._is_saved(name)]
            bases = [whole for whole in shared if whole is not None]
            if len(bases) == 2 and not torch.equal(*bases):
                raise InputError(f"{self.path}: {owner} and {alias} differ, though the model has one tensor for both")
            for name, change in changes.items():
                found[name] = replace(change, whole=bases[0]) if bases and not self._is_saved(name) else change
            if found[owner].same(found[alias]):
                del found[alias]
            else:
                untied = True
        return found, untied


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Read what an adapter is.

    Raises:
        InputError: it is none, or one whose merged weights cannot be had from the base's and its own.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise InputError(f"{path}: no peft_type, so it is not the config of a PEFT adapter")
    if config["peft_type"] != "LORA":
        raise InputError(f"{path}: peft_type {config['peft_type']!r}: allowed is 'LORA'")
    for key, value in config.items():
        if key in REFUSED and value:
            raise InputError(f"{path}: {key} is set: {REFUSED[key]}; allowed are adapters without it")
        if value and key not in (*READ, *WITHOUT_EFFECT, *REFUSED):
            raise InputError(f"{path}: {one_of('setting', key, [*READ, *WITHOUT_EFFECT])}")
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        hint = "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        raise InputError(f"{path}: init_lora_weights {init!r}: its training began by changing the base; {hint}")
    for key, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("modules_to_save", list)):
        if config.get(key) and not isinstance(config[key], kind):
            raise InputError(f"{path}: {key} is {config[key]!r}: allowed is a {kind.__name__}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InputError(f"{path}: {one_of('bias', config['bias'], ['none', 'all', 'lora_only'])}")
    if config.get("use_dora") and config.get("lora_bias"):
        raise InputError(f"{path}: use_dora and lora_bias are both set: allowed is one of them")
    return config


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by name, in the file until they are read.

    Raises:
        InputError: the file is damaged, or holds other things than plain floating-point tensors.
    """
    if path.suffix == ".safetensors":
        found = {}
        for name, stored in read_header(path).items():
            if 0 in stored.shape:  # which cannot be mapped: DeepSpeed's ZeRO-3 leaves such tensors if not gathered
                found[name] = torch.empty(stored.shape, dtype=stored.dtype)
                continue
            kind = f"u{stored.dtype.itemsize}"
            raw = np.memmap(path, dtype=kind, mode="c", offset=stored.offset, shape=stored.shape)
            found[name] = torch.from_numpy(raw).view(stored.dtype)
        return found
    entries = load_pickle(path, "PyTorch file")
    if not isinstance(entries, dict) or not all(torch.is_tensor(tensor) for tensor in entries.values()):
        raise InputError(f"{path}: holds other things than tensors by name, so it is not an adapter's weights")
    for name, tensor in entries.items():
        if tensor.dtype not in CODES or tensor.layout != torch.strided:
            raise InputError(f"{path}: {name} is {tensor.dtype}, {tensor.layout}; plain floating point is read")
    return {str(name): tensor.detach() for name, tensor in entries.items()}
