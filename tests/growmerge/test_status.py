"""`growmerge status`, `logs` and `cancel` of runs on this machine, with a real run at work."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import growmerge
from toy import command

sys.path.append(str(Path(__file__).parents[1] / "cluster"))

from runs import STEPS, prepare, write

from growmerge.events import EventLog
from growmerge.status import duration, progress, rows
from parallel.errors import InputError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    prepare(home)
    return home


def test_a_run_is_watched_cancelled_and_goes_on(home, monkeypatch):
    monkeypatch.setenv("GROWMERGE_SLOW", "step/:0.3")
    path = write(home, "watched", ranks=1, nodes=1)
    folder = home / "runs" / "watched"
    line = command("train", path.name, "--executor", "local")
    with subprocess.Popen(line, cwd=home, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not ((folder / "lease.json").is_file() and rows(folder)[0].tokens_per_second):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.1)
        (row,) = json.loads(growmerge("status", str(folder), "--json").stdout)
        assert row["stage"] == "watched" and row["state"] == "running" and row["note"].startswith("by growmerge train")
        assert row["step"].endswith(f"/{STEPS}") and row["loss"] > 0
        shown = growmerge("cancel", str(folder))
        assert shown.stdout.startswith("ended: growmerge train"), shown.stderr
        process.communicate(timeout=60)
    assert [(row.state, row.note) for row in rows(folder)] == [("stopped", "its run was stopped")]
    monkeypatch.delenv("GROWMERGE_SLOW")
    assert growmerge("train", path.name, "--executor", "local", cwd=home).returncode == 0
    shown = growmerge("status", str(folder)).stdout
    assert "done" in shown and "1 done" in shown
    assert growmerge("logs", str(folder)).returncode == 0


def test_states_follow_from_a_log(tmp_path):
    log = EventLog(tmp_path / "log.jsonl")
    steps = [{"event": "step", "step": n, "steps": 10, "loss": 2.0, "tokens_per_second": 5.0} for n in (1, 2)]
    events = [{"event": "run"}, {"event": "start", "stage": "a"}, {"event": "done", "stage": "a", "seconds": 1}]
    events += [{"event": "start", "stage": "b"}, *({**step, "stage": "b"} for step in steps)]
    events += [{"event": "error", "stage": "b", "text": "no more"}, {"event": "start", "stage": "c"}]
    for event in [*events, {"event": "end", "failed": True}]:
        log.write(event)
    found = {row.stage: (row.state, row.note) for row in rows(tmp_path)}
    assert found == {"a": ("done", ""), "b": ("failed", "no more"), "c": ("stopped", "its run failed")}


def test_what_is_left_follows_from_the_last_steps():
    def step(number, at):
        return {"event": "step", "time": at, "step": number, "steps": 100, "loss": 2.5, "tokens_per_second": 7.0}

    # A restart in between does not count as a slow step.
    events = [step(1, 0.0), step(2, 5.0), {"event": "start"}, step(3, 1000.0), step(5, 1020.0)]
    assert progress(events) == {"step": "5/100", "loss": 2.5, "tokens_per_second": 7.0, "left_s": 950.0}
    assert [duration(seconds) for seconds in (40, 950, 11100)] == ["40 s", "16 min", "3 h 05 min"]


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(InputError, match="nothing was run or submitted from here"):
        rows(tmp_path)
    for verb in ("status", "resubmit"):
        found = growmerge(verb, str(tmp_path))
        assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    assert "no jobs of a cluster were submitted" in found.stderr
    assert "has a log of a rank 0" in growmerge("logs", str(tmp_path)).stderr
    assert growmerge("cancel", str(tmp_path)).stdout == "0 jobs cancelled\n"
