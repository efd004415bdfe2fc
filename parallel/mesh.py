"""The device mesh: how many ranks each kind of parallelism has, which rank stands where, and what cannot be combined.

DeepSpeed 0.19.8 sets the order: tensor-parallel ranks are neighbours (AutoTP's mesh is data x tensor), so are those of
one sequence (Ulysses), and a pipeline's stages are the slowest axis (PipelineModule's topology is pipe x data).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import InputError
from parallel.families import family_of


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the axes; their product is the number of ranks."""

    dp: int = 1
    """Data parallel: model replicas, or with ZeRO the ranks that share one."""
    tp: int = 1
    """Tensor parallel (AutoTP): ranks that share each matrix."""
    sp: int = 1
    """Sequence parallel (Ulysses): ranks that share each sequence."""
    pp: int = 1
    """Pipeline stages: ranks that share the layers."""

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.sp * self.pp

    def data_rank(self, rank: int) -> int:
        """Return which of the `dp` shares of a batch a rank works on."""
        return rank % self.dp if self.pp > 1 else rank // (self.tp * self.sp)

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tp

    def sequence_rank(self, rank: int) -> int:
        return rank % self.sp

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return rank // self.dp if self.pp > 1 else 0

    def __str__(self) -> str:
        parts = [f"{name} {size}" for name, size in vars(self).items() if size > 1]
        return " x ".join(parts) or "1 rank"


def mesh_of(world_size: int, *, zero: int, dp: int | None = None, tp: int = 1, sp: int = 1, pp: int = 1) -> Mesh:
    """Return the mesh of a world of so many ranks; `dp` is what the other axes leave, unless it is given.

    Raises:
        InputError: the axes do not multiply to the world size, or DeepSpeed cannot combine them; the line names the
            nearest mesh that works.
    """
    for name, size in (("dp", dp), ("tp", tp), ("sp", sp), ("pp", pp)):
        if size is not None and size < 1:
            raise InputError(f"parallel.{name} is {size}: it has to be at least 1")
    rest = tp * sp * pp
    asked = f"tp {tp} x sp {sp} x pp {pp}"
    if pp > 1 and zero > 1:
        raise InputError(f"pipeline parallelism (pp {pp}) does not work with ZeRO-{zero}: use zero: 1, or pp: 1")
    if pp > 1 and zero == 0:
        raise InputError(f"pipeline parallelism (pp {pp}) is built on ZeRO-1 here: use zero: 1")
    if tp > 1 and sp > 1:
        raise InputError(
            f"tensor (tp {tp}) and sequence parallelism (sp {sp}) cannot be combined: "
            f"use tp: {tp * sp} with sp: 1, or sp: {tp * sp} with tp: 1"
        )
    if pp > 1 and rest > pp:
        other = "tp" if tp > 1 else "sp"
        raise InputError(f"pipeline parallelism (pp {pp}) cannot be combined with {other}: use pp: 1, or {other}: 1")
    if sp > 1 and zero == 0:
        raise InputError(f"sequence parallelism (sp {sp}) needs ZeRO: use zero: 3")
    if world_size % rest:
        most = max(size for size in range(1, world_size + 1) if world_size % size == 0 and size <= rest)
        raise InputError(
            f"{asked} = {rest} does not divide the {world_size} ranks: use {rest * -(-world_size // rest)} ranks, "
            f"or axes that multiply to {most}"
        )
    if dp is not None and dp * rest != world_size:
        raise InputError(
            f"dp {dp} x {asked} = {dp * rest}, but there are {world_size} ranks: use dp {world_size // rest}"
        )
    return Mesh(dp=world_size // rest, tp=tp, sp=sp, pp=pp)


def check_model(mesh: Mesh, config: Mapping[str, Any], sequence_length: int) -> None:
    """Check that a model can be cut so.

    Args:
        config: the Hugging Face config.
        sequence_length: tokens in a sample.

    Raises:
        InputError: an axis has more ranks than there is to cut.
    """
    family = family_of(config)
    sizes = family.axes(config)
    heads, kv_heads = sizes["q"] // sizes["head_dim"], sizes["kv"] // sizes["head_dim"]
    layers = config["num_hidden_layers"]
    if mesh.tp > kv_heads:
        raise InputError(f"parallel.tp is {mesh.tp}: the model has {kv_heads} key/value heads; at most {kv_heads} work")
    if mesh.tp > 1 and family.uncut:
        raise InputError(f"parallel.tp is {mesh.tp}: {family.name} {family.uncut}")
    if heads % mesh.sp or (kv_heads % mesh.sp and mesh.sp % kv_heads):
        fits = [size for size in range(1, heads + 1) if not heads % size and not (kv_heads % size and size % kv_heads)]
        raise InputError(
            f"parallel.sp is {mesh.sp}: {heads} heads and {kv_heads} key/value heads are shared evenly by "
            f"{', '.join(map(str, fits))} ranks"
        )
    if sequence_length % mesh.sp:
        raise InputError(f"parallel.sp is {mesh.sp}: it has to divide the sequence length {sequence_length}")
    if mesh.pp > layers:
        raise InputError(f"parallel.pp is {mesh.pp}: the model has {layers} layers; at most {layers} work")
