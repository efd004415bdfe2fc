"""`growmerge train`: a run from its file, its folder, its mistakes; real ranks."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import forked
import psutil
import pytest
from test_merging import told
from transformers import AutoModelForCausalLM

from growmerge.schema_training import Training
from growmerge.training import load
from parallel.errors import InputError
from train.data.tokenizer import load_tokenizer, train_tokenizer
from train.data.tokens import write_tokens
from train.plan import RunPlan
from train.tracker import read_metrics

WORDS = [
    *("grow", "merge", "language", "model", "small", "large", "north", "sea"),
    *("house", "stone", "river", "winter", "light", "bread", "word", "horse"),
]
FILE = """
name: try
seed: 3
tokenizer: tokenizer
shape: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, intermediate_size: 64}
data: {folder: data, mixture: both}
mixtures: {both: {eng: 0.3, swe: 0.7}}
training:
  steps: 12
  sequence_length: 32
  global_batch: 6
  lr: 3e-3
  warmup: 2
  precision: float32
  checkpoint_every: 4
  evaluate_every: 6
resources: {ranks: 2}
"""
ALONE = FILE.replace("ranks: 2", "ranks: 1")
"""Half the processes to start, where what is looked at does not depend on their number."""


def texts(language):
    words = WORDS if language == "eng" else [word[::-1] for word in WORDS]
    return [" ".join(words[(number * place) % len(words)] for place in range(1, 60)) for number in range(1, 120)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tokenizer, token files and held-out text of two languages."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer(texts("eng") + texts("swe"), vocab_size=300, folder=home / "tokenizer")
    for language in ("eng", "swe"):
        write_tokens(texts(language)[4:], tokenizer, home / "data" / language)
        lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(texts(language)[:4])]
        (home / "data" / f"{language}.heldout.jsonl").write_text("\n".join(lines) + "\n")
    return home


def write(home, name, text=FILE, **changes):
    """Write a file for a run of that name, `key: value` lines of training changed."""
    text = text.replace("name: try", f"name: {name}")
    for key, value in changes.items():
        lines = [line for line in text.splitlines() if not line.strip().startswith(f"{key}:")]
        text = "\n".join(lines).replace("training:", f"training:\n  {key}: {value}") + "\n"
    path = home / f"{name}.yaml"
    path.write_text(text)
    return path


def start(path, *options, **environment):
    command = [sys.executable, "-m", "growmerge.cli", "train", str(path), *options]
    return subprocess.Popen(
        command,
        cwd=path.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "DS_ACCELERATOR": "cpu", **environment},
    )


def run(path, *options, **environment):
    found = forked.growmerge("train", str(path), *options, cwd=path.parent, **environment)
    return found.returncode, found.stdout, found.stderr


def run_apart(path, *options, **environment):
    """Run it in processes of its own."""
    process = start(path, *options, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def whole(home):
    """A run from beginning to end."""
    code, out, err = run_apart(write(home, "whole"))
    assert code == 0, err
    assert "done: model:" in out
    return home / "runs" / "whole"


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_a_run_leaves_a_stock_model_and_a_full_log(whole, home):
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert model.num_parameters() > 10_000
    assert load_tokenizer(whole / "model").sha256 == load_tokenizer(home / "tokenizer").sha256
    lines = read_metrics(whole / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [*range(1, 13)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    for line in steps:
        assert set(line["losses"]) <= {"eng", "swe"}
        assert min(line["losses"].values()) - 1e-9 <= line["loss"] <= max(line["losses"].values()) + 1e-9
    scored = [line for line in lines if "evaluation" in line]
    assert [line["step"] for line in scored] == [0, 6, 12]
    assert scored[0]["bits_per_byte"].keys() == {"eng", "swe"}
    assert all(after < scored[0]["bits_per_byte"][language] for language, after in scored[-1]["bits_per_byte"].items())
    about = {language: json.loads((home / "data" / f"{language}.json").read_text()) for language in ("eng", "swe")}
    least, most = sorted(one["bytes"] / one["tokens"] for one in about.values())
    assert least * steps[-1]["tokens"] <= steps[-1]["bytes"] <= most * steps[-1]["tokens"]
    assert set(scored[0]["evaluation"]["languages"]) == {"eng", "swe"}
    timings = [json.loads(line) for line in (whole / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timings] == [*range(1, 13)]
    assert all(line["tokens_per_second"] > 0 for line in timings)
    layers = [f"layers/{layer}/{part}" for layer in (0, 1) for part in ("attention", "mlp")]
    for line, timing in zip(steps, timings, strict=True):
        assert sorted(timing["grad_norms"]) == sorted(["embedding", *layers, "norms"])
        assert math.hypot(*timing["grad_norms"].values()) == pytest.approx(line["grad_norm"], rel=1e-3)
    saves = [line["save"] for line in timings if "save" in line]
    assert saves
    assert all(save["bytes"] > 1e5 for save in saves)
    about = json.loads((whole / "model" / "growmerge.json").read_text())
    assert about["tokens"] == 12 * 6 * 32


@pytest.mark.slow
def test_a_run_has_a_report(whole):
    found = told("report", str(whole))
    assert found.exit_code == 0, found.stderr
    results = json.loads((whole / "results.json").read_text())
    (name,) = results["models"]
    last = [line for line in read_metrics(whole / "metrics.jsonl") if "evaluation" in line][-1]
    for language, bits in last["bits_per_byte"].items():
        assert results["bits_per_byte"][name][language]["value"] == pytest.approx(bits)
    assert [point["step"] for point in results["curves"][name]] == [0, 6, 12]
    assert results["curves"][name][-1]["flops"] == results["models"][name]["flops"] > 0
    assert [step for step, _ in results["timings"]["curves"][name]] == [0, 6, 12]
    assert results["timings"]["cost"]["core_hours"] > 0
    assert results["seed"] == 3
    assert "progress" not in results


def test_a_pipeline_trains_and_scores_as_data_parallel_ranks_do(whole, home):
    path = write(home, "pipelined", pp="2", zero="1", evaluate_every="0")
    code, _, err = run(path)
    assert code == 0, err
    assert losses(home / "runs" / "pipelined") == pytest.approx(losses(whole), rel=1e-4)
    scores, expected = (
        [line["bits_per_byte"] for line in read_metrics(folder / "metrics.jsonl") if "evaluation" in line]
        for folder in (home / "runs" / "pipelined", whole)
    )
    assert scores[0] == pytest.approx(expected[0], rel=1e-5)
    assert scores[-1] == pytest.approx(expected[-1], rel=1e-3)


def test_run_again_it_does_nothing_and_another_configuration_is_refused(whole, home):
    before = (whole / "metrics.jsonl").stat().st_mtime_ns
    assert run(home / "whole.yaml")[:2] == (0, f"nothing to do: whole is finished; model: {whole / 'model'}\n")
    assert (whole / "metrics.jsonl").stat().st_mtime_ns == before
    code, _, err = run(write(home, "whole", lr="1e-3"))
    assert code == 2
    assert "holds a run of another configuration" in err
    assert "whole.yaml has changed since" in err
    write(home, "whole")


def test_asked_to_stop_it_saves_and_the_same_command_goes_on_to_the_same_end(whole, home):
    path = write(home, "stopped")
    folder = home / "runs" / "stopped"
    process = start(path)
    wait_for(lambda: len(losses(folder)) >= 5, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    if process.returncode == 75:
        assert "asked to stop; saved, and the same command goes on from here" in err
        assert len(losses(folder)) < 12
    assert run(path)[0] == 0
    assert losses(folder) == losses(whole)


@pytest.mark.slow  # as of a pipeline's job, which test_run.py kills
def test_a_killed_rank_ends_the_others_and_the_same_command_goes_on(whole, home, tmp_path):
    path = write(home, "killed")
    process = start(path, GROWMERGE_FAULT=f"{tmp_path / 'there'}:step/6")
    wait_for((tmp_path / "there").is_file, process)
    (stuck,) = ranks_at_work(process)[:1]
    os.kill(stuck, signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert time.monotonic() - began < 60
    assert re.search(r"^killed: rank \d failed: .*log: ", err, re.MULTILINE), err
    assert run(path)[0] == 0
    assert losses(home / "runs" / "killed") == losses(whole)


@pytest.mark.slow
def test_without_progress_it_says_so_and_leaves_the_stacks(home, tmp_path):
    path = write(home, "stalled", stall_minutes="0.1")
    code, _, err = run_apart(path, GROWMERGE_FAULT=f"{tmp_path / 'there'}:step/6")
    assert code == 1
    found = re.search(r"rank \d failed: no progress for 0:00:06 .* in its log: (\S+)", err)
    assert found, err
    assert "most recent call first" in Path(found[1]).read_text()


def test_ahead_of_its_jobs_end_it_saves_and_stops(whole, home):
    path = write(home, "timed")
    code, _, err = run(path, SLURM_JOB_END_TIME=str(int(time.time()) + 30))
    assert code == 75, err
    assert losses(home / "runs" / "timed") == losses(whole)[:1]
    assert run(path)[0] == 0
    assert losses(home / "runs" / "timed") == losses(whole)


@pytest.mark.slow
def test_a_full_disk_costs_saves_and_nothing_else(whole, home, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        # As a kill after step 8 leaves it; each step from there on is to be saved.
        path = write(home, "full", saves="background", checkpoint_every="1")
        to = ("--workdir", str(disk / "run"))
        cut = shutil.ignore_patterns("model", "run.json", "step-00000012")
        shutil.copytree(whole, disk / "run", ignore=cut)
        (disk / "run" / "checkpoints" / "latest").write_text("step-00000008")
        with (disk / "ballast").open("wb") as ballast:
            ballast.write(bytes(shutil.disk_usage(disk).free - 300_000))
        code, _, err = run_apart(path, *to)
        assert code == 1
        for step in (9, 10, 11, 12):
            assert f"full: not saved: {disk / 'run' / 'checkpoints' / f'step-{step:08d}'}: no space left" in err, err
        assert err.splitlines()[-1].endswith("nothing that was complete is lost")
        assert losses(disk / "run") == losses(whole)  # it went on
        (disk / "ballast").unlink()
        assert run(path, *to)[0] == 0
        assert losses(disk / "run") == losses(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def wait_for(there, process):
    deadline = time.monotonic() + 200
    while not there():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


def ranks_at_work(process):
    """Return the process ids of a command's ranks."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "SUBMITIT_LOCAL_LOCALID" in child.environ() and "submitit.core._submit" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


