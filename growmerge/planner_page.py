"""What `growmerge plan` prints: the best ways to train, the memory of the best term by term, what is assumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from growmerge.plan import duration, short
from parallel.cluster import LINK_SHARE
from parallel.timing import HOOKS_S, HOST_S, OVERLAP

if TYPE_CHECKING:
    from growmerge.planner import Choice, Found
    from growmerge.schema_plan import PlanConfig

SHOWN = 10
LATER = {"gather": "weights are gathered", "loss": "the loss is differentiated", "layer": "a layer is differentiated"}
WHEN = {**LATER, "reduce": "gradients are reduced", "update": "AdamW steps"}


def page(found: Found, plan: PlanConfig) -> Iterator[Table | str]:
    """Yield what is printed, part by part."""
    cluster, best = found.cluster, found.choices[0]
    yield (
        f"{short(found.parameters)} parameters on {cluster.gpus} GPU{'s' * (cluster.gpus > 1)} "
        f"({cluster.nodes} x {cluster.gpus_a_node} "
        f"{plan.cluster.gpu}), {plan.global_batch:,} sequences of {plan.sequence_length:,} tokens a step: "
        f"{len(found.choices):,} of {found.looked_at:,} ways fit"
    )
    yield _choices(found)
    yield _memory(best, found.memory_gb)
    a_node = sum(best.memory.host.values()) * cluster.gpus_a_node
    host = ", ".join(f"{term} {_gb(size)}" for term, size in best.memory.host.items())
    yield f"Host memory a node: {_gb(a_node)} GB ({host} GB a rank)"
    yield (
        f"A checkpoint: {_gb(found.checkpoint)} GB, training waits {found.blocked_s:.1f} s, written after "
        f"{duration(found.written_s)}; the model alone in bfloat16: {_gb(found.exported)} GB"
    )
    if found.hours is not None:
        gpu_hours = found.hours * cluster.gpus
        yield f"The run's {short(round(plan.tokens or 0))} tokens: {found.hours:,.1f} h, {gpu_hours:,.0f} GPU-hours"
    between = f" and of {cluster.node_link_gb_s:g} GB/s between nodes" if cluster.nodes > 1 else ""
    yield (
        "Measured: the memory terms, but for the CUDA context (tests compare them with running engines within 10 %). "
        f"Modelled: the CUDA context, and all times: {plan.efficiency:.0%} of {cluster.gpu.flops / 1e12:g} TFLOP/s "
        f"while computing, at least {1e3 * HOST_S:g} ms a layer and a pass (ZeRO-3: {1e3 * (HOST_S + HOOKS_S):.1f}) "
        f"for the host, {LINK_SHARE:.0%} of {cluster.link_gb_s:g} GB/s in a node{between}, "
        f"{OVERLAP:.0%} of computing hides ZeRO-3's communication, disk {cluster.disk_gb_s:g} GB/s."
    )


def _choices(found: Found) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("ZeRO", "dp", "tp", "sp", "pp", "micro", "passes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("with", no_wrap=True)
    for name in ("GB a GPU", "step s", "compute", "gather", "reduce", "tp/sp", "bubble", "update", "tokens/s", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in found.choices[:SHOWN]:
        setup, mesh, time = choice.setup, choice.setup.mesh, choice.time
        options = ["recompute"] * setup.recompute + ["offload"] * setup.offload
        axes = (setup.zero, mesh.dp, mesh.tp, mesh.sp, mesh.pp, setup.micro_batch, setup.accumulation)
        parts = (time.compute, time.gather, time.reduce, time.tensor + time.sequence, time.bubble, time.update)
        table.add_row(
            *map(str, axes),
            ", ".join(options),
            _gb(choice.memory.total),
            f"{time.seconds:.3g}",
            *(f"{part:.2g}" if part else "" for part in parts),
            f"{choice.tokens_per_second:,.0f}",
            f"{choice.mfu:.1%}",
        )
    return table


def _memory(best: Choice, memory_gb: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("memory of a GPU with the best", f"of {memory_gb:g} GB", no_wrap=True)
    table.add_column("at rest, GB", _gb(sum(best.memory.rest.values())), justify="right")
    table.add_column(f"when {WHEN[best.memory.when]}, GB", _gb(best.memory.total), justify="right")
    for term in dict.fromkeys([*best.memory.rest, *best.memory.peak]):
        table.add_row(term, *(_gb(held[term]) if term in held else "" for held in (best.memory.rest, best.memory.peak)))
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"
