"""A run on a SLURM cluster: a job a stage, all submitted at once; who submitted them may watch, or leave.

`submitted.json` in the workdir remembers the jobs. The same command on a workdir whose jobs are under way watches
these, and submits what is not.
"""

import getpass
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import write_json
from growmerge.clusters import HOME, profile_of
from growmerge.events import Follower
from growmerge.schema import Resources
from growmerge.submitted import NO_WORD, SUBMITTED, Entry, ran, said, submitted, under_way, why
from parallel.errors import InputError
from slurm.executor import Job
from slurm.graph import Planned, Taken, scripts, submit_all
from slurm.queue import Queued, refuse_what_no_node_has

SILENT_S, LATE_S = 600.0, 60.0
"""How long the scheduler may not answer, and a result be late after its job's end (network file systems)."""
POLL_S = 2.0
"""Seconds between two looks at the jobs: one question to the scheduler for all of them."""
PACKED = ("merge", "evaluate")
"""Verbs of which several may share a job, where the file says so."""
CODE = "code"
"""Folder of a submission that holds the packages as they were."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A stage, as it is submitted."""

    verb: str
    together: bool
    """Whether all ranks work on it; otherwise it takes one."""
    after: tuple[str, ...]
    """Stages that it needs."""
    result: Path
    """Folder that is complete when it has been done."""
    key: str
    """Hash of all that the result depends on."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a command submits from a workdir."""

    name: str
    workdir: Path
    units: Mapping[str, Unit]
    """All stages, each after those that it needs."""
    resources: Resources
    function: Callable[[Any], Any]
    order: Callable[[tuple[str, ...], Path], Any]
    """Returns the function's argument, for stages and the folder of their job's events."""
    verb: str
    file: Path
    """The command's, to give it again."""


def submit(submission: Submission, todo: Sequence[str], show: Any, done: Callable[[str], bool]) -> None:
    """Submit what is to be done and is not under way.

    Raises:
        InputError: the scheduler rejects a job, or does not answer.
    """
    entries = submitted(submission.workdir)
    running = refuse_changed(submission, todo)
    if running:
        show.say(f"{len(running)} jobs are under way already")
    # Asked after the scheduler, so that what has just ended is not done again.
    new = [name for name in todo if name not in running and not done(name)]
    if new:
        _submit(submission, new, entries, running)
        show.say(f"{len(new)} jobs submitted; they go on without this command")


def refuse_changed(submission: Submission, todo: Sequence[str]) -> dict[str, Queued]:
    """Return the stages that are under way.

    Raises:
        InputError: one of those to do is, with another configuration.
    """
    workdir, entries = submission.workdir, submitted(submission.workdir)
    running = under_way(entries)
    for name in todo:
        if name in running and entries[name].key != submission.units[name].key:
            raise InputError(
                f"{workdir}: the job of {name} is under way with another configuration: "
                f"`growmerge cancel {workdir}` first"
            )
    return running


def _submit(
    submission: Submission, new: Sequence[str], entries: dict[str, Entry], running: Mapping[str, Queued]
) -> None:
    """Submit stages; `entries` and the file get each as soon as the scheduler has taken it."""
    workdir, user = submission.workdir, getpass.getuser()
    place = workdir / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folders = {names: place / f"{number:04d}" for number, names in enumerate(packs(submission, new))}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (workdir / "leases").mkdir(exist_ok=True)
    copy_code(place / CODE)

    def note(taken: Mapping[str, Taken]) -> None:
        for names, folder in folders.items():
            if names[0] not in taken:
                continue
            for name in names:
                entries[name] = Entry(
                    stage=name,
                    ids=taken[names[0]].ids,
                    soft=taken[names[0]].soft,
                    user=user,
                    folder=folder,
                    result=submission.units[name].result,
                    key=submission.units[name].key,
                    after=submission.units[name].after,
                )
        stages = {
            name: {
                **asdict(one),
                "folder": str(one.folder.relative_to(workdir)),
                "result": str(one.result.relative_to(workdir)),
            }
            for name, one in entries.items()
        }
        again = {
            "verb": submission.verb,
            "file": str(submission.file),
            "profile": _absolute(submission.resources.profile),
        }
        write_json(workdir / SUBMITTED, {"again": again, "stages": stages})

    known = {name: entries[name].taken for name in running}
    jobs = planned_jobs(submission, folders, place, known)
    for job in {(one.job.ranks, one.job.nodes): one.job for one in jobs.values()}.values():
        refuse_what_no_node_has(job)
    submit_all(jobs, place / "logs", running=known, note=note)


def _absolute(profile: str | None) -> str | None:
    """Return a profile's path as it is found from any folder, or its name."""
    return str(Path(profile).expanduser().absolute()) if profile and profile.endswith((".yaml", ".yml")) else profile


def copy_code(folder: Path) -> None:
    """Copy this project's packages: jobs run what was submitted, whatever is edited while they wait."""
    from growmerge.cli import ROOMS

    for room in (*ROOMS, "growmerge"):
        for path in (HOME / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copied = folder / path.relative_to(HOME)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)  # without its mode: a profile may want another


