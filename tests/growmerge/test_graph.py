"""Stages in an order that can be run; a line for every name that stands for nothing."""

from pathlib import Path

import pytest
import yaml
from pipeline_files import SMALL, STUDY, change, load, write
from test_config import matches

from growmerge.config import load_pipeline
from growmerge.graph import PARTS, match, study_stages
from growmerge.schema import GrowStage, MergeStage, TrainStage
from parallel.errors import InputError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MODEL = SMALL[SMALL.index("model:") : SMALL.index("mixtures:")]
STAGES = "seed, base-1x, base-2x, grown, 1x-linear, 1x-ties, 2x-linear, 2x-ties"
GRID = "each: {setup: [1x, 2x], method: [linear, ties]}"

ASKED = "evaluation: {{tasks: {{{}}}}}\nchecks:"
ERRORS = [
    # variables and names
    ("each: {setup: [1x, 2x]}", "each: {s: [1x]}", "32: stages.base-{setup}: unknown variable 'setup': allowed are s"),
    ('[seed, "base-{setup}"]', '[seed, "base-{setpu}"]', "43: *.from.1: unknown variable 'setpu': *'setup'?"),
    ("from: scratch", 'from: "{x}"', "31: stages.seed.train.from: unknown variable 'x': allowed are (none)"),
    ("  grown:", "  base-1x:", "38: stages.base-1x: a second stage is called 'base-1x'; the first: */x.yaml:32"),
    ("  grown:", "  report:", "38: stages.report: 'report' cannot be a stage's name: *text, tokens, *report, scratch"),
    ("  grown:", "  a/b:", "38: stages.a/b: 'a/b' cannot be a stage's name: letters, digits and . _ + -,*"),
    ("  grown:", f"  {'g' * 101}:", "38: *cannot be a stage's name: *"),
    # what a grid fills in is checked like anything else, where its values are listed
    ("[linear, ties]", "[linear, tise]", "41: *: unknown method 'tise': allowed are linear, *; did you mean 'ties'?"),
    ('from: [seed, "base-{setup}"]', 'from: ["{setup}", seed]', "41: *.from.0: unknown stage '1x': allowed are *"),
    ("base: seed\n", 'base: seed\n      parameters: {density: "{setup}"}\n', "41: *.density: '1x' is not *"),
    # references
    ("seed, width", "sed, width", f"39: stages.grown.grow.from: unknown stage 'sed': allowed are {STAGES}; *'seed'? *"),
    ('[seed, "base-{setup}"]', '[seed, "bas-{setup}"]', "43: *.from.1: unknown stage 'bas-1x': *mean 'base-1x'?*"),
    ("base: seed", "base: sed", "44: stages.{setup}-{method}.merge.base: unknown stage 'sed': *"),
    ("seed, width", "scratch, width", "39: *.grow.from: unknown stage 'scratch': *(a checkpoint's path needs a /)"),
    ("seed, width", "./gone, width", "39: stages.grown.grow.from: no checkpoint folder './gone' in *"),
    (MODEL, "", "24: stages.seed.train.from: scratch needs `model:`, the shape of the model, and there is none"),
    ("seed, width", "grown, width", "39: stages.grown.grow.from: a cycle: grown -> grown"),
    ("from: scratch", "from: 2x-ties", "31: stages.seed.train.from: a cycle: seed -> base-2x -> 2x-ties -> seed"),
    ("data: english\n", "data: englsh\n", "36: *.train.data: unknown mixture 'englsh': allowed are english, swe;*"),
    ("vocab_size: 512", "path: tok", "13: tokenizer.path: no tokenizer folder 'tok' in *"),
    ("eng/*.txt", "est/*.txt", "8: *.0.files: language without text: no file matches 'texts/est/*.txt' in *"),
    # trainings and merges
    ("{steps: 10}", "{lr: 1}", "31: *.train.training: no number of steps: give `steps` here or in `training:`"),
    ("{steps: 10}", "{steps: 1}", "31: *.train.training.warmup: 2 steps of warm-up are more than the run's 1 steps"),
    ("      base: seed\n", "", "42: stages.{setup}-{method}.merge: method ties needs `base`, *"),
    ("base: seed", "base: seed\n      weights: [1]", "45: *.merge.weights: 1 weights for 2 models: give one a model"),
    ("base: seed", "base: seed\n      weights: [1, -1]", "45: *.weights: weights [1.0, -1.0] add up to 0: *"),
    ("base: seed", "base: seed\n      parameters: {density: 1.5}", "45: *.density: density is 1.5: allowed is 0 to 1"),
    ('[seed, "base-{setup}"]', "[]", "43: *.merge.from: no models to merge: the list is empty"),
    (GRID, f"each: {{setup: [1x], method: [{', '.join('m' for _ in range(10001))}]}}", "41: *.each: *10001 stages;*"),
    # growth with the optimizer, of what has none
    ("seed, width: 2", "1x-ties, optimizer: scaled", "39: *.optimizer: scaled, but '1x-ties' has no optimizer state:*"),
    ("seed, width: 2", "./texts, optimizer: asymmetric", "39: *.grow.optimizer: asymmetric, but './texts' has no *"),
    ("width: 2}", "width: 2}\n  more: {grow: {from: grown, optimizer: scaled}}", "40: *: scaled, but 'grown' has no *"),
    # checks and study
    ("language: eng", "language: fin", "47: checks.0.language: language without text: unknown corpus 'fin': *eng, swe"),
    ("models: [seed]", "models: [sed]", f"47: checks.0.models.0: unknown stage 'sed': allowed are {STAGES};* 'seed'?"),
    ("models: [seed]", "models: ['{setup}-x']", "47: checks.0.models.0: unknown stage '{setup}-x': allowed are *"),
    ("models: [seed]", "models: ['{setpu}-x']", "47: checks.0.models.0: unknown variable 'setpu': allowed are *"),
    ("models: [seed]", "models: []", "47: checks.0.models: the list is empty"),
    ("checks:", STUDY.replace("eng", "fin") + "checks:", "47: study.source_language: language without text: *'fin':*"),
    ("checks:", STUDY.replace("[swe]", "[swd]") + "checks:", "48: study.languages.0: language without text: *'swe'?"),
    ("checks:", STUDY.replace("2x]", "3x]") + "checks:", "46: study.base: * asks for an unknown stage 'base-3x':*"),
    ("checks:", STUDY.replace("[1x, 2x]", "[]") + "checks:", "49: study.setups: the list is empty"),
    ("checks:", STUDY.replace("{setup}", "{setpu}") + "checks:", "50: study.adapted: unknown variable 'setpu':*"),
    ("checks:", STUDY + "  joint: all\nchecks:", "52: study.joint: 'all' asks for an unknown stage 'all': *"),
    ("checks:", STUDY + "  merged: '{setup}'\nchecks:", "52: study.merged: '{setup}' asks for an unknown stage '1x':*"),
    # what models are asked
    ("checks:", ASKED.format("own: {kind: pairs, files: p.tsv}"), "46: *.tasks.own.files: p.tsv: no such file *"),
    ("checks:", ASKED.format("own: {kind: pears}"), "46: *.tasks.own.kind: unknown kind 'pears': *; did you mean *?"),
    ("checks:", ASKED.format("own: {kind: text, hub: a/b, good: c}"), "46: *.own.good: has no meaning for kind text*"),
    ("checks:", ASKED.format("heldout-eng: {kind: text, hub: a/b}"), "46: *: 'heldout-eng' is what the pipeline *"),
    ("checks:", ASKED.format("a b: {kind: text, hub: a/b}"), "46: evaluation.tasks.a b: 'a b' cannot be a name: *"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), ERRORS)
def test_an_error_names_file_and_line(old: str, new: str, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path, change(old, new))
    with pytest.raises(InputError) as caught:
        load(path)
    line = str(caught.value)
    assert matches(line, f"{path}:{expected}"), line
    assert "\n" not in line


def test_the_quickstart_expands_to_its_stages_in_an_order_that_can_be_run() -> None:
    _, nodes = load(QUICKSTART)
    setups = ["1x", "1x-cloned", "2x"]
    bases = ["seed", "base-1x", "seed-2x", "base-2x", "base-1x-cloned"]
    adapted = [f"{setup}-{data}" for setup in setups for data in ("swe", "est")]
    joint = [f"{setup}-joint" for setup in setups]
    merged = [f"{setup}-{method}" for setup in setups for method in ("linear", "ties")]
    assert list(nodes) == bases + adapted + joint + merged
    before: set[str] = set()
    for name, node in nodes.items():
        assert node.name == name and before.issuperset(node.inputs)
        before.add(name)
    assert nodes["seed"].inputs == ()
    assert nodes["2x-est"].inputs == ("base-2x",) and nodes["2x-est"].template == "{setup}-{data}"
    assert nodes["2x-est"].variables == {"setup": "2x", "data": "est"}
    stage, merge = nodes["2x-est"].stage, nodes["1x-cloned-ties"].stage
    assert isinstance(stage, TrainStage) and (stage.from_, stage.data) == ("base-2x", "est")
    written = yaml.safe_load(QUICKSTART.read_text())["stages"]["{setup}-{data}"]["train"]["training"]
    assert stage.training == written and written["steps"] > 0
    assert isinstance(merge, MergeStage) and merge.method == "ties" and merge.base == "base-1x-cloned"
    assert nodes["1x-cloned-ties"].inputs == ("1x-cloned-swe", "1x-cloned-est", "base-1x-cloned")


