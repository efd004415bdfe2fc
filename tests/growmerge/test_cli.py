"""The command line: help, inspect, exit codes, what shadows a room; what is shown while it runs."""

import json
import os
import subprocess
import sys

import forked
import pytest
from toy import growmerge, write_toy

from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout
from checkpoint.writer import write_checkpoint
from growmerge.cards import card
from growmerge.events import EventLog, Follower


def test_help_lists_the_verbs():
    shown = growmerge("--help")
    assert shown.returncode == 0
    assert all(verb in shown.stdout for verb in ("run", "report", "inspect"))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    missing = growmerge("run", str(tmp_path / "nothing.yaml"))
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert "nothing.yaml" in missing.stderr
    shown = growmerge("--debug", "run", str(tmp_path / "nothing.yaml"))
    assert "Traceback" in shown.stderr


def test_dry_run_prints_every_stage_and_does_nothing(tmp_path):
    path = write_toy(tmp_path)
    shown = forked.growmerge("run", str(path), "--dry-run", "--workdir", str(tmp_path / "run"), COLUMNS="120")
    assert shown.returncode == 0, shown.stderr
    for words in ("seed-2x", "2x-ties", "10.2k", "FLOPs"):
        assert words in shown.stdout
    assert not (tmp_path / "run").exists()


def test_inspect_says_what_a_checkpoint_is_and_finds_a_flipped_bit(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    about = {"name": "seed", "verb": "train", "parents": []}
    write_checkpoint(open_checkpoint(tiny_folder()), folder, SafetensorsLayout(), about=about)
    shown = forked.growmerge("inspect", str(folder), "--check", COLUMNS="150")
    assert shown.returncode == 0, shown.stderr
    for words in ("safetensors", "llama", "weight float32", "lm_head.weight = model.embed_tokens.weight", "train seed"):
        assert words in shown.stdout
    path = folder / "model.safetensors"
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = forked.growmerge("inspect", str(folder), "--check")
    assert found.returncode == 2
    assert "model.safetensors: damaged (checksum of block 0" in found.stderr


def test_a_package_that_shadows_a_room_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # submitting in this process sets it
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "__init__.py").write_text("")
    found = subprocess.run(
        [sys.executable, "-m", "growmerge.cli", "inspect", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert f"the package 'merge' comes from {tmp_path / 'merge' / '__init__.py'}" in found.stderr


def test_slurm_is_refused_where_there_is_none(tmp_path):
    path = write_toy(tmp_path)
    options = ("--workdir", str(tmp_path / "run"), "--executor", "slurm")
    found = forked.growmerge("run", str(path), *options, PATH=str(tmp_path))
    assert found.returncode == 2
    assert "no sbatch on PATH" in found.stderr


def test_followers_get_whole_events_once(tmp_path):
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert follower.new() == []
    log = EventLog(path)
    log.write({"event": "start", "stage": "å"})
    assert [event["stage"] for event in follower.new()] == ["å"]
    with path.open("a") as file:
        file.write('{"event": "ste')
    assert follower.new() == []
    with path.open("a") as file:
        file.write('p"}\n')
    assert [event["event"] for event in follower.new()] == ["step"]


def test_a_card_has_metadata_that_yaml_reads():
    import yaml

    source = {"edition": "E", "rights_holder": "R", "licence": 'L "quoted"'}
    text = card(
        name="m",
        verb="grow",
        pipeline="p",
        recipe={"width": 2, "stage": {"method": "exact-split", "empty": None}},
        parents=["seed"],
        corpora={"eng": {"name": "English", "sources": [source]}},
        results={"eng": {"value": 2.5, "low": None, "high": None}},
        confidence=0.9,
    )
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license_name"] == 'L "quoted"'
    assert "| stage.method | `exact-split` |" in body
    assert "empty" not in body
    assert "- seed" in body
    assert "90 % interval" in body
    assert "| eng | 2.500 | – |" in body


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(tmp_path, terminal):
    """The real thing on a real pseudo-terminal, fed with events."""
    code = (
        "import sys, json, pathlib\n"
        "from growmerge.events import EventLog\n"
        "from growmerge.run import load\n"
        "from growmerge.show import Show\n"
        "plan = load(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "import growmerge.show as module\n"
        "module.EVERY = -1\n"
        "with Show(dict.fromkeys(plan.tasks, 1.0), EventLog(pathlib.Path(sys.argv[2]) / 'log.jsonl')) as show:\n"
        "    show.event({'event': 'start', 'stage': 'seed'})\n"
        "    show.event({'event': 'start', 'stage': 'pairs'})\n"
        "    step = {'step': 20, 'steps': 40, 'loss': 3.25, 'tokens_per_second': 1234.0}\n"
        "    show.event({'event': 'step', 'stage': 'seed', **step})\n"
        "    show.tick()\n"
        "    show.event({'event': 'done', 'stage': 'pairs', 'seconds': 0.5})\n"
        "    show.event({'event': 'done', 'stage': 'seed', 'seconds': 2.5})\n"
    )
    arguments = [sys.executable, "-c", code, str(write_toy(tmp_path)), str(tmp_path / "run")]
    if terminal:
        import pty

        master, slave = pty.openpty()
        environment = {**os.environ, "COLUMNS": "140", "TERM": "xterm"}
        subprocess.run(arguments, stderr=slave, check=True, env=environment)
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:
                break
        text = shown.decode()
        assert "ETA" in text
        assert "━" in text
        assert "seed and 1 more" in text
    else:
        text = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr
        assert "seed: step 20/40" in text
        assert "━" not in text
        assert "seed: done in 2.5 s" in text
    assert "loss 3.250  1,234 tokens/s" in text
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert events == ["run", "start", "start", "step", "done", "done", "end"]
