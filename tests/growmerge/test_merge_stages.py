"""Merge stages that go by statistics of the models, and merge stages that search: real models, stage by stage."""

import dataclasses
import json
import os
import shutil
from fnmatch import fnmatch

import pytest
import torch
from click.testing import CliRunner
from pipeline_files import change, write
from toy import write_toy

from checkpoint import manifest
from checkpoint.open import open_checkpoint
from checkpoint.source import read_tensor
from growmerge import run, statistics
from growmerge.cli import main
from growmerge.context import Context, Resources
from growmerge.events import EventLog
from growmerge.results import _searches
from growmerge.statistics import Pass, make_statistics
from growmerge.status import _found, rows
from growmerge.verbs import do
from merge import search as merge_search
from merge.gram import open_gram
from merge.merge import merge
from parallel.errors import InputError
from parallel.ranks import ALONE
from train.data.tokenizer import train_tokenizer

PIPELINE = """
name: merges
seed: 3
corpora:
  eng: {name: Toy English, splits: {first: 0.7, rest: 0.3}, sources: [{files: eng/*.txt}]}
  swe: {name: Toy Swedish, sources: [{files: swe/*.txt}]}
heldout: {share: 0.1, max_bytes: 6000}
tokenizer: {path: base}
mixtures: {first: {eng.first: 1}}
training: {precision: float32, sequence_length: 32}
stages:
  "to-{method}":
    each: {method: [linear, fisher, regmean]}
    merge:
      from: [./swe-model, ./est-model]
      method: "{method}"
      statistics: {text: [swe, ./est.txt], tokens: 700, sequence_length: 32}
  found:
    merge:
      from: [./swe-model, ./est-model]
      base: ./base
      method: search
      weights: [1, 0.5]
      search: {method: ties, texts: {eng: eng.rest, est: ./est.txt}, evaluations: 9, tokens: 80, sequence_length: 32}
  found-fisher:
    merge:
      from: [./swe-model, ./est-model]
      method: search
      statistics: {text: [swe, ./est.txt], tokens: 700, sequence_length: 32}
      search: {method: fisher, texts: {swe: swe}, evaluations: 6, tokens: 80, sequence_length: 32}
"""
NAMES = ("statistics/fisher-swe-model", "statistics/fisher-est-model")


class Stages:
    """The tasks of a pipeline file, done one by one in this process."""

    def __init__(self, folder, text=PIPELINE):
        (folder / "merges.yaml").write_text(text)
        self.plan = run.load(folder / "merges.yaml", folder / "run")
        self.tasks = self.plan.tasks
        self.events = []
        self.context = Context(
            pipeline=self.plan.pipeline,
            nodes=self.plan.nodes,
            tasks=self.tasks,
            base=self.plan.base,
            workdir=self.plan.workdir,
            ranks=ALONE,
            resources=Resources(threads=1),
            report=lambda event: self.events.append(event),
        )

    def make(self, name):
        """Do a task and what it needs; return its folder."""
        for other in self.tasks[name].inputs:
            self.make(other)
        if not self.tasks[name].done:
            do(self.context, self.tasks[name])
        return self.tasks[name].folder

    def model(self, name):
        for around in ("tokens", name):  # whose tokenizer goes with every model
            self.make(around)
        return open_checkpoint(self.tasks[name].folder / "model")

    def statistics(self, name):
        return [other for other in self.tasks[name].inputs if other.startswith("statistics/")]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """Three models beside one another, text, and a tokenizer."""
    write_toy(tmp_path)
    text = "".join(path.read_text() for path in sorted((tmp_path / "est").iterdir())[:4])
    (tmp_path / "est.txt").write_text(text)
    for seed, name in enumerate(("base", "swe-model", "est-model")):
        tiny_folder(name, seed, vocab_size=320)
    train_tokenizer([text], vocab_size=320, folder=tmp_path / "base")
    return tmp_path


def same(one, other):
    return all(
        torch.equal(read_tensor(one, name), read_tensor(other, name))
        for name, info in one.infos.items()
        if info.tied_to is None
    )


def opened(folder):
    return [open_checkpoint(folder / name) for name in ("swe-model", "est-model")]


