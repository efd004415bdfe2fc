"""`growmerge plan`: the best topologies of a file, as a table and as JSON, and a line for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from growmerge.config import load_file
from growmerge.planner import look, print_best
from growmerge.schema_plan import PlanConfig
from parallel.errors import InputError
from parallel.mesh import check_model, mesh_of

SHAPE = """\
shape: {hidden_size: 8192, num_hidden_layers: 80, num_attention_heads: 64, num_key_value_heads: 8, \
intermediate_size: 28672, max_position_embeddings: 8192, tie_word_embeddings: false}
vocab_size: 128256
"""
FILE = SHAPE + "cluster: {gpu: H100, nodes: 128}\nsequence_length: 4096\nglobal_batch: 1024\ntokens: 1e12\n"


def found(tmp_path: Path, text: str):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    plan, marks = load_file(PlanConfig, path)
    return look(plan, marks, base=tmp_path)


def error(tmp_path: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        found(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_seventy_billion_on_a_thousand_gpus(tmp_path: Path) -> None:
    best = found(tmp_path, FILE)
    assert 70e9 < best.parameters < 71e9
    speeds = [choice.tokens_per_second for choice in best.choices]
    assert speeds == sorted(speeds, reverse=True)
    for choice in best.choices:
        setup, mesh = choice.setup, choice.setup.mesh
        assert mesh == mesh_of(1024, zero=setup.zero, tp=mesh.tp, sp=mesh.sp, pp=mesh.pp)
        check_model(mesh, best.config, 4096)
        assert mesh.dp * setup.micro_batch * setup.accumulation == 1024
        assert choice.memory.total <= 0.92 * 80e9
        assert choice.mfu < 0.55
    assert best.hours == pytest.approx(1e12 / speeds[0] / 3600)
    assert best.checkpoint == 12 * best.parameters
    assert best.written_s == pytest.approx(best.checkpoint / 5e9)


def test_pins_are_kept(tmp_path: Path) -> None:
    pinned = found(tmp_path, FILE + "zero: 3\ntp: 4\nmicro_batch: 2\nrecompute: true\noffload: false\n")
    assert [(c.setup.zero, c.setup.mesh.tp, c.setup.micro_batch) for c in pinned.choices] == [(3, 4, 2)]


def test_growth_by_two_in_width(tmp_path: Path) -> None:
    small = FILE.replace("8192, num", "1024, num").replace("64", "8").replace("28672", "4096")
    once, twice = found(tmp_path, small), found(tmp_path, small + "grow: {width: 2}\n")
    assert twice.config["hidden_size"] == 2 * once.config["hidden_size"]
    assert twice.parameters > 3 * once.parameters


def test_a_folder_is_read_without_weights(tmp_path: Path, tiny_folder) -> None:
    folder = tiny_folder("tiny")
    (folder / "model.safetensors").unlink()
    text = "cluster: {gpu: L4, gpus_a_node: 1}\nsequence_length: 64\nglobal_batch: 4\n"
    by_folder = found(tmp_path, f"model: {folder}\n{text}")
    assert by_folder.parameters == found(tmp_path, f"model: {folder}/config.json\n{text}").parameters
    assert by_folder.config["hidden_size"] == 32


def test_a_name_is_a_shape(tmp_path: Path) -> None:
    rest = FILE.removeprefix(SHAPE)
    by_name, by_shape = found(tmp_path, f"model: llama-70b\n{rest}"), found(tmp_path, FILE)
    assert by_name.parameters == by_shape.parameters
    assert by_name.choices == by_shape.choices


def test_a_number_of_parameters_is_enough(tmp_path: Path) -> None:
    rest = FILE.removeprefix(SHAPE)
    seven = found(tmp_path, f"parameters: 7e9\n{rest}")
    assert seven.parameters == pytest.approx(7e9, rel=0.02)
    assert found(tmp_path, f"parameters: 7e9\nvocab_size: 32000\n{rest}").config["vocab_size"] == 32000


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(FILE)
    print_best(path, as_json=False)
    text = capsys.readouterr().out
    for part in ("70.6B parameters on 1024 GPUs", "Adam moments", "Measured: ", "Modelled: ", "GPU-hours"):
        assert part in text
    print_best(path, as_json=True)
    data = json.loads(capsys.readouterr().out)
    best = data["best"][0]
    assert len(data["best"]) == 10
    assert sum(best["memory"]["peak"].values()) == best["memory"]["total"]
    parts = {name: part for name, part in best["step"].items() if name != "seconds"}
    assert sum(parts.values()) == pytest.approx(best["step"]["seconds"])
    assert data["gpu_hours"] == pytest.approx(1024 * data["hours"])


def test_the_verb_answers_without_torch(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(FILE)
    code = "import sys; from growmerge.planner import print_best; from pathlib import Path; "
    code += f"print_best(Path({str(tmp_path / 'plan.yaml')!r}), as_json=True); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("nodes: 128", "nodes: 1", None),
        ("gpu: H100", "gpu: H1000", "plan.yaml:3: cluster.gpu: unknown GPU 'H1000': allowed are B300, "),
        ("tokens: 1e12", "zero: 3\npp: 2", "plan.yaml:7: pp: pipeline parallelism (pp 2) does not work with ZeRO-3: "),
        ("tokens: 1e12", "tp: 16", "plan.yaml:6: tp: parallel.tp is 16: the model has 8 key/value heads; at most 8 "),
        ("tokens: 1e12", "zero: 4", "plan.yaml:6: zero: 4 is out of range: allowed are 1, 2, 3"),
        ("4096", "9000", "plan.yaml:4: sequence_length: 9000 is more than the model's max_position_embeddings, 8192"),
        ("nodes: 128", "nodes: 0", "plan.yaml:3: cluster.nodes: 0 is out of range: allowed is at least 1"),
        ("vocab_size: 128256\n", "", "plan.yaml:1: vocab_size: goes with `shape`, which needs it, or `parameters`"),
        (SHAPE, "model: llama-7ob\n", "plan.yaml:1: model: no folder 'llama-7ob', and unknown model 'llama-7ob': "),
        (SHAPE, "parameters: 1e7\n", "plan.yaml:1: parameters: 1e+07 parameters are too few for a vocabulary of "),
        (SHAPE, "", "plan.yaml:1: one of `model`, `shape` and `parameters` is needed: which model is planned for"),
        (
            "tokens: 1e12",
            "tp: 1\npp: 1\nsp: 1\nmicro_batch: 3",
            "plan.yaml:5: global_batch: 1024 sequences cannot be shared evenly by the data ranks of 1024 GPUs with "
            "micro_batch 3: use 3072",
        ),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, line: str | None) -> None:
    if line is not None:
        assert error(tmp_path, FILE.replace(old, new)).startswith(line)
        return
    text = error(tmp_path, FILE.replace(old, new) + "offload: false\nzero: 3\n")
    assert text.startswith("plan.yaml:3: cluster: fits nowhere: the least is ")
    assert "ZeRO-3" in text
    assert text.endswith("leave out zero, offload, or take more nodes, larger GPUs or a shorter sequence_length")
