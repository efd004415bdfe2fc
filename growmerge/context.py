"""What a task may use: the pipeline, the other tasks' folders, the ranks, and a way to say how far it is."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growmerge.graph import Node
from growmerge.hub import place
from growmerge.schema import Pipeline, TrainStage
from growmerge.tasks import Task
from parallel.errors import InputError

if TYPE_CHECKING:
    from parallel.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the job runs on."""

    threads: int
    """Threads a rank."""
    began: float = 0.0
    """When the run began (seconds since the epoch)."""

    @property
    def elapsed(self) -> float:
        return time.time() - self.began


@dataclass(frozen=True, kw_only=True)
class Context:
    """Shared by all tasks of a job."""

    pipeline: Pipeline
    nodes: Mapping[str, Node]
    tasks: Mapping[str, Task]
    base: Path
    workdir: Path
    ranks: "Ranks"
    resources: Resources
    report: Callable[[Mapping[str, Any]], None]

    def folder(self, name: str) -> Path:
        """Return the folder of a task's result."""
        return self.tasks[name].folder

    def model(self, name: str) -> Path:
        """Return the Hugging Face folder that a stage's name, or a path in the pipeline file, stands for."""
        return self.tasks[name].folder / "model" if name in self.nodes else place(self.base, name)

    def train_stage(self, name: str) -> TrainStage:
        stage = self.nodes[name].stage
        assert isinstance(stage, TrainStage), f"{name} does not train"
        return stage

    def once(self, action: Callable[[], Any]) -> Any:
        """Do on rank 0 what is done once; every rank returns its result, or raises its InputError."""
        outcome: tuple[Any, str | None] = (None, None)
        if self.ranks.first:
            try:
                outcome = (action(), None)
            except InputError as error:
                outcome = (None, str(error))
        result, line = self.ranks.broadcast(outcome)
        if line is not None:
            raise InputError(line, shared=True)
        return result
