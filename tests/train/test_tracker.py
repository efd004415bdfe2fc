"""The run's log: what a resume keeps of it, real wandb runs offline across a kill, and a wandb that fails."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.errors import InputError
from train.tracker import METRICS, TIMINGS, Tracker, numbers, plain

ROOT = Path(__file__).parents[2]
RUN = """
import json, os, sys, time
from pathlib import Path
from train.tracker import Tracker
folder, first, last, known, state = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
warnings = []
tracker = Tracker("wandb", folder, first=True, warn=warnings.append, known=known.encode(), state=json.loads(state),
                  config={"lr": 0.1, "data": {"weights": [1, 2]}}, project="growmerge", name="a run")
def log(step):
    line = {"step": step, "loss": 1 / step, "blocks": {"layers/0/mlp": 2.0 * step}, "note": "text"}
    tracker.write(line, {"tokens_per_second": 10.0 * step, "mfu": None})
"""
KILLED = """
for step in range(first, last + 1):
    log(step)
print(json.dumps({"state": tracker.state(), "where": tracker.where}), flush=True)
while True:  # wandb writes once a second
    time.sleep(1)
"""
FINISHED = """
for step in range(first, last + 1):
    log(step)
tracker.close()
print(json.dumps({"state": tracker.state(), "warnings": warnings}))
"""
BROKEN = """
import psutil
log(1)
for child in psutil.Process().children(recursive=True):
    child.kill()
    child.wait()
for step in range(2, last + 1):
    log(step)
