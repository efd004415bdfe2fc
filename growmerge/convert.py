"""`growmerge grow`, `convert` and `verify`: one line of the core each, from any format to any other."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint import manifest
from checkpoint.dcp_layout import DcpLayout
from checkpoint.files import disk_errors, read_json
from checkpoint.finite import Finite, NotFiniteError
from checkpoint.gguf import is_gguf
from checkpoint.layout import Layout
from checkpoint.megatron_layout import MegatronLayout
from checkpoint.nanotron_layout import NanotronLayout
from checkpoint.open import open_checkpoint
from checkpoint.pipeline_layout import PipelineLayout
from checkpoint.provenance import descend
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.source import Source, WithoutState
from checkpoint.team import MOST, as_many_as_fit
from checkpoint.titan_layout import TitanLayout
from checkpoint.torch_dist_layout import TorchDistLayout
from checkpoint.universal_layout import UniversalLayout
from checkpoint.writer import PROGRESS, Output, write_checkpoints
from checkpoint.zero3_layout import Zero3Layout
from growmerge import __version__
from parallel.errors import InputError, one_of
from slurm.lease import Lease
from upscale.factors import Recipe
from upscale.grow import grow

LEASE = ".lease.json"
"""Of whoever writes into a folder."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
"""Files of a Hugging Face folder that go with its weights as they are."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a checkpoint goes and in what form."""

    folder: Path
    format: str
    dtype: str | None = None
    """safetensors: a key of DTYPES; the source's own by default. zero3: bfloat16 or float32 is the run's precision."""
    shard_gb: float = 5.0
    ranks: int = 1
    """zero3, pipeline: data-parallel ranks of the run that will load it."""
    tensor_ranks: int = 1
    """zero3: tensor-parallel ranks of that run; so many files for each data-parallel rank. nanotron, megatron: too."""
    vocab_parallel: bool = False
    """zero3 with tensor parallelism: a tied embedding is cut too; see `checkpoint.tensor_parallel`."""
    stages: int = 1
    """pipeline, megatron: stages of the run that will load it."""
    workers: int | None = None
    """Processes; by default as many as there are cores and half gigabytes of memory for."""
    finite: bool = False
    """Refuse a source that holds a NaN or an infinity."""

    @property
    def processes(self) -> int:
        """Workers that write.

        Raises:
            InputError: a number that makes no sense.
        """
        if self.workers is not None and not 1 <= self.workers <= MOST:
            raise InputError(f"--workers is {self.workers}: allowed are 1 to {MOST}")
        return self.workers or as_many_as_fit()


def _safetensors(source: Source, target: Target) -> Layout:
    return SafetensorsLayout(
        dtype=DTYPES[target.dtype] if target.dtype else None, shard_size=round(target.shard_gb * 1e9)
    )


def _is_bf16(source: Source, target: Target) -> bool:
    """Return the precision of the DeepSpeed run that a checkpoint is for."""
    first = next(info for info in source.infos.values() if info.tied_to is None)
    stored = DTYPES[target.dtype] if target.dtype else first.slots["weight"]
    if stored == torch.float16:
        raise InputError("a DeepSpeed checkpoint of a float16 run is not written; choose --dtype bfloat16 or float32")
    return stored == torch.bfloat16


def _megatron(target: Target, implementation: str) -> Layout:
    return MegatronLayout(
        tp=target.tensor_ranks,
        stages=target.stages,
        dtype=DTYPES[target.dtype] if target.dtype else None,
        fused_norms=implementation == "transformer_engine",
    )


