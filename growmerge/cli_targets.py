"""Options of commands that write a checkpoint."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from growmerge.convert import Target


def targets(command: Callable[..., None]) -> Callable[..., None]:
    """Add what `grow` and `convert` know of their output: an argument each, named as in `growmerge.convert.Target`."""
    options = [
        click.argument("source", type=click.Path(path_type=Path)),
        click.argument("folder", type=click.Path(path_type=Path), metavar="TARGET"),
        click.option(
            "--format",
            default="safetensors",
            show_default=True,
            help="safetensors, zero3, pipeline, universal, dcp, torchtitan, nanotron, megatron, megatron_local or "
            "torch_dist.",
        ),
        click.option("--dtype", help="float32, bfloat16 or float16; the source's own by default."),
        click.option(
            "--shard-gb", type=float, default=5.0, show_default=True, help="safetensors: size of a shard (GB)."
        ),
        click.option(
            "--dp",
            "ranks",
            type=int,
            default=1,
            show_default=True,
            help="zero3, pipeline: data-parallel ranks that will load it.",
        ),
        click.option(
            "--tp",
            "tensor_ranks",
            type=int,
            default=1,
            show_default=True,
            help="zero3, nanotron, megatron: tensor-parallel ranks (DeepSpeed's autotp_size) that will load it.",
        ),
        click.option(
            "--vocab-parallel",
            is_flag=True,
            help="zero3 with --tp: cut a tied embedding too, as autotp_size alone makes DeepSpeed do.",
        ),
        click.option(
            "--stages",
            type=int,
            default=1,
            show_default=True,
            help="pipeline, megatron: stages that will load it.",
        ),
        click.option("--workers", type=int, help="Processes; by default as cores and memory allow."),
        click.option("--finite", is_flag=True, help="Refuse a source with a NaN or an infinity."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def target_of(given: dict[str, Any]) -> "Target":
    """Take what `targets` added out of a command's arguments."""
    from growmerge.convert import Target

    return Target(**{field.name: given.pop(field.name) for field in fields(Target)})
