"""Writing DCP folders of torchtitan's Llama 3: the names of its model, rows of queries and keys in its order.

The state dict is a trainer's: the model's keys at the top, `optimizer` with the state and the groups of each parameter
under its name, `train_state`. A run goes on from it with `--checkpoint.exclude-from-loading` of what is not there
(lr_scheduler, dataloader), or begins with `--checkpoint.initial-load-path` and loads the model alone.

Facts of pytorch/torchtitan: components/checkpoint.py, components/optimizer.py, train.py; names: `checkpoint.dcp_names`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from checkpoint.dcp_layout import DcpLayout, Item, Key, saved
from checkpoint.dcp_names import TITAN
from checkpoint.layout import FilePlan
from checkpoint.source import Box, Info, Map, Slot, Source, Wrapped, row_major_tiles
from parallel.errors import InputError
from parallel.families import LLAMA

TURNED = (".attention.wq.", ".attention.wk.")
"""In the names of what rotary embeddings turn."""


@dataclass(frozen=True)
class TitanView(Wrapped):
    """A Llama whose tensors have torchtitan's names and rows."""

    @cached_property
    def names(self) -> Mapping[str, str]:
        """torchtitan's name -> Hugging Face's."""
        found = {}
        for name, tensor in self.family.tensors(self.config).items():
            general = name.replace(f"layers.{tensor.layer}.", "layers.{layer}.", 1)
            if general not in TITAN:
                raise InputError(f"{name}: torchtitan's Llama 3 has no such tensor")
            found[TITAN[general][0].format(layer=tensor.layer)] = name
        return found

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        back = {name: titan for titan, name in self.names.items()}
        known = self.source.infos
        infos = {titan: known[name] for titan, name in self.names.items()}
        return {
            titan: info if info.tied_to is None else replace(info, tied_to=back[info.tied_to])
            for titan, info in infos.items()
        }

    def tiles(self, name: str) -> Sequence[Box]:
        return row_major_tiles(self.infos[name].shape)

    def collect(self, name: str, spread: Map) -> Any:
        return self.source.collect(self.names[name], spread)

    def read(self, name: str, box: Box, out: Mapping[Slot, torch.Tensor], stats: Any = None) -> None:
        inner = self.names[name]
        if not any(part in name for part in TURNED):
            self.source.read(inner, box, out, stats)
            return
        half = self.family.axes(self.config)["head_dim"] // 2
        for rows, at in neighbours(box[0], half):
            # A copy: what is asked for stands in every other row of `out`.
            wide = {slot: torch.empty_like(target[at]) for slot, target in out.items()}
            self.source.read(inner, (rows, *box[1:]), wide, stats)
            for slot, target in out.items():
                target[at] = wide[slot]


def neighbours(rows: slice, half: int) -> Iterator[tuple[slice, slice]]:
    """Return where rows of queries or keys in torchtitan's order come from.

    Row 2i of a head is row i of Hugging Face's, and row 2i + 1 is row half + i.

    Yields:
        (rows there, a slice with a step of the rows asked for) for the even and the odd rows of each head.
    """
    size = 2 * half
    for head in range(rows.start // size, -(-rows.stop // size)):
        start, stop = max(rows.start - head * size, 0), min(rows.stop - head * size, size)
        for odd in (0, 1):
            first = start + (start + odd) % 2  # of this parity, from start on
            count = max(0, -(-(stop - first) // 2))
            if count:
                begin = head * size + odd * half + first // 2
                at = head * size + first - rows.start
                yield slice(begin, begin + count), slice(at, at + 2 * count - 1, 2)


@dataclass(frozen=True, kw_only=True)
class TitanLayout(DcpLayout):
    """A folder of torchtitan's Llama 3, with the optimizer where the source has one."""

    def files(self, source: Source) -> list[FilePlan]:
        """Return the plans of the files.

        Raises:
            InputError: torchtitan's Llama 3 has no such model.
        """
        view = self._view(source)
        return [replace(plan, source=view) for plan in super().files(view)]

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        return super().extras(self._view(source), plans)

    def _view(self, source: Source) -> Source:
        if isinstance(source, TitanView):
            return source
        family, config = source.family, source.config
        if family is not LLAMA:
            raise InputError(f"torchtitan's Llama 3 is of the llama family; this is a model of {family.name}")
        heads, sizes = config["num_attention_heads"], family.axes(config)
        if heads * sizes["head_dim"] != sizes["hidden"]:
            raise InputError(
                f"{heads} heads of {sizes['head_dim']} do not make up hidden size {sizes['hidden']}, "
                "and torchtitan's Llama 3 derives the size of a head from it"
            )
        return TitanView(source)

    def weight_keys(self, names: Sequence[str]) -> tuple[Key, ...]:
        return tuple((name,) for name in names)

    def state_key(self, name: str, what: str) -> Key:
        return "optimizer", f"state.{name}.{what}"

    def group_keys(self, number: int, names: Sequence[str], field: str) -> tuple[Key, ...]:
        if field == "params":
            return ()
        return tuple(("optimizer", f"param_groups.{name}.{field}") for name in names)

    def run_items(self, source: Source) -> Iterator[Item]:
        yield from super().run_items(source)
        run = source.run
        for key, value in (
            ("step", torch.tensor(run.step, dtype=torch.int32)),
            ("ntokens_seen", torch.tensor(run.tokens)),
        ):
            yield Item(keys=(("train_state", key),), head=saved(value), offsets=(), dtype=value.dtype)
