"""`growmerge train`: one training run, here, or as one of the ranks that torchrun or srun has started."""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.files import disk_errors, read_json, write_json
from growmerge import rules_mixture
from growmerge.clusters import profile_of, workdir_of
from growmerge.config import Marks, load_file
from growmerge.launched import join, launched
from growmerge.rules import NAME
from growmerge.schema_train import TrainConfig
from growmerge.tasks import TOPOLOGY, WITHOUT_RESULT
from parallel.errors import InputError, Stopped, one_of

RUN = "run.json"
"""What a run's folder says of itself: its configuration, and whether it is finished."""
STOPPED = 75
"""Exit code of a run that was asked to stop and has saved: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
ADDED = (
    ("grow", "experts", None),
    ("grow", "experts_per_token", None),
    ("shape", "hidden_act", "silu"),
    ("training", "decay_norms", False),
)
"""Keys that the first versions did not have, by the part of the file, with what stands for what those did."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the ranks are told; plain data, pickled by submitit."""

    config: TrainConfig
    base: Path
    folder: Path
    events: Path
    rendezvous: Path | None
    threads: int
    launcher: tuple[int, int] | None


def load(path: Path) -> tuple[TrainConfig, Marks]:
    """Read a file for `growmerge train`.

    Raises:
        InputError: anything wrong in it, with its line.
    """
    config, marks = load_file(TrainConfig, path)
    starts = [key for key in ("model", "shape", "branch") if getattr(config, key) is not None]
    if len(starts) != 1:
        raise marks.error("", f"a run starts from exactly one of model, shape, branch; given: {starts or 'none'}")
    if not NAME.fullmatch(config.name):
        raise marks.error("name", f"{config.name!r} is no name: letters, digits and . _ + - are allowed")
    if config.training.steps is None:
        raise marks.error("training", "`steps` is missing")
    if config.data.mixture not in config.mixtures:
        raise marks.error("data.mixture", one_of("mixture", config.data.mixture, config.mixtures))
    for key, problem in rules_mixture.named(config.mixtures):
        raise marks.error(key, problem)
    if config.grow is not None and config.branch is not None:
        raise marks.error("grow", "a branch goes on with the model as it is")
    return config, marks


def train_file(
    path: Path,
    workdir: Path | None,
    executor: str,
    profile: str | None = None,
    *,
    detach: bool = False,
    dry_run: bool = False,
) -> int:
    """Train what a file says and return the exit code: 0 finished, 1 failed, 75 asked to stop and saved.

    Args:
        profile: of the cluster, instead of the one that the file names.
        detach: on a cluster, return when it is submitted.
        dry_run: print the script that would be submitted, whether there is a cluster or not.
    """
    config, marks = load(path)
    if profile is not None:
        config = replace(config, resources=replace(config.resources, profile=profile))
    profile_of(config.resources.profile).enter()
    folder = workdir_of(workdir, config.resources, config.name)
    base = path.absolute().parent
    if dry_run:
        from growmerge.on_cluster import print_scripts

        print_scripts(submission(config, base, folder, path), [config.name])
        return 0
    key = _key(config)
    if _finished(folder, key, marks):
        print(f"nothing to do: {config.name} is finished; model: {folder / 'model'}")
        return 0
    ranks = launched() if executor == "auto" else None
    with marks.within("training"):
        plan_of(config).mesh(ranks[1] if ranks else config.resources.ranks)
    check_places(config, base, marks)
    if ranks:
        return _as_rank(config, base, folder, key, *ranks)
    from slurm.executor import choose

    if choose(executor) == "slurm":
        return _submit(config, base, folder, key, path, detach=detach)
    return _launch(config, base, folder, key, path)


def check_places(config: TrainConfig, base: Path, marks: Marks) -> None:
    """Check that what the run reads is there, before any rank waits for it.

    Raises:
        InputError: something is not, with its line.
    """
    from growmerge.hub import place

    named = {
        "model": config.model,
        "tokenizer": config.tokenizer,
        "data.folder": config.data.folder,
        "branch.run": config.branch.run if config.branch else None,
    }
    for key, name in named.items():
        with marks.within(key):
            if name is not None and not place(base, name).is_dir():
                advice = "; make it by `growmerge data prepare`" if key == "data.folder" else ""
                problem = "holds no tokenizer.json" if key == "tokenizer" else f"no such folder{advice}"
                raise InputError(f"{place(base, name)}: {problem}")


