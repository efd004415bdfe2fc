"""What a LoRA adapter makes of each tensor of the model that it is for, checked against that model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint.adapter_files import CONFIG, WEIGHTS, read_tensors
from checkpoint.source import Source
from parallel.errors import InputError

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
        for key, tensor in read_tensors(self.path).items():
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