@pytest.mark.parametrize(("method", "statistic"), [("fisher", "fisher"), ("regmean", "gram")])
def test_a_merge_by_statistics_is_what_the_command_line_makes_of_the_same_text(folder, method, statistic):
    stages = Stages(folder)
    made = stages.model(f"to-{method}")
    found = []
    for name, text in (("swe-model", stages.make("text") / "swe" / "train.jsonl"), ("est-model", folder / "est.txt")):
        asked = {"statistic": statistic, "model": folder / name, "texts": (text,), "tokenizer": folder / "base"}
        make_statistics(Pass(**asked, folder=folder / f"{name}-out", tokens=700, sequence_length=32))
        found.append(str(folder / f"{name}-out"))
    wanted = merge(opened(folder), method, parameters={statistic: found})
    assert same(made, wanted)
    assert not same(made, merge(opened(folder), method, parameters={statistic: found, "weight": [1, 2]}))
    record = made.run.provenance
    assert [parent["name"] for parent in record["parents"]] == [
        *("./swe-model", "./est-model"),
        *stages.statistics(f"to-{method}"),
    ]
    counted = [stages.tasks[name].folder / statistic / "growmerge.json" for name in stages.statistics(f"to-{method}")]
    texts = [json.loads(path.read_text())["statistic"]["texts"][0]["name"] for path in counted]
    assert texts == ["swe", "./est.txt"]


def test_a_split_is_the_text_of_its_documents_alone(folder):
    changed = PIPELINE.replace("text: [swe, ./est.txt], tokens: 700", "text: eng.rest, tokens: 1000000")
    stages = Stages(folder, changed)
    made = stages.make(stages.statistics("to-regmean")[0]) / "gram"
    lines = (stages.make("text") / "eng" / "train.jsonl").read_text().splitlines()
    rest = [line for line in lines if json.loads(line)["split"] == "rest"]
    assert 0 < len(rest) < len(lines)
    (folder / "rest.jsonl").write_text("\n".join(rest))
    asked = {"model": folder / "swe-model", "tokenizer": folder / "base", "folder": folder / "out"}
    make_statistics(Pass(statistic="gram", texts=(folder / "rest.jsonl",), sequence_length=32, **asked))
    ours, theirs = (open_gram(place, open_checkpoint(folder / "swe-model")) for place in (made, folder / "out"))
    assert ours.tokens == theirs.tokens
    assert all(torch.equal(ours.matrix(name), theirs.matrix(name)) for name in ours.weights)


def test_statistics_are_shared_and_made_anew_when_what_they_are_of_has_changed(folder):
    before = Stages(folder).tasks
    names = [name for name in before if name.startswith("statistics/")]
    # Two merges by Fisher share theirs.
    assert [name.rpartition("-")[0] for name in names] == [*NAMES, *(one.replace("fisher", "gram") for one in NAMES)]

    def differing(text=PIPELINE):
        after = Stages(folder, text).tasks
        return {name for name in before if name not in after or after[name].key != before[name].key}

    def alone(found):
        return (
            {name.split("-")[0] if name.startswith("statistics") else name for name in found}
            - {"report"}
            - {name for name in found if name.startswith("evaluate/")}
        )

    assert differing() == set()
    fewer = PIPELINE.replace("tokens: 700", "tokens: 60", 1)
    assert alone(differing(fewer)) == {"to-fisher", "to-regmean", "statistics/gram"}
    # Grids share parameters and statistics: what they mean nothing to is as it was.
    floor = PIPELINE.replace('method: "{method}"\n', 'method: "{method}"\n      parameters: {floor: 1e-3}\n')
    assert alone(differing(floor)) == {"to-fisher"}
    given = "      statistics: {text: [swe, ./est.txt], tokens: 700, sequence_length: 32}\n  found:"
    without = PIPELINE.replace("linear, fisher, regmean", "linear").replace(given, "  found:")
    assert without.count("statistics") == 1 and "to-linear" not in differing(without)
    os.utime(folder / "est.txt", ns=(1, 1))
    changed, by_both = differing(), ("to-fisher", "to-regmean", "found-fisher")
    assert alone(changed) == {*by_both, "found", "statistics/fisher", "statistics/gram"}
    assert not any("swe-model" in name for name in changed)


def test_interrupted_statistics_go_on_and_damaged_ones_are_made_again(folder, monkeypatch):
    monkeypatch.setattr(statistics, "BATCH", 64)
    whole, stages = Stages(folder), Stages(folder)
    name = whole.statistics("to-fisher")[0]
    model = whole.make(name) / "fisher" / "model.safetensors"
    wanted = model.read_bytes()
    steps = [event["step"] for event in whole.events if event["event"] == "step"]
    assert steps[-1] == 700 and len(steps) > 21
    # Damaged, it is not done, and is made again.
    model.write_bytes(wanted[:-4])
    assert not stages.tasks[name].done
    stages.make(name)
    assert model.read_bytes() == wanted
    manifest.check(model.parent, deep=True)

    def stop(event):
        if event.get("step") == steps[20]:
            raise KeyboardInterrupt

    shutil.rmtree(stages.tasks[name].folder)
    with pytest.raises(KeyboardInterrupt):
        do(dataclasses.replace(stages.context, report=stop), stages.tasks[name])
    stages.events.clear()
    stages.make(name)
    assert [event["step"] for event in stages.events if event["event"] == "step"] == steps[20:]
    assert model.read_bytes() == wanted