tracker.close()
print(json.dumps({"state": tracker.state(), "warnings": warnings}))
sys.stdout.flush()
os._exit(0)  # wandb's own exit hooks print a traceback
"""


def start(body, folder, first, last, *, known=b"", state=None, **environment):
    """Start a script of its own with real wandb."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "-c", RUN + body, str(folder), str(first), str(last), known.decode(), json.dumps(state or {})],
        env={**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(body, folder, first, last, **given):
    """Run such a script to its end and return what it printed."""
    process = start(body, folder, first, last, **given)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(printed)


def kill_when_written(process, folder, rows):
    """Kill a run that goes on for ever once wandb's file holds so many rows; return what it printed."""
    printed = json.loads(process.stdout.readline())
    for _ in range(600):
        (path,) = folder.glob("wandb/offline-run-*/*.wandb")
        if len(history(records(path))) == rows:
            break
        time.sleep(0.1)
    process.kill()
    process.communicate()
    return printed


def records(path):
    """Read a .wandb file: a LevelDB log, blocks of 32 KiB, of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(part)
            part = b""


def history(found):
    """Return the logged rows of a .wandb file, each as {key: value}."""
    return [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]


def test_a_wandb_run_goes_on_as_one_run_after_a_kill(tmp_path):
    folder = tmp_path / "run"
    killed = kill_when_written(start(KILLED, folder, 1, 6, WANDB_MODE="offline"), folder, 6)
    lines = (folder / METRICS).read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert killed["where"].startswith(str(folder / "wandb" / "offline-run-"))

    # Resumed from a checkpoint of step 4, which holds the id as well.
    (folder / "wandb.json").unlink()
    checkpoint = b"".join(lines[:4])
    resumed = finish(FINISHED, folder, 5, 8, known=checkpoint, state=killed["state"], WANDB_MODE="offline")
    assert (resumed["state"], resumed["warnings"]) == (killed["state"], [])
    assert [line["step"] for line in read(folder / METRICS)] == list(range(1, 9))
    assert [line["step"] for line in read(folder / TIMINGS)] == list(range(1, 9))

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    before, after = (list(records(path)) for path in files)
    for found in (before, after):
        (run,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.project, run.display_name) == (killed["state"]["wandb"], "growmerge", "a run")
        assert run.resume
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (config["lr"], config["data"]) == (0.1, {"weights": [1, 2]})
        metrics = [record.metric for record in found if record.WhichOneof("record_type") == "metric"]
        assert ("*", "step") in {(metric.glob_name, metric.step_metric) for metric in metrics}
    assert [row["step"] for row in history(before)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in history(after)] == [5, 6, 7, 8]
    for rows in (history(before), history(after)):
        assert [row["_step"] for row in rows] == list(range(len(rows)))  # wandb's own never goes backwards
    row = history(before)[2]
    assert {key: value for key, value in row.items() if not key.startswith("_")} == {
        "step": 3,
        "loss": 1 / 3,
        "blocks/layers/0/mlp": 6.0,
        "tokens_per_second": 30.0,
    }


def test_without_a_login_the_run_goes_on_and_says_so_once(tmp_path):
    folder = tmp_path / "run"
    found = [finish(FINISHED, folder, 1, 3, WANDB_MODE="online") for _ in range(2)]
    for one in found:
        (warning,) = one["warnings"]
        assert re.fullmatch(
            r"wandb does not work \(UsageError: No API key configured.*\): the run goes on without it; metrics.jsonl "
            "has everything",
            warning,
        )
    assert [line["step"] for line in read(folder / METRICS)] == [1, 2, 3]
    # Begun twice before any checkpoint: one run all the same.
    assert found[0]["state"] == found[1]["state"] == {"wandb": json.loads((folder / "wandb.json").read_text())["id"]}


def test_a_wandb_that_dies_on_the_way_takes_nothing_with_it(tmp_path):
    found = finish(BROKEN, tmp_path / "run", 1, 5, WANDB_MODE="offline")
    assert len(found["warnings"]) == 1
    assert found["warnings"][0].startswith("wandb does not work (ConnectionResetError")
    assert [line["step"] for line in read(tmp_path / "run" / METRICS)] == [1, 2, 3, 4, 5]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_lines(folder, **given):
    return Tracker("jsonl", folder, **{"first": True, "warn": pytest.fail, **given})


def test_a_resumed_log_has_the_bytes_of_an_undisturbed_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, steps in ((whole, range(6)), (cut, range(5))):
        tracker = open_lines(folder)
        for step in steps:
            tracker.write({"step": step, "loss": 1 / (step + 1)}, {"seconds": 0.5 + step})
            if (folder, step) == (cut, 2):
                checkpoint, state = tracker.content(), tracker.state()
        tracker.close()
    with (cut / TIMINGS).open("a") as file:
        file.write('{"step": 5, "sec')  # as a kill in the middle of a line leaves it
    assert state == {}
    tracker = open_lines(cut, known=checkpoint, state=state)
    for step in range(3, 6):
        tracker.write({"step": step, "loss": 1 / (step + 1)}, {"seconds": 0.5 + step})
    tracker.close()
    for name in (METRICS, TIMINGS):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    # Begun anew, nothing of before is left.
    tracker = open_lines(cut)
    tracker.write({"step": 0})
    tracker.close()
    assert read(cut / METRICS) == [{"step": 0}]
    assert read(cut / TIMINGS) == []


def test_only_the_first_rank_writes(tmp_path):
    tracker = Tracker("wandb", tmp_path, first=False, warn=pytest.fail)
    tracker.write({"step": 1}, {"seconds": 1.0})
    assert (tracker.content(), tracker.state(), tracker.where) == (b"", {}, None)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_number_is_null_in_json(tmp_path):
    tracker = open_lines(tmp_path)
    tracker.write({"step": 1, "loss": float("nan"), "blocks": {"head": float("inf"), "norms": [1.0, -float("inf")]}})
    tracker.close()
    text = (tmp_path / METRICS).read_text()
    assert text == '{"step": 1, "loss": null, "blocks": {"head": null, "norms": [1.0, null]}}\n'
    assert plain({1: (True, "text", None)}) == {"1": [True, "text", None]}


def test_numbers_of_a_line_by_their_paths():
    line = {"step": 3, "skipped": True, "loss": {"eng": 1.5, "by": {"swe": 2}}, "note": "x", "rows": [1], "no": None}
    found = dict(numbers(line))
    assert found == {"step": 3, "skipped": 1, "loss/eng": 1.5, "loss/by/swe": 2}
    assert not any(isinstance(value, bool) for value in found.values())


def test_json_lines_need_no_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from train.tracker import Tracker; "
        "Tracker('none', Path(sys.argv[1]), first=True, warn=print).write({'step': 1}); "
        "sys.exit('wandb' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False).returncode == 0
    assert read(tmp_path / METRICS) == [{"step": 1}]


def test_bad_input_is_one_line(tmp_path):
    line = "unknown tracker 'wandbb': allowed are none, jsonl, wandb; did you mean 'wandb'?"
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        Tracker("wandbb", tmp_path, first=False, warn=pytest.fail)
    (tmp_path / "file").touch()
    line = f"{tmp_path}/file/{METRICS}: cannot be written (File exists)"
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        open_lines(tmp_path / "file")
