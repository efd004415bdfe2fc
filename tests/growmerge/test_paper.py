"""The recipes of "Grow Up and Merge": their dry run comes to the published numbers, and all of their scales fit."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from growmerge.cli import main
from growmerge.config import load_file, merged_training
from growmerge.graph import Node
from growmerge.lint import notes
from growmerge.plan import PlannedStage, plan
from growmerge.run import Plan, load
from growmerge.schema import GrowStage, MergeStage, TrainStage
from growmerge.schema_data import DataConfig
from growmerge.shapes import model_configs, multiplied

PAPER = Path(__file__).parents[2] / "configs" / "paper"
STUDY = PAPER / "grow_up_and_merge.yaml"
SIZES = {"1x": 180_078_912, "1x-cloned": 572_494_464, "2x": 572_494_464}
RUNS = {
    # stages: steps, warm-up, start and length of the decay, tokens (billions), FLOPs at 180 and 572 million
    "seed": (15244, 30, 12194, 3050, 159.84, "1.73e+20", None),
    "base-1x": (3572, 10, 2822, 750, 37.46, "4.05e+19", None),
    "base-2x": (3572, 10, 2822, 750, 37.46, None, "1.29e+20"),
    "{setup}-swe": (6279, 15, 5019, 1260, 65.84, "7.11e+19", "2.26e+20"),
    "{setup}-fas": (5928, 15, 4738, 1190, 62.16, "6.72e+19", "2.14e+20"),
    "{setup}-ekk": (7087, 15, 5667, 1420, 74.31, "8.03e+19", "2.55e+20"),
    "{setup}-isl": (2514, 10, 2004, 510, 26.36, "2.85e+19", "9.05e+19"),
    "{setup}-fao": (144, 10, 114, 30, 1.51, "1.63e+18", "5.19e+18"),
    "{setup}-joint": (21940, 45, 17550, 4390, 230.06, "2.49e+20", "7.90e+20"),
}
"""As published: training configs, and what follows from them (6 N D with the head)."""


def loaded(path: Path = STUDY, scale: str | None = None) -> Plan:
    return load(path, None, scale=scale, absent=[])


@pytest.fixture(scope="module")
def study() -> Plan:
    return loaded()


@pytest.fixture(scope="module")
def planned(study: Plan) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in plan(study.pipeline, study.nodes, base=study.base)}


def training_of(plan: Plan, name: str) -> Any:
    stage = plan.nodes[name].stage
    assert isinstance(stage, TrainStage)
    return merged_training(plan.pipeline, stage)


def shape(nodes: dict[str, Node]) -> dict[str, int]:
    return {verb: sum(node.verb == verb for node in nodes.values()) for verb in ("train", "grow", "merge")}


def test_every_published_number_follows(study: Plan, planned: dict[str, PlannedStage]) -> None:
    seen = 0
    for template, (steps, warmup, start, length, billions, small, large) in RUNS.items():
        for setup in SIZES if "{" in template else [template.removeprefix("base-").replace("seed", "1x")]:
            stage = planned[template.replace("{setup}", setup)]
            training = training_of(study, stage.name)
            assert (stage.steps, training.warmup, stage.steps - training.decay, training.decay) == (
                (steps, warmup, start, length)
            ), stage.name
            assert round(stage.tokens / 1e9, 2) == billions, stage.name
            assert f"{stage.flops:.2e}" == (small if setup == "1x" else large), stage.name
            assert stage.parameters == SIZES[setup], stage.name
            seen += 1
    assert seen == 21, "trainings"
    assert shape(dict(study.nodes)) == {"train": 21, "grow": 2, "merge": 390}
    training = study.pipeline.training
    assert training.global_batch * training.sequence_length == 10_485_760
    assert (training.lr, training.betas, training.eps, training.weight_decay) == (3e-3, (0.9, 0.95), 1e-8, 0.01)


def test_the_models_are_the_published_ones(study: Plan) -> None:
    configs = model_configs(study.pipeline, study.nodes, base=study.base)
    found = {
        name: [configs[name][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")]
        for name in ("seed", "2x-fao")
    }
    assert found == {"seed": [576, 1536, 30, 128256], "2x-fao": [1152, 3072, 30, 128256]}
    heads = [configs[name][key] for name in found for key in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    assert heads == [9, 3, 64, 18, 6, 64]
    assert configs["2x-fao"]["hidden_act"] == "gelu" and multiplied(configs["seed"]) == SIZES["1x"]


def test_the_merges_are_of_every_subset_and_by_their_own_base(study: Plan) -> None:
    merges = {name: node.stage for name, node in study.nodes.items() if isinstance(node.stage, MergeStage)}
    one = merges["2x-ties-swe+ekk+fao"]
    assert (one.from_, one.base, one.method) == (("2x-swe", "2x-ekk", "2x-fao"), "base-2x", "ties")
    assert len({(stage.method, stage.from_) for stage in merges.values()}) == 390
    assert {len(stage.from_) for stage in merges.values()} == {2, 3, 4, 5}
    assert notes(study.nodes) == []


def test_faithful_has_the_published_oddities_and_says_so() -> None:
    faithful = loaded(PAPER / "faithful.yaml")
    assert shape(dict(faithful.nodes)) == {"train": 21, "grow": 2, "merge": 390}
    grown = [node.stage for node in faithful.nodes.values() if isinstance(node.stage, GrowStage)]
    assert [(stage.method, stage.noise_db) for stage in grown] == [("symmetric", None)] * 2
    assert faithful.pipeline.training.decay_norms and faithful.pipeline.training.decay_embeddings
    merges = {name: node.stage for name, node in faithful.nodes.items() if isinstance(node.stage, MergeStage)}
    assert {stage.dtype for stage in merges.values()} == {"float16"}
    told = [line for line in notes(faithful.nodes) if "is not what its models were trained from" in line]
    wrong = [stage for name, stage in merges.items() if name.startswith("2x-") and stage.base == "base-1x-cloned"]
    assert len(wrong) == 76 and {stage.method for stage in wrong} == {"task_arithmetic", "ties", "dare_ties"}
    assert len(told) == 2 and "and 74 more" in told[0] and "faithful.yaml" in told[0]
    assert merges["2x-ties-swe+fas+ekk+isl+fao"].base == "base-2x"


def test_a_wrong_base_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    text = (PAPER / "faithful.yaml").read_text().replace(", allow_unrelated: true", "")
    path.write_text(text.replace("grow_up", f"{PAPER}/grow_up"))
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert result.exit_code == 2
    assert "2x-swe was not trained from base-1x-cloned: name what it was, or give allow_unrelated" in result.output


def test_better_compares_at_equal_tokens_and_flops(study: Plan) -> None:
    better = loaded(PAPER / "better.yaml")
    assert better.pipeline.study and better.pipeline.study.branches
    planned = {stage.name: stage for stage in plan(better.pipeline, better.nodes, base=better.base)}
    branch, training = planned["2x-swe-1250"], training_of(better, "2x-swe-1250")
    assert (training.steps, branch.steps, training.lr) == (1564, 314, 3e-3)
    assert training.decay / training.steps == pytest.approx(1260 / 6279, abs=1e-3)
    sizes = {name: round(planned[f"base-{name}"].parameters / 1e6) for name in better.pipeline.study.setups}
    assert sizes["1x"] < sizes["2x"] < sizes["3x-cloned"] < sizes["4x-cloned"] == sizes["4x"]
    assert {"fisher", "regmean", "tsv", "search"} <= {*better.pipeline.study.methods}


def test_the_dry_run_says_what_is_not_there_yet() -> None:
    result = CliRunner().invoke(main, ["run", str(STUDY), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "390 merges" in result.output and "21,940" in result.output and "2.5e20" in result.output
    missing = [line for line in result.output.splitlines() if line.startswith("not there yet: ")]
    assert len(missing) == 2 and "growmerge data prepare" in missing[0] and "Llama-3.3-70B" in missing[1]
    result = CliRunner().invoke(main, ["run", str(STUDY), "--dry-run", "--executor", "slurm"])
    assert result.exit_code == 2 and "prepared.folder: not in" in result.output


def test_the_text_is_that_of_the_study(study: Plan) -> None:
    config, _ = load_file(DataConfig, PAPER / "data.yaml")
    assert study.pipeline.prepared and (config.folder, config.tokenizer) == (
        (study.pipeline.prepared.folder, study.pipeline.tokenizer.path)
    )
    splits = {name: dict(corpus.splits) for name, corpus in config.corpora.items()}
    assert splits == {name: dict(corpus.splits) for name, corpus in study.pipeline.corpora.items()}


@pytest.mark.parametrize(
    ("file", "scale", "divisor", "repeats"),
    [
        ("grow_up_and_merge.yaml", "tiny", 60, 0),
        ("grow_up_and_merge.yaml", "small", 24, 2),
        ("grow_up_and_merge.yaml", "gpu", 12, 0),
        ("faithful.yaml", "tiny", 60, 0),
    ],
)
def test_the_graph_is_the_same_in_miniature(file: str, scale: str, divisor: int, repeats: int, study: Plan) -> None:
    small = loaded(PAPER / file, scale)
    assert small.pipeline.name.endswith(f"-{scale}")
    whole = shape(dict(study.nodes))
    assert shape(dict(small.nodes)) == {**whole, "train": whole["train"] + 15 * repeats}
    names = {"est": "fas", "fin": "ekk", "nob": "isl", "dan": "fao"}
    for name, node in small.nodes.items():
        if not isinstance(node.stage, TrainStage):
            continue
        setup, _, language = name.removesuffix("-1").removesuffix("-2").rpartition("-")
        there = f"{setup}-{names.get(language, language)}" if setup else name
        training, published = training_of(small, name), training_of(study, there)
        assert training.steps == max(10, round(published.steps / divisor)), name
        assert training.decay / training.steps == pytest.approx(published.decay / published.steps, abs=0.05), name


def test_full_is_the_file_itself(study: Plan) -> None:
    full = loaded(scale="full")
    assert full.pipeline.name == study.pipeline.name
    assert json.dumps(sorted(full.nodes)) == json.dumps(sorted(study.nodes))
