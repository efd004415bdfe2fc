"""`growmerge plan`: which topologies a model fits on a cluster in, and what a step and a run take in each."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from growmerge.config import Marks, load_file
from growmerge.planner_page import page
from growmerge.schema import GrowStage, ModelConfig
from growmerge.schema_plan import ClusterConfig, PlanConfig
from growmerge.shapes import parameters, read_config, recipe_of
from parallel import cluster as links
from parallel import timing
from parallel.cluster import Cluster
from parallel.errors import InputError, one_of
from parallel.families import family_of
from parallel.gpus import gpu_of
from parallel.mesh import Mesh, check_model, mesh_of
from parallel.planner import Memory, memory
from parallel.presets import PRESETS, VOCABULARY, llama_of
from parallel.sizes import Setup, sizes_of
from parallel.timing import StepTime, flops_per_token, save_seconds, step_time
from upscale.factors import axis_growths, grown_config

WIDTH = 160
"""Columns that a table may have, whatever the terminal."""
NODE_LINK_GB_S = 50.0
"""A GPU's share of a node's network cards where nothing is given (400 Gbit/s)."""
STAGES = (1, 2, 3)
"""ZeRO stages with bfloat16."""
BEST = 10
AT_LEAST_1 = ("sequence_length", "global_batch", "vocab_size", "parameters", "tokens", "tp", "pp", "sp", "micro_batch")
ABOVE_0 = ("memory_gb", "link_gb_s", "node_link_gb_s", "disk_gb_s")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to train, and what it comes to."""

    setup: Setup
    memory: Memory
    time: StepTime
    tokens_per_second: float
    mfu: float
    """Model FLOPs utilisation: without what recomputing costs, as in a run's log."""

    @property
    def record(self) -> dict[str, Any]:
        """The numbers as plain data: bytes and seconds."""
        setup = self.setup
        return {
            "zero": setup.zero,
            **vars(setup.mesh),
            "micro_batch": setup.micro_batch,
            "accumulation": setup.accumulation,
            "recompute": setup.recompute,
            "offload": setup.offload,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "step": {**asdict(self.time), "seconds": self.time.seconds},
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a file comes to."""

    config: Mapping[str, Any]
    """The Hugging Face config of the model."""
    parameters: int
    cluster: Cluster
    memory_gb: float
    choices: tuple[Choice, ...]
    """All that fit, the fastest first."""
    looked_at: int
    checkpoint: int
    """Bytes of a checkpoint of the best: weights where a stage keeps them apart, master weights, moments."""
    blocked_s: float
    written_s: float
    exported: int
    """Bytes of the model as a Hugging Face folder in bfloat16."""
    hours: float | None
    """Of the whole run, with the best."""


def print_best(path: Path, *, as_json: bool) -> None:
    """Print what a file comes to, as a table or as JSON.

    Raises:
        InputError: a wrong file, or a model that fits nowhere; see `look`.
    """
    plan, marks = load_file(PlanConfig, path)
    found = look(plan, marks, base=path.absolute().parent)
    if as_json:
        print(json.dumps(record(found, plan), indent=1))
        return
    console = Console(width=WIDTH, markup=False, highlight=False, emoji=False)
    for part in page(found, plan):
        console.print(part)


def record(found: Found, plan: PlanConfig) -> dict[str, Any]:
    """Return what was found as plain data: bytes, seconds; the best choices in order."""
    of_links = {name: getattr(links, name) for name in ("LINK_SHARE", "START_S", "HOP_S", "NODE_HOP_S")}
    names = ("OVERLAP", "HOST_S", "HOOKS_S", "AGAIN", "HOST_LINK_GB_S", "HOST_MEMORY_GB_S", "UPDATE_BYTES")
    rest = ("parameters", "memory_gb", "looked_at", "checkpoint", "blocked_s", "written_s", "exported", "hours")
    return {
        **{name: getattr(found, name) for name in rest},
        "gpu_hours": None if found.hours is None else found.hours * found.cluster.gpus,
        "cluster": asdict(found.cluster),
        "assumptions": {
            "EFFICIENCY": plan.efficiency,
            **of_links,
            **{name: getattr(timing, name) for name in names},
        },
        "measured": "memory terms but the CUDA context",
        "modelled": "times, and what the CUDA context takes",
        "fit": len(found.choices),
        "best": [choice.record for choice in found.choices[:BEST]],
    }


def look(plan: PlanConfig, marks: Marks, *, base: Path) -> Found:
    """Return all ways to train a file's model on its cluster that fit, the fastest first.

    Args:
        base: the folder of the file, which `model` in it is relative to.

    Raises:
        InputError: an unknown GPU, a model that cannot be read or grown, axes that cannot be combined, a batch that
            does not divide, or a model that fits nowhere: the line says what least it takes and what to change.
    """
    _check(plan, marks)
    config = _config(plan, marks, base)
    cluster, memory_gb = _cluster(plan, marks)
    longest = config["max_position_embeddings"]
    if plan.sequence_length > longest:
        line = f"{plan.sequence_length} is more than the model's max_position_embeddings, {longest}"
        raise marks.error("sequence_length", line)
    with marks.within(_pinned(plan)):
        meshes = _meshes(plan, config, cluster.gpus)
    setups = [setup for zero, mesh in meshes for setup in _setups(plan, zero, mesh)]
    if not setups:
        raise _undivided(plan, marks, meshes, cluster.gpus)
    usable = memory_gb * 1e9 * (1 - plan.margin)
    sizes = {mesh.tp: sizes_of(config, mesh.tp) for _, mesh in meshes}
    taken = [(setup, memory(sizes[setup.mesh.tp], setup)) for setup in setups]
    flops = flops_per_token(config, plan.sequence_length)
    choices = []
    for setup, needed in taken:
        if needed.total <= usable:
            time = step_time(sizes[setup.mesh.tp], setup, needed, cluster, flops)
            rate = plan.global_batch * plan.sequence_length / time.seconds
            mfu = rate * flops / (cluster.gpus * cluster.gpu.flops)
            choices.append(Choice(setup=setup, memory=needed, time=time, tokens_per_second=rate, mfu=mfu))
    if not choices:
        raise _nowhere(plan, marks, min(taken, key=lambda pair: pair[1].total), usable, memory_gb)
    choices.sort(key=lambda choice: (choice.time.seconds, choice.memory.total))
    count, best = parameters(config), choices[0]
    checkpoint = (12 + (2 if best.setup.zero < 3 else 0)) * count
    blocked, written = save_seconds(best.memory, cluster, checkpoint)
    return Found(
        config=config,
        parameters=count,
        cluster=cluster,
        memory_gb=memory_gb,
        choices=tuple(choices),
        looked_at=len(setups),
        checkpoint=checkpoint,
        blocked_s=blocked,
        written_s=written,
        exported=2 * count,
        hours=None if plan.tokens is None else plan.tokens / best.tokens_per_second / 3600,
    )


def _check(plan: PlanConfig, marks: Marks) -> None:
    """Check the ranges of the numbers, and that there is one model."""
    for name in AT_LEAST_1:
        value = getattr(plan, name)
        if value is not None and value < 1:
            raise marks.error(name, f"{value:g} is out of range: allowed is at least 1")
    for name in ("gpus_a_node", "nodes"):
        if getattr(plan.cluster, name) < 1:
            raise marks.error(
                f"cluster.{name}", f"{getattr(plan.cluster, name)} is out of range: allowed is at least 1"
            )
    for name in ABOVE_0:
        value = getattr(plan.cluster, name)
        if value is not None and value <= 0:
            raise marks.error(f"cluster.{name}", f"{value:g} is out of range: allowed is above 0")
    if not 0 <= plan.margin < 1:
        raise marks.error("margin", f"{plan.margin:g} is out of range: allowed is at least 0 and below 1")
    if not 0 < plan.efficiency <= 1:
        raise marks.error("efficiency", f"{plan.efficiency:g} is out of range: allowed is above 0 and at most 1")
    if plan.zero is not None and plan.zero not in STAGES:
        raise marks.error("zero", f"{plan.zero} is out of range: allowed are {', '.join(map(str, STAGES))}")
    if sum(given is not None for given in (plan.model, plan.shape, plan.parameters)) != 1:
        raise marks.error("", "one of `model`, `shape` and `parameters` is needed: which model is planned for")
    if plan.model is not None if plan.vocab_size is not None else plan.shape is not None:
        raise marks.error("vocab_size", "goes with `shape`, which needs it, or `parameters`")


def _config(plan: PlanConfig, marks: Marks, base: Path) -> Mapping[str, Any]:
    config: Mapping[str, Any]
    if plan.model is not None:
        with marks.within("model"):
            config = _named(plan.model, base)
    elif plan.parameters is not None:
        with marks.within("parameters"):
            config = llama_of(plan.parameters, plan.vocab_size or VOCABULARY)
    else:
        shape = cast(ModelConfig, plan.shape)
        sizes = {field.name: getattr(shape, field.name) for field in fields(shape) if field.name != "family"}
        head_dim = shape.hidden_size // shape.num_attention_heads
        config = {"model_type": shape.family, **sizes, "head_dim": head_dim, "vocab_size": plan.vocab_size}
    if plan.grow is not None:
        with marks.within("grow"):
            recipe = recipe_of(cast(GrowStage, plan.grow), 0)
            axis_growths(recipe, config)  # refuses what cannot be grown
            config = grown_config(recipe, config)
    return config


def _named(model: str, base: Path) -> Mapping[str, Any]:
    """Return the config of a model in a folder, or of a preset; a folder of the same name goes before."""
    path = base / model
    if path.exists():
        return read_config(path.parent if path.name == "config.json" else path)
    if model not in PRESETS:
        raise InputError(f"no folder {str(path)!r}, and {one_of('model', model, PRESETS)}")
    return PRESETS[model]


def _cluster(plan: PlanConfig, marks: Marks) -> tuple[Cluster, float]:
    given: ClusterConfig = plan.cluster
    with marks.within("cluster.gpu"):
        gpu = gpu_of(given.gpu)
    cluster = Cluster(
        gpu=gpu,
        gpus_a_node=given.gpus_a_node,
        nodes=given.nodes,
        link_gb_s=given.link_gb_s or gpu.link_gb_s,
        node_link_gb_s=given.node_link_gb_s or NODE_LINK_GB_S * given.gpus_a_node,
        disk_gb_s=given.disk_gb_s,
        efficiency=plan.efficiency,
    )
    return cluster, given.memory_gb or gpu.memory_gb


def _pinned(plan: PlanConfig) -> str:
    """Return the key that an error of the mesh is about: the first axis that is given."""
    return next((name for name in ("pp", "tp", "sp", "zero") if getattr(plan, name) is not None), "")


def _meshes(plan: PlanConfig, config: Mapping[str, Any], gpus: int) -> list[tuple[int, Mesh]]:
    """Return the (ZeRO stage, mesh) pairs that work, as `parallel.mesh` says; raise what it says if none does."""
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    axes = {name: [pin] if (pin := getattr(plan, name)) is not None else sizes for name in ("tp", "sp", "pp")}
    family = family_of(config)
    plain = not family.scaled_embeddings and family.logits_divisor is None  # see `train.pipeline.build_pipeline`
    found, problem = [], None
    for zero in STAGES if plan.zero is None else (plan.zero,):
        for pp in axes["pp"]:
            if pp > 1 and not plain:
                line = f"pp: the family {family.name} scales between its layers, which no stage does: use tp"
                problem = problem or InputError(line)
                continue
            for tp in axes["tp"]:
                for sp in axes["sp"]:
                    try:
                        mesh = mesh_of(gpus, zero=zero, tp=tp, sp=sp, pp=pp)
                        check_model(mesh, config, plan.sequence_length)
                    except InputError as error:
                        problem = problem or error
                    else:
                        found.append((zero, mesh))
    if not found:
        assert problem is not None, "no mesh and no problem"
        raise problem
    return found


def _setups(plan: PlanConfig, zero: int, mesh: Mesh) -> Iterator[Setup]:
    """Yield the ways to share the batch out on a mesh."""
    share, rest = divmod(plan.global_batch, mesh.dp)
    if rest:
        return
    micros = [plan.micro_batch] if plan.micro_batch else [size for size in range(1, share + 1) if share % size == 0]
    for micro in (micro for micro in micros if share % micro == 0):
        for recompute in (False, True) if plan.recompute is None else (plan.recompute,):
            # Offloading is for ZeRO 2 and 3: DeepSpeed's ZeRO-1 in bfloat16 has none.
            for offload in (False, True) if plan.offload is None else (plan.offload,):
                if not offload or zero > 1:
                    yield Setup(
                        zero=zero,
                        mesh=mesh,
                        micro_batch=micro,
                        accumulation=share // micro,
                        sequence_length=plan.sequence_length,
                        recompute=recompute,
                        offload=offload,
                    )


def _undivided(plan: PlanConfig, marks: Marks, meshes: list[tuple[int, Mesh]], gpus: int) -> InputError:
    if plan.offload and max(zero for zero, _ in meshes) < 2:
        return marks.error("offload", "needs zero: 2 or 3")
    least = min(mesh.dp for _, mesh in meshes) * (plan.micro_batch or 1)
    below = plan.global_batch // least * least
    near = f"{below} or {below + least}" if below else str(least)
    micro = f" with micro_batch {plan.micro_batch}" if plan.micro_batch else ""
    return marks.error(
        "global_batch",
        f"{plan.global_batch} sequences cannot be shared evenly by the data ranks of {gpus} GPUs{micro}: use {near}",
    )


def _nowhere(
    plan: PlanConfig, marks: Marks, least: tuple[Setup, Memory], usable: float, memory_gb: float
) -> InputError:
    setup, needed = least
    how = [f"ZeRO-{setup.zero}", str(setup.mesh), f"micro_batch {setup.micro_batch}"]
    how += ["recompute"] * setup.recompute + ["offload"] * setup.offload
    pins = [name for name in ("zero", "tp", "pp", "sp", "micro_batch") if getattr(plan, name) is not None]
    pins += [name for name in ("recompute", "offload") if getattr(plan, name) is False]
    change = f"leave out {', '.join(pins)}, or " if pins else ""
    return marks.error(
        "cluster",
        f"fits nowhere: the least is {needed.total / 1e9:.1f} GB a GPU ({', '.join(how)}), usable are "
        f"{usable / 1e9:.1f} of {memory_gb:g} GB: {change}take more nodes, larger GPUs or a shorter sequence_length",
    )