def test_stages_come_after_their_inputs_and_else_in_the_files_order(tmp_path: Path) -> None:
    text = change("  seed:\n", "  z-last: {grow: {from: grown}}\n  seed:\n")
    _, nodes = load(write(tmp_path, text))
    assert list(nodes) == [
        "seed", "base-1x", "base-2x", "grown", "z-last", "1x-linear", "1x-ties", "2x-linear", "2x-ties",
    ]  # fmt: skip


def test_inputs_are_named_once_with_the_base_last(tmp_path: Path) -> None:
    _, nodes = load(write(tmp_path, SMALL))
    assert nodes["2x-ties"].inputs == ("seed", "base-2x")  # seed is a model and the base
    assert nodes["grown"].where == f"{tmp_path / 'x.yaml'}:38"


def test_what_has_optimizer_state_can_be_grown_with_it(tmp_path: Path) -> None:
    for name in ("zero3/zero_pp_rank_0_mp_rank_00_optim_states.pt", "universal/zero/model.norm.weight/fp32.pt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for start in ("seed", "./zero3", "./universal"):
        text = change("seed, width: 2", f"{start}, optimizer: scaled")
        text = change("checks:", "  more: {grow: {from: grown, optimizer: scaled}}\nchecks:", text)
        _, nodes = load(write(tmp_path, text))
        assert isinstance(nodes["more"].stage, GrowStage) and nodes["more"].stage.optimizer == "scaled"


def test_numbers_can_be_variables(tmp_path: Path) -> None:
    text = change("  grown:\n    grow: {from: seed, width: 2}", '  "grown-{w}":\n'
                  '    each: {w: ["2", "3"]}\n    grow: {from: seed, width: "{w}"}\n'
                  '  "lr-{lr}":\n    each: {lr: ["1e-3"]}\n'
                  '    train: {from: seed, data: swe, training: {steps: 9, lr: "{lr}"}}')  # fmt: skip
    _, nodes = load(write(tmp_path, text))
    widths = [getattr(nodes[name].stage, "width", None) for name in ("grown-2", "grown-3")]
    assert widths == [2, 3]
    stage = nodes["lr-1e-3"].stage
    assert isinstance(stage, TrainStage) and stage.training == {"steps": 9, "lr": 0.001}


def test_a_checkpoints_folder_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "models" / "old").mkdir(parents=True)
    for written in ("models/old", "./models", str(tmp_path / "models")):
        text = change("seed, width", f"{written}, width")
        _, nodes = load(write(tmp_path, text))
        assert nodes["grown"].inputs == ()


def test_a_template_stands_for_its_stages() -> None:
    pipeline, nodes = load(QUICKSTART)
    assert match(nodes, "{setup}-swe") == ["1x-swe", "1x-cloned-swe", "2x-swe"]
    assert match(nodes, "base-{setup}") == ["base-1x", "base-2x", "base-1x-cloned"]
    assert match(nodes, "2x-{method}") == ["2x-linear", "2x-ties"]
    assert match(nodes, "seed") == ["seed"]
    assert match(nodes, "{setup}-fin") == []
    assert match(nodes, "{setup}-{language}", pipeline.study) == [
        f"{setup}-{language}" for setup in ("1x", "1x-cloned", "2x") for language in ("swe", "est")
    ]
    with pytest.raises(InputError, match="unknown variable 'language': allowed are setup, data, method"):
        match(nodes, "{setup}-{language}")


def test_a_studys_parts_are_stages() -> None:
    pipeline, nodes = load(QUICKSTART)
    assert pipeline.study is not None
    assert study_stages(pipeline.study, "seed") == {(): "seed"}
    assert study_stages(pipeline.study, "adapted")["1x-cloned", "est"] == "1x-cloned-est"
    named = {name for part in PARTS for name in study_stages(pipeline.study, part).values()}
    assert named == set(nodes) - {"seed-2x"}


def test_a_study_may_do_without_joint_models_and_without_merges(tmp_path: Path) -> None:
    study = STUDY.replace("  methods: [linear]\n", "")
    pipeline, nodes = load(write(tmp_path, change("checks:", study + "checks:")))
    assert pipeline.study is not None and not {"1x-joint", "2x-joint"} & set(nodes)


def test_a_file_that_loads_alone_says_what_is_missing_in_the_graph(tmp_path: Path) -> None:
    path = write(tmp_path, change("seed, width", "sed, width"))
    load_pipeline(path)
    with pytest.raises(InputError):
        load(path)
