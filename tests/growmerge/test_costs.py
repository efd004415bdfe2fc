"""What stages cost and what went wrong, from logs as jobs leave them."""

import json
from pathlib import Path
from typing import Any

import pytest

from growmerge.costs import attempts, costs, events_by_stage, incidents, training_seconds


def event(time: float, kind: str, stage: str = "a", **more: Any) -> dict[str, Any]:
    return {"time": time, "event": kind, "stage": stage, **more}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


KILLED = [event(0, "start"), event(10, "step", step=1), event(20, "start"), event(25, "error", text="no memory")]
DONE = [event(30, "start"), event(90, "done", seconds=60, ranks=4, threads=2, gpus=0, memory_gb=1.5)]


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        (DONE, [60]),
        ([*KILLED, *DONE], [10, 5, 60]),  # killed after its last word, failed, done
        (KILLED[:2], [10]),  # at work, or killed
        ([event(0, "warning", text="before it began")], []),
        ([], []),
    ],
)
def test_attempts_last_until_their_last_word(events: list[dict[str, Any]], seconds: list[float]) -> None:
    assert attempts(events) == seconds


def test_costs_hold_lost_attempts() -> None:
    said = {"a": [*KILLED, *DONE], "b": [event(0, "start", "b"), event(36, "done", "b", seconds=36, gpus=8, ranks=8)]}
    found = costs({"a": "train", "b": "train", "c": "merge"}, said, ranks=1, threads=1, gpus=0)
    assert [row["stage"] for row in found["rows"]] == ["a", "b"]  # c has not begun
    assert found["rows"][0]["hours"] == pytest.approx(75 * 4 * 2 / 3600, abs=1e-6)
    assert found["gpu_hours"] == pytest.approx(36 * 8 / 3600)
    assert found["core_hours"] == found["rows"][0]["hours"]


def test_a_job_that_does_not_say_counts_as_it_was_asked_for() -> None:
    found = costs({"a": "train"}, {"a": KILLED}, ranks=3, threads=2, gpus=0)
    assert found["core_hours"] == pytest.approx(15 * 6 / 3600, abs=1e-6)
    assert found["gpu_hours"] is None


def test_incidents() -> None:
    warned = [event(40, "warning", text="step 3 skipped"), event(41, "warning", text="step 9 skipped")]
    events = [*KILLED, DONE[0], *warned, DONE[1]]
    assert incidents(["a", "b"], {"a": events}) == [
        {"stage": "a", "event": "error", "times": 1, "text": "no memory"},
        {"stage": "a", "event": "warning", "times": 2, "text": "step 9 skipped"},
        {"stage": "a", "event": "requeued", "times": 2, "text": ""},
    ]
    # Done, and done anew after the file had changed.
    again = [event(100, "start"), event(101, "done", seconds=1)]
    assert incidents(["a"], {"a": [*DONE, *again]}) == []


def test_a_jobs_events_count_once(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", [{"time": 0, "event": "run", "stages": 1}, *DONE])
    write(tmp_path / "jobs" / "1" / "events.jsonl", DONE)
    write(tmp_path / "jobs" / "2" / "b" / "events.jsonl", [event(50, "start", "b")])
    found = events_by_stage(tmp_path)
    assert {name: [one["time"] for one in events] for name, events in found.items()} == {"a": [30, 90], "b": [50]}


def test_events_of_a_training_may_name_no_stage(tmp_path: Path) -> None:
    write(tmp_path / "jobs" / "1" / "events.jsonl", [{"time": 1, "event": "start"}])
    assert events_by_stage(tmp_path, "swe") == {"swe": [{"time": 1, "event": "start", "stage": "swe"}]}


def test_training_time_is_that_of_steps_alone(tmp_path: Path) -> None:
    metrics = [{"step": 0, "tokens": 0, "evaluation": {}}]
    metrics += [{"step": step, "tokens": step * 100, "loss": 1.0} for step in (1, 2)]
    metrics += [{"step": 2, "tokens": 200, "evaluation": {}}, {"step": 3, "tokens": 300, "loss": 1.0}]
    metrics += [{"step": 3, "tokens": 300, "evaluation": {}}]
    write(tmp_path / "metrics.jsonl", metrics)
    write(tmp_path / "timings.jsonl", [{"step": step, "tokens_per_second": 50 * step} for step in (1, 2, 3)])
    assert training_seconds(tmp_path) == [[0, 0.0], [2, 3.0], [3, 3.667]]
    assert training_seconds(tmp_path / "none") == []
