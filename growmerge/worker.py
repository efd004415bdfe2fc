"""What runs inside a job, once a rank: the tasks it was given, one after the other, all ranks together."""

import atexit
import gc
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from checkpoint.files import disk_errors
from growmerge.context import Context, Resources
from growmerge.events import EventLog
from growmerge.graph import Node
from growmerge.schema import Pipeline
from growmerge.tasks import Task
from parallel.errors import InputError, Stopped

JOB_LEASE = "job.json"
LATE_S = 40.0
"""How long what another node wrote may be out of sight (network file systems), and a signal be late."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a job is told; plain data, pickled by submitit."""

    pipeline: Pipeline
    nodes: Mapping[str, Node]
    tasks: Mapping[str, Task]
    todo: tuple[str, ...]
    """Names of the tasks to do, in order."""
    base: Path
    workdir: Path
    events: Path
    rendezvous: Path | None
    """File on which the ranks of one machine meet; None on a cluster."""
    threads: int
    began: float
    """When the run began (seconds since the epoch)."""
    launcher: tuple[int, int] | None
    """(pid, start) of the process without which the job must not go on; None on a cluster."""
    leases: Path | None = None
    """Folder of leases, one a stage; by default one job a workdir."""


def work(order: Order) -> str | None:
    """Do an order's tasks as one rank; return the line of a bad input, or None."""
    if order.launcher is not None:
        end_with(order.launcher)
    else:
        signal.signal(signal.SIGUSR2, leave)
    prepare_environment(order.threads)
    import torch

    from growmerge.verbs import VERBS
    from parallel.ranks import connect
    from slurm.executor import task_environment
    from slurm.lease import Lease

    import_all(VERBS[order.tasks[name].verb][0] for name in order.todo)
    torch.set_num_threads(order.threads)
    rank, world = task_environment()
    alone = order.leases is None
    # A new run waits for, or is refused by, a job that outlived its own.
    with Lease(order.workdir / JOB_LEASE, "a job of growmerge run") if rank == 0 and alone else nullcontext():
        log = EventLog(order.events) if rank == 0 else None
        context = Context(
            pipeline=order.pipeline,
            nodes=order.nodes,
            tasks=order.tasks,
            base=order.base,
            workdir=order.workdir,
            ranks=connect(rank, world, rendezvous=order.rendezvous),
            resources=Resources(threads=order.threads, began=order.began),
            report=log.write if log else lambda event: None,
        )
        failed: list[InputError] = []
        for name in order.todo:
            if context.ranks.broadcast(context.tasks[name].done if rank == 0 else None):
                continue  # by a job that was requeued after its end
            if (error := _do(context, name, order)) is not None:
                failed.append(error)
                if isinstance(error, Stopped) or order.leases is None or not (world == 1 or error.shared):
                    break  # where each stage has a lease of its own, others do not need it, or notice
        if not failed:
            torch.distributed.destroy_process_group()
    if failed and order.launcher is None:
        give_up(next((error for error in failed if isinstance(error, Crashed)), failed[-1]), world)
    return str(failed[-1]) if failed else None


class Crashed(InputError):
    """What is no bad input, in a job that goes on with other stages."""


def give_up(error: InputError, world: int) -> NoReturn:
    """End a rank of a cluster's job, whose exit code says whether to try again (slurm/job.sh).

    A bad input that one rank of several alone has met may be its node's fault.
    """
    from slurm.script import STOPPED, WOULD_FAIL_AGAIN

    bad_input = not isinstance(error, Crashed) and (world == 1 or error.shared)
    quit_now(STOPPED if isinstance(error, Stopped) else WOULD_FAIL_AGAIN if bad_input else 1)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """End a rank that is told to stop while it has nothing to save; training listens by itself."""
    from slurm.script import OUT_OF_TIME, STOPPED
    from train.signals import time_left

    # What comes long before the end of the job's time is a preemption, which may happen as often as it likes.
    lead = float(os.environ.get("GROWMERGE_LEAD_S", "120"))
    quit_now(OUT_OF_TIME if time_left() < lead + LATE_S else STOPPED)


def quit_now(code: int) -> NoReturn:
    """End this process with a code, whatever its threads do.

    srun ends the other ranks when the first has ended, by a signal; while Python takes itself apart that would count.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare_environment(threads: int) -> None:
    """Set what has to be set before torch is imported: kernels that pick their thread count at load must agree."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def import_all(modules: Iterable[str]) -> None:
    """Import modules, and leave what they bring out of the search for garbage, which is seconds of work.

    None of it ever is garbage, but DeepSpeed searches all there is before each engine, and Python at its end.
    """
    gc.disable()
    for module in modules:
        import_module(module)
    gc.enable()
    gc.freeze()
    atexit.register(gc.freeze)


def _do(context: Context, name: str, order: Order) -> InputError | None:
    """Do one task and say so; return what went wrong, or None."""
    from growmerge.verbs import do
    from parallel.ranks import device

    started = time.time()
    if (missing := context.once(lambda: _missing(context, name, order))) is not None:
        context.report({"event": "needs", "stage": name, "text": missing})
        return InputError(missing, shared=True)
    try:
        with disk_errors(context.workdir), ExitStack() as held:
            if order.leases is not None:
                context.once(lambda: _take(held, context.tasks[name], order))
            context.report({"event": "start", "stage": name})
            do(context, context.tasks[name])
            seconds, memory = round(time.time() - started, 2), round(sum(context.ranks.gather(peak_memory())), 2)
            width = context.ranks.world_size
            used = {"ranks": width, "threads": order.threads, "gpus": width if device().type == "cuda" else 0}
            context.report({"event": "done", "stage": name, "seconds": seconds, "memory_gb": memory, **used})
    except InputError as error:
        with suppress(OSError):  # the disk may be full
            kind = "stopped" if isinstance(error, Stopped) else "error"
            context.report({"event": kind, "stage": name, "text": str(error)})
        return error
    except Exception as error:
        if len(order.todo) == 1 or context.ranks.world_size > 1:
            raise
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        context.report({"event": "error", "stage": name, "text": text})
        return Crashed(text)
    return None


def _missing(context: Context, name: str, order: Order) -> str | None:
    """Return why a task cannot be begun, if it cannot: its job may start however those that it needs have ended."""
    left = [other for other in context.tasks[name].inputs if other in context.tasks]
    until = time.monotonic() + (LATE_S if order.launcher is None else 0)
    while left := [other for other in left if not context.tasks[other].done]:
        if time.monotonic() > until:
            return f"it needs {left[0]}, which has failed"
        time.sleep(2)
    return None


def _take(held: ExitStack, task: Task, order: Order) -> None:
    from slurm.lease import BEAT, STALE, Lease

    assert order.leases is not None, "a job without leases of its own"
    patience = STALE + BEAT if order.launcher is None else 0
    held.enter_context(Lease(order.leases / f"{task.key}.json", "a job of growmerge run", patience=patience))


def peak_memory() -> float:
    """Return this process' largest resident size so far (GB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def end_with(launcher: tuple[int, int]) -> None:
    """End this process when the launcher or the parent is gone: a job of this machine is never an orphan."""
    from slurm.lease import alive

    parent = os.getppid()

    def watch() -> None:
        while alive(*launcher) and os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
