"""What is to be said of nodes, from what `growmerge doctor`'s ranks wrote on them."""

import math
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from growmerge.doctor_job import PACKAGES, REPORTS, versions
from growmerge.doctor_login import LOW_BYTES, Finding, size
from growmerge.submitted import ERROR, NO_WORD
from parallel.errors import InputError
from slurm.profile import OFFLINE, Profile

SKEW_S = 5.0
"""Difference of clocks (seconds) that is a warning: leases compare times of different nodes."""
Note = tuple[str, str, str]
"""State, what was seen and what to do, as in a Finding."""


@dataclass(kw_only=True)
class Seen:
    """What is known of the job."""

    ranks: int
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What each rank wrote."""
    skews: dict[int, tuple[float, float]] = field(default_factory=dict)
    """How far the clock of each rank's node is ahead, at least and at most (seconds)."""
    ended: bool = False
    why: str = ""
    """Why it did not end in time."""

    @property
    def whole(self) -> bool:
        return len(self.reports) == self.ranks and all("speed" in report for report in self.reports.values())

    def update(self, folder: Path) -> None:
        """Read what the ranks have written so far."""
        for rank in range(self.ranks):
            with suppress(InputError, OSError):
                report = self.reports[rank] = read_json(folder / REPORTS / f"{rank}.json")
                least, most = self.skews.get(rank, (-math.inf, math.inf))
                # It was written before now, and after the time here that it has read.
                least = max(least, report["time"] - time.time())
                self.skews[rank] = least, min(most, report["time"] - report["login_time"])


def told(seen: Seen, token: str, work: Path, gpus: int, profile: Profile) -> Iterator[Finding]:
    """Yield what is to be said of a job that has ended, or been cancelled."""
    if not seen.reports:
        said = seen.why or words(work / "logs")
        do = "see that nodes start jobs, or give a longer --wait" if seen.why else "mend what it names in the profile"
        if not said:
            said, do = NO_WORD, "choose a --workdir that they share"
        yield Finding(name="job", state="failed", seen=said, do=do)
        return
    missing = [rank for rank in range(seen.ranks) if rank not in seen.reports]
    nodes = {report["node"]: rank for rank, report in sorted(seen.reports.items(), reverse=True)}  # the first of each
    other = [node for node, rank in nodes.items() if seen.reports[rank]["token"] != token]
    if missing or other:
        text = f"{len(seen.reports)} of {seen.ranks} ranks wrote what is seen here"
        text += f"; {', '.join(sorted(other))}: not what was written here" if other else ""
        text += f"; {seen.why or words(work / 'logs')}"
        yield Finding(name="shared workdir", state="failed", seen=text, do="choose a --workdir that all nodes share")
    else:
        text = (
            f"{', '.join(sorted(nodes))}: what was written here is read there, and what was written there is read here"
        )
        yield Finding(name="shared workdir", seen=text)
    views = {node: seen.reports[rank] for node, rank in sorted(nodes.items())}
    yield from _by_node("node packages", {node: _packages(view) for node, view in views.items()})
    yield from _by_node("device", {node: _device(view, gpus) for node, view in views.items()})
    yield from _by_node("node temporary", {node: _temporary(view) for node, view in views.items()})
    yield from _by_node("network", {node: _network(view, profile) for node, view in views.items()})
    yield from _by_node("clock", {node: _clock(*seen.skews[nodes[node]]) for node in views})
    yield _speed(seen, work)


def _by_node(name: str, notes: Mapping[str, Note]) -> Iterator[Finding]:
    """Yield a finding for all nodes of which the same is to be said."""
    for each in dict.fromkeys(notes.values()):
        state, seen, do = each
        nodes = ", ".join(node for node, other in notes.items() if other == each)
        yield Finding(name=name, state=state, seen=f"{nodes}: {seen}", do=do)  # type: ignore[arg-type]


