"""`growmerge run`: find what is not up to date, hand it to the executor, show how far it is."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.files import disk_errors, read_json, write_bytes, write_json
from growmerge.clusters import profile_of, workdir_of
from growmerge.config import load_pipeline
from growmerge.events import EventLog
from growmerge.graph import Node, expand
from growmerge.lengths import with_sizes
from growmerge.lint import notes
from growmerge.schema import Pipeline
from growmerge.shapes import model_configs
from growmerge.tasks import EVALUATION, Task, build_tasks
from parallel.errors import InputError

PUBLISHED = ("report.html", "report.md", "results.json", "report/*/*")
"""Of the report's folder, as globs: what is put at the top of a workdir."""
FROM = "pipeline.json"
"""Which file a workdir is of."""
TOGETHER = ("train", "evaluate")
"""Verbs whose work all ranks share; of the others one rank does it all."""
HERE = ("text",)
"""Verbs that run in this process before anything is submitted: they need the network, which compute nodes may lack."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A pipeline file, read and taken apart."""

    pipeline: Pipeline
    nodes: Mapping[str, Node]
    tasks: Mapping[str, Task]
    base: Path
    workdir: Path


def load(
    path: Path,
    workdir: Path | None,
    profile: str | None = None,
    scale: str | None = None,
    absent: list[str] | None = None,
) -> Plan:
    """Read a pipeline file and say what it comes to.

    Args:
        profile: of the cluster, instead of the one that the file names.
        scale: which of the file's `scales`, if any.
        absent: see `growmerge.graph.expand`; if there is something, there are no tasks yet.

    Raises:
        InputError: anything wrong in the file, with its line.
    """
    pipeline, lines = load_pipeline(path, scale)
    base = path.absolute().parent
    pipeline = with_sizes(pipeline, base)
    if profile is not None:
        pipeline = replace(pipeline, resources=replace(pipeline.resources, profile=profile))
    profile_of(pipeline.resources.profile).enter()
    nodes = expand(pipeline, lines, path, absent)
    workdir = workdir_of(workdir, pipeline.resources, pipeline.name)
    model_configs(pipeline, nodes, base=base)  # refuses shapes that do not fit, before anything runs
    tasks = {} if absent else build_tasks(pipeline, nodes, workdir, base)
    return Plan(pipeline=pipeline, nodes=nodes, tasks=tasks, base=base, workdir=workdir)


def dry_run(path: Path, workdir: Path | None, executor: str, profile: str | None, scale: str | None = None) -> None:
    """Print the stages in order with their inputs, parameters, tokens, FLOPs and estimated cost.

    With `slurm` print what would be submitted instead, whether there is a cluster or not.

    Text and tokenizer need not be there yet: what is not is told.
    """
    absent: list[str] = []
    loaded = load(path, workdir, profile, scale, absent)
    if executor == "slurm":
        from growmerge.on_cluster import print_scripts

        if absent:
            raise InputError(absent[0])
        todo = [name for name, task in loaded.tasks.items() if task.verb not in HERE and not task.done]
        print_scripts(submission(loaded, path, time.time()), todo)
        return
    from growmerge.plan import plan, print_plan

    print_plan(plan(loaded.pipeline, loaded.nodes, base=loaded.base), loaded.pipeline)
    for line in notes(loaded.nodes):
        print(f"note: {line}")
    for line in absent:
        print(f"not there yet: {line}")


def submission(plan: Plan, path: Path, began: float) -> Any:
    """Return a pipeline as it is submitted to a cluster."""
    from growmerge.on_cluster import Submission, Unit
    from growmerge.worker import Order, work

    def order(names: tuple[str, ...], folder: Path) -> Order:
        known = _with_inputs(plan.tasks, names)
        return Order(
            pipeline=plan.pipeline,
            nodes={name: node for name, node in plan.nodes.items() if name in known},
            tasks=known,
            todo=names,
            base=plan.base,
            workdir=plan.workdir,
            events=folder / "events.jsonl",
            rendezvous=None,
            threads=plan.pipeline.resources.threads or 1,
            began=began,
            launcher=None,
            leases=plan.workdir / "leases",
        )

    units = {
        name: Unit(verb=task.verb, together=task.verb in TOGETHER, after=task.inputs, result=task.folder, key=task.key)
        for name, task in plan.tasks.items()
    }
    return Submission(
        name=plan.pipeline.name,
        workdir=plan.workdir,
        units=units,
        resources=plan.pipeline.resources,
        function=work,
        order=order,
        verb="run",
        file=path.absolute(),
    )


def _with_inputs(tasks: Mapping[str, Task], names: Iterable[str]) -> dict[str, Task]:
    """Return tasks, all that they go back to, and the report, which model cards look for."""
    found: set[str] = set()
    left = [*names]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += tasks[name].inputs
    return {name: task for name, task in tasks.items() if name in found or name == "report"}