def test_a_search_leaves_its_outcome_beside_the_model_that_it_has_found(folder):
    stages = Stages(folder)
    made = stages.model("found")
    path = stages.tasks["found"].folder / "model" / "search.json"
    found = json.loads(path.read_text())
    assert found["search"]["seed"] == 3 and found["merges"] == len(found["curve"]) == 9
    assert found["best"]["mean"] == pytest.approx(min(found["curve"]), abs=1e-6)
    assert found["best"]["mean"] < found["start"]["mean"]
    assert found["start"]["bits_per_byte"].keys() == {"eng", "est"}
    assert found["models"] == ["./swe-model", "./est-model"]
    weights = found["weights"]["all"]
    assert weights == [w * f for w, f in zip([1, 0.5], found["best"]["factors"]["all"], strict=True)]
    about = {"base": open_checkpoint(folder / "base"), "parameters": {"density": 0.5}, "seed": 3}
    assert same(made, merge(opened(folder), "ties", weights=weights, **about))
    # The results and the status know it.
    assert _searches(stages.context) == {
        "found": ({key: one for key, one in found.items() if key != "seconds"}, found["seconds"])
    }
    said = f"searched: {found['start']['mean']:.4f} -> {found['best']['mean']:.4f} bits per byte"
    assert _found(stages.tasks["found"].folder) == f"{said}, 9 merges"
    log = EventLog(stages.plan.workdir / "log.jsonl")
    for event in [{"event": "start", "stage": "found"}, *stages.events, {"event": "done", "stage": "found"}]:
        log.write(event)
    (row,) = [row for row in rows(stages.plan.workdir) if row.stage == "found"]
    assert row.state == "done" and row.note.startswith(said)
    # Other development text is another search.
    other = Stages(folder, PIPELINE.replace("eng.rest", "eng.first"))
    assert other.tasks["found"].key != stages.tasks["found"].key
    other.model("found")
    again = json.loads((other.tasks["found"].folder / "model" / "search.json").read_text())
    assert again["start"]["bits_per_byte"]["est"] == found["start"]["bits_per_byte"]["est"]
    assert again["start"]["bits_per_byte"]["eng"] != found["start"]["bits_per_byte"]["eng"]


def test_a_search_may_be_of_a_method_that_goes_by_statistics(folder):
    stages = Stages(folder)
    made = stages.model("found-fisher")
    found = json.loads((stages.tasks["found-fisher"].folder / "model" / "search.json").read_text())
    assert stages.statistics("found-fisher") == stages.statistics("to-fisher")
    folders = [str(stages.tasks[name].folder / "fisher") for name in stages.statistics("found-fisher")]
    weights = found["weights"]["all"]
    assert weights != [1.0, 1.0]
    assert same(made, merge(opened(folder), "fisher", weights=weights, parameters={"fisher": folders}))


def test_an_interrupted_search_goes_on_with_the_tries_that_are_left(folder, monkeypatch):
    made = []
    bits_per_byte = merge_search.bits_per_byte
    monkeypatch.setattr(merge_search, "bits_per_byte", lambda *given: made.append(1) or bits_per_byte(*given))
    stages = Stages(folder)
    stages.make("tokens")

    def stop(event):
        if event.get("step") == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(dataclasses.replace(stages.context, report=stop), stages.tasks["found"])
    assert len(made) == 2 * 5
    stages.make("found")
    assert len(made) == 2 * 9
    model = stages.tasks["found"].folder / "model" / "model.safetensors"
    wanted = model.read_bytes()
    # A model that is damaged later is merged again without a search.
    model.write_bytes(wanted[:-4])
    stages.make("found")
    assert model.read_bytes() == wanted and len(made) == 2 * 9


