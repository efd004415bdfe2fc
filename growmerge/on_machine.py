"""A pipeline on this machine: all stages in one job, or a job a stage, each started as a cluster would start it."""

import os
import time
from collections.abc import Sequence

import psutil

from growmerge.jobs import run_jobs
from growmerge.run import TOGETHER, Plan, wait_for_orphans
from growmerge.worker import Order, work
from slurm.executor import Job
from slurm.graph import Planned
from slurm.lease import this_process
from slurm.local import Queue


def queue_of(plan: Plan, todo: Sequence[str], began: float) -> Queue:
    """Return the jobs of stages that are to be done.

    Raises:
        InputError: a stage asks for more cores or memory than jobs may take.
    """
    resources = plan.pipeline.resources
    cores = resources.cores or os.cpu_count() or 1
    # By default a job of all ranks takes all cores, packed or not: sums depend on a rank's threads.
    threads = resources.threads or max(1, cores // resources.ranks)
    me = this_process("run")
    place = plan.workdir / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    packs = {plan.pipeline.name: todo} if resources.pack and todo else {name: (name,) for name in todo}
    jobs = {}
    for name, stages in packs.items():
        folder = place if resources.pack else place / name
        together = resources.pack or plan.tasks[name].verb in TOGETHER
        order = Order(
            pipeline=plan.pipeline,
            nodes=plan.nodes,
            tasks=plan.tasks,
            todo=tuple(stages),
            base=plan.base,
            workdir=plan.workdir,
            events=folder / "events.jsonl",
            rendezvous=folder / "rendezvous",
            threads=threads,
            began=began,
            launcher=(me.pid, me.started),
            leases=None if resources.pack else plan.workdir / "leases",
        )
        job = Job(
            name=name,
            function=work,
            arguments=(order,),
            ranks=resources.ranks if together else 1,
            threads=threads,
            minutes=resources.minutes,
            memory_gb=resources.memory_gb,
            gpus=resources.gpus if together else 0,
        )
        needed = () if resources.pack else plan.tasks[name].inputs
        jobs[name] = Planned(job=job, after=tuple(other for other in needed if other in packs))
    if resources.pack:
        return Queue(jobs)
    memory_gb = resources.total_memory_gb or psutil.virtual_memory().total // 10**9
    return Queue(jobs, cores=cores, memory_gb=memory_gb)


def run_stages(plan: Plan, todo: Sequence[str], show: object, began: float) -> str | None:
    """Run stages and return the line to end with if one failed."""
    queue = queue_of(plan, todo, began)
    leases = plan.workdir / "leases"
    leases.mkdir(exist_ok=True)
    for name in todo:
        wait_for_orphans(leases / f"{plan.tasks[name].key}.json")
    orders = {name: planned.job.arguments[0] for name, planned in queue.jobs.items()}
    for order in orders.values():
        order.events.parent.mkdir(parents=True)
        # Read by torch's threads when they start, and inherited by the ranks.
        os.environ["OMP_NUM_THREADS"] = str(order.threads)
    return run_jobs(queue, {name: order.events for name, order in orders.items()}, show, plan.workdir)