def run_pipeline(
    path: Path,
    workdir: Path | None,
    executor: str,
    profile: str | None = None,
    scale: str | None = None,
    *,
    detach: bool = False,
) -> int:
    """Run what is not up to date and return the exit code: 0 done, 1 a stage or a check failed.

    Args:
        detach: on a cluster, return when all is submitted.
    """
    began = time.time()
    plan = load(path, workdir, profile, scale)
    todo = [name for name, task in plan.tasks.items() if not task.done]
    if not todo:
        return _finished(plan, [])
    from growmerge.on_cluster import submit, watch
    from growmerge.on_machine import queue_of, run_stages
    from growmerge.show import Show
    from growmerge.submitted import refuse_here
    from growmerge.worker import JOB_LEASE
    from slurm.executor import choose
    from slurm.lease import Lease

    kind = choose(executor)
    if kind == "local":
        # Refuses what this machine has no room for before anything runs.
        queue_of(plan, [name for name in todo if plan.tasks[name].verb not in HERE], began)
    with disk_errors(plan.workdir):
        if kind == "slurm":
            profile_of(plan.pipeline.resources.profile).prepare(plan.workdir)
        plan.workdir.mkdir(parents=True, exist_ok=True)
    with disk_errors(plan.workdir), Lease(plan.workdir / "lease.json", f"growmerge run {path}"):
        wait_for_orphans(plan.workdir / JOB_LEASE)
        write_json(plan.workdir / FROM, {"file": str(path.absolute()), "profile": profile, "scale": scale})
        # Another run may have done some of it between the look above and the lease.
        todo = [name for name, task in plan.tasks.items() if not task.done]
        if kind == "local":
            refuse_here(plan.workdir)
        with Show(_weights(plan, todo), EventLog(plan.workdir / "log.jsonl")) as show:
            for name in [name for name in todo if plan.tasks[name].verb in HERE]:
                _do_here(plan, name, show, began)
            left = [name for name in todo if plan.tasks[name].verb not in HERE]
            if kind == "slurm":
                submit(submission(plan, path, began), left, show, lambda name: plan.tasks[name].done)
            elif (failed := run_stages(plan, left, show, began)) is not None:
                show.say(failed)
                return 1
    if kind == "slurm":  # watched without the lease: others may watch as well
        if detach:
            return 0
        with Show(_weights(plan, left), EventLog(Path(os.devnull)), requeues=True) as show:
            failed = watch(submission(plan, path, began), left, show, lambda name: plan.tasks[name].done)
            if failed is not None:
                show.say(failed)
                return 1
    return _finished(plan, todo)


def _weights(plan: Plan, todo: list[str]) -> dict[str, float]:
    """Return the estimated seconds of each task to do."""
    from growmerge.plan import plan as estimate

    seconds = {stage.name: stage.seconds for stage in estimate(plan.pipeline, plan.nodes, base=plan.base)}
    return {name: seconds.get(name, 0.0) for name in todo}


def wait_for_orphans(path: Path) -> None:
    """Wait until the job of a killed run has noticed that its run is gone; it does so within a second."""
    from slurm.lease import holder

    for _ in range(100):
        owner = holder(path)
        if owner is None:
            return
        time.sleep(0.1)
    raise InputError(f"{path.parent} is in use: {owner}")


def alone(plan: Plan, threads: int, began: float, report: Callable[[Mapping[str, Any]], None]) -> Any:
    """Return the context of tasks that this process does by itself."""
    from growmerge.context import Context, Resources
    from parallel.ranks import ALONE

    return Context(
        pipeline=plan.pipeline,
        nodes=plan.nodes,
        tasks=plan.tasks,
        base=plan.base,
        workdir=plan.workdir,
        ranks=ALONE,
        resources=Resources(threads=threads, began=began),
        report=report,
    )


def _do_here(plan: Plan, name: str, show: Any, began: float) -> None:
    from growmerge.verbs import do

    started = time.time()
    show.event({"event": "start", "stage": name})
    do(alone(plan, 1, began, show.event), plan.tasks[name])
    show.event({"event": "done", "stage": name, "seconds": round(time.time() - started, 2)})


def _finished(plan: Plan, done: list[str]) -> int:
    """Say how it ended and return the exit code."""
    import sys

    publish(plan)
    outcome = read_json(plan.tasks["report"].folder / "outcome.json")
    page = plan.workdir / "report.html"
    if done:
        print(f"done: {len(done)} stages; report: {_near(page)}")
    else:
        print(f"nothing to do: all {len(plan.tasks)} stages are up to date; report: {_near(page)}")
    for line in outcome["failed_checks"]:
        print(f"check failed: {line}", file=sys.stderr)
    return 1 if outcome["failed_checks"] else 0


def publish(plan: Plan) -> None:
    """Put the report and the verdicts of this configuration, and links to its models, at the top of the workdir."""
    report = plan.tasks["report"].folder
    found = {path.relative_to(report): path for pattern in PUBLISHED for path in report.glob(pattern)}
    for name in plan.nodes:
        found[Path(EVALUATION) / f"{name}.json"] = plan.tasks[f"evaluate/{name}"].folder / "verdict.json"
    for place, path in found.items():
        data, shown = path.read_bytes(), plan.workdir / place
        if not shown.is_file() or shown.read_bytes() != data:
            write_bytes(shown, data)
    for path in (plan.workdir / EVALUATION).rglob("*.json"):
        if path.stem not in plan.nodes:  # a stage that the file does not have any more; its scores stay
            path.unlink()
    links = plan.workdir / "models"
    with disk_errors(links):
        links.mkdir(exist_ok=True)
        folders = {name: plan.tasks[name].folder.relative_to(plan.workdir) for name in plan.nodes}
        wanted = {name: Path("..") / folder / "model" for name, folder in folders.items()}
        for link in links.iterdir():
            if link.is_symlink() and link.readlink() != wanted.get(link.name):
                link.unlink()
        for name, target in wanted.items():
            if not (links / name).is_symlink():
                (links / name).symlink_to(target, target_is_directory=True)


def _near(path: Path) -> str:
    """Return a path the short way, relative to the current folder if it lies in it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
