"""The memory of a training rank, term by term: what DeepSpeed 0.19.8 holds between steps, and at the peak of a step.

A pure function of a model's config and of how it is trained; `tests/parallel/test_planner.py` compares it with running
engines. All sizes are in bytes unless they are called elements.

Letters: B micro-batch, T tokens of a sequence, D hidden, F ffn, V vocab, H heads, P elements on a rank before ZeRO cuts
them, d ranks that ZeRO cuts them over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.sizes import PERSISTENT, Setup, Sizes, layer_activations, sizes_of, tokens_a_chunk

ALL_REDUCE = 5 * 10**8
"""Elements that ZeRO-0, and ZeRO-1 in bfloat16, reduce at once (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)."""
SUB_GROUP = 5 * 10**7
"""Elements that ZeRO-3 steps at once; as `train.engine.SUB_GROUP`."""
PREFETCH = 5 * 10**7
"""Elements that ZeRO-3 gathers ahead (prefetch_bucket_size)."""
REUSE = 10**9
"""ZeRO-3 keeps gathered what is used again within so many elements (max_reuse_distance)."""
CONTEXT = 2 * 10**9
"""Modelled: what CUDA, cuBLAS and NCCL take of a GPU beside tensors."""
SMALL = 2**20
"""What a shard file holds beside its tensors, at most."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one rank takes."""

    rest: Mapping[str, int]
    """Held between steps, by term."""
    peak: Mapping[str, int]
    """Held when a step holds most, by term."""
    when: str
    """What the step does then: gather, loss, layer, reduce or update."""
    host: Mapping[str, int]
    """In the CPU's memory: what is offloaded, and the buffers that a checkpoint is copied into."""
    elements: int
    """P."""

    @property
    def total(self) -> int:
        """Bytes on the device at the peak."""
        return sum(self.peak.values())


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One pipeline stage: what of the model it has."""

    elements: int
    apart: int
    """Elements that ZeRO-3 gathers for each use."""
    layers: int
    embeds: bool
    scores: bool
    in_flight: int
    """Micro-batches whose activations it holds at once (1F1B: arXiv 2104.04473, section 2.2)."""


def _stages(sizes: Sizes, setup: Setup) -> list[_Stage]:
    """Return the first and the last stage, which are those that hold most; without pipeline both are one."""
    pp = setup.mesh.pp
    layers = -(-sizes.layers // pp)

    def stage(number: int) -> _Stage:
        embeds, scores = number == 0, number == pp - 1
        ends = sizes.embedding * (embeds or (scores and sizes.tied)) + (sizes.head + sizes.final) * scores
        loose = sum(size for size in (sizes.embedding, sizes.head) if size > PERSISTENT)
        return _Stage(
            elements=ends + layers * sizes.layer,
            apart=loose + layers * sizes.layer_apart,
            layers=layers,
            embeds=embeds,
            scores=scores,
            in_flight=min(setup.accumulation, pp - number),
        )

    return [stage(number) for number in sorted({0, pp - 1})]


def memory_of(config: Mapping[str, Any], setup: Setup) -> Memory:
    """Return what a rank takes, of a pipeline's the one that takes most."""
    return memory(sizes_of(config, setup.mesh.tp), setup)


def memory(sizes: Sizes, setup: Setup) -> Memory:
    """Return what a rank takes, from the sizes of the model on it."""
    return max((_memory(sizes, setup, stage) for stage in _stages(sizes, setup)), key=lambda found: found.total)


