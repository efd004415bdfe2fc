"""The growth options of a pipeline file, on real ranks: what is trained on after them starts as they say."""

import shutil
from pathlib import Path

import pytest
from tiny import on_ranks
from toy import PIPELINE, write_toy

from checkpoint.files import read_json
from checkpoint.open import open_checkpoint
from growmerge.config import load_pipeline
from growmerge.context import Context, Resources
from growmerge.graph import expand
from growmerge.tasks import build_tasks
from growmerge.verbs import do
from train.loop import last_checkpoint
from train.tracker import read_metrics

STAGES = """stages:
  seed: {train: {from: scratch, data: first, training: {steps: 12}}}
  wide: {grow: {from: seed, width: 2, method: symmetric, optimizer: scaled}}
  again: {grow: {from: wide, width: 1, ffn: 3, method: symmetric, optimizer: scaled}}
  same: {grow: {from: seed, width: 1, optimizer: scaled}}
  fresh: {grow: {from: seed, width: 2, method: symmetric}}
  deep: {grow: {from: seed, depth: stack, layers: 4}}
  padded: {grow: {from: seed, to_ffn: 100, depth: identity, layers: 4}}
  noisy: {grow: {from: seed, width: 1, heads: 2, kv_heads: 1, hidden: 2, method: diagonal, noise_db: 20}}
  "{start}-on":
    each: {start: [same, wide, again, fresh]}
    train: {from: "{start}", data: first, training: {steps: 6, dynamics: preserve, warmup: 0, decay: 0.0}}
  later: {train: {from: wide-on, data: rest, training: {steps: 2, dynamics: preserve}}}
"""
TEXT = PIPELINE[: PIPELINE.index("stages:")] + STAGES + "resources: {ranks: 2, threads: 1}\n"
TEXT = TEXT.replace("max_bytes: 6000", "max_bytes: 1500")


def load(path: Path):
    pipeline, marks = load_pipeline(path)
    nodes = expand(pipeline, marks, path)
    return pipeline, nodes, build_tasks(pipeline, nodes, path.parent / "run", path.parent)


def run_stages(ranks, path):
    path = Path(path)
    pipeline, nodes, tasks = load(path)
    context = Context(
        pipeline=pipeline,
        nodes=nodes,
        tasks=tasks,
        base=path.parent,
        workdir=path.parent / "run",
        ranks=ranks,
        resources=Resources(threads=1),
        report=lambda event: None,
    )
    for name in ("text", "tokens", *nodes):
        do(context, tasks[name])


@pytest.mark.slow
def test_growth_with_the_optimizer_goes_on_as_no_growth_does(tmp_path):
    path = write_toy(tmp_path, TEXT)
    on_ranks(tmp_path, 2, run_stages, str(path))
    tasks = load(path)[2]
    losses = {
        name: [line["loss"] for line in read_metrics(task.folder / "metrics.jsonl") if "loss" in line]
        for name, task in tasks.items()
        if task.verb == "train"
    }
    # Growth by 1 with the optimizer is the small model trained on; all runs see the same samples.
    for name in ("wide-on", "again-on"):
        assert losses[name] == pytest.approx(losses["same-on"], abs=1e-4)
    assert losses["fresh-on"][0] == pytest.approx(losses["same-on"][0], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(losses["fresh-on"], losses["same-on"], strict=True)) > 1e-3

    # Layers that are repeated change the function, and the stage says by how much; padding does not.
    deep, padded = (read_json(tasks[name].folder / "growth.json") for name in ("deep", "padded"))
    assert deep["difference"] > 1e-3 > 1e-5 > padded["difference"]
    for name, ffn in (("deep", 48), ("padded", 100)):
        config = open_checkpoint(tasks[name].folder / "model").config
        assert (config["num_hidden_layers"], config["intermediate_size"]) == (4, ffn)

    # The stage's own model is what the run starts from; a later run keeps the factors.
    ends = {name: last_checkpoint(tasks[name].folder, len(losses[name])) for name in losses}
    for name, steps in {"wide-on": 18, "fresh-on": 6, "later": 2}.items():
        end = open_checkpoint(ends[name])
        assert end.groups[end.infos["model.layers.0.mlp.up_proj.weight"].group].lr_factor == 0.5
        assert {group.step for group in end.groups.values()} == {steps}
    growths = {name: read_json(task.folder / "growth.json") for name, task in tasks.items() if task.verb == "grow"}
    del growths["deep"], growths["padded"]
    assert [(one["method"], one["optimizer"]) for one in growths.values()] == [
        *[("symmetric", "scaled")] * 2,
        ("exact-split", "scaled"),
        ("symmetric", "reset"),
        ("diagonal", "reset"),
    ]
    assert max(one["difference"] for one in growths.values()) < 1e-5
    config = read_json(tasks["noisy"].folder / "model" / "config.json")
    assert [config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")] == [64, 8, 2]
    assert config["intermediate_size"] == 48
    card = (tasks["wide-on"].folder / "model" / "README.md").read_text()
    assert "| training.dynamics | `preserve` |" in card
    assert "| optimizer | `scaled` |" in (tasks["wide"].folder / "model" / "README.md").read_text()

    # A stage without its last checkpoint is not done: it is trained again before what needs the checkpoint.
    assert tasks["seed"].done
    shutil.rmtree(ends["seed"])
    assert not tasks["seed"].done
