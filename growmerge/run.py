"""`growmerge run`: find what is not up to date, hand it to the executor, show how far it is."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import disk_errors, read_json, write_bytes
from growmerge.config import load_pipeline
from growmerge.events import EventLog
from growmerge.graph import Node, expand
from growmerge.schema import Pipeline
from growmerge.shapes import model_configs
from growmerge.tasks import Task, build_tasks
from parallel.errors import InputError

PUBLISHED = ("report.html", "report.md", "results.json")
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


def load(path: Path, workdir: Path | None) -> Plan:
    """Read a pipeline file and say what it comes to.

    Raises:
        InputError: anything wrong in the file, with its line.
    """
    pipeline, lines = load_pipeline(path)
    nodes = expand(pipeline, lines, path)
    workdir = (workdir or Path("runs") / pipeline.name).absolute()
    base = path.absolute().parent
    model_configs(pipeline, nodes, base=base)  # refuses shapes that do not fit, before anything runs
    return Plan(
        pipeline=pipeline, nodes=nodes, tasks=build_tasks(pipeline, nodes, workdir, base), base=base, workdir=workdir
    )


def dry_run(path: Path, workdir: Path | None) -> None:
    """Print the stages in order with their inputs, parameters, tokens, FLOPs and estimated cost."""
    from growmerge.plan import plan, print_plan

    loaded = load(path, workdir)
    print_plan(plan(loaded.pipeline, loaded.nodes, base=loaded.base), loaded.pipeline)


def run_pipeline(path: Path, workdir: Path | None, executor: str) -> int:
    """Run what is not up to date and return the exit code: 0 done, 1 a stage or a check failed."""
    began = time.time()
    plan = load(path, workdir)
    todo = [name for name, task in plan.tasks.items() if not task.done]
    if not todo:
        return _finished(plan, [])
    from growmerge.show import Show
    from growmerge.worker import JOB_LEASE
    from slurm.executor import choose
    from slurm.lease import Lease, holder

    kind = choose(executor)
    with disk_errors(plan.workdir):
        plan.workdir.mkdir(parents=True, exist_ok=True)
    with disk_errors(plan.workdir), Lease(plan.workdir / "lease.json", f"growmerge run {path}"):
        _wait_for_orphans(plan.workdir / JOB_LEASE, holder)
        # Another run may have done some of it between the look above and the lease.
        todo = [name for name, task in plan.tasks.items() if not task.done]
        with Show(_weights(plan, todo), EventLog(plan.workdir / "log.jsonl")) as show:
            for name in [name for name in todo if plan.tasks[name].verb in HERE]:
                _do_here(plan, name, show, began)
            left = [name for name in todo if plan.tasks[name].verb not in HERE]
            if kind == "slurm":
                from growmerge.on_cluster import submit_stages

                submit_stages(plan, left, show, began)
            elif (busy := _on_a_cluster(plan.workdir)) is not None:
                raise InputError(f"{plan.workdir}: {busy} on a cluster: watch it there, or `growmerge cancel` it first")
            elif (failed := _submit(plan, left, kind, show, began)) is not None:
                show.say(failed)
                return 1
    if kind == "slurm":  # watched without the lease: others may watch as well
        from growmerge.on_cluster import watch_stages

        with Show(_weights(plan, left), EventLog(Path(os.devnull)), requeues=True) as show:
            if (failed := watch_stages(plan, left, show)) is not None:
                show.say(failed)
                return 1
    return _finished(plan, todo)


def _on_a_cluster(workdir: Path) -> str | None:
    """Return what of this workdir is under way on a cluster, if something is and the scheduler can be asked."""
    from growmerge.on_cluster import submitted, under_way

    entries = submitted(workdir)
    try:
        running = under_way(entries)
    except InputError:
        return None
    return f"the job of {next(iter(running))} is under way" if running else None


def _weights(plan: Plan, todo: list[str]) -> dict[str, float]:
    """Return the estimated seconds of each task to do."""
    from growmerge.plan import plan as estimate

    seconds = {stage.name: stage.seconds for stage in estimate(plan.pipeline, plan.nodes, base=plan.base)}
    return {name: seconds.get(name, 0.0) for name in todo}


def _wait_for_orphans(path: Path, holder: Any) -> None:
    """Wait until the job of a killed run has noticed that its run is gone; it does so within a second."""
    for _ in range(100):
        owner = holder(path)
        if owner is None:
            return
        time.sleep(0.1)
    raise InputError(f"{path.parent} is in use: {owner}")


def _do_here(plan: Plan, name: str, show: Any, began: float) -> None:
    from growmerge.context import Context, Resources
    from growmerge.verbs import do
    from parallel.ranks import ALONE

    started = time.time()
    show.event({"event": "start", "stage": name})
    context = Context(
        pipeline=plan.pipeline,
        nodes=plan.nodes,
        tasks=plan.tasks,
        base=plan.base,
        workdir=plan.workdir,
        ranks=ALONE,
        resources=Resources(threads=1, began=began),
        report=show.event,
    )
    do(context, plan.tasks[name])
    show.event({"event": "done", "stage": name, "seconds": round(time.time() - started, 2)})


def _submit(plan: Plan, todo: list[str], kind: Any, show: Any, began: float) -> str | None:
    """Run tasks as jobs, packed into one or a job each; return the line to end with if something failed."""
    packs = [todo] if plan.pipeline.resources.pack else [[name] for name in todo]
    for pack in packs:
        if pack and (failed := _run_job(plan, pack, kind, show, began)) is not None:
            return failed
    return None


def _run_job(plan: Plan, pack: list[str], kind: Any, show: Any, began: float) -> str | None:
    from growmerge.jobs import run_job
    from growmerge.worker import Order, work
    from slurm.executor import Job
    from slurm.lease import this_process

    resources = plan.pipeline.resources
    threads = resources.threads or max(1, (os.cpu_count() or 1) // resources.ranks)
    folder = plan.workdir / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{len(pack)}"
    folder.mkdir(parents=True)
    me = this_process("run")
    order = Order(
        pipeline=plan.pipeline,
        nodes=plan.nodes,
        tasks=plan.tasks,
        todo=tuple(pack),
        base=plan.base,
        workdir=plan.workdir,
        events=folder / "events.jsonl",
        rendezvous=folder / "rendezvous" if kind == "local" else None,
        threads=threads,
        began=began,
        launcher=(me.pid, me.started) if kind == "local" else None,
    )
    # Read by torch's threads when they start, and inherited by the ranks of this machine.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    job = Job(
        name=plan.pipeline.name,
        function=work,
        arguments=(order,),
        ranks=resources.ranks,
        threads=threads,
        minutes=resources.minutes,
        memory_gb=resources.memory_gb,
        gpus=resources.gpus,
        slurm=resources.slurm,
    )
    return run_job(job, kind, folder, order.events, show, plan.workdir)


def _finished(plan: Plan, done: list[str]) -> int:
    """Say how it ended and return the exit code."""
    import sys

    _publish(plan)
    outcome = read_json(plan.tasks["report"].folder / "outcome.json")
    page = plan.workdir / "report.html"
    if done:
        print(f"done: {len(done)} stages; report: {_near(page)}")
    else:
        print(f"nothing to do: all {len(plan.tasks)} stages are up to date; report: {_near(page)}")
    for line in outcome["failed_checks"]:
        print(f"check failed: {line}", file=sys.stderr)
    return 1 if outcome["failed_checks"] else 0


def _publish(plan: Plan) -> None:
    """Put the report of this configuration, and links to its models, at the top of the workdir."""
    for name in PUBLISHED:
        data, shown = (plan.tasks["report"].folder / name).read_bytes(), plan.workdir / name
        if not shown.is_file() or shown.read_bytes() != data:
            write_bytes(shown, data)
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