def _memory(sizes: Sizes, setup: Setup, stage: _Stage) -> Memory:
    rest = _rest(setup, stage)
    host = _host(setup, stage)
    if setup.mesh.pp > 1:
        # DeepSpeed keeps two micro-batches of what a stage takes and gives, between steps too; of the last: logits.
        given = sizes.vocab if stage.scores else sizes.hidden
        rest["pipeline buffers"] = 2 * setup.width * setup.tokens * (sizes.hidden + given)
    if setup.offload:
        share = -(-stage.elements // setup.shards)
        for term in ("master weights", "Adam moments"):
            host[term] = rest.pop(term)
        rest.pop("gradients", None)
        host["gradients"] = (8 if setup.zero == 3 else 4 + setup.width) * share
        if setup.zero < 3:
            # What gradients travel through, on both sides.
            rest["offload buffer"] = host["offload buffer"] = setup.width * sizes.largest
    phases = {
        "gather": _at_gather(sizes, setup, stage),
        "loss": _at_loss(sizes, setup, stage),
        "layer": _in_layer(sizes, setup, stage),
        "reduce": _at_reduce(sizes, setup, stage),
        "update": _at_update(sizes, setup, stage, rest),
    }
    context = {"CUDA context": CONTEXT} if setup.cuda else {}
    when = max(phases, key=lambda name: sum(phases[name].values()))
    peak = {**rest, **context}
    for term, size in phases[when].items():
        peak[term] = peak.get(term, 0) + size
    return Memory(
        rest={term: size for term, size in rest.items() if size},
        peak={term: size for term, size in peak.items() if size},
        when=when,
        host={term: size for term, size in host.items() if size},
        elements=stage.elements,
    )


def _plain_bf16(setup: Setup) -> bool:
    """Whether DeepSpeed's BF16_Optimizer runs, which is its ZeRO-1 in bfloat16: it sums whole float32 gradients."""
    return setup.zero == 1 and setup.precision == "bfloat16"


def _rest(setup: Setup, stage: _Stage) -> dict[str, int]:
    """Return what is held between steps."""
    elements, width = stage.elements, setup.width
    share = -(-elements // setup.shards)
    if setup.zero == 0:
        return {"weights": width * elements, "Adam moments": 8 * elements}
    found = {
        "weights": width * (share if setup.zero == 3 else elements),
        "master weights": 4 * share,
        "Adam moments": 8 * share,
    }
    if _plain_bf16(setup):
        found["gradients"] = 4 * elements
    if setup.zero == 3:
        found["gradients"] = 4 * share
        found["whole small weights"] = width * (elements - stage.apart) if setup.shards > 1 else 0
        found["reduce bucket"] = setup.reduced * setup.bucket
    return found


def _host(setup: Setup, stage: _Stage) -> dict[str, int]:
    """Return `train.saver`'s buffers: a rank's part of master weights and moments; below ZeRO-3 the weights too."""
    share = -(-stage.elements // setup.shards) if setup.zero else stage.elements
    weights = 0 if setup.zero == 3 else setup.width * stage.elements
    return {"checkpoint buffers": (12 if setup.zero else 8) * share + weights + SMALL}


def _summed(setup: Setup, stage: _Stage) -> int:
    """Return the gradients that are held beside those at rest when a pass after the first begins."""
    if setup.accumulation == 1 or setup.zero == 3:
        return 0
    if setup.zero == 2:
        return -(-4 * stage.elements // setup.shards)
    return setup.width * stage.elements


def _gathered(setup: Setup, stage: _Stage, elements: int) -> int:
    """Return the bytes of weights that ZeRO-3 has gathered, of so many elements that it would."""
    if setup.zero < 3 or setup.shards == 1:
        return 0
    return setup.width * min(stage.apart, elements)


def _kept(sizes: Sizes, setup: Setup, stage: _Stage) -> int:
    """Return the activations of all layers when the backward pass begins."""
    a_layer = sizes.hidden * setup.width if setup.recompute else _a_layer(sizes, setup)
    return stage.in_flight * setup.tokens * stage.layers * a_layer


def _a_layer(sizes: Sizes, setup: Setup) -> int:
    return layer_activations(sizes, setup.width, sequence_parallel=setup.mesh.sp > 1)


def _at_gather(sizes: Sizes, setup: Setup, stage: _Stage) -> dict[str, int]:
    """Return what is held beside the rest when ZeRO-3 has gathered the last layers: their weights, and the buffer that
    they were gathered in, of as many elements as it fetches at once."""
    return {
        "activations": _kept(sizes, setup, stage),
        "gradients": _summed(setup, stage),
        "gathered weights": _gathered(setup, stage, sizes.embedding + sizes.head + REUSE // 2)
        + _gathered(setup, stage, PREFETCH),
    }


def _at_loss(sizes: Sizes, setup: Setup, stage: _Stage) -> dict[str, int]:
    """Return what is held beside the rest when the loss is differentiated.

    Logits: log-probabilities, their gradient, and that of the logits, each [B, T, V] in float32, or of a chunk of the
    tokens, but in a pipeline. Weights are gathered that are used again within REUSE elements: the last layers, on the
    way there and back.
    """
    if not stage.scores:
        return _in_layer(sizes, setup, stage)
    at_once = setup.tokens if setup.mesh.pp > 1 else tokens_a_chunk(sizes.vocab, setup.tokens)
    final = sizes.hidden * (4 + 2 * setup.width)
    return {
        "activations": _kept(sizes, setup, stage) + setup.tokens * final,
        "logits and loss": 12 * sizes.vocab * at_once,
        "gradients": _summed(setup, stage),
        "gathered weights": _gathered(setup, stage, sizes.embedding + sizes.head + REUSE // 2),
    }


def _in_layer(sizes: Sizes, setup: Setup, stage: _Stage) -> dict[str, int]:
    """Return what is held beside the rest in the backward pass of the last layer."""
    width = setup.width
    again = _a_layer(sizes, setup) if setup.recompute else 0
    inside = width * (2 * sizes.ffn + 2 * sizes.hidden)
    head = width * sizes.vocab * sizes.hidden if stage.scores and setup.zero < 2 else 0
    return {
        "activations": _kept(sizes, setup, stage) + setup.tokens * (again + inside),
        "gradients": _summed(setup, stage) + (head if setup.accumulation == 1 else 0),
        "gathered weights": _gathered(setup, stage, sizes.embedding + sizes.head + REUSE // 2),
        "reduce bucket": _bucket(setup),
    }


def _bucket(setup: Setup) -> int:
    """Return the bytes of the bucket where it is made for each backward pass."""
    return 0 if setup.zero in (0, 3) or _plain_bf16(setup) else setup.reduced * setup.bucket


def _at_reduce(sizes: Sizes, setup: Setup, stage: _Stage) -> dict[str, int]:
    """Return what is held beside the rest when the last gradients of a pass are reduced.

    A tied embedding has two gradients, of the head and of the look-up, until their sum is made. A gradient larger than
    the bucket stays where it is: with ZeRO-3 it waits there for the one before it, with ZeRO-2 those of a rank's own
    part stay for the whole pass.
    """
    elements, width = stage.elements, setup.width
    share = -(-4 * elements // setup.shards)
    large = sizes.largest if sizes.largest > setup.bucket else 0
    tied = width * sizes.embedding if sizes.tied and stage.embeds and stage.scores else 0
    if setup.zero == 0:
        return {"gradients": 4 * elements, "reduce copies": 4 * min(elements, ALL_REDUCE)}
    if _plain_bf16(setup):  # flattened in float32, sent in bfloat16
        return {"gradients": width * elements, "reduce copies": max(2 * tied, 6 * min(elements, ALL_REDUCE))}
    if setup.zero == 1:
        return {
            "gradients": width * elements,
            "reduce copies": max(2 * tied + _bucket(setup), share) - _bucket(setup),
            "reduce bucket": _bucket(setup),
        }
    if setup.zero == 3:
        twice = 2 * sizes.layer_largest if sizes.layer_largest > setup.bucket else 0
        sent = max(min(elements, setup.bucket), large, twice)
        copies = setup.reduced * sent + (-(-4 * sent // setup.shards) if setup.reduced == 2 else 0)
        gathered = _gathered(setup, stage, sizes.embedding + sizes.layer_apart + PREFETCH)
        return {"reduce copies": copies, "gradients": tied, "gathered weights": gathered}
    copies = setup.reduced * max(min(elements, setup.bucket), large)
    if width == 2:
        copies, held = copies + 4 * sizes.largest, share + width * _larger(sizes, setup, stage) // setup.shards
    else:
        copies, held = max(copies, 3 * tied), share * (1 if setup.accumulation == 1 else 2)
    return {
        "gradients": held,
        "reduce copies": copies,
        "reduce bucket": _bucket(setup),
    }


def _larger(sizes: Sizes, setup: Setup, stage: _Stage) -> int:
    """Return the elements of a stage's tensors that are larger than the bucket."""
    in_layer = sum(count for count in sizes.layer_tensors if count > setup.bucket)
    return stage.layers * in_layer + sum(size for size in (sizes.embedding, sizes.head) if size > setup.bucket)


def _at_update(sizes: Sizes, setup: Setup, stage: _Stage, rest: Mapping[str, int]) -> dict[str, int]:
    """Return what is held beside the rest when AdamW steps, in place: float32 gradients, flattened.

    Offloaded it steps elsewhere; the sums of ZeRO-2 are on the device until then.
    """
    if setup.offload:
        return {"gradients": -(-4 * stage.elements // setup.shards) if setup.zero == 2 else 0}
    if setup.zero == 0:
        return {"gradients": 4 * stage.elements}
    if _plain_bf16(setup):
        return {"gradients": setup.width * stage.elements}
    share = -(-stage.elements // setup.shards)
    if setup.zero < 3:
        return {"gradients": (4 if setup.width == 2 else 8) * share}
    # A sub-group ends with the tensor that fills it.
    at_once = min(share, SUB_GROUP - (-sizes.largest // setup.shards))
    return {"update": 4 * at_once, "whole small weights": -rest["whole small weights"]}
