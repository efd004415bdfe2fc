"""A model as a distributed checkpoint of Megatron-Core has it: a tensor for each key, made of another source's tensors.

The parameters of all layers are stacked, [L, ...], as Megatron-Core's are unless it is told otherwise; `linear_fc1` is
one key, gate over up; the vocabulary is padded with zeros. The keys: `checkpoint.torch_dist_keys`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from checkpoint.megatron_model import Parameter, arguments_of, parameters_of
from checkpoint.source import Box, Info, Map, Slot, Source, Wrapped, row_major_tiles
from checkpoint.torch_dist_keys import generic
from parallel.errors import InputError

PADDED_TO = 128
"""The vocabulary's size is a multiple: Megatron-LM's default for one tensor-parallel rank. Loading pads as it likes."""


def padded_vocab(config: Mapping[str, Any]) -> int:
    """Return the size of the padded vocabulary."""
    return -(-int(config["vocab_size"]) // PADDED_TO) * PADDED_TO


@dataclass(frozen=True)
class TorchDistView(Wrapped):
    """A source whose tensors are the keys of a checkpoint."""

    @cached_property
    def parameters(self) -> Mapping[str, Sequence[Parameter]]:
        """The parameter, or that of each layer, by key.

        Raises:
            InputError: Megatron-Core has no such model.
        """
        arguments_of(self.family, self.config)
        vocab = padded_vocab(self.config)
        found: dict[str, list[Parameter]] = {}
        for parameter in parameters_of(self.family, self.config, padded_vocab=vocab, fused_norms=True).values():
            found.setdefault(generic(parameter), []).append(parameter)
        return found

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        """Every key.

        Raises:
            InputError: of tensors that are one key some have a slot and others have not.
        """
        found, infos = {}, self.source.infos
        for key, parameters in self.parameters.items():
            shape = parameters[0].shape if parameters[0].layer is None else (len(parameters), *parameters[0].shape)
            first, *others = self.tensors_of(key)
            for other in others:
                if infos[other].slots.keys() != infos[first].slots.keys():
                    raise InputError(
                        f"{first} and {other} are parts of one tensor for Megatron-Core, {key}, and one of them has no "
                        "state of the optimizer: it is not trained, or was not saved"
                    )
            found[key] = Info(shape=shape, slots=infos[first].slots)
        return found

    def tensors_of(self, key: str) -> list[str]:
        """Return the tensors that a key is made of."""
        return list(dict.fromkeys(piece.tensor for one in self.parameters[key] for piece in one.pieces))

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return {tensor: self.source.collect(tensor, spread) for tensor in self.tensors_of(name)}

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        parameters = self.parameters[name]
        if parameters[0].layer is None:
            self._read(parameters[0], box, out, stats)
            return
        for at, layer in enumerate(range(box[0].start, box[0].stop)):
            self._read(parameters[layer], box[1:], {slot: target[at] for slot, target in out.items()}, stats)

    def _read(self, parameter: Parameter, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any) -> None:
        """Fill a box of one parameter; rows of padding are zero."""
        rows, *columns = box
        whole = 0
        for piece in parameter.pieces:
            low, high = max(whole, rows.start), min(whole + piece.stop - piece.start, rows.stop)
            if low < high:
                within: Box = (slice(low - whole + piece.start, high - whole + piece.start), *columns)
                target = {slot: whole_out[low - rows.start : high - rows.start] for slot, whole_out in out.items()}
                self.source.read(piece.tensor, within, target, stats[piece.tensor] if stats else None)
            whole += piece.stop - piece.start
        if whole < rows.stop:
            for target_out in out.values():
                target_out[max(whole, rows.start) - rows.start :].zero_()


def view_of(source: Source) -> TorchDistView:
    return source if isinstance(source, TorchDistView) else TorchDistView(source)
