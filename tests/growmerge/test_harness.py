"""lm-eval asked of our models, and our tasks of its own model: the numbers are the same both ways."""

import json
import shutil

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from test_evaluating import PAIRS, TEXT, verdict
from test_merging import told
from tiny import tiny_model

from train.data.tokenizer import train_tokenizer

CONFIG = """\
models: {swe: swe}
tasks:
  text: {kind: text, files: text.jsonl, window: 512}
  verbs: {kind: pairs, files: pairs.tsv}
  made: {kind: corrupt, files: text.jsonl, count: 3}
"""
CHOICES = {
    "task": "choices",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "test",
    "doc_to_text": "Fråga: {{question}}\nSvar:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
CLOZE = {
    **{key: CHOICES[key] for key in ("dataset_path", "test_split")},
    "task": "cloze",
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
WRITTEN = {
    **{key: CHOICES[key] for key in ("dataset_path", "test_split")},
    "task": "written",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n", "a"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
LONG = {
    **{key: CHOICES[key] for key in ("dataset_path", "test_split")},
    "task": "long",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "long",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
}
SLOW = pytest.mark.slow
"""lm-eval reads the 14,000 files of its own tasks."""
QUESTIONS = [
    {"question": "Vad gör katten?", "choices": [" Den sover nu", " Den sova nu", " Nu den"], "answer": 0},
    {"question": "Var är hunden?", "choices": [" I huset", " Huset i"], "answer": 1},
    {"question": "När regnar det?", "choices": [" I dag", " I går", " I morgon", " Aldrig"], "answer": 2},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    train_tokenizer([f"{TEXT[0]} {number}" for number in range(300)], vocab_size=300, folder=folder / "swe")
    model = tiny_model(1, torch.float32, vocab_size=300, max_position_embeddings=512)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.config.dtype = torch.float32
    model.save_pretrained(folder / "swe")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    rows = "".join("\t".join(pair) + "\n" for pair in PAIRS)
    (folder / "pairs.tsv").write_text("sen\twrong_sen\tphenomenon\n" + rows)
    (folder / "eval.yaml").write_text(CONFIG)
    (folder / "tasks").mkdir()
    data = folder / "tasks" / "questions.jsonl"
    data.write_text("".join(json.dumps({**one, "long": " ".join(TEXT) * 6}) + "\n" for one in QUESTIONS))
    for task in (CHOICES, CLOZE, WRITTEN, LONG):
        about = {**task, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def theirs(model, tasks, include, **how):
    """What lm-eval's own model gets."""
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(include), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=100,
        log_samples=False,
        **how,
    )
    return found["results"]


def numbers(results):
    return {key: value for key, value in results.items() if isinstance(value, float) and "stderr" not in key}


def test_lm_eval_gets_our_numbers_of_our_tasks(folder):
    assert told("eval", "eval.yaml", "out").exit_code == 0
    exported = told("eval", "eval.yaml", "out", "--export")
    assert exported.exit_code == 0 and exported.stdout.split() == [
        f"out/lm_eval/{name}.yaml" for name in ("text", "verbs", "made")
    ]
    found = theirs(folder / "swe", ["text", "verbs"], folder / "out" / "lm_eval")
    tasks = verdict(folder, "swe")["tasks"]
    assert found["text"]["bits_per_byte,none"] == pytest.approx(tasks["text"]["bits_per_byte"]["value"], abs=1e-4)
    assert found["verbs"]["acc,none"] == pytest.approx(tasks["verbs"]["sum"]["micro"]["value"], abs=1e-4)
    ours = json.loads((folder / "out" / "lm_eval" / "swe.json").read_text())
    for name in ("text", "verbs"):
        for key, value in numbers(ours["results"][name]).items():
            assert found[name][key] == pytest.approx(value, abs=1e-4), (name, key)
    assert found["verbs"]["acc_stderr,none"] == pytest.approx(ours["results"]["verbs"]["acc_stderr,none"], abs=1e-4)
    assert ours["n-samples"]["verbs"] == {"original": 3, "effective": 3}


@pytest.mark.parametrize("shots", [0, 2])
def test_our_model_gets_lm_evals_numbers_of_its_tasks(shots, folder):
    names = ["choices", "cloze", "written", "long"]
    task = f"  theirs: {{kind: harness, names: [{', '.join(names)}], include: tasks}}\n"
    if shots:
        names = ["choices"]
        task = f"  theirs: {{kind: harness, names: [choices], include: tasks, shots: {shots}}}\n"
    (folder / "eval.yaml").write_text(CONFIG + task)
    found = told("eval", "eval.yaml", "out")
    assert found.exit_code == 0, found.stderr
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
    expected = theirs(folder / "swe", names, folder / "tasks", num_fewshot=shots or None, **seeds)
    ours = verdict(folder, "swe")["tasks"]["theirs"]["results"]
    assert set(ours) == set(names)
    for name in names:
        assert numbers(expected[name]) and numbers(ours[name]).keys() == numbers(expected[name]).keys()
        for key, value in numbers(expected[name]).items():
            assert ours[name][key] == pytest.approx(value, rel=1e-4, abs=1e-4), (name, key)
    again = told("eval", "eval.yaml", "out")
    assert again.exit_code == 0 and verdict(folder, "swe")["tasks"]["theirs"]["results"] == ours
    shaped = json.loads((folder / "out" / "lm_eval" / "swe.json").read_text())
    assert shaped["results"]["choices"] == ours["choices"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        pytest.param(
            "[beleble_swe_Latn]", "knows no task 'beleble_swe_Latn'; did you mean 'belebele_swe_Latn'?", marks=SLOW
        ),
        ("[]", "tasks.theirs.names: none is given: which of lm-eval's tasks?"),
        ("[choices], include: nowhere", "tasks.theirs: include: "),
        # Its data is on the Hub, which is not to be reached.
        pytest.param("[belebele_swe_Latn]", "swe: theirs: lm-eval: ", marks=SLOW),
    ],
)
def test_what_lm_eval_cannot_do_is_one_line(names, said, folder):
    (folder / "eval.yaml").write_text(CONFIG + f"  theirs: {{kind: harness, names: {names}}}\n")
    found = told("eval", "eval.yaml", "out")
    assert found.exit_code == 2, found.output
    assert said in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr
