"""HyperLlama, the model class of liu-nlp/nanotron for cloned models with tied embeddings, read as a plain Llama.

Its head divides the embedding by `lm_head_normalization_factor` n in every forward pass. Nothing but the head reads
what the final norm returns, so a final norm divided by n gives the same logits: E/n (w * h) = E ((w/n) * h), exact
where n is a power of two. The code that such a folder may carry is never run, nor kept.

Facts: examples/llama/hyper_llama/ and convert_nanotron_to_hf.py of liu-nlp/nanotron (e1097f2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoint import safetensors
from checkpoint.files import read_json
from checkpoint.safetensors import SafetensorsSource
from checkpoint.source import Box, Group, Info, RunState, Slot, Source, Wrapped, empty_box
from parallel.errors import InputError

MODEL_TYPE = "hyperllama"
FACTOR = "lm_head_normalization_factor"
POWERS: dict[Slot, int] = {"weight": -1, "master": -1, "exp_avg": 1, "exp_avg_sq": 2}
"""A slot of the final norm is multiplied by the head's divisor to this power: a weight n times smaller has a gradient
n times larger."""


@dataclass(frozen=True)
class FoldedHead(Wrapped):
    """A source whose model divides its logits by a number, as one that does not: its final norm divides by it."""

    divisor: float

    @cached_property
    def _norm(self) -> str:
        tensors = self.source.family.tensors(self.source.config)
        return next(name for name, tensor in tensors.items() if tensor.kind == "final_norm")

    @cached_property
    def _group(self) -> tuple[str, Group]:
        """The final norm's group and its name, as growth makes them: with it, training goes on as it did."""
        name = self.source.infos[self._norm].group
        group = self.source.groups.get(name, Group())
        if "exp_avg" not in self.source.infos[self._norm].slots:
            return name, group
        folded = replace(
            group,
            lr_factor=group.lr_factor / self.divisor,
            weight_decay_factor=group.weight_decay_factor * self.divisor,
            eps_factor=group.eps_factor * self.divisor,
            norm_weight=group.norm_weight / self.divisor**2,
        )
        return f"{name.partition('/')[0]}/in{1 / folded.lr_factor:.6g}-out{1 / folded.eps_factor:.6g}", folded

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        infos = self.source.infos
        return {**infos, self._norm: replace(infos[self._norm], group=self._group[0])}

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        groups = {**self.source.groups, self._group[0]: self._group[1]}
        used = {info.group for info in self.infos.values()}
        return {name: group for name, group in groups.items() if name in used}

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        if name != self._norm:
            self.source.read(name, box, out, stats)
            return
        wide = {slot: empty_box(box) for slot in out}
        self.source.read(name, box, wide, stats)
        for slot, target in out.items():
            power = POWERS[slot]
            values = wide[slot]
            target.copy_(values / self.divisor if power == -1 else values * self.divisor**power)


def folded(source: Source, divisor: float) -> Source:
    """Return a source whose head divides by nothing."""
    return source if divisor == 1 else FoldedHead(source, divisor)


def is_hyperllama(folder: Path) -> bool:
    """Return whether a Hugging Face folder of safetensors holds a HyperLlama."""
    if not any((folder / name).is_file() for name in (safetensors.SINGLE, safetensors.INDEX)):
        return False
    try:
        config = read_json(folder / "config.json")
    except InputError:
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the Llama that a HyperLlama is; it names no code."""
    kept = {key: value for key, value in config.items() if key not in (FACTOR, "auto_map", "architectures")}
    return {"architectures": ["LlamaForCausalLM"], **kept, "model_type": "llama"}


def open_hyperllama(folder: Path) -> Source:
    """Open a HyperLlama folder lazily, as a plain Llama.

    Raises:
        InputError: config.json is missing, or its factor is no number above 0; later, when a tensor is missing or has
            another shape.
    """
    config = read_json(folder / "config.json")
    factor = config.get(FACTOR, 1)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise InputError(f"{folder / 'config.json'}: {FACTOR} is {factor!r}: allowed are numbers above 0")
    about = read_json(folder / "growmerge.json") if (folder / "growmerge.json").is_file() else {}
    plain = SafetensorsSource(folder=folder, config=plain_config(config), run=RunState(provenance=about))
    return folded(plain, factor)