def plan_of(config: TrainConfig) -> Any:
    """Return how the run trains."""
    from train.plan import RunPlan

    return RunPlan(**asdict(config.training))


def _key(config: TrainConfig) -> str:
    """Return the hash of all in a file that the run's result depends on."""
    content = asdict(config)
    for name in ("resources", "name"):
        del content[name]
    content["training"] = {key: value for key, value in content["training"].items() if key not in WITHOUT_RESULT}
    for name in TOPOLOGY:
        del content["training"][name]
    for part, name, value in ADDED:  # without them a run has the key that it had before there were any
        if content[part] is not None and content[part][name] == value:
            del content[part][name]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _finished(folder: Path, key: str, marks: Marks) -> bool:
    """Return whether the run is finished.

    Raises:
        InputError: the folder has a run of another configuration.
    """
    from checkpoint import manifest

    known = read_json(folder / RUN) if (folder / RUN).is_file() else None
    begun = any(manifest.is_complete(path) for path in (folder / "checkpoints").glob("step-*"))
    if known is not None and known.get("key") != key:
        if not begun and not (folder / "model").exists():
            return False  # nothing of it is there to be lost
        raise InputError(
            f"{folder}: holds a run of another configuration ({marks.file} has changed since): "
            "give this one another name or --workdir, or delete the folder"
        )
    return known is not None and _ended(folder)


def _ended(folder: Path) -> bool:
    """Return whether the run in a folder has left its model."""
    from checkpoint import manifest

    known = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    return bool(known.get("finished")) and manifest.is_complete(folder / "model")


def _as_rank(config: TrainConfig, base: Path, folder: Path, key: str, rank: int, world: int, local: int) -> int:
    """Train as one of a launcher's ranks; its events are lines on stderr."""
    from growmerge.events import EventLog
    from growmerge.run_of_ranks import run
    from growmerge.show import Show

    if rank == 0:
        _begin(folder, key, config)
    ranks = join(rank, world, local)
    if rank:
        return run(config, base, folder, ranks, lambda event: None)
    with Show({config.name: 0.0}, EventLog(folder / "log.jsonl")) as show:
        show.stage = config.name
        return run(config, base, folder, ranks, lambda event: show.event({**event, "stage": config.name}))


def _begin(folder: Path, key: str, config: TrainConfig) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        known = read_json(folder / RUN) if (folder / RUN).is_file() else {}
        if known.get("key") != key:
            write_json(folder / RUN, {"key": key, "name": config.name, "seed": config.seed, "finished": False})


def submission(config: TrainConfig, base: Path, folder: Path, path: Path) -> Any:
    """Return a run as it is submitted to a cluster."""
    from growmerge.on_cluster import Submission, Unit

    def order(names: tuple[str, ...], place: Path) -> Order:
        return Order(
            config=config,
            base=base,
            folder=folder,
            events=place / "events.jsonl",
            rendezvous=None,
            threads=config.resources.threads or 1,
            launcher=None,
        )

    return Submission(
        name=config.name,
        workdir=folder,
        units={
            config.name: Unit(verb="train", together=True, after=(), result=folder / "model", key=_key(config)),
        },
        resources=config.resources,
        function=work,
        order=order,
        verb="train",
        file=path.absolute(),
    )


