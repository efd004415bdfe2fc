"""`growmerge eval`: numbers against a plain softmax, merges in memory against written ones, nothing scored twice."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_merging import told
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import growmerge.evaluating
from train.data.tokenizer import load_tokenizer, train_tokenizer

TEXT = [
    "En gammal räv sover under det stora trädet. Sedan går den hem igen nu.",
    "Två katter sitter still på en liten sten vid vägen.\n\nDe ser på fåglarna hela dagen.",
    "Det regnar mycket i dag och vi stannar hemma.",
]
PAIRS = [
    ("katten sover här", "katten sova här", "verb"),
    ("hundarna springer fort", "hundarna springer fortt", "verb"),
    ("ett stort hus", "en stort hus", "article"),
]
CONFIG = """\
models: {swe: swe, est: est}
tasks:
  text: {kind: text, files: text.jsonl, language: swe, domain: stories, window: 64, stride: 32}
  verbs: {kind: pairs, files: pairs.tsv, language: swe}
  made: {kind: corrupt, files: text.jsonl, count: 3, language: swe}
  samples: {kind: samples, prompts: [Det var], tokens: 5}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three models with a tokenizer, a text, pairs, and a file for `growmerge eval`."""
    folder = tmp_path_factory.mktemp("made")
    train_tokenizer([f"{TEXT[0]} {number}" for number in range(300)], vocab_size=300, folder=folder / "words")
    for seed, name in enumerate(("base", "swe", "est")):
        shutil.copytree(folder / "words", folder / name)
        model = tiny_model(seed, torch.bfloat16, vocab_size=300, max_position_embeddings=512)
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder / name)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    rows = "".join("\t".join(pair) + "\n" for pair in PAIRS)
    (folder / "pairs.tsv").write_text("sen\twrong_sen\tphenomenon\n" + rows)
    (folder / "eval.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def scored(monkeypatch):
    """How many sequences each call has scored."""
    found = []
    score = growmerge.evaluating.token_logprobs

    def counted(model, flat, **how):
        found.append(len(flat))
        return score(model, flat, **how)

    monkeypatch.setattr(growmerge.evaluating, "token_logprobs", counted)
    return found


@pytest.fixture
def loads(monkeypatch):
    """A source for each model that was made, not filled anew."""
    found = []
    load = growmerge.evaluating.load_model

    def counted(source, dtype):
        found.append(source)
        return load(source, dtype)

    monkeypatch.setattr(growmerge.evaluating, "load_model", counted)
    return found


def verdict(folder, name, out="out"):
    return json.loads((folder / out / f"{name}.json").read_text())


def logprob(folder, text, *, per_token=False):
    """ln p of a text behind BOS, by transformers alone, in float64."""
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    tokens = [tokenizer.bos, *tokenizer.encode(text)]
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1)
    found = sum(float(table[at - 1, tokens[at]]) for at in range(1, len(tokens)))
    return found / (len(tokens) - 1) if per_token else found


def test_a_verdict_has_the_numbers_of_a_plain_softmax(folder):
    (folder / "eval.yaml").write_text(CONFIG.replace("window: 64, stride: 32", "window: 512"))
    found = told("eval", "eval.yaml", "out")
    assert found.exit_code == 0, found.stderr
    for name in ("swe", "est"):
        tasks = verdict(folder, name)["tasks"]
        bits = -sum(logprob(folder / name, text) for text in TEXT) / math.log(2)
        size = sum(len(text.encode()) for text in TEXT)
        text = tasks["text"]
        assert text["bits_per_byte"]["value"] == pytest.approx(bits / size, rel=1e-5)
        assert text["bits_per_byte"]["low"] < text["bits_per_byte"]["value"] < text["bits_per_byte"]["high"]
        assert (text["bytes"], text["documents"], text["words"]) == (size, 3, sum(len(one.split()) for one in TEXT))
        assert text["token_perplexity"] == pytest.approx(2 ** (bits / text["tokens"]), rel=1e-4)
        assert (text["language"], text["domain"], text["window"], text["stride"]) == ("swe", "stories", 512, 256)
        for how, per_token in (("sum", False), ("per_token", True)):
            of = partial(logprob, folder / name, per_token=per_token)
            right = {good: of(good) > of(bad) for good, bad, _ in PAIRS}
            phenomena = tasks["verbs"][how]["phenomena"]
            assert phenomena["verb"]["correct"] == sum(right[good] for good, _, kind in PAIRS if kind == "verb")
            assert phenomena["article"]["correct"] == right["ett stort hus"]
            assert tasks["verbs"][how]["micro"]["correct"] == sum(right.values())
            assert tasks["verbs"][how]["macro"]["value"] == pytest.approx(
                (phenomena["verb"]["value"] + phenomena["article"]["value"]) / 2
            )
        assert set(tasks["made"]["per_token"]["phenomena"]) == {"swap", "drop"}
        assert set(tasks["made"]["sum"]["phenomena"]) == {"swap"}  # a drop is shorter: no sum is fair
        (sample,) = tasks["samples"]["samples"]
        assert sample["prompt"] == "Det var"
    assert "text" in found.stdout and "accuracy" in found.stdout


def test_what_was_evaluated_has_a_report_and_can_still_be_compared(folder):
    assert told("eval", "eval.yaml", "out").exit_code == 0
    found = told("report", "out")
    assert found.exit_code == 0, found.stderr
    results = json.loads((folder / "out" / "results.json").read_text())
    tasks = {task["name"]: task for task in results["tasks"]}
    assert set(tasks) == {"text", "verbs", "made"}
    bits = verdict(folder, "est")["tasks"]["text"]["bits_per_byte"]
    assert tasks["text"]["values"]["est"] == bits
    html = (folder / "out" / "report.html").read_text()
    assert f"{bits['value']:.3f} [{bits['low']:.3f}, {bits['high']:.3f}]" in html
    assert "Det var" in html
    assert f"{bits['value']}" in (folder / "out" / "report" / "tables" / "tasks.csv").read_text()
    assert [row["model"] for row in results["fertility"]] == ["est", "swe"]
    # The report lies beside the verdicts, and is none.
    assert told("compare", "out").exit_code == 0
    assert told("report", "out").exit_code == 0


def test_what_is_scored_is_not_scored_again(folder, loads, scored):
    assert told("eval", "eval.yaml", "out").exit_code == 0
    before = verdict(folder, "swe")
    loads.clear()
    (folder / "out" / "swe.json").unlink()
    assert told("eval", "eval.yaml", "out").exit_code == 0
    assert (loads, verdict(folder, "swe")) == ([], before)
    # another name for the same model, another place for the same pairs: the same scores
    (folder / "again.yaml").write_text(CONFIG.replace("swe: swe, est: est", "again: swe").replace("verbs:", "pairs:"))
    assert told("eval", "again.yaml", "out").exit_code == 0
    assert loads == []
    assert verdict(folder, "again")["tasks"]["pairs"] == before["tasks"]["verbs"]
    # one more pair is another task, and the others still stand
    with (folder / "pairs.tsv").open("a") as file:
        file.write("den här katten\tdet här katten\tarticle\n")
    scored.clear()
    assert told("eval", "eval.yaml", "out", "--model", "swe").exit_code == 0
    assert (len(loads), scored) == (1, [8])
    changed = verdict(folder, "swe")
    assert changed["tasks"]["verbs"]["pairs"] == 4
    assert changed["tasks"]["text"] == before["tasks"]["text"]


def test_another_model_in_its_place_is_scored(folder):
    assert told("eval", "eval.yaml", "out").exit_code == 0
    before = verdict(folder, "swe")["tasks"]["text"]["bits_per_byte"]
    (folder / "swe" / "model.safetensors").write_bytes((folder / "est" / "model.safetensors").read_bytes())
    assert told("eval", "eval.yaml", "out").exit_code == 0
    after = verdict(folder, "swe")["tasks"]["text"]["bits_per_byte"]
    assert after == verdict(folder, "est")["tasks"]["text"]["bits_per_byte"] != before


SWEEP = """\
models: {swe: swe, est: est}
base_model: base
methods: {linear: {}, ties: {density: [0.3, 0.5]}, dare_ties: {density: 0.5}}
dtype: float32
seed: 3
"""


def test_merges_of_a_sweep_are_scored_without_writing_them(folder, loads):
    (folder / "sweep.yaml").write_text(SWEEP)
    (folder / "ties.yml").write_text(
        "{merge_method: ties, base_model: base, models: [{model: swe}, {model: est}], "
        "parameters: {weight: 1.0, density: 0.3}, dtype: float32}"
    )
    config = CONFIG.replace("models: {swe: swe, est: est}", "models: {mine: ties.yml}\nsweep: sweep.yaml")
    (folder / "memory.yaml").write_text(config)
    found = told("eval", "memory.yaml", "memory")
    assert found.exit_code == 0, found.stderr
    assert len(loads) == 1  # the next merge takes the place of the last one
    assert told("sweep", "sweep.yaml", "merges").exit_code == 0
    names = [entry["name"] for entry in json.loads((folder / "merges" / "sweep.json").read_text())]
    assert len(names) == 4
    written = ", ".join(f"{name}: merges/{name}" for name in names)
    (folder / "disk.yaml").write_text(CONFIG.replace("swe: swe, est: est", written))
    assert told("eval", "disk.yaml", "disk").exit_code == 0
    results = [verdict(folder, name, "memory")["tasks"] for name in names]
    for name, tasks in zip(names, results, strict=True):
        rows = [
            [json.loads(line)["rows"] for line in (folder / out / part["scores"]).read_text().splitlines()]
            for out in ("memory", "disk")
            for part in verdict(folder, name, out)["tasks"].values()
        ]
        half = len(rows) // 2
        assert rows[:half] == rows[half:]
        assert tasks["text"]["bits_per_byte"] == verdict(folder, name, "disk")["tasks"]["text"]["bits_per_byte"]
    assert len({tasks["text"]["bits_per_byte"]["value"] for tasks in results}) == 4
    alone = verdict(folder, "mine", "memory")
    (same,) = [name for name in names if "ties" in name and "0.3" in name]
    assert alone["tasks"]["text"]["bits_per_byte"] == verdict(folder, same, "memory")["tasks"]["text"]["bits_per_byte"]
    assert alone["model"]["provenance"]["recipe"]["method"] == "ties"
    assert not (folder / "memory" / "merges").exists()


def test_any_format_gives_the_numbers_of_its_weights(folder):
    for name, extra in (("universal", ()), ("zero3", ("--dp", "3"))):
        assert told("convert", "swe", name, "--format", name, *extra).exit_code == 0
        (folder / name / "tokenizer.json").write_bytes((folder / "swe" / "tokenizer.json").read_bytes())
        (folder / name / "tokenizer_config.json").write_bytes((folder / "swe" / "tokenizer_config.json").read_bytes())
    (folder / "eval.yaml").write_text(CONFIG.replace("est: est", "universal: universal, zero3: zero3"))
    found = told("eval", "eval.yaml", "out")
    assert found.exit_code == 0, found.stderr
    one, *others = (verdict(folder, name)["tasks"]["text"]["bits_per_byte"] for name in ("swe", "universal", "zero3"))
    assert others == [one, one]


def test_files_of_all_kinds_hold_the_same_pairs(folder):
    records = [{"good": good, "bad": bad, "UID": kind, "lang": "swe"} for good, bad, kind in PAIRS]
    records += [{"good": "tere hommikust", "bad": "tere hommik", "UID": "case", "lang": "est"}]
    (folder / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), folder / "p.parquet")
    text = "".join(",".join(record.values()) + "\n" for record in records)
    (folder / "p.csv").write_text("first,second,UID,lang\n" + text)
    kinds = {
        "jsonl": "files: p.jsonl, where: {lang: swe}",
        "parquet": "files: p.parquet, where: {lang: swe}",
        "csv": "files: p.csv, good: first, bad: second, phenomenon: UID, where: {lang: swe}",
    }
    tasks = "".join(f"  {name}: {{kind: pairs, {about}}}\n" for name, about in kinds.items())
    (folder / "eval.yaml").write_text(CONFIG + tasks)
    found = told("eval", "eval.yaml", "out", "--model", "swe")
    assert found.exit_code == 0, found.stderr
    tasks = verdict(folder, "swe")["tasks"]
    for name in kinds:
        assert tasks[name]["sum"] == tasks["verbs"]["sum"]


def test_a_data_set_in_the_form_of_the_hub(folder):
    """MultiBLiMP's form: a folder a language with data.tsv."""
    for language, rows in {"swe": PAIRS, "est": [("tere hommikust", "tere hommik", "case")]}.items():
        place = folder / "multi" / language
        place.mkdir(parents=True)
        lines = "".join("\t".join(pair) + "\n" for pair in rows)
        (place / "data.tsv").write_text("sen\twrong_sen\tphenomenon\n" + lines)
    configs = "".join(
        f'- config_name: {language}\n  data_files: {language}/data.tsv\n  sep: "\\t"\n' for language in ("swe", "est")
    )
    (folder / "multi" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    text = (
        CONFIG
        + "  multi: {kind: pairs, hub: multi, config: swe}\n  both: {kind: pairs, hub: multi, config: [swe, est]}\n"
        "  every: {kind: pairs, hub: multi, config: all}\n"
    )
    (folder / "eval.yaml").write_text(text)
    found = told("eval", "eval.yaml", "out", "--model", "swe")
    assert found.exit_code == 0, found.stderr
    tasks = verdict(folder, "swe")["tasks"]
    assert tasks["multi"]["sum"] == tasks["verbs"]["sum"]
    assert set(tasks["both"]["sum"]["phenomena"]) == {"verb", "article", "case"}
    assert tasks["every"]["data"] == tasks["both"]["data"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("pairs.tsv", "pair.tsv"), "eval.yaml:4: tasks.verbs: pair.tsv: no such file in "),
        (("text.jsonl, lang", "text.jsonl, field: body, lang"), "text.jsonl:1: unknown field 'body': allowed are text"),
        (
            ("files: pairs.tsv", "files: pairs.tsv, good: god"),
            "pairs.tsv:2: unknown column 'god': allowed are sen, wr",
        ),
        (
            ("files: pairs.tsv", "files: bare.tsv"),
            "bare.tsv:2: which columns hold the sentences? Name them as good",
        ),
        (("files: pairs.tsv", "files: empty.tsv"), "empty.tsv: holds no pairs"),
        (("files: pairs.tsv", "files: torn.tsv"), "torn.tsv:2: 2 columns; the first line names 3"),
        (("files: pairs.tsv", "files: same.jsonl"), "same.jsonl:1: good and bad are the same sentence"),
        (("files: pairs.tsv", "files: blank.jsonl"), "blank.jsonl:1: bad holds no text ('')"),
        (
            ("files: pairs.tsv", "files: notes.md"),
            "notes.md: unknown kind of file '.md': allowed are .tsv, .csv",
        ),
        (
            ("files: pairs.tsv", "files: pairs.tsv, where: {phenomenon: case}"),
            "pairs.tsv: unknown phenomenon 'case': allowed are article, verb",
        ),
        (("text.jsonl, lang", "empty.txt, lang"), "tasks.text: "),
        (("kind: text", "kind: texts"), "eval.yaml:3: tasks.text.kind: unknown kind 'texts': allowed are text, pairs"),
        (("window: 64, stride: 32", "window: 64, stride: 64"), "tasks.text.stride: 64 is not below the window of 64"),
        (("window: 64, stride: 32", "window: 4096"), "window 4096 is not possible: allowed are 2 to 512 tokens"),
        (("kind: pairs,", "kind: pairs, prompts: [a],"), "tasks.verbs.prompts: has no meaning for kind pairs"),
        (("files: pairs.tsv, ", ""), "tasks.verbs: exactly one of `files` (globs) and `hub` (a data set)"),
        (("est: est", "est: nowhere"), "eval.yaml: models.est: "),
        (("est: est", "est: hollow"), "models.est: "),
        (("est: est", "est: bare"), "est: "),
        (
            ("files: pairs.tsv", "files: long.jsonl"),
            "swe: verbs: good pair 0 (bad): 601 tokens are more than the",
        ),
    ],
)
def test_what_is_wrong_is_one_line(change, said, folder):
    (folder / "empty.tsv").write_text("sen\twrong_sen\n")
    (folder / "bare.tsv").write_text("one\ttwo\na\tb\n")
    (folder / "torn.tsv").write_text("sen\twrong_sen\tphenomenon\na\tb\n")
    (folder / "same.jsonl").write_text('{"good": "a b", "bad": "a b"}\n')
    (folder / "blank.jsonl").write_text('{"good": "a b", "bad": ""}\n')
    (folder / "long.jsonl").write_text(json.dumps({"good": "a", "bad": "§" * 300, "phenomenon": "good"}) + "\n")
    (folder / "notes.md").write_text("notes\n")
    (folder / "empty.txt").write_text("")
    (folder / "hollow").mkdir()
    (folder / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "bare" / name).write_bytes((folder / "swe" / name).read_bytes())
    (folder / "eval.yaml").write_text(CONFIG.replace(*change))
    found = told("eval", "eval.yaml", "out")
    assert found.exit_code == 2, found.output
    assert found.stderr.count("\n") == 1 and found.stderr.startswith("growmerge: ")
    assert said in found.stderr


