"""Writing Megatron-LM checkpoints of `--ckpt-format torch`: the weights, for any tensor and pipeline parallelism.

What is written is a release, as Megatron-LM calls a checkpoint that a run begins with: `release/mp_rank_TT[_PPP]/` and
`latest_checkpointed_iteration.txt` that says so. `--load` then takes the weights and, told by that file, no optimizer
and no state of random numbers. The format: `checkpoint.megatron_files`. The numbers of ranks are those of the run that
loads it, since Megatron-LM cuts nothing anew in this format.

The vocabulary is padded to a multiple as Megatron-LM pads it, with copies of its last row as its converters have them
(NVIDIA/Megatron-LM, tools/checkpoint/saver_base.py).
"""

import functools
import json
import math
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from checkpoint.layout import FilePlan, Fragment
from checkpoint.megatron_files import FILE, LAYER, RELEASE, TRACKER
from checkpoint.megatron_model import EMBEDDING, HEAD, Parameter, arguments_of, parameters_of
from checkpoint.megatron_shards import local_shape, runs_of
from checkpoint.source import Source
from checkpoint.tensor_parallel import Cut, piece_of
from checkpoint.zero_state import save_skeleton
from parallel.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MegatronLayout:
    """A Megatron-LM folder, weights alone."""

    tp: int = 1
    """Tensor-parallel ranks."""
    stages: int = 1
    """Pipeline stages, each of as many layers."""
    dtype: torch.dtype | None = None
    """Output dtype; each tensor's own by default, and of tensors in one parameter the first one's."""
    fused_norms: bool = True
    """For `--transformer-impl transformer_engine`, the default there; else for `local`: norms are called otherwise."""
    multiple: int = 128
    """`--make-vocab-size-divisible-by`: of this times the ranks the padded vocabulary is a multiple."""

    def files(self, source: Source) -> list[FilePlan]:
        """Return a plan for each rank of each stage.

        Raises:
            InputError: Megatron-Core has no such model, or cannot cut it over so many ranks or stages.
        """
        arguments = self._arguments(source)
        parameters = self._parameters(source)
        # Rows are cut by the fragments; what is cut by columns is a view.
        cuts: dict[str, Cut] = {}
        for parameter in parameters.values():
            if parameter.dim == 1:
                size = parameter.shape[1]
                cuts[parameter.pieces[0].tensor] = 1, [rank * size // self.tp for rank in range(self.tp + 1)]
        pieces = [piece_of(source, cuts, rank) for rank in range(self.tp)]
        plans = []
        for stage, held in enumerate(self._cut_stages(source, parameters)):
            dtypes = {name: self._dtype(source, parameter) for name, parameter in held.items()}
            tensors = tuple(dict.fromkeys(piece.tensor for parameter in held.values() for piece in parameter.pieces))
            beside = {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": source.run.step}
            for rank, piece in enumerate(pieces):
                create = functools.partial(
                    _create, parameters=held, dtypes=dtypes, ranks=self.tp, rank=rank, beside=beside
                )
                tail = f"_{stage:03d}" if self.stages > 1 else ""
                name = f"{RELEASE}/mp_rank_{rank:02d}{tail}/{FILE}"
                plans.append(FilePlan(name=name, tensors=tensors, create=create, source=piece))
        return plans

    def extras(self, source: Source, plans: Sequence[FilePlan]) -> dict[str, bytes]:
        """Return what says that it is a release, and the Hugging Face config."""
        config = json.dumps(dict(source.config), indent=2, ensure_ascii=False) + "\n"
        return {TRACKER: RELEASE.encode(), "config.json": config.encode()}

    def _check(self, source: Source) -> None:
        if self.tp < 1 or self.stages < 1:
            raise InputError(f"a Megatron-LM checkpoint of {self.tp} x {self.stages} ranks cannot be written")
        axes = source.family.axes(source.config)
        heads, groups = (axes[axis] // axes["head_dim"] for axis in ("q", "kv"))
        counts = [("query heads", heads, self.tp), ("elements of intermediate_size", axes["ffn"], self.tp)]
        # More ranks than key/value heads share them, so many ranks each.
        counts.append(("key/value heads", *((groups, self.tp) if groups >= self.tp else (self.tp, groups))))
        for what, count, ranks in counts:
            if count % ranks:
                raise InputError(
                    f"{self.tp} tensor-parallel ranks do not fit the model's {what}: Megatron-LM wants {heads} query "
                    f"heads, {groups} key/value heads and {axes['ffn']} of the MLP in equal parts"
                )
        layers = source.config["num_hidden_layers"]
        if layers % self.stages:
            raise InputError(f"{layers} layers cannot be as many on each of {self.stages} stages, as Megatron-LM wants")

    def _parameters(self, source: Source) -> dict[str, Parameter]:
        padded = self._padded(source)
        return parameters_of(source.family, source.config, padded_vocab=padded, fused_norms=self.fused_norms)

    def _padded(self, source: Source) -> int:
        multiple = self.multiple * self.tp
        return -(-int(source.config["vocab_size"]) // multiple) * multiple

    def _cut_stages(self, source: Source, parameters: Mapping[str, Parameter]) -> list[dict[str, Parameter]]:
        """Return the parameters of each stage, by their names there, which count its own layers."""
        each = source.config["num_hidden_layers"] // self.stages
        found: list[dict[str, Parameter]] = [{} for _ in range(self.stages)]
        for name, parameter in parameters.items():
            if parameter.layer is None:
                found[0 if name == EMBEDDING else -1][name] = parameter
            else:
                stage, layer = divmod(parameter.layer, each)
                found[stage][LAYER.sub(rf"\g<1>{layer}.", name)] = parameter
        if self.stages > 1 and HEAD not in parameters:  # the last stage has a copy of a tied embedding
            found[-1][HEAD] = replace(parameters[EMBEDDING], name=HEAD)
        return found

    def _dtype(self, source: Source, parameter: Parameter) -> torch.dtype:
        return self.dtype or source.infos[parameter.pieces[0].tensor].slots["weight"]

    def _arguments(self, source: Source) -> dict[str, object]:
        """Return the arguments that Megatron-LM's run of this model and these ranks would have."""
        arguments = arguments_of(source.family, source.config)
        self._check(source)
        dtype = self._dtype(source, self._parameters(source)[EMBEDDING])
        return {
            **arguments,
            "padded_vocab_size": self._padded(source),
            "make_vocab_size_divisible_by": self.multiple,
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.stages,
            "transformer_impl": "transformer_engine" if self.fused_norms else "local",
            "params_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "ckpt_format": "torch",
            "consumed_train_samples": source.run.samples,
            "consumed_valid_samples": 0,
        }


def _create(
    path: Path,
    *,
    parameters: Mapping[str, Parameter],
    dtypes: Mapping[str, torch.dtype],
    ranks: int,
    rank: int,
    beside: Mapping[str, object],
) -> list[Fragment]:
    """Write a rank's file at its full size, and return where its rows go."""
    # Virtual memory alone: nothing is ever written to it.
    model = OrderedDict(
        (name, torch.empty(local_shape(parameter, ranks), dtype=dtypes[name])) for name, parameter in parameters.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Records are called after the file, so they lie where its own name puts them, under whatever name it is asked for.
    with TemporaryDirectory(dir=path.parent) as apart:
        offsets = save_skeleton(Path(apart) / FILE, {**beside, "model": model}, list(model.values()))
        (Path(apart) / FILE).replace(path)
    fragments = []
    for name, tensor in model.items():
        fragments += _fragments(parameters[name], ranks, rank, offsets[id(tensor)], tensor)
    return fragments


def _fragments(parameter: Parameter, ranks: int, rank: int, offset: int, tensor: torch.Tensor) -> list[Fragment]:
    """Return where a rank has which rows of a parameter, padding included."""
    width = math.prod(tensor.shape[1:])
    last = parameter.pieces[-1]
    rows = [
        (run.at, run.tensor, run.start, run.stop)
        for run in runs_of(parameter, ranks)
        if run.rank == rank or parameter.dim != 0
    ]
    held = sum(stop - start for _, _, start, stop in rows)
    # What a rank has more rows of than the tensors is the end of the vocabulary.
    rows += [(at, last.tensor, last.stop - 1, last.stop) for at in range(held, tensor.shape[0])]
    return [
        Fragment(
            offset=offset + at * width * tensor.itemsize,
            tensor=name,
            slot="weight",
            dtype=tensor.dtype,
            start=start * width,
            stop=stop * width,
        )
        for at, name, start, stop in rows
    ]
