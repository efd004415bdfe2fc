"""`growmerge run`, the whole of it, on a toy pipeline: a run, killed runs, changed files, two at once."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
from toy import PIPELINE, command, growmerge, numbers, started, write_toy

from checkpoint import manifest

POINTS = [
    "step/3",  # in a step, before the first checkpoint
    "save/model/0",  # after a rank's first shard
    "save/optim/1",  # after a shard
    "save/part/0",  # when a rank's shards are on disk, before the others'
    "save/manifest",  # before the manifest
    "save/pointer",  # before the pointer
    "write/model.safetensors",  # after a shard of the exported model
    "write/manifest",
    "stage/base-1x",  # a stage's work done, the stage not yet complete
    "stage/2x-ties",
    "stage/report",
]

ALONE = PIPELINE.replace("ranks: 2", "ranks: 1")
"""Half the processes to start, where what runs does not depend on their number."""

BARE = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, text in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    document = json.loads(open(text).readline())
    ids = [tokenizer.bos_token_id, *tokenizer(document["text"], add_special_tokens=False).input_ids]
    bits, done, start = 0.0, 1, 0
    while done < len(ids):
        stop = min(start + 32, len(ids))
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids[start:stop]])).logits[0].double(), dim=-1)
        bits -= sum(float(logs[at - start - 1, ids[at]]) for at in range(done, stop)) / math.log(2)
        start, done = start + 16, stop
    print(bits, type(model).__name__, model.lm_head.weight is model.model.embed_tokens.weight, document["id"])
"""
"""A process without this project: stock transformers, one pass a window, the bits of the first held-out document."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a pipeline, and the workdir of one undisturbed run of it."""
    folder = tmp_path_factory.mktemp("toy")
    path = write_toy(folder)
    # What a user may have in the folder that he starts from is not taken for this project's rooms.
    (folder / "train.py").write_text("raise SystemExit('not ours')\n")
    (folder / "eval").mkdir()
    ran = growmerge("run", path.name, "--workdir", "run", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert "report:" in ran.stdout
    return folder, ran


def run_of(undisturbed):
    return undisturbed[0] / "run"


def copy_of(undisturbed, place, *, without=()):
    """Return a copy of the undisturbed run's workdir, in which some stages are not done."""
    shutil.copytree(run_of(undisturbed), place, symlinks=True)
    for stage in without:
        shutil.rmtree(place / "stages" / stage)
    return place


def test_a_run_ends_with_models_that_stock_transformers_loads(undisturbed):
    workdir = run_of(undisturbed)
    found = numbers(workdir)
    assert {name for name, model in found["models"].items() if model["verb"] == "merge"} == {
        "1x-linear",
        "1x-ties",
        "2x-linear",
        "2x-ties",
    }
    looked_at = (("2x-swe", "swe"), ("1x-ties", "est"))
    files = []
    for name, language in looked_at:
        (text,) = (workdir / "stages" / "text").glob(f"*/{language}/heldout.jsonl")
        files += [str(workdir / "models" / name), str(text)]
    bare = subprocess.run(
        [sys.executable, "-c", BARE, *files],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    for (name, language), line in zip(looked_at, bare.stdout.splitlines(), strict=True):
        bits, kind, tied, document = line.split()
        assert (kind, tied) == ("LlamaForCausalLM", "True")
        row = found["scores"][name][language][0]
        assert row[0] == document
        assert row[1] == pytest.approx(float(bits), rel=1e-5)
    card = (workdir / "models" / "2x-swe" / "README.md").read_text()
    value = found["bits_per_byte"]["2x-swe"]["swe"]["value"]
    for words in ("CC0-1.0", "| Toy Swedish | made up |", "- base-2x", f"| swe | {value:.3f} |"):
        assert words in card
    record = json.loads((workdir / "models" / "2x-swe" / "growmerge.json").read_text())
    seed = json.loads((workdir / "models" / "seed" / "growmerge.json").read_text())
    assert seed["hash"] in record["ancestors"]


def test_growth_is_exact_before_the_first_step(undisturbed):
    found = numbers(run_of(undisturbed))
    assert [growth["stage"] for growth in found["growth"]] == ["seed-2x"]
    assert found["growth"][0]["difference"] <= 1e-5
    # The running engine of the next stage, before its first step, scores as the small model did at its end.
    start, end = found["curves"]["base-2x"][0], found["curves"]["seed"][-1]
    assert start["step"] == 0
    for ours, theirs in zip(start["scores"]["eng"], end["scores"]["eng"], strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5)


def test_the_report_is_one_file_and_every_number_is_in_the_results(undisturbed):
    workdir = run_of(undisturbed)
    html = (workdir / "report.html").read_text()
    assert "http://" not in html
    assert "https://" not in html
    assert "CC0-1.0" in html
    found = numbers(workdir)
    assert f"{found['bits_per_byte']['2x-swe']['swe']['value']:.3f}" in html
    assert all(check["passed"] for check in found["checks"])
    assert (workdir / "report.md").read_text().startswith("# ")
    assert {path.name for path in (workdir / "report" / "tables").iterdir()} >= {"cost.csv", "tasks.csv"}
    (learning,) = (workdir / "report" / "figures").glob("learning-*swe*tokens.svg")
    assert learning.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [one["step"] for one in found["curves"]["1x-swe"]] == [0, 4, 8]
    assert found["curves"]["1x-swe"][-1]["flops"] == found["models"]["1x-swe"]["flops"] > 0
    timings = json.loads((workdir / "results.json").read_text())["timings"]
    assert [step for step, _ in timings["curves"]["1x-swe"]] == [0, 4, 8]
    assert {row["stage"] for row in timings["cost"]["rows"]} >= {*found["models"], "evaluate/seed", "text"}
    assert timings["incidents"] == []
    assert [(row["label"], row["group"]) for row in found["heat"][0]["rows"]] == [
        (f"{method}, {setup}: Toy Swedish + Toy Estonian", "")
        for setup in ("1x", "2x")
        for method in ("linear", "ties")
    ]


def test_every_model_is_asked_the_tasks_of_the_file(undisturbed):
    workdir = run_of(undisturbed)
    found = numbers(workdir)
    (task,) = found["tasks"]
    assert (task["name"], task["unit"], task["language"]) == ("order", "accuracy", "swe")
    assert task["values"].keys() == found["models"].keys()
    assert set(task["parts"]["2x-swe"]) == {"even", "odd"}
    verdict = json.loads((workdir / "evaluation" / "1x-swe.json").read_text())
    kept = workdir / "evaluation" / verdict["tasks"]["order"]["scores"]
    rows = [row for line in kept.read_text().splitlines() for row in json.loads(line)["rows"]]
    # Both phenomena have 12 pairs: their mean is that of all.
    assert task["values"]["1x-swe"]["value"] == pytest.approx(sum(good > bad for good, bad, *_ in rows) / 24)
    own = verdict["tasks"]["heldout-swe"]
    assert own["bits_per_byte"]["value"] == pytest.approx(found["bits_per_byte"]["1x-swe"]["swe"]["value"], abs=1e-12)
    forgot = {
        (one["model"], one["against"]): one["value"]
        for one in found["comparisons"]
        if (one["kind"], one["task"]) == ("forgetting", "heldout-eng")
    }
    assert forgot["2x-swe", "base-2x"] == pytest.approx(found["forgetting"]["2x-swe"]["value"], abs=1e-9)
    assert {one["against"] for one in found["comparisons"] if one["model"] == "2x-ties"} == {
        "base-2x",
        "2x-swe",
        "2x-est",
    }
    compared = growmerge("compare", str(workdir), "--task", "order", "--base", "seed", "--json")
    assert compared.returncode == 0, compared.stderr
    entries = json.loads(compared.stdout)["tasks"]["order"]["models"]
    assert entries["1x-swe"]["value"] == task["values"]["1x-swe"]["value"]
    assert entries["1x-swe"]["difference"]["value"] == pytest.approx(
        task["values"]["1x-swe"]["value"] - task["values"]["seed"]["value"]
    )


def test_an_unfinished_run_has_a_report(undisturbed, tmp_path):
    folder, _ = undisturbed
    workdir = copy_of(undisturbed, tmp_path / "run")
    again = forked.growmerge("report", str(workdir))
    assert again.returncode == 0, again.stderr
    assert (workdir / "report.html").read_bytes() == (folder / "run" / "report.html").read_bytes()
    for name in ("2x-ties", "evaluate/2x-ties", "report"):  # as a kill leaves it
        for path in (workdir / "stages" / name).glob(f"*/{manifest.NAME}"):
            path.unlink()
    (workdir / "results.json").unlink()
    told = forked.growmerge("report", str(workdir))
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == str(workdir / "report.html")
    whole, found = numbers(folder / "run"), numbers(workdir)
    assert (found["progress"]["done"], found["progress"]["stages"]) == (26, 29)
    assert whole["scores"].keys() - found["scores"].keys() == {"2x-ties"}
    assert found["bits_per_byte"]["2x-linear"] == whole["bits_per_byte"]["2x-linear"]
    assert f"{found['progress']['done']} of 29 stages" in (workdir / "report.html").read_text()
    answers = {one["id"]: one["verdict"] for one in found["questions"]}
    assert answers["Q5/ties"] == "not resolved by this run"
    assert answers["Q1"] == {one["id"]: one["verdict"] for one in whole["questions"]}["Q1"]
    nothing = forked.growmerge("report", str(tmp_path))
    assert (nothing.returncode, nothing.stderr) == (
        2,
        f"growmerge: {tmp_path}: nothing of `growmerge run`, `train` or `eval` is there\n",
    )


def test_run_again_does_nothing_and_needs_no_torch(undisturbed):
    folder, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    again = growmerge("run", str(folder / "toy.yaml"), "--workdir", str(folder / "run"))
    assert again.returncode == 0
    assert "nothing to do: all" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    code = (
        "import sys\nfrom growmerge.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'deepspeed', 'matplotlib', 'submitit', 'datasets'}))"
    )
    broken = folder / "broken.yaml"
    broken.write_text(PIPELINE.replace("heldout:", "heldowt:"))
    for arguments in (
        ["--help"],
        ["run", str(folder / "toy.yaml"), "--workdir", str(folder / "run")],
        ["run", str(broken)],
    ):
        shown = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert shown.stdout.strip().endswith("[]"), arguments


def kill_tree(process: psutil.Process) -> None:
    """SIGKILL a process and all that came from it, as the machine's end would."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.suspend()  # none may notice that another is gone
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=10)


def run_and_kill(folder: Path, workdir: Path, *, at: str | None = None, after: float = 0.0) -> bool:
    """Start the run, kill all of it at a point or after some seconds; return whether it was killed before its end."""
    marker = workdir.parent / f"reached-{random.random()}"
    environment = {**os.environ, **({"GROWMERGE_FAULT": f"{marker}:{at}"} if at else {})}
    process = psutil.Popen(
        command("run", str(folder / "toy.yaml"), "--workdir", str(workdir)),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    began = time.monotonic()
    while process.poll() is None:
        if marker.exists() or (not at and time.monotonic() - began > after):
            kill_tree(psutil.Process(process.pid))
            return True
        time.sleep(0.05)
    return False


def assert_same(folder: Path, workdir: Path) -> None:
    assert numbers(workdir) == numbers(folder / "run")
    for model in (folder / "run" / "models").iterdir():
        ours = (workdir / "models" / model.name / "model.safetensors").read_bytes()
        assert ours == (model / "model.safetensors").read_bytes(), model.name


def assert_goes_on(folder: Path, workdir: Path, run: Callable[..., Any] = growmerge) -> None:
    ended = run("run", str(folder / "toy.yaml"), "--workdir", str(workdir))
    assert ended.returncode == 0, ended.stderr
    assert_same(folder, workdir)


@pytest.mark.covered
def test_killed_in_a_save_it_ends_with_the_very_numbers(undisturbed, tmp_path):
    folder, _ = undisturbed
    workdir = copy_of(undisturbed, tmp_path / "run", without=["2x-est"])
    assert run_and_kill(folder, workdir, at="save/manifest")
    assert_goes_on(folder, workdir, forked.growmerge)
    assert started(workdir) == ["2x-est"]


@pytest.mark.slow
def test_killed_at_named_points_it_ends_with_the_very_numbers(undisturbed, tmp_path):
    folder, _ = undisturbed
    workdir = tmp_path / "run"
    for point in POINTS:
        assert run_and_kill(folder, workdir, at=point), f"{point} was never reached"
    assert_goes_on(folder, workdir)


@pytest.mark.slow
def test_killed_at_20_random_moments_it_ends_with_the_very_numbers(undisturbed, tmp_path):
    folder, _ = undisturbed
    draw = random.Random(0)
    kills = 0
    round_of = 0
    while kills < 20:
        round_of += 1
        workdir = tmp_path / f"run{round_of}"
        while run_and_kill(folder, workdir, after=draw.uniform(0.3, 25.0)):
            kills += 1
            if kills == 20:
                break
        assert_goes_on(folder, workdir)


def test_a_changed_file_runs_what_depends_on_it_and_nothing_else(undisturbed, tmp_path):
    folder, _ = undisturbed
    workdir = copy_of(undisturbed, tmp_path / "run")
    changed = folder / "changed.yaml"
    changed.write_text(ALONE.replace('method: "{method}"}', 'method: "{method}", parameters: {density: 0.3}}'))
    ran = forked.growmerge("run", str(changed), "--workdir", str(workdir))
    assert ran.returncode == 0, ran.stderr
    # linear has no density
    assert started(workdir) == ["1x-ties", "2x-ties", "evaluate/1x-ties", "evaluate/2x-ties", "report"]
    before, after = numbers(folder / "run"), numbers(workdir)
    assert after["scores"]["2x-linear"] == before["scores"]["2x-linear"]
    assert after["scores"]["2x-ties"] != before["scores"]["2x-ties"]

    # Going back finds the old results and shows the old report; what the user put beside the links stays.
    (workdir / "models" / "mine").mkdir()
    (workdir / "report.md").unlink()
    back = forked.growmerge("run", str(folder / "toy.yaml"), "--workdir", str(workdir))
    assert "nothing to do" in back.stdout
    for name in ("results.json", "report.html", "report.md"):
        assert (workdir / name).read_bytes() == (folder / "run" / name).read_bytes()
    assert_same(folder, workdir)
    assert (workdir / "models" / "mine").is_dir()

    # What only the report says of the text re-runs the report alone, which mends the cards too.
    changed.write_text(ALONE.replace("edition: made up", "edition: corrected").replace("every: 5", "every: 4"))
    ran = forked.growmerge("run", str(changed), "--workdir", str(workdir))
    assert ran.returncode == 0, ran.stderr
    assert started(workdir) == ["report"]
    assert "corrected" in (workdir / "models" / "2x-ties" / "README.md").read_text()
    assert numbers(workdir)["corpora"]["swe"]["sources"][0]["edition"] == "corrected"


def test_files_damaged_since_are_noticed_and_made_again(undisturbed, tmp_path):
    folder, _ = undisturbed
    workdir = copy_of(undisturbed, tmp_path / "run")
    victim = workdir / "models" / "2x-ties" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-4])
    (log,) = (workdir / "stages" / "base-1x").glob("*/metrics.jsonl")
    log.write_bytes(log.read_bytes()[:300])
    ran = forked.growmerge("run", str(folder / "toy.yaml"), "--workdir", str(workdir))
    assert ran.returncode == 0, ran.stderr
    assert started(workdir) == ["base-1x", "2x-ties"]
    manifest.check(victim.resolve().parent, deep=True)
    assert "## Results" in (victim.parent / "README.md").read_text()
    (original,) = (folder / "run" / "stages" / "base-1x").glob("*/metrics.jsonl")
    assert log.read_bytes() == original.read_bytes()
    assert_same(folder, workdir)


@pytest.mark.slow
def test_a_check_that_is_not_passed_is_exit_code_1(undisturbed, tmp_path):
    folder, _ = undisturbed
    workdir = copy_of(undisturbed, tmp_path / "run")
    changed = folder / "asks-too-much.yaml"
    changed.write_text(ALONE.replace("by: 0.2", "by: 5.0"))
    failed = growmerge("run", str(changed), "--workdir", str(workdir))
    assert failed.returncode == 1
    assert "check failed: seed on eng beats the unigram model by" in failed.stderr
    again = growmerge("run", str(changed), "--workdir", str(workdir))
    assert again.returncode == 1
    assert "nothing to do" in again.stdout


@pytest.fixture
def disk(tmp_path):
    """A disk of 200 MB, and what gives it another size."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)], check=True)
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    subprocess.run(["umount", "-l", str(disk)], check=True)


def assert_full(folder: Path, workdir: Path, run: Callable[..., Any] = growmerge) -> None:
    full = run("run", str(folder / "toy.yaml"), "--workdir", str(workdir))
    assert full.returncode in (1, 2), full.stderr
    assert "no space left" in full.stderr.splitlines()[-1], full.stderr
    assert "Traceback" not in full.stderr


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(undisturbed, disk):
    """It fills up in one stage of training; the others are done."""
    folder, (disk, resize) = undisturbed[0], disk
    workdir = copy_of(undisturbed, disk / "run", without=["2x-est"])
    resize(shutil.disk_usage(disk).used + 300_000)
    assert_full(folder, workdir, forked.growmerge)
    assert started(workdir) == ["2x-est"]
    resize("200m")
    assert_goes_on(folder, workdir, forked.growmerge)
    assert started(workdir) == ["2x-est"]


@pytest.mark.slow
def test_disks_that_are_full_at_any_stage(undisturbed, disk):
    folder, (disk, resize) = undisturbed[0], disk
    for size in ("64k", "400k", "1200k", "2m", "3m", "5m", "9m", "12m"):
        resize(size)
        assert_full(folder, disk / "run")
    resize("200m")
    assert_goes_on(folder, disk / "run")


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_run_with_one_clear_line(undisturbed, tmp_path, victim):
    """Rank 1 dies in a save and rank 0 waits for it; or rank 0 dies and rank 1 never learns of it by itself."""
    folder, _ = undisturbed
    workdir, marker = copy_of(undisturbed, tmp_path / "run", without=["2x-est"]), tmp_path / "reached"
    process = psutil.Popen(
        command("run", str(folder / "toy.yaml"), "--workdir", str(workdir)),
        env={**os.environ, "GROWMERGE_FAULT": f"{marker}:save/optim/1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not marker.exists():
        time.sleep(0.05)
    ranks = [child for child in process.children(recursive=True) if "SUBMITIT_LOCAL_LOCALID" in child.environ()]
    (dying,) = [rank for rank in ranks if rank.environ()["SUBMITIT_LOCAL_LOCALID"] == str(victim)]
    dying.kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"2x-est: rank {victim} failed: it died without a message (killed, or out of memory)" in error
    assert "Traceback" not in error
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_a_second_run_at_once_is_refused_and_ctrl_c_ends_all_of_the_first_with_one_line(undisturbed, tmp_path):
    folder, _ = undisturbed
    workdir, marker = copy_of(undisturbed, tmp_path / "run", without=["2x-est"]), tmp_path / "reached"
    process = psutil.Popen(
        command("run", str(folder / "toy.yaml"), "--workdir", str(workdir)),
        env={**os.environ, "GROWMERGE_FAULT": f"{marker}:step/3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests themselves run in a shell's background, the signal is ignored from the start.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not marker.exists():
        time.sleep(0.05)
    second = growmerge("run", str(folder / "toy.yaml"), "--workdir", str(workdir))
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert f"{workdir} is in use: growmerge run" in second.stderr
    assert f"pid {process.pid} of" in second.stderr
    family = process.children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and all ranks at once
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "growmerge: interrupted; the same command goes on from here"
    assert "Traceback" not in error
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_untrained_models_fail_the_check_that_trained_ones_pass(undisturbed):
    """The check itself, on this run's numbers: what the seed knows, and what it knew before its first step."""
    from dataclasses import dataclass, field
    from typing import Any

    from growmerge.config import load_pipeline
    from growmerge.graph import expand
    from growmerge.results import checks

    folder, _ = undisturbed
    pipeline, marks = load_pipeline(folder / "toy.yaml")
    nodes = expand(pipeline, marks, folder / "toy.yaml")

    @dataclass
    class Context:
        pipeline: Any
        nodes: Any = field(default_factory=dict)

    found = numbers(folder / "run")
    trained, untrained = found["scores"]["seed"], {"eng": found["curves"]["seed"][0]["scores"]["eng"]}
    (good,) = checks(Context(pipeline, nodes), {"seed": trained}, found["baselines"])
    (bad,) = checks(Context(pipeline, nodes), {"seed": untrained}, found["baselines"])
    assert good["passed"]
    assert good["low"] >= 0.2
    assert not bad["passed"]
    assert bad["value"] < 0
