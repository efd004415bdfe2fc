"""Jobs of this machine: which may start, as numbers alone; and small real ones, which note what they do in files."""

import random
import subprocess

import psutil
import pytest

from parallel.errors import InputError
from slurm import local
from slurm.executor import Job
from slurm.graph import Planned
from slurm.local import Queue, run_all, takes


def planned(*after, script="true", **changes):
    """A job that runs a line of shell once a rank, and fails as that does."""
    how = {"ranks": 1, "threads": 1, "minutes": 1, **changes}
    return Planned(
        job=Job(name="j", function=subprocess.check_call, arguments=(["sh", "-c", script],), **how), after=after
    )


def test_a_job_starts_when_those_that_it_needs_have_ended_and_what_fails_takes_its_dependents_along():
    graph = {"a": planned(), "b": planned(), "c": planned("a"), "d": planned("c", "b"), "e": planned("b")}
    queue = Queue(graph)
    assert queue.start() == ["a", "b"]
    assert queue.start() == []
    queue.end("a", well=False)
    assert (queue.dropped, queue.start()) == (["c", "d"], [])
    queue.end("b", well=True)
    assert queue.start() == ["e"]
    queue.end("e", well=True)
    assert not queue.waiting and not queue.running


def test_what_has_room_starts_and_gpus_belong_to_one_job_at_a_time():
    graph = {"wide": planned(ranks=2, threads=2), "two": planned(ranks=2), "one": planned(), "late": planned()}
    queue = Queue(graph, cores=5)
    assert queue.start() == ["wide", "one"]  # `two` has no room beside `wide`
    queue.end("wide", well=True)
    assert queue.start() == ["two", "late"]
    queue = Queue({"a": planned(memory_gb=6), "b": planned(memory_gb=6), "c": planned()}, memory_gb=11)
    assert queue.start() == ["a", "c"]
    queue = Queue({"a": planned(gpus=1), "b": planned(gpus=1), "c": planned()})
    assert queue.start() == ["a", "c"]


@pytest.mark.parametrize("seed", range(20))
def test_limits_hold_in_random_graphs_and_each_job_runs_or_needs_one_that_failed(seed):
    draw = random.Random(seed)
    names = [str(number) for number in range(40)]
    graph = {
        name: planned(
            *draw.sample(names[:at], draw.randint(0, min(at, 3))),
            ranks=draw.randint(1, 4),
            threads=draw.randint(1, 2),
            memory_gb=draw.choice([None, 2, 5, 9]),
            gpus=draw.randint(0, 1),
        )
        for at, name in enumerate(names)
    }
    queue, limits, ended = Queue(graph, cores=8, memory_gb=10), (8, 10, 1), {}
    while queue.waiting or queue.running:
        for name in queue.start():
            assert all(ended[other] for other in graph[name].after)
        taken = [sum(each) for each in zip(*(takes(graph[name].job) for name in queue.running), strict=True)]
        assert all(took <= limit for took, limit in zip(taken, limits, strict=True)), (taken, queue.running)
        for name in queue.waiting:  # nothing waits that could run
            free = all(
                took + more <= limit for took, more, limit in zip(taken, takes(graph[name].job), limits, strict=True)
            )
            assert not free or not all(other in ended for other in graph[name].after)
        name = draw.choice(queue.running)
        ended[name] = draw.random() < 0.9
        queue.end(name, well=ended[name])
    assert {*ended} | {*queue.dropped} == {*names} and not {*ended} & {*queue.dropped}
    failed = {name for name, well in ended.items() if not well} | {*queue.dropped}
    assert all(failed & {*graph[name].after} for name in queue.dropped)


def test_a_job_that_never_has_room_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^resources: seed takes 8 cores \(4 ranks x 2 threads\), and there are 6: "):
        Queue({"seed": planned(ranks=4, threads=2)}, cores=6)
    with pytest.raises(InputError, match=r"^resources: a takes 9 GB of memory, and there are 8: lower memory_gb, or "):
        Queue({"a": planned(memory_gb=9)}, memory_gb=8)


class Runs:
    """Runs jobs that append to `notes`, and keeps how they ended."""

    def __init__(self, folder):
        self.folder = folder
        self.notes = folder / "notes"
        self.notes.touch()
        self.ended = {}

    def said(self):
        return self.notes.read_text().split()

    def note(self, word, name):
        return f"echo {word}-{name} >> {self.notes}"

    def job(self, name, *after, script="true", **changes):
        return planned(*after, script=f"{self.note('start', name)}; {script} && {self.note('end', name)}", **changes)

    def __call__(self, graph, look=lambda running: None, ended=lambda name: None, **limits):
        def well(name, job):
            self.ended[name] = not job.failed()
            ended(name)
            return self.ended[name]

        queue = Queue(graph, **limits)
        run_all(queue, {name: self.folder / name for name in graph}, look=look, well=well)
        return queue


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def until(path, lines=1):
    """Shell that waits for so many lines of a file, a minute at most."""
    return f'for try in $(seq 600); do [ "$(cat {path} 2>/dev/null | wc -l)" -ge {lines} ] && break; sleep 0.1; done'


def test_independent_jobs_run_side_by_side_and_a_failure_stops_what_needs_it_alone(runs):
    # b and c wait for one another; that ends well only if both are at work at once.
    both = {
        name: runs.job(name, "a", script=f"{until(runs.notes, 4)}; grep -q start-{other} {runs.notes}")
        for name, other in (("b", "c"), ("c", "b"))
    }
    graph = {"a": runs.job("a"), **both, "bad": runs.job("bad", "b", "c", script="exit 3"), "needs": planned("bad")}
    queue = runs(graph)
    assert runs.ended == {"a": True, "b": True, "c": True, "bad": False}
    assert queue.dropped == ["needs"]
    said = runs.said()
    assert said[:2] == ["start-a", "end-a"]
    assert {*said[2:4]} == {"start-b", "start-c"}
    assert said[-1] == "start-bad"


@pytest.mark.slow
def test_jobs_that_have_no_room_beside_one_another_take_turns(runs):
    runs({name: runs.job(name, ranks=2) for name in "ab"}, cores=3)
    assert [word[-1] for word in runs.said()] == [*"aaaabbbb"]  # start and end of each rank


@pytest.mark.slow
def test_a_killed_rank_ends_its_job_and_no_other(runs, monkeypatch):
    monkeypatch.setattr(local, "PATIENCE", 0.5)
    pids, ranks = runs.folder / "pids", []
    graph = {
        "hit": planned(script=f"echo $PPID >> {pids}; sleep 1001", ranks=2),
        "needs": planned("hit"),
        "other": runs.job("other", script=until(runs.notes, 2)),
    }
    everything = []

    def look(running):
        if not ranks and pids.exists() and len(pids.read_text().split()) == 2:
            ranks.extend(psutil.Process(int(pid)) for pid in pids.read_text().split())
            everything.extend(child for rank in ranks for child in (rank, *rank.children(recursive=True)))
            ranks[0].kill()

    def ended(name):
        if name == "hit":  # which the other one waits for
            runs.notes.write_text(runs.notes.read_text() + "hit-ended\n")

    queue = runs(graph, look, ended)
    assert runs.ended == {"hit": False, "other": True}
    assert runs.said() == ["start-other", "hit-ended", "end-other"]
    assert queue.dropped == ["needs"]
    assert len(everything) == 6  # of each rank: Python, a shell, sleep
    assert not psutil.wait_procs(everything, timeout=10)[1]


def family():
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("when", ["at once", "at work"])
def test_what_ends_the_run_ends_all_that_its_jobs_have_started_and_nothing_else(runs, when):
    unrelated = subprocess.Popen(["sleep", "1001"])
    before = {process.pid for process in family()}  # other tests' as well
    seen = []

    def look(running):
        if when == "at once" or len(runs.said()) == 3:
            seen.extend(process for process in family() if process.pid not in before)
            raise KeyboardInterrupt

    try:
        script = f"sleep 1001 & {runs.note('at', 'work')}; wait"
        with pytest.raises(KeyboardInterrupt):
            runs({"a": planned(script=script, ranks=2), "b": planned(script=script)}, look)
        # Two controllers, and of each rank: Python, a shell, sleep.
        assert len(seen) >= (2 if when == "at once" else 2 + 3 * 3), seen
        assert not psutil.wait_procs(seen, timeout=10)[1]
        assert [process for process in family() if process.pid not in before] == []
        assert unrelated.poll() is None
    finally:
        unrelated.kill()
        unrelated.wait()
