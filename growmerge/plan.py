"""The dry run: every stage with its inputs, parameters, tokens, FLOPs and modelled cost, before anything is done."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from growmerge.config import merged_training
from growmerge.graph import Node
from growmerge.schema import MergeStage, Pipeline, Resources, TrainStage
from growmerge.schema_mixture import MixtureConfig
from growmerge.shapes import model_configs, multiplied, parameters
from growmerge.tasks import statistics_of

STEP_SECONDS = 0.079
"""Modelled: seconds a step whatever the model (Python, DeepSpeed, gloo), measured with 2 ranks on 2 CPU cores."""
CORE_FLOPS = 7.2e10
"""Modelled: FLOP/s that a core sustains in float32 training, measured at 0.5 and 1.6 million parameters."""
JOB_SECONDS = 14.0
"""Modelled: seconds from a job's start to its first step (imports, process group)."""
ONE_BY_ONE = 40
"""Merges of a grid that have a row each; more are one row."""
WIDTH = 100
"""Columns of the table at least."""
BESIDES = 76
"""Columns that the table needs beside the stages' names."""


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """What a stage comes to."""

    name: str
    verb: str
    inputs: tuple[str, ...]
    """Stages and checkpoints that it reads from, or `scratch`."""
    data: str | None
    """The mixture that it trains on."""
    parameters: int
    template: str = ""
    """Of the grid that it is of."""
    statistics: Mapping[str, str] = field(default_factory=dict)
    """What a merge goes by, and of what it is made first."""
    steps: int = 0
    """Its own: of a branch those from where it branches off."""
    tokens: int = 0
    flops: int = 0
    """6 N D: N parameters with the head, without an embedding that is only looked up; D tokens (arXiv 2001.08361)."""
    seconds: float = 0.0
    """Modelled, see STEP_SECONDS and CORE_FLOPS; 0 for a stage that does not train."""


def plan(pipeline: Pipeline, nodes: Mapping[str, Node], *, base: Path) -> list[PlannedStage]:
    """Return what each stage comes to, in the order of the nodes.

    Args:
        base: the folder of the pipeline file, which checkpoints' paths in it are relative to.

    Raises:
        InputError: see `growmerge.shapes.model_configs`.
    """
    configs = model_configs(pipeline, nodes, base=base)
    found = []
    for node in nodes.values():
        stage, config = node.stage, configs[node.name]
        count = parameters(config)
        if not isinstance(stage, TrainStage):
            read = (*stage.from_, stage.base) if isinstance(stage, MergeStage) else (stage.from_,)
            inputs = tuple(dict.fromkeys(name for name in read if name))
            counted = statistics_of(stage, pipeline.seed) if isinstance(stage, MergeStage) else []
            reads = {name: f"{about['from_']} on {about['text']}" for name, about in counted}
            found.append(
                PlannedStage(
                    name=node.name,
                    verb=node.verb,
                    inputs=inputs,
                    data=None,
                    parameters=count,
                    template=node.template,
                    statistics=reads,
                )
            )
            continue
        training = merged_training(pipeline, stage)
        assert training.steps is not None, "expand lets no stage through without steps"
        a_step = training.global_batch * training.sequence_length
        each = 6 * multiplied(config) * a_step
        own = training.steps - (stage.at or 0)
        found.append(
            PlannedStage(
                name=node.name,
                verb=node.verb,
                inputs=(stage.from_,),
                data=stage.data,
                parameters=count,
                steps=own,
                tokens=own * a_step,
                flops=own * each,
                seconds=own * (STEP_SECONDS + each / (cores(pipeline.resources) * CORE_FLOPS)),
            )
        )
    return found