def _packages(view: Mapping[str, Any]) -> Note:
    here = {"Python": platform.python_version(), **versions()}
    there = {"Python": view["python"], **view["packages"]}
    if missing := [name for name in PACKAGES if there[name] is None]:
        return "failed", f"no {', '.join(missing)}", "install growmerge into what `python` in the profile runs"
    other = [f"{name} {there[name]} (here {here[name]})" for name in here if there[name] != here[name]]
    if other:
        return "warning", ", ".join(other), "submit from the environment that jobs run in"
    return "ok", f"Python {there['Python']} and packages as here", ""


def _device(view: Mapping[str, Any], gpus: int) -> Note:
    if "devices" not in view:
        return "failed", "torch cannot be imported", "see the job's words below"
    found = view["devices"]
    text = ", ".join(f"{found.count(name)} x {name}" for name in dict.fromkeys(found)) or "CPU, no GPU"
    if len(found) < gpus:
        do = "look at `gres`, at torch's build, and at the container's option for GPUs (--nv, --rocm)"
        return "failed", f"{text}; {gpus} GPUs were asked for", do
    return "ok", text, ""


def _temporary(view: Mapping[str, Any]) -> Note:
    found = view["temporary"]
    if found["problem"] is not None:
        do = "name a folder of the nodes in `temporary` of the profile"
        return "failed", f"{found['folder']}: cannot be written ({found['problem']})", do
    text = f"{found['folder']}: writable, {size(found['free_bytes'])} free"
    if found["free_bytes"] < LOW_BYTES / 10:
        return "warning", text, "name a larger one in `temporary` of the profile"
    return "ok", text, ""


def _network(view: Mapping[str, Any], profile: Profile) -> Note:
    found = view["network"]
    if not profile.network:
        if unset := sorted({*OFFLINE} - {*found["offline"]}):
            do = "look for what sets it in `setup` and `environment` of the profile"
            return "warning", f"to stay offline, but for {', '.join(unset)}", do
        return "ok", "told to stay offline (HF_HUB_OFFLINE, ...): `growmerge fetch` on a login node", ""
    if found["problem"] is not None:
        return "warning", f"{found['hub']} is not reached: {found['problem']}", "set `network: false` in the profile"
    if found["offline"]:
        return "warning", f"told to stay offline by {', '.join(found['offline'])}", "unset what the profile denies"
    return "ok", f"{found['hub']} is reached", ""


def _clock(least: float, most: float) -> Note:
    if least > SKEW_S or most < -SKEW_S:
        text = f"{least:.0f} s ahead of here" if least > 0 else f"{-most:.0f} s behind"
        return "warning", f"its clock is at least {text}", "tell the site: leases rely on clocks that agree"
    return "ok", f"clock within {math.ceil(max(-least, most))} s of here", ""


def _speed(seen: Seen, work: Path) -> Finding:
    if not seen.whole:
        do = "do NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in the profile name a network that the nodes share?"
        text = f"ranks did not reach one another: {seen.why or words(work / 'logs') or 'no word'}"
        return Finding(name="bandwidth", state="failed", seen=text, do=do)
    found = seen.reports[0]["speed"]
    ranks = found["ranks"]
    if ranks == 1:
        return Finding(name="bandwidth", seen="one rank alone: nothing to measure")
    rate = found["bytes"] / found["seconds"] / 1e9
    bus = rate * 2 * (ranks - 1) / ranks  # as nccl-tests define it
    values = {**found, "algorithm_gb_per_second": rate, "bus_gb_per_second": bus}
    text = (
        f"all-reduce of {found['bytes'] >> 20} MiB over {ranks} ranks ({found['backend']}): algorithm {rate:.3g} GB/s, "
    )
    text += f"bus {bus:.3g} GB/s; of 4 bytes in {found['latency_s'] * 1e6:.0f} µs"
    return Finding(name="bandwidth", seen=text, values=values)


def words(logs: Path) -> str:
    """Return why a job failed by its ranks' logs: the first exception, else what was said last; empty without logs."""
    lines = [
        line.strip() for log in sorted(logs.glob("*.err")) for line in log.read_text(errors="replace").splitlines()
    ]
    errors = [line for line in lines if ERROR.match(line)]
    last = errors[:1] or [line for line in lines if line][-1:]
    return last[0][:500] if last else ""
