"""`growmerge run` on this machine with a job a stage: the numbers of one job for all, and what ends it."""

import os
import shutil
import signal
import subprocess
import time
from functools import partial

import psutil
import pytest
from toy import PIPELINE, command, growmerge, numbers, started, write_toy

SMALL = (
    PIPELINE[: PIPELINE.index("stages:")]
    + """\
stages:
  seed: {train: {from: scratch, data: first, training: {steps: 20}}}
  swe: {train: {from: seed, data: swe, training: {steps: 6}}}
  est: {train: {from: seed, data: est, training: {steps: 6}}}
  both: {merge: {from: [swe, est], method: linear}}
evaluation: {pairs: 10, resamples: 200, sample_tokens: 5}
resources: {ranks: 2, threads: 1}
"""
)
APART = SMALL.replace("threads: 1}", "threads: 1, pack: false, cores: 4}")


def write(folder, text):
    path = folder / "apart.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the pipeline's text, and in `packed` the workdir of a run in one job."""
    folder = tmp_path_factory.mktemp("machine")
    ran = growmerge("run", str(write_toy(folder, SMALL)), "--workdir", str(folder / "packed"))
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.parametrize(
    ("resources", "line"),
    [
        ("pack: false, cores: 3, threads: 2", "resources: seed takes 4 cores (2 ranks x 2 threads), and there are 3: "),
        ("pack: false, memory_gb: 9, total_memory_gb: 8", "resources: tokens takes 9 GB of memory, and there are 8: "),
        ("cores: 3", "resources.cores: has a meaning with `pack: false` alone"),
    ],
)
def test_what_has_no_room_is_refused_in_one_line_before_anything_runs(tmp_path, resources, line):
    path = write_toy(tmp_path, SMALL.replace("ranks: 2, threads: 1", f"ranks: 2, {resources}"))
    refused = growmerge("run", str(path), "--workdir", str(tmp_path / "run"), "--executor", "local")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert line in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_jobs_of_their_own_end_with_the_numbers_of_one_job_however_the_command_is_ended(folder):
    workdir = folder / "apart"
    again = command("run", str(write(folder, APART)), "--workdir", str(workdir), "--executor", "local")
    for number, point in {
        signal.SIGKILL: "step/3",
        signal.SIGTERM: "save/manifest",
        signal.SIGINT: "stage/both",
    }.items():
        marker = folder / f"reached-{number}"
        process = psutil.Popen(
            again,
            env={**os.environ, "GROWMERGE_FAULT": f"{marker}:{point}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
        )
        while not marker.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        family = process.children(recursive=True)
        assert family
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 130
            assert error.strip().splitlines()[-1] == "growmerge: interrupted; the same command goes on from here"
            assert "Traceback" not in error
        assert not psutil.wait_procs(family, timeout=10)[1]
    ended = subprocess.run(again, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert numbers(workdir) == numbers(folder / "packed")
    assert not {"seed", "swe", "est"} & {*started(workdir)}


@pytest.mark.slow
def test_what_needs_a_failed_stage_never_starts_and_the_rest_goes_on(folder):
    workdir, model = folder / "failing", folder / "given"
    shutil.copytree(next(folder.glob("packed/stages/seed/*/model")), model)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    path = write(folder, APART.replace("swe: {train: {from: seed", "swe: {train: {from: ./given"))
    failed = growmerge("run", str(path), "--workdir", str(workdir), "--executor", "local")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    # both, its evaluation and swe's, and the report
    assert last.startswith("swe: ") and last.endswith("; 4 stages that need it did not start"), failed.stderr
    assert "Traceback" not in failed.stderr
    begun = {*started(workdir)}
    assert {"seed", "swe", "est", "evaluate/est"} <= begun
    assert not {"both", "evaluate/swe", "evaluate/both", "report"} & begun

    weights.write_bytes(whole)
    mended = growmerge("run", str(path), "--workdir", str(workdir), "--executor", "local")
    assert mended.returncode == 0, mended.stderr
    assert {*started(workdir)} == {"swe", "both", "evaluate/swe", "evaluate/both", "report"}