LAYOUTS: Mapping[str, Callable[[Source, Target], Layout]] = {
    "safetensors": _safetensors,
    "zero3": lambda source, target: Zero3Layout(
        ranks=target.ranks,
        tensor_ranks=target.tensor_ranks,
        vocab_parallel=target.vocab_parallel,
        bf16=_is_bf16(source, target),
    ),
    "pipeline": lambda source, target: PipelineLayout(
        stages=target.stages, ranks=target.ranks, bf16=_is_bf16(source, target)
    ),
    "universal": lambda source, target: UniversalLayout(bf16=_is_bf16(source, target)),
    "dcp": lambda source, target: DcpLayout(dtype=DTYPES[target.dtype] if target.dtype else None),
    "torchtitan": lambda source, target: TitanLayout(dtype=DTYPES[target.dtype] if target.dtype else None),
    "nanotron": lambda source, target: NanotronLayout(
        tp=target.tensor_ranks, dtype=DTYPES[target.dtype] if target.dtype else None
    ),
    "megatron": lambda source, target: _megatron(target, "transformer_engine"),
    "megatron_local": lambda source, target: _megatron(target, "local"),
    "torch_dist": lambda source, target: TorchDistLayout(dtype=DTYPES[target.dtype] if target.dtype else None),
}
"""The formats that are written."""
WEIGHTS_ALONE = ("safetensors", "nanotron", "megatron", "megatron_local")
"""Those that are written without the optimizer's state."""
TENSOR_PARALLEL = ("zero3", "nanotron", "megatron", "megatron_local")
"""Those that are cut over tensor-parallel ranks."""
PIPELINED = ("pipeline", "megatron", "megatron_local")
"""Those that are cut into pipeline stages."""


def grow_checkpoint(source: Path, target: Target, recipe: Recipe) -> str:
    """Grow a checkpoint of any format into a folder; return what is said of it.

    Raises:
        InputError: the recipe does not fit, the source is damaged, the target is taken or cannot be written.
    """
    small = _open(source, target)
    if recipe.state != "reset" and not any("exp_avg" in info.slots for info in small.infos.values()):
        raise InputError(f"{source}: has no optimizer state to grow; leave out --with-optimizer")
    if recipe.state != "reset" and target.format in WEIGHTS_ALONE:
        others = ", ".join(name for name in LAYOUTS if name not in WEIGHTS_ALONE)
        raise InputError(f"{target.format} is written without optimizer state; choose --format {others}")
    return _write(source, grow(small, recipe), target, {"verb": "grow", "recipe": recipe.plain()})


def convert_checkpoint(source: Path, target: Target) -> str:
    """Write a checkpoint in another format; return what is said of it.

    Raises:
        InputError: as `grow_checkpoint`.
    """
    opened = _open(source, target)
    kept = WithoutState(opened) if target.format in WEIGHTS_ALONE else opened
    return _write(source, kept, target, {"verb": "convert", "recipe": {}})


def _open(path: Path, target: Target) -> Source:
    source = open_checkpoint(path)
    return Finite(source, path) if target.finite else source


def _write(path: Path, source: Source, target: Target, made: Mapping[str, Any]) -> str:
    record = record_of(path)
    said = write_target(
        source,
        target,
        made=made,
        parents=[{**record, "name": record.get("name", path.name)}],
        inputs=[path],
        files={name: (path / name).read_bytes() for name in COMPANIONS if (path / name).is_file()},
    )
    return f"{said}; its tokenizer has to be brought, a GGUF file's is not read" if is_gguf(path) else said


def write_target(
    source: Source,
    target: Target,
    *,
    made: Mapping[str, Any],
    parents: Sequence[Mapping[str, Any]],
    inputs: Sequence[Path],
    files: Mapping[str, bytes],
) -> str:
    """Write a source where it goes, unless it is there; return what is said of it. Arguments as of `planned`.

    Raises:
        InputError: the target is taken or cannot be written; an unknown format or dtype.
    """
    folder = target.folder

    def plan() -> tuple[Output | None, Layout]:
        return planned(source, target, made=made, parents=parents, inputs=inputs, files=files)

    if plan()[0] is None:
        return f"nothing to do: {folder} is there and whole"
    with held(folder, f"growmerge {made.get('verb', 'convert')}"):
        output, layout = plan()  # another run may have written it meanwhile
        if output is None:
            return f"nothing to do: {folder} is there and whole"
        try:
            write_checkpoints([output], layout, workers=target.processes)
        except NotFiniteError:
            for path in folder.iterdir():  # there is no going on
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LEASE:
                    path.unlink()
            raise
    size = sum(entry["size"] for entry in manifest.read_manifest(folder)["files"].values())
    return f"{folder}: {target.format}, {size:,} bytes"


@contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder that is written into; two that write at once would leave a mixture that looks whole.

    Raises:
        InputError: somebody else holds it, or it cannot be made.
    """
    there = folder.is_dir()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with Lease(folder / LEASE, doing):
            yield
    finally:
        if not there:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def planned(
    source: Source,
    target: Target,
    *,
    made: Mapping[str, Any],
    parents: Sequence[Mapping[str, Any]],
    inputs: Sequence[Path],
    files: Mapping[str, bytes],
) -> tuple[Output | None, Layout]:
    """Return what is to be written, and how; nothing if it is there.

    Args:
        made: verb and recipe, for provenance.
        parents: records of the checkpoints that it is made from.
        inputs: their folders.
        files: further files, by name.

    Raises:
        InputError: the target is taken; an unknown format or dtype.
    """
    for what, value, allowed in (("format", target.format, LAYOUTS), ("dtype", target.dtype or "float32", DTYPES)):
        if value not in allowed:
            raise InputError(one_of(what, value, allowed))
    if target.format in TENSOR_PARALLEL[1:] and target.vocab_parallel:
        raise InputError(f"--vocab-parallel is of --format zero3 alone; {target.format} always cuts the vocabulary")
    if target.format not in TENSOR_PARALLEL and (target.tensor_ranks != 1 or target.vocab_parallel):
        raise InputError(
            "--tp is of --format zero3 and nanotron, megatron and megatron_local, "
            f"--vocab-parallel of zero3 alone; {target.format} has none"
        )
    if target.format not in PIPELINED and target.stages != 1:
        raise InputError(f"--stages is of --format {', '.join(PIPELINED)}; {target.format} has none")
    folder = target.folder
    if folder.resolve() in [path.resolve() for path in inputs]:
        raise InputError(f"{folder}: is {'the' if len(inputs) == 1 else 'a'} source itself; choose another folder")
    layout = LAYOUTS[target.format](source, target)
    about = {
        "format": 1,
        "name": folder.name,
        **made,
        **descend(parents),
        "tokens": source.run.tokens,
        "inputs": [fingerprint(path) for path in inputs],
        "layout": repr(layout),
        "versions": {"growmerge": __version__, "torch": torch.__version__},
    }
    if manifest.is_complete(folder):
        known = record_of(folder)
        if any(known.get(key) != about[key] for key in ("verb", "recipe", "inputs", "layout")):
            made = known.get("verb", "unknown")
            raise InputError(f"{folder}: holds another checkpoint (made by {made}); choose another folder")
        manifest.check(folder)
        if target.finite:
            Finite(open_checkpoint(folder), folder).scan()
        return None, layout
    others = [path for path in folder.iterdir() if path.name != LEASE] if folder.is_dir() else []
    if others and not (folder / PROGRESS).is_file():
        raise InputError(f"{folder}: is not empty and not an unfinished checkpoint; choose another folder")
    return Output(source=source, folder=folder, about=about, files=files), layout


def fingerprint(folder: Path) -> str:
    """Return what tells a source from another: its manifest's digest, or its files' names, sizes and times."""
    if manifest.is_complete(folder):
        return manifest.digest(manifest.read_manifest(folder))
    paths = [folder] if folder.is_file() else sorted(folder.iterdir())
    stats = [(path.name, path.stat()) for path in paths]
    text = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def record_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's provenance; empty if it has none."""
    path = folder / "growmerge.json"
    return dict(read_json(path)) if path.is_file() else {}
