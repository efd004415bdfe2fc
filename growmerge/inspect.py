"""`growmerge inspect`: what a checkpoint folder is, and whether it is whole."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoint import manifest
from checkpoint.finite import Finite
from checkpoint.open import format_of, open_checkpoint
from checkpoint.pipeline import PipelineSource
from checkpoint.source import Source
from checkpoint.zero3 import Zero3Source
from checkpoint.zero3_tp import TensorParallelSource
from checkpoint.zero12 import Zero12Source


def print_checkpoint(folder: Path, *, check: bool, finite: bool) -> None:
    """Print format, model, tensors, sizes, provenance and integrity.

    Raises:
        InputError: it is no checkpoint, or it is damaged or, with `finite`, holds a NaN; the line names the file.
    """
    source = open_checkpoint(folder)
    kind = format_of(folder)
    owned = {name: info for name, info in source.infos.items() if info.tied_to is None}
    aliases = [f"{name} = {info.tied_to}" for name, info in source.infos.items() if info.tied_to is not None]
    slots = {slot: str(dtype).removeprefix("torch.") for info in owned.values() for slot, dtype in info.slots.items()}
    about = source.run.provenance
    rows = {
        "format": kind,
        "ranks": _ranks(source),
        "family": f"{source.family.name} ({source.config['model_type']})",
        "parameters": f"{sum(math.prod(info.shape) for info in owned.values()):,} in {len(owned)} tensors",
        "tied": ", ".join(aliases) or "no",
        "slots": ", ".join(f"{slot} {dtype}" for slot, dtype in slots.items()),
        "groups": ", ".join(f"{name} (step {group.step})" for name, group in source.groups.items()),
        "step": f"{source.run.step:,} ({source.run.tokens:,} tokens)",
        "made by": f"{about['verb']} {about['name']}" if "verb" in about else "unknown",
        "parents": ", ".join(str(parent["name"]) for parent in about.get("parents", [])) or "none known",
        "hash": str(about.get("hash", "unknown")),
        "integrity": _integrity(folder, check),
    }
    if finite:
        Finite(source, folder).scan()
        rows["values"] = "all finite"
    table = Table(show_header=False, box=None)
    for key, value in rows.items():
        table.add_row(f"[bold]{key}", value)
    Console(highlight=False).print(table)


def _ranks(source: Source) -> str:
    if isinstance(source, TensorParallelSource):
        return f"{source.pieces[0].ranks} data-parallel x {len(source.pieces)} tensor-parallel"
    if isinstance(source, PipelineSource):
        return f"{source.stages[0].ranks} data-parallel x {len(source.stages)} pipeline stages"
    return f"{source.ranks} data-parallel" if isinstance(source, Zero3Source | Zero12Source) else "any number"


def _integrity(folder: Path, deep: bool) -> str:
    if not manifest.is_complete(folder):
        return "no manifest: written by another tool, or interrupted"
    found = manifest.check(folder, deep=deep)
    total = sum(entry["size"] for entry in found["files"].values())
    what = "every byte read, all checksums right" if deep else "sizes and times right (--check reads every byte)"
    return f"{len(found['files'])} files, {total:,} bytes: {what}"
