"""What `--dry-run --executor slurm` prints, against files that a person has read; no cluster is needed."""

import re
import sys
from pathlib import Path

import pytest
from forked import growmerge
from toy import PIPELINE, write_toy

HERE = Path(__file__).parent
STAGES = """\
stages:
  seed: {train: {from: scratch, data: first, training: {steps: 30}}}
  swe: {train: {from: seed, data: swe, training: {steps: 6}}}
  est: {train: {from: seed, data: est, training: {steps: 6}}}
  "both-{method}":
    each: {method: [linear, ties]}
    merge: {from: [swe, est], base: seed, method: "{method}"}
evaluation: {pairs: 10, resamples: 200, sample_tokens: 5}
resources: {ranks: 8, nodes: 2, gpus: 4, threads: 8, minutes: 240, memory_gb: 400, per_job: 2, profile: PROFILE}
"""
PROFILE = """
description: made up
slurm: {partition: gpu, account: p123, constraint: "a100|h100"}
gpus_per_node: 4
cores_per_node: 64
minutes_at_most: 720
gres: gpu:a100:{gpus}
srun: [--cpu-bind=cores]
lead_seconds: 300
setup: [module load cuda]
environment: {NCCL_SOCKET_IFNAME: ib0, NOTE: 'a "quoted" $HOME `not run` $(nor this)'}
cache: $SCRATCH/cache
temporary: /tmp/$USER
group_writable: true
"""
CHAIN = """
requeue: false
successors: 2
python: apptainer exec --nv --bind {workdir} image.sif python
"""


@pytest.fixture
def scripts(tmp_path):
    """Return what would be submitted with a profile, its places named."""
    path = write_toy(tmp_path, PIPELINE[: PIPELINE.index("stages:")] + STAGES)

    def made(profile, **changes):
        (tmp_path / "PROFILE.yaml").write_text(profile)
        text = path.read_text().replace("profile: PROFILE}", f"profile: {tmp_path}/PROFILE.yaml}}")
        for old, new in changes.items():
            text = re.sub(rf"{old}: \w+", f"{old}: {new}", text)
        path.write_text(text)
        found = growmerge("run", str(path), "--executor", "slurm", "--dry-run", cwd=tmp_path)
        out = found.stdout.replace(sys.executable, "PYTHON").replace(str(tmp_path), "FOLDER")
        return found.returncode, out, found.stderr.replace(str(tmp_path), "FOLDER")

    return made


@pytest.mark.parametrize(("name", "profile"), [("requeued", PROFILE), ("successors", PROFILE + CHAIN)])
def test_scripts_are_as_read(scripts, name, profile):
    code, out, err = scripts(profile)
    assert code == 0, err
    golden = HERE / f"scripts-{name}.txt"
    if not golden.exists():  # to renew: delete the file, run this, and read what it wrote
        golden.write_text(out)
        pytest.fail(f"{golden} is new: read it")
    assert out == golden.read_text()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"gpus": 8}, "resources: 8 GPUs a node are asked for; this cluster has 4"),
        ({"threads": 17}, "resources: 68 cores a node are asked for; this cluster has 64"),
        ({"minutes": 721}, "resources: 721 minutes are asked for; this cluster has 720"),
        ({"nodes": 3}, "toy.yaml:41: resources.nodes: 8 ranks cannot be shared evenly by 3 nodes"),
    ],
)
def test_what_the_cluster_has_not_is_one_line(scripts, changes, line):
    code, out, err = scripts(PROFILE, **changes)
    assert (code, out) == (2, "")
    assert line in err and err.count("\n") == 1


def test_a_profile_that_is_not_there_or_wrong_is_one_line(scripts, tmp_path):
    for text, line in {
        "slurm: {partition: gpu}\nlead_second: 3\n": "PROFILE.yaml:2: unknown key 'lead_second'",
        "environment: {A-B: x}\n": "PROFILE.yaml: environment: 'A-B' is not the name of a variable",
    }.items():
        code, _, err = scripts(text)
        assert code == 2 and f"FOLDER/{line}" in err
    found = growmerge("run", str(tmp_path / "toy.yaml"), "--profile", "nvidea", "--dry-run", cwd=tmp_path)
    assert found.returncode == 2 and "did you mean 'nvidia'?" in found.stderr


def test_the_templates_are_read_and_say_that_no_run_has_shown_them():
    from growmerge.clusters import known_profiles, profile_of

    notes = {name: profile_of(name).note for name in known_profiles()}
    assert notes["nvidia"] == notes["rocm"] == "untested template"
    assert notes["virtual"].startswith("by the tests")
