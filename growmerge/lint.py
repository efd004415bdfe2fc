"""What a pipeline's user should know before anything runs: merges by an unrelated base, and in a narrow dtype."""

from collections.abc import Iterator, Mapping

from growmerge.graph import Node
from growmerge.references import Body, unrelated
from growmerge.schema import MergeStage


def notes(nodes: Mapping[str, Node]) -> list[str]:
    """Return what there is to say, each with the file's line and the stages that it is true of."""
    inputs = {name: node.inputs for name, node in nodes.items()}
    bodies = {name: node.stage for name, node in nodes.items()}
    found: dict[str, list[str]] = {}
    for node in nodes.values():
        if isinstance(node.stage, MergeStage):
            for line in _of_merge(node.stage, bodies, inputs):
                found.setdefault(f"{node.where}: {line}", []).append(node.name)
    return [f"{line} ({_named(names)})" for line, names in found.items()]


def _of_merge(stage: MergeStage, bodies: Mapping[str, Body], inputs: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    if unrelated(stage, bodies, inputs):
        yield f"base {stage.base} is not what its models were trained from"
    if stage.dtype == "float16":
        yield "float16 loses digits below 6e-5 and ends at 65504; sums are float32 here, but bfloat16 holds the weights"


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