def packs(submission: Submission, new: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the stages in groups that share a job: one each, or up to `per_job` of a verb that wait for as much."""
    levels: dict[str, int] = {}
    found: list[list[str]] = []
    last: dict[tuple[str, int], list[str]] = {}
    for name in new:
        unit = submission.units[name]
        levels[name] = 1 + max((levels[other] for other in unit.after if other in levels), default=0)
        kind = unit.verb, levels[name]
        if unit.verb not in PACKED or len(last.get(kind, ())) % submission.resources.per_job == 0:
            last[kind] = []
            found.append(last[kind])
        last[kind].append(name)
    return [tuple(names) for names in sorted(found, key=lambda names: levels[names[0]])]


def planned_jobs(
    submission: Submission, folders: Mapping[tuple[str, ...], Path], place: Path, running: Iterable[str] = ()
) -> dict[str, Planned]:
    """Return the jobs of packs of stages, by the first stage of each.

    Args:
        folders: of events, by the stages of a pack.
        place: of the submission.
        running: stages whose jobs are under way already.

    Raises:
        InputError: the cluster has no nodes of what is asked for.
    """
    resources = submission.resources
    profile = profile_of(resources.profile)
    threads = resources.threads or 1
    lead = profile.lead_seconds if resources.lead_seconds is None else resources.lead_seconds
    first = {name: names[0] for names in folders for name in names}
    waited = {*first, *running}
    jobs = {}
    for names, folder in folders.items():
        unit = submission.units[names[0]]
        ranks, nodes, gpus = (resources.ranks, resources.nodes, resources.gpus) if unit.together else (1, 1, 0)
        profile.refuse(ranks=ranks, nodes=nodes, gpus=gpus, threads=threads, minutes=resources.minutes)
        after = {other for name in names for other in submission.units[name].after if other in waited} - {*names}
        jobs[names[0]] = Planned(
            job=Job(
                name=f"{submission.name}/{names[0]}" + (f"+{len(names) - 1}" if len(names) > 1 else ""),
                function=submission.function,
                arguments=(submission.order(names, folder),),
                ranks=ranks,
                nodes=nodes,
                gpus=gpus,
                threads=threads,
                minutes=resources.minutes,
                memory_gb=resources.memory_gb,
                slurm={**profile.slurm, **resources.slurm},
                setup=tuple(profile.lines(place / CODE)),
                lead_s=lead,
                restarts=resources.restarts,
                failures=place / "failures",
                code=place / CODE,
                python=profile.command(submission.workdir),
                gres=profile.gres,
                srun=profile.srun,
                requeue=profile.requeue,
                successors=0 if profile.requeue or unit.verb != "train" else profile.successors,
                soft=len(names) > 1,
            ),
            after=tuple(dict.fromkeys(first.get(name, name) for name in submission.units if name in after)),
        )
    return jobs


def print_scripts(submission: Submission, todo: Sequence[str]) -> None:
    """Print what would be submitted; where the scheduler would give a job's id, `@stage` stands for it."""
    place = submission.workdir / "jobs" / "submission"
    folders = {names: place / f"{number:04d}" for number, names in enumerate(packs(submission, todo))}
    jobs = planned_jobs(submission, folders, place)
    stages = {names[0]: " + ".join(names) for names in folders}
    for names, script in scripts(jobs, place / "logs"):
        number = jobs[names[0]].job.successors
        then = f"; then {number} successors, each afternotok of the one before it" if number else ""
        print(f"# --- {', '.join(stages[name] for name in names)}{then}\n{script}\n")


def watch(submission: Submission, names: Sequence[str], show: Any, done: Callable[[str], bool]) -> str | None:
    """Show how far the jobs are until all have ended; return what failed, if something did."""
    entries = {name: entry for name, entry in submitted(submission.workdir).items() if name in names}
    try:
        return _watch(entries, show, done)
    except KeyboardInterrupt:
        show.say("no longer watched; the jobs go on, and the same command watches them again")
        raise


def _watch(entries: Mapping[str, Entry], show: Any, done: Callable[[str], bool]) -> str | None:
    followers = {entry.folder: Follower(entry.folder / "events.jsonl") for entry in entries.values()}
    left, gone = set(entries), dict[str, float]()
    answered = time.monotonic()
    while left:
        show.tick()
        _tell(followers, show)
        try:
            running = {*under_way(entries)}
            answered = time.monotonic()
        except InputError:
            if time.monotonic() - answered > SILENT_S:
                raise
            running = {*left}
        for name in sorted(left - running):
            late = time.monotonic() - gone.setdefault(name, time.monotonic()) > LATE_S
            given_up = any(not done(other) for other in entries[name].after) and not ran(entries[name])
            if done(name) or late or given_up or said(entries[name]):
                left.remove(name)
        _tell(followers, show)
        time.sleep(POLL_S if left else 0)
    missing = [name for name in entries if not done(name)]
    failed = [name for name in missing if ran(entries[name])]
    if not missing:
        return None
    waiting = len(missing) - len(failed)
    rest = f"; {waiting} stages that need it did not start" if waiting else ""
    return (f"{failed[0]}: {why(entries[failed[0]])}" if failed else f"{missing[0]}: {NO_WORD}") + rest


def _tell(followers: Mapping[Path, Follower], show: Any) -> None:
    for follower in followers.values():
        for event in follower.new():
            show.event(event)