@pytest.mark.slow
def test_torchrun_starts_its_ranks(home):
    path = write(home, "launched", steps="3", evaluate_every="0")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", "--standalone"]
    ran = subprocess.run(
        [*command, sys.executable, "-m", "growmerge.cli", "train", str(path)],
        cwd=home,
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(losses(home / "runs" / "launched")) == 3
    assert (home / "runs" / "launched" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_a_branch_decays_from_the_stable_phase(whole, home):
    """WSD with the same decay from the same step is the same run, so the branch has to end where the whole one did."""
    path = write(home, "stable", schedule="constant", keep_every="4")
    assert run(path)[0] == 0
    stable = home / "runs" / "stable"
    text = FILE.replace("shape: {", "branch: {run: runs/stable, step: 8}\nunused: {").replace(
        FILE[FILE.index("shape:") : FILE.index("data:")], "branch: {run: runs/stable, step: 8}\n"
    )
    text = "\n".join(line for line in text.splitlines() if not line.startswith("unused"))
    assert run(write(home, "branch", text, steps="12"))[0] == 0
    wsd = write(home, "wsd", decay="4")
    assert run(wsd)[0] == 0
    assert losses(home / "runs" / "branch")[:8] == losses(stable)[:8]
    assert losses(home / "runs" / "branch") == losses(home / "runs" / "wsd")


@pytest.mark.slow
def test_an_alarm_turns_the_run_into_a_branch(home):
    alarms = {"alarms": "{eng: +0 branch}", "lr": "5", "decay": "4", "skip_sigma": "1000", "evaluate_every": "3"}
    name = "branching"
    path = write(home, name, checkpoint_every="2", keep="3", **alarms)
    code, _, err = run(path)
    assert code == 0, err
    folder = home / "runs" / name
    assert "decaying from step 2 over 4 steps" in err
    assert json.loads((folder / "branch.json").read_text()) == {"at": 2, "steps": 4}
    rates = [line["lr"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert rates == pytest.approx([2.5, 5, 5, 3.75, 2.5, 1.25])
    whole = losses(folder)

    # As a kill before the alarm leaves it: the checkpoint that it resumes from is the one to branch off from.
    for name in ("model", "branch.json", "run.json", "checkpoints/step-00000004", "checkpoints/step-00000006"):
        gone = folder / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
    assert sorted(one.name for one in (folder / "checkpoints").glob("step*")) == ["step-00000002"]
    code, _, err = run(path)
    assert "decaying from step 2 over 4 steps" in err
    assert losses(folder) == whole


@pytest.mark.parametrize(
    "mixtures",
    [pytest.param(("alone",), marks=pytest.mark.covered), pytest.param(("alone", "both"), marks=pytest.mark.slow)],
)
def test_forgetting_rings_the_alarm_and_replay_keeps_it_still(whole, home, mixtures):
    """The model knows both languages; trained on one alone it forgets the other."""
    text = ALONE.replace(FILE[FILE.index("shape:") : FILE.index("data:")], "model: runs/whole/model\n").replace(
        "mixtures: {", "mixtures: {alone: {swe: 1}, "
    )
    found = {"both": []}
    for mixture in mixtures:
        path = write(
            home,
            f"on-{mixture}-{len(mixtures)}",
            text.replace("mixture: both", f"mixture: {mixture}"),
            alarms="{eng: +0.05}",
        )
        code, _, err = run(path)
        assert code == 0, err
        found[mixture] = [line for line in err.splitlines() if "the alarm is at +0.05" in line]
    assert found["alone"] and not found["both"], found
    assert re.search(r"step \d+: eng: \d\.\d+ bits per byte held out, \+\d\.\d+, \+\d", found["alone"][0])


@pytest.mark.slow
def test_an_alarm_that_cannot_turn_a_run_into_a_branch_is_a_warning(home):
    alarms = {"alarms": "{eng: +0 branch}", "lr": "5", "warmup": "9", "skip_sigma": "1000", "evaluate_every": "3"}
    code, _, err = run(write(home, "warming", checkpoint_every="2", **alarms))
    assert code == 0, err
    assert "the alarm cannot turn the run into a branch: no branch at step 2: the stable phase goes from" in err
    assert len(losses(home / "runs" / "warming")) == 12


def test_an_alarm_stops_a_run(home):
    alarms = {"alarms": "{eng: +0 stop}", "lr": "5", "decay": "0", "skip_sigma": "1000", "evaluate_every": "3"}
    path = write(home, "alarm", ALONE, **alarms)
    code, _, err = run(path)
    assert code == 0, err
    assert "eng:" in err
    assert "bits per byte held out" in err
    assert losses(home / "runs" / "alarm")[-1:] != []
    assert len(losses(home / "runs" / "alarm")) < 12


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mixture: both", "mixture: bth", "try.yaml:6: data.mixture: unknown mixture 'bth': allowed are both"),
        ("folder: data,", "folder: dta,", "dta: no such folder; make it by `growmerge data prepare`"),
        (
            "seed: 3",
            "seed: 3\nmodel: x",
            "a run starts from exactly one of model, shape, branch; given: ['model', 'shape']",
        ),
        ("steps: 12", "stepz: 12", "try.yaml:9: training: unknown key 'stepz'"),
        (
            "steps: 12",
            "steps: 12\n  pp: 2",
            "pipeline parallelism (pp 2) does not work with ZeRO-3: use zero: 1, or pp: 1",
        ),
        ("steps: 12", "steps: 12\n  tp: 2\n  sp: 2", "cannot be combined: use tp: 4 with sp: 1"),
        (
            "steps: 12",
            "steps: 12\n  rewarm: [{at: 1, steps: 3}]",
            "training.rewarm.0: has to lie between step 2, the end of the warm-up before, and the end",
        ),
        (
            "steps: 12",
            "steps: 12\n  schedule: cosine\n  alarms: {eng: +0.1 branch}",
            "training.alarms: a cosine has no stable phase",
        ),
        (
            "steps: 12",
            "steps: 12\n  pp: 2\n  zero: 1\n  compile: true",
            "training.compile: does not work in a pipeline",
        ),
        ("steps: 12", "steps: 12\n  rewarm: [{at: 10, steps: 3}]", "try.yaml:10: training.rewarm.0: has to lie"),
        ("steps: 12", "steps: 12\n  tp: 3", "tp 3 x sp 1 x pp 1 = 3 does not divide the 2 ranks"),
        ("{eng: 0.3, swe: 0.7}", "{eng: 0.3, swf: 0.7}", "swf"),
        (
            "{both: {eng: 0.3, swe: 0.7}}",
            "{both: {part_of: al, corpora: [eng]}, all: {eng: 1}}",
            "unknown mixture 'al'",
        ),
        ("steps: 12", "steps: 12\n  offload: nvme", "try.yaml:10: training.offload: nvme is not supported"),
        ("tokenizer: tokenizer", "tokenizer: elsewhere", "elsewhere: holds no tokenizer.json"),
    ],
)
def test_mistakes_are_one_line(home, old, new, message):
    path = home / "try.yaml"
    assert old in FILE
    path.write_text(FILE.replace(old, new))
    code, _, err = run(path)
    last = err.strip().splitlines()[-1]
    assert message in last, err
    assert code in (1, 2)
    assert "Traceback" not in err


def test_a_mistake_is_told_without_waiting_for_torch():
    imported = "import sys, growmerge.training, growmerge.jobs, train.plan; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_file_names_what_a_plan_has():
    assert {field.name for field in fields(Training)} == {field.name for field in fields(RunPlan)}


def test_weights_of_another_model_are_one_line(home, whole):
    model = home / "another"
    shutil.copytree(whole / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    text = FILE.replace(FILE[FILE.index("shape:") : FILE.index("data:")], "model: another\n")
    code, _, err = run(write(home, "mixed", text))
    assert code in (1, 2)
    assert err.strip().count("\n") == 0, err
    assert "model.layers.2." in err and "another" in err


@pytest.mark.slow
def test_a_tokenizer_larger_than_the_model_is_one_line(home, whole):
    larger = train_tokenizer(
        [*texts("eng"), *texts("swe"), "xyzzy plugh " * 50], vocab_size=330, folder=home / "larger"
    )
    assert larger.vocab_size > 300
    text = ALONE[: FILE.index("shape:")] + "model: runs/whole/model\n" + ALONE[FILE.index("data:") :]
    path = write(home, "mismatch", text.replace("tokenizer: tokenizer", "tokenizer: larger"))
    with pytest.raises(InputError, match="exactly one"):
        load(write(home, "none", text.replace("model: runs/whole/model\n", "")))
    code, _, err = run(path)
    assert code == 1
    assert f"the tokenizer has {larger.vocab_size} entries, the model only 300" in err