def _submit(config: TrainConfig, base: Path, folder: Path, key: str, path: Path, *, detach: bool) -> int:
    """Submit the run as a job of a cluster and watch it."""
    from growmerge.events import EventLog
    from growmerge.on_cluster import refuse_changed, submit, watch
    from growmerge.show import Show
    from slurm.lease import Lease

    names, job = [config.name], submission(config, base, folder, path)
    profile_of(config.resources.profile).prepare(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    show = Show({config.name: 0.0}, EventLog(folder / "log.jsonl"), requeues=True)
    with disk_errors(folder), Lease(folder / "lease.json", f"growmerge train {path}"), show:
        refuse_changed(job, names)
        _begin(folder, key, config)
        submit(job, names, show, lambda name: _ended(folder))
    if detach:
        return 0
    with Show({config.name: 0.0}, EventLog(Path(os.devnull)), requeues=True) as show:
        show.stage = config.name
        if (failed := watch(job, names, show, lambda name: _ended(folder))) is not None:
            show.say(failed)
            return 1
    print(f"done: model: {folder / 'model'}")
    return 0


def _launch(config: TrainConfig, base: Path, folder: Path, key: str, path: Path) -> int:
    """Start the ranks as a job and follow it."""
    from growmerge.events import EventLog
    from growmerge.jobs import run_job
    from growmerge.show import Show
    from growmerge.submitted import refuse_here
    from slurm.executor import Job
    from slurm.lease import Lease, this_process

    refuse_here(folder)
    resources = config.resources
    threads = resources.threads or max(1, (os.cpu_count() or 1) // resources.ranks)
    _begin(folder, key, config)
    with disk_errors(folder), Lease(folder / "lease.json", f"growmerge train {path}"):
        place = folder / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        place.mkdir(parents=True)
        me = this_process("train")
        order = Order(
            config=config,
            base=base,
            folder=folder,
            events=place / "events.jsonl",
            rendezvous=place / "rendezvous",
            threads=threads,
            launcher=(me.pid, me.started),
        )
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by torch's threads when they start
        job = Job(
            name=config.name,
            function=work,
            arguments=(order,),
            ranks=resources.ranks,
            threads=threads,
            minutes=resources.minutes,
            memory_gb=resources.memory_gb,
            gpus=resources.gpus,
        )
        with Show({config.name: 0.0}, EventLog(folder / "log.jsonl")) as show:
            show.stage = config.name
            failed = run_job(job, order.events, show, folder, stops=True)
            if failed is not None:
                show.say(failed)
                return 1
        if not read_json(folder / RUN)["finished"]:
            print(f"{config.name}: asked to stop; saved, and the same command goes on from here", file=sys.stderr)
            return STOPPED
    print(f"done: model: {folder / 'model'}")
    return 0


def work(order: Order) -> str | None:
    """Train as one rank of a job; return the line of a bad input, or None."""
    from growmerge.worker import end_with, give_up, import_all, leave, prepare_environment

    if order.launcher is not None:
        end_with(order.launcher)
    else:
        signal.signal(signal.SIGUSR2, leave)
    prepare_environment(order.threads)
    import_all(["growmerge.run_of_ranks"])
    from contextlib import nullcontext, suppress

    import torch

    from growmerge.events import EventLog
    from growmerge.run_of_ranks import run
    from growmerge.worker import JOB_LEASE
    from parallel.ranks import connect
    from slurm.executor import task_environment
    from slurm.lease import BEAT, STALE, Lease

    torch.set_num_threads(order.threads)
    rank, world = task_environment()
    patience = STALE + BEAT if order.launcher is None else 0
    lease = Lease(order.folder / JOB_LEASE, "a job of growmerge train", patience=patience)
    failed: InputError | None = None
    with lease if rank == 0 else nullcontext():
        log = EventLog(order.events) if rank == 0 else None

        def report(event: Mapping[str, Any]) -> None:
            if log is not None:
                log.write({**event, "stage": order.config.name})

        ranks = connect(rank, world, rendezvous=order.rendezvous)
        try:
            with disk_errors(order.folder):
                code = run(order.config, order.base, order.folder, ranks, report)
                if code == STOPPED:
                    raise Stopped("asked to stop; saved")
        except InputError as error:
            stopped = isinstance(error, Stopped)
            if stopped and order.launcher is not None:
                return None  # whoever started it looks into run.json
            with suppress(OSError):  # the disk may be full
                report({"event": "stopped" if stopped else "error", "text": str(error)})
            failed = error
        else:
            torch.distributed.destroy_process_group()
    if failed is not None and order.launcher is None:
        give_up(failed, world)  # once the lease is free: who goes on would wait for it
    return None if failed is None else str(failed)