def cores(resources: Resources) -> int:
    """Return how many cores a job computes on."""
    available = os.cpu_count() or 1
    return resources.ranks * (resources.threads or max(1, available // resources.ranks))


def total_seconds(stages: Sequence[PlannedStage], resources: Resources) -> float:
    """Return the modelled time of all training, jobs' starts included, one after the other (seconds)."""
    jobs = 1 if resources.pack else len(stages)
    return sum(stage.seconds for stage in stages) + jobs * JOB_SECONDS


def print_plan(stages: Sequence[PlannedStage], pipeline: Pipeline) -> None:
    """Print the stages in order as a table, with what runs around them, and the totals."""
    # Nothing is cut: a long name makes the table wider, a pipe or a narrow terminal does not make it narrower.
    longest = max((len(name) for stage in stages for name in (stage.name, *stage.statistics)), default=0)
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    width = max(terminal, WIDTH, longest + BESIDES)
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    console.print(_table(stages, pipeline))
    if lines := mixtures_in_words(stages, pipeline):
        unknown = "" if pipeline.prepared else ", whose epochs are unknown before the text is there and tokenised"
        console.print(f"Mixtures{unknown}:")
        for line in lines:
            console.print(f"  {line}", soft_wrap=True)
    if pipeline.resources.gpus:
        console.print("Time and memory on GPUs: growmerge plan.")
        return
    seconds, count = total_seconds(stages, pipeline.resources), cores(pipeline.resources)
    console.print(
        f"Modelled on {pipeline.resources.ranks} ranks, {count} cores: {STEP_SECONDS} s a step and "
        f"{CORE_FLOPS / 1e9:g} GFLOP/s a core, {JOB_SECONDS:g} s to start a job; "
        f"{count * seconds / 3600:.2g} core hours. Text, growing, merging and evaluating are not in it."
    )


def _table(stages: Sequence[PlannedStage], pipeline: Pipeline) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1), collapse_padding=True, pad_edge=False)
    numbers = {
        "parameters": "",
        "steps": f"{sum(stage.steps for stage in stages):,}",
        "tokens": short(sum(stage.tokens for stage in stages)),
        "FLOPs": scientific(sum(stage.flops for stage in stages)),
        **({} if pipeline.resources.gpus else {"est. cost": duration(total_seconds(stages, pipeline.resources))}),
    }
    table.add_column("stage", f"{len(stages)} stages", no_wrap=True, overflow="fold")
    table.add_column("verb", no_wrap=True)
    table.add_column("from", "", overflow="fold")
    for name, total in numbers.items():
        table.add_column(name, total, justify="right", no_wrap=True)
    for name, reads in before(pipeline):
        table.add_row(name, "data", reads)
    counted: set[str] = set()
    merges = Counter(stage.template for stage in stages if stage.verb == "merge")
    together = [template for template, count in merges.items() if count > ONE_BY_ONE]
    for stage in stages:
        if stage.verb == "merge" and stage.template in together:
            continue
        for name, reads in stage.statistics.items():
            if name not in counted:
                table.add_row(name, "measure", reads)
        counted |= {*stage.statistics}
        reads = ", ".join(stage.inputs) + (f" on {stage.data}" if stage.data else "")
        costs: tuple[str, ...] = ()
        if stage.steps:
            costs = (f"{stage.steps:,}", short(stage.tokens), scientific(stage.flops), duration(stage.seconds))
        costs = costs[: len(numbers) - 1]
        table.add_row(stage.name, stage.verb, reads, short(stage.parameters), *costs)
    for template in together:
        sizes = [stage.parameters for stage in stages if stage.template == template]
        largest = short(min(sizes)) if min(sizes) == max(sizes) else f"{short(min(sizes))} - {short(max(sizes))}"
        table.add_row(template, "merge", f"{merges[template]} merges", largest)
    for name, reads in after(stages):
        table.add_row(name, "measure" if name != "report" else "report", reads)
    return table


def mixtures_in_words(stages: Sequence[PlannedStage], pipeline: Pipeline) -> list[str]:
    """Return a line for each mixture in a long form that is trained on, and for those that it names.

    No epochs are among it: they follow from the sizes of the corpora.
    """
    lines: dict[str, str] = {}
    names = [stage.data for stage in stages if stage.data is not None]
    while names:
        name = names.pop(0)
        mixture = pipeline.mixtures[name]
        if name in lines or not isinstance(mixture, MixtureConfig):
            continue
        others = [stage.mixture for stage in mixture.stages]
        names += [mixture.part_of] if mixture.part_of is not None else others
        if mixture.stages:
            lines[name] = ", ".join(f"{stage.mixture} from step {stage.from_step}" for stage in mixture.stages)
        elif mixture.part_of is not None:
            lines[name] = f"{', '.join(mixture.corpora)} of {mixture.part_of}"
        else:
            lines[name] = f"{mixture.sampling} of {', '.join(mixture.corpora or mixture.weights)}"
        if mixture.replay:
            lines[name] += f", with replay of {', '.join(part.corpus for part in mixture.replay)}"
    return [f"{name}: {words}" for name, words in lines.items()]


def before(pipeline: Pipeline) -> list[tuple[str, str]]:
    """Return (stage, what it reads) of what runs before the stages of the file."""
    return [("text", ", ".join(pipeline.corpora)), ("tokens", "text"), ("pairs", "text")]


def after(stages: Sequence[PlannedStage]) -> list[tuple[str, str]]:
    """Return (stage, what it reads) of what runs after the stages of the file."""
    return [("evaluate", f"each of the {len(stages)} models"), ("baselines", "tokens"), ("report", "all of it")]


def short(number: int) -> str:
    """Return a count in three digits: 491,904 -> 492k; 1,571,000,000 -> 1.57B."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return str(number)


def scientific(number: int) -> str:
    """Return a count as 2.1e12."""
    return f"{number:.1e}".replace("e+", "e") if number else "0"


def duration(seconds: float) -> str:
    """Return a time in its largest fitting unit, such as `70 s`, `12.3 min` or `4.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