def test_on_a_cluster_statistics_wait_for_the_model_and_merges_for_them(tmp_path):
    text = change("each: {setup: [1x, 2x], method: [linear, ties]}", "each: {setup: [1x], method: [fisher]}")
    text = change('method: "{method}"', 'method: "{method}"\n      statistics: {text: eng}', text)
    path = write(tmp_path, text)
    shown = CliRunner().invoke(main, ["run", str(path), "--workdir", str(tmp_path / "run"), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    table = [line.split() for line in shown.output.splitlines()]
    first, second = (line[0] for line in table if line and line[0].startswith("statistics/"))
    assert [first, "measure", "seed", "on", "eng"] in table
    options = ["--dry-run", "--executor", "slurm"]
    scripts = CliRunner().invoke(main, ["run", str(path), "--workdir", str(tmp_path / "run"), *options]).output
    waits = {}
    for script in scripts.split("# --- ")[1:]:
        lines = script.splitlines()
        found = [line.partition("afterok:")[2] for line in lines if "--dependency=" in line]
        needed = {one.strip("@") for one in found[0].split(":")} if found else set()
        waits |= dict.fromkeys(lines[0].split(", "), needed)  # those that wait for the same share an array
    assert waits[first] == {"tokens", "seed"} and waits[second] == {"tokens", "base-1x"}
    assert waits["1x-fisher"] == {"seed", "base-1x", first, second}


TWO = 'from: [seed, "base-{setup}"]\n      base: seed\n      method: "{method}"\n'
METHODS = "method: [linear, ties]"


def merged(*lines, method="fisher"):
    """Return SMALL with a method in its grid and further lines, from line 46 on, in its merge."""
    text = change(METHODS, f"method: [linear, {method}]")
    return change(TWO, TWO + "".join(f"      {line}\n" for line in lines), text)


SEARCH = "search: {method: ties, texts: {eng: eng}}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (merged(), "42: stages.{setup}-{method}.merge: method fisher needs `statistics`: *such as {text: swe}"),
        (merged("statistics: {tokens: 5}"), "46: *.statistics: the key 'text' is missing; needed are text"),
        (merged("statistics: {text: fin}"), "46: *.text: unknown corpus or split 'fin': *eng.first*path needs a /)"),
        (merged("statistics: {text: eng.frist}"), "46: *unknown corpus or split 'eng.frist': *'eng.first'?*"),
        (merged("statistics: {text: [eng, ./no.txt]}"), "46: *.statistics.text.1: no file './no.txt' in *"),
        (merged("statistics: {text: [eng]}"), "46: *.statistics.text: 1 texts for 2 models: give one for all, or *"),
        (merged("statistics: {text: eng, token: 5}"), "46: *.statistics: unknown key 'token': *'tokens'?"),
        (merged("statistics: {text: eng, tokens: 0}"), "46: *.tokens: 0 is out of range: allowed is at least 1"),
        (merged("statistics: {text: eng, labels: no}"), "46: *.labels: *unknown labels 'no': *text, sampled"),
        (
            merged("statistics: {text: eng}", method="ties"),
            "46: stages.{setup}-{method}.merge.statistics: means nothing to method linear, ties: *fisher and regmean",
        ),
        (
            merged("statistics: {text: eng, sequence_length: 900}"),
            "40: stage 1x-fisher: statistics.sequence_length 900 is more than the model's max_position_embeddings, 128",
        ),
        (merged("parameters: {fisher: 1}", "statistics: {text: eng}"), "46: *.fisher: unknown parameter 'fisher': *"),
        (merged(method="search"), "42: *.merge: method search needs `search`: the method whose weights *"),
        (merged(SEARCH, method="ties"), "46: *.merge.search: means nothing to method linear, ties: it is for search"),
        (merged("search: {method: ties}", method="search"), "46: *.search: the key 'texts' is missing; needed are *"),
        (merged(SEARCH.replace("ties", "tise"), method="search"), "46: *.search.method: unknown method with weights*"),
        (merged(SEARCH.replace("{eng: eng}", "{}"), method="search"), "46: *.search.texts: texts: a mapping of *"),
        (merged(SEARCH.replace(": eng}", ": ./no}"), method="search"), "46: *.search.texts.eng: no file './no' in *"),
        (merged(SEARCH.replace("}}", "}, steps: 1}"), method="search"), "46: *.search: unknown key 'steps': *"),
        (merged(SEARCH.replace("}}", "}, blocks: 0}"), method="search"), "46: *.search.blocks: blocks is 0: *from 1 *"),
        (merged(SEARCH.replace("ties", "fisher"), method="search"), "42: *: method fisher needs `statistics`: *"),
        (
            merged(SEARCH, method="search"),
            "40: stage 1x-search: search.sequence_length 512 is more than the model's max_position_embeddings, 128",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(text, line, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        run.load(path, tmp_path / "run")
    told = str(caught.value)
    assert fnmatch(told, f"{path}:{line}".replace("[", "[[]")), told
    assert "\n" not in told
