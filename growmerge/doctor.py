"""`growmerge doctor`: whether a cluster, or this machine, is fit for growmerge; a line a check."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from checkpoint.files import disk_errors
from growmerge.clusters import profile_of
from growmerge.doctor_login import Finding, answer, group, packages, quotas, spaces, writable
from parallel.errors import InputError
from slurm.executor import choose
from slurm.profile import Profile

COLORS = {"ok": "green", "warning": "yellow", "failed": "red"}
NO_SLURM = "no SLURM here: nodes were not looked at"


def examine(name: str | None, workdir: Path | None, *, nodes: int, wait: float, as_json: bool) -> int:
    """Print what all checks find, each as soon as it is known; return 1 if one failed, else 0.

    Args:
        name: of the cluster's profile, or its path.
        workdir: where runs will have theirs; what the profile says by default.
        wait: for the job on the nodes at most (seconds).

    Raises:
        InputError: no such profile, or something in it is wrong.
    """
    profile = profile_of(name)
    console = Console()
    found: list[Finding] = []
    with contextlib.closing(_checks(name, profile, workdir, nodes, wait)) as checks:
        for finding in checks:
            found.append(finding)
            if not as_json:
                console.print(_line(finding), soft_wrap=True)
    failed = [finding.name for finding in found if finding.state == "failed"]
    if as_json:
        print(json.dumps({"fit": not failed, "checks": [asdict(finding) for finding in found]}, indent=1))
    else:
        console.print(f"not fit: {', '.join(dict.fromkeys(failed))}" if failed else "fit", soft_wrap=True)
    return 1 if failed else 0


def _line(finding: Finding) -> Text:
    line = Text(f"{finding.state:<8}", COLORS[finding.state])
    line.append(f"{finding.name:<16} {finding.seen}", "default")
    return line.append(f"  -> {finding.do}", "bold default") if finding.do else line


def _checks(name: str | None, profile: Profile, workdir: Path | None, nodes: int, wait: float) -> Generator[Finding]:
    note = f"tested {profile.tested}" if profile.tested else profile.note
    known = f"{name}: {profile.description or 'no description'} ({note})"
    yield Finding(name="profile", seen="none: SLURM's own defaults" if name is None else known)
    yield packages()
    scheduler = list(_scheduler(name, profile))
    yield from scheduler
    ready = bool(scheduler) and all(finding.state != "failed" for finding in scheduler)
    try:
        place = _place(workdir, profile)
    except InputError as error:
        yield Finding(name="workdir", state="failed", seen=str(error), do="set them, or give --workdir")
        return
    with contextlib.ExitStack() as left:
        try:
            work: Path | None = left.enter_context(_work(place, profile))
            assert work is not None
            tried = writable(work)
        except (InputError, OSError) as error:
            work, do = None, "choose a --workdir that can be written to"
            tried = Finding(name="workdir", state="failed", seen=str(error), do=do)
        yield tried
        if profile.group_writable and work is not None:
            yield group(work)
        yield from spaces(place, profile)
        yield from quotas(place)
        if not scheduler:
            if name is None:
                yield Finding(name="nodes", seen=NO_SLURM)
            else:
                yield Finding(name="nodes", state="failed", seen=NO_SLURM, do="give this command on a login node")
        elif ready and work is not None and tried.state == "ok":
            yield from _nodes(name, profile, place, work, nodes, wait)
        else:
            do = "mend what failed above"
            yield Finding(name="nodes", state="warning", seen="nodes were not looked at", do=do)


def _scheduler(name: str | None, profile: Profile) -> Iterator[Finding]:
    """Yield what the scheduler answers; nothing where there is none."""
    try:
        if choose("auto") == "local":
            return
    except InputError as error:
        yield Finding(name="scheduler", state="failed", seen=str(error), do="tell the site if it stays so")
        return
    yield Finding(name="scheduler", seen=f"sbatch is there, sinfo answers: {answer(['sinfo', '--version'])[1].strip()}")
    for partition in filter(None, str(profile.slurm.get("partition", "")).split(",")):
        code, text, words = answer(["scontrol", "--oneliner", "show", "partition", partition])
        if code:
            do = "`sinfo` names the partitions; mend `slurm` in the profile"
            yield Finding(name="partition", state="failed", seen=f"{partition}: {words}", do=do)
            continue
        facts = dict(re.findall(r"(\w+)=(\S*)", text))
        seen = f"{partition}: {facts.get('State')}, {facts.get('TotalNodes')} nodes, at most {facts.get('MaxTime')}"
        if facts.get("State") == "UP":
            yield Finding(name="partition", seen=seen)
        else:
            yield Finding(name="partition", state="failed", seen=seen, do="choose another, or ask the site")


def _nodes(name: str | None, profile: Profile, workdir: Path, work: Path, nodes: int, wait: float) -> Iterator[Finding]:
    from growmerge.doctor_nodes import findings, plan, rehearse

    try:
        planned = plan(work, workdir, name, nodes)
    except InputError as error:
        yield Finding(name="submission", state="failed", seen=str(error), do="give fewer --nodes")
        return
    rehearsed = rehearse(planned, work)
    yield rehearsed
    if rehearsed.state == "ok":
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # the job is cancelled, the folder removed
        yield from findings(planned, work, profile, wait, lambda text: click.echo(text, err=True))


def _place(given: Path | None, profile: Profile) -> Path:
    """Return the folder that is looked at: runs have their workdirs in it, or it is one."""
    filled = os.path.expandvars(given or profile.workdirs or "runs")
    if given is None and "$" in filled:
        raise InputError(f"workdirs: {profile.workdirs}: not all of its variables are set here")
    return (given or Path(filled).expanduser()).absolute()


@contextlib.contextmanager
def _work(place: Path, profile: Profile) -> Iterator[Path]:
    """Make a folder to work in, as workdirs are made, and remove it at the end with those above that were not there."""
    work = place / f".doctor-{secrets.token_hex(4)}"
    new = [folder for folder in work.parents if not folder.exists()]
    try:
        with disk_errors(place):
            profile.prepare(work)
            work.mkdir(parents=True, exist_ok=True)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for folder in new:
            with contextlib.suppress(OSError):  # others may have used it meanwhile
                folder.rmdir()