def test_a_tokenizer_without_an_end(folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / "swe" / name).unlink()
    found = told("eval", "eval.yaml", "out")
    assert found.exit_code == 2
    assert found.stderr.endswith(
        "swe: text: the tokenizer has neither a BOS nor an EOS token: the first token of a text cannot be scored\n"
    )


def test_killed_it_goes_on_and_two_at_once_do_not_mix(folder, scored, monkeypatch):
    monkeypatch.setattr(growmerge.evaluating, "PART", 1)  # an item a part
    assert told("eval", "eval.yaml", "whole", "--model", "swe").exit_code == 0
    (folder / "one.py").write_text(
        "import growmerge.evaluating, growmerge.cli\ngrowmerge.evaluating.PART = 1\ngrowmerge.cli.main()\n"
    )
    stuck = folder / "stuck"
    process = subprocess.Popen(
        [sys.executable, "one.py", "eval", "eval.yaml", "out", "--model", "swe"],
        env={**os.environ, "GROWMERGE_FAULT": f"{stuck}:eval/2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not stuck.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    second = told("eval", "eval.yaml", "out", "--model", "swe")
    assert second.exit_code == 2
    assert "growmerge eval of swe (pid " in second.stderr
    assert second.stderr.count("\n") == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "out" / "swe.json").exists()
    # a line that the kill has cut
    (file,) = (folder / "out" / "scores").glob("*/*.jsonl")
    with file.open("a") as torn:
        torn.write('{"from": 2, "rows": [["d')
    scored.clear()
    assert told("eval", "eval.yaml", "out", "--model", "swe").exit_code == 0
    assert len(scored) == 1 + 3 + 6  # of the text's three documents, two were scored before the kill
    assert verdict(folder, "swe") == verdict(folder, "swe", "whole")


@pytest.mark.slow
def test_ranks_of_a_launcher_share_the_work(folder):
    """Three ranks get the numbers of one, with lm-eval's tasks among them; one of them writes."""
    (folder / "tasks").mkdir()
    about = {"task": "cloze", "dataset_path": "json", "output_type": "loglikelihood", "test_split": "test"}
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "text.jsonl")}}}
    metric = {"metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]}
    asked = {"doc_to_text": "Det", "doc_to_target": "{{text.split()[0]}}"}
    (folder / "tasks" / "cloze.yaml").write_text(json.dumps({**about, **data, **asked, **metric}))
    harness = "  theirs: {kind: harness, names: [cloze], include: tasks}\n"
    (folder / "eval.yaml").write_text(CONFIG + harness)
    alone = told("eval", "eval.yaml", "alone")
    assert alone.exit_code == 0, alone.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*torchrun, "-m", "growmerge.cli", "eval", "eval.yaml", "out", "--batch-tokens", "200"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("swe") == 1  # of the table
    for name in ("swe", "est"):
        ours, theirs = verdict(folder, name)["tasks"], verdict(folder, name, "alone")["tasks"]
        assert ours["text"]["bits_per_byte"] == pytest.approx(theirs["text"]["bits_per_byte"], rel=1e-5)
        assert ours["verbs"] == theirs["verbs"]
        assert ours["samples"] == theirs["samples"]
        perplexity = ours["theirs"]["results"]["cloze"]["perplexity,none"]
        assert perplexity == pytest.approx(theirs["theirs"]["results"]["cloze"]["perplexity,none"], rel=1e-4)
    files = sorted(path.relative_to(folder / "out") for path in (folder / "out").rglob("*.jsonl"))
    assert files == sorted(path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*.jsonl"))
