"""What is submitted together, which of a job and its successors counts, and why something failed."""

from pathlib import Path

import pytest

from growmerge.events import EventLog
from growmerge.on_cluster import Submission, Unit, packs
from growmerge.schema import Resources
from growmerge.status import with_those_that_need_it
from growmerge.submitted import NO_WORD, Entry, ran, under_way, why


def submission(units, **resources):
    made = {
        name: Unit(verb=verb, together=verb == "evaluate", after=after, result=Path(name), key=name)
        for name, (verb, after) in units.items()
    }
    about = {"function": print, "order": lambda names, folder: None, "verb": "run", "file": Path("f")}
    return Submission(name="toy", workdir=Path(), units=made, resources=Resources(**resources), **about)


def test_merges_that_wait_for_as_much_share_jobs():
    units = {"a": ("train", ()), "b": ("train", ())}
    units |= {f"m{number}": ("merge", ("a", "b")) for number in range(5)}
    units |= {"mm": ("merge", ("m0", "m4")), "grown": ("grow", ("m0",))}
    units |= {f"evaluate/{name}": ("evaluate", (name,)) for name in ("a", "m0", "m4", "mm")}
    assert packs(submission(units, per_job=3), list(units)) == [
        ("a",),
        ("b",),
        ("m0", "m1", "m2"),
        ("m3", "m4"),
        ("evaluate/a",),
        ("mm",),
        ("grown",),
        ("evaluate/m0", "evaluate/m4"),
        ("evaluate/mm",),
    ]
    assert max(map(len, packs(submission(units), list(units)))) == 1
    # What was done before is not waited for, and does not keep apart.
    assert packs(submission(units, per_job=3), ["m4", "mm"]) == [("m4",), ("mm",)]
    assert packs(submission(units, per_job=3), ["evaluate/a", "evaluate/mm"]) == [("evaluate/a", "evaluate/mm")]


def entry(folder, ids=("7",), stage="seed"):
    (folder / "0000").mkdir(exist_ok=True, parents=True)
    (folder / "logs").mkdir(exist_ok=True)
    about = {"soft": False, "user": "me", "folder": folder / "0000", "key": stage, "after": ()}
    return Entry(stage=stage, ids=ids, result=folder / "result", **about)


def test_of_a_job_and_its_successors_the_one_that_runs_counts(tmp_path, monkeypatch):
    widths = (20, 20, 20, 20, 400, 100, 8)

    def queue(*lines):
        text = "\n".join(
            "".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines
        )
        (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n")
        (tmp_path / "squeue").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    entries = {"seed": entry(tmp_path, ("7", "8", "9")), "other": entry(tmp_path, ("12_3",))}
    waits = [(number, "N/A", number, "PENDING", "", "Dependency", "0") for number in "789"]
    queue(*waits, ("12", "3", "15", "RUNNING", "n1", "None", "2"))
    found = under_way(entries)
    assert (found["seed"].id, found["seed"].why) == ("7", "waits for other stages")
    assert (found["other"].id, found["other"].nodes, found["other"].restarts) == ("12_3", "n1", 2)
    queue(("8", "N/A", "8", "RUNNING", "n[1-2]", "None", "0"), waits[2])
    assert under_way(entries)["seed"].id == "8" and "other" not in under_way(entries)
    queue()
    assert under_way(entries) == {}


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "Traceback\n[rank0]: KeyError: 'report'\nsrun: error: n1: task 0: Exited with exit code 1\n",
            "[rank0]: KeyError: 'report'",
        ),
        (
            "/x.py:3: FutureWarning: old\n  return f()\nsrun: error: n1: task 0: Killed\nsrun: Terminating\n",
            "srun: error: n1: task 0: Killed",
        ),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 10:00 DUE TO TIME LIMIT ***\n", "DUE TO TIME LIMIT ***"),
        ("module: not found\n", "module: not found"),
        ("", "it left no word"),
    ],
)
def test_why_a_job_failed_is_its_own_words_or_the_schedulers(tmp_path, log, line):
    one = entry(tmp_path)
    path = tmp_path / "logs" / "7_0_log.err"
    path.write_text(log)
    assert ran(one)
    found = why(one)
    assert found.startswith("its job 7 failed: ") and found.endswith(f"{line}; log: {path}")


def test_what_a_job_has_said_of_a_stage_goes_before_its_log(tmp_path):
    one, other = entry(tmp_path), entry(tmp_path, stage="swe")
    assert not ran(one) and "share" in NO_WORD
    log = EventLog(one.folder / "events.jsonl")
    (tmp_path / "logs" / "7_0_log.err").write_text("a warning\n")
    log.write({"event": "start", "stage": "seed"})
    log.write({"event": "error", "stage": "seed", "text": "text.txt: not UTF-8"})
    log.write({"event": "needs", "stage": "swe", "text": "it needs seed, which has failed"})
    assert why(one) == "text.txt: not UTF-8"
    assert ran(one) and not ran(other)


def test_what_needs_a_cancelled_stage_is_cancelled_with_it():
    def one(stage, ids, *after):
        about = {"soft": False, "user": "me", "folder": Path(), "result": Path(), "key": stage}
        return Entry(stage=stage, ids=ids, after=after, **about)

    entries = {"seed": one("seed", ("1",)), "swe": one("swe", ("2",), "seed"), "est": one("est", ("3",), "seed")}
    entries |= {"both": one("both", ("4",), "swe", "est"), "twice": one("twice", ("4",), "est")}
    entries |= {"evaluate/twice": one("evaluate/twice", ("5",), "twice")}
    assert with_those_that_need_it(["swe"], entries) == {"swe", "both", "twice", "evaluate/twice"}
    assert with_those_that_need_it(["evaluate/twice"], entries) == {"evaluate/twice"}
    assert with_those_that_need_it([], entries) == {*entries}
