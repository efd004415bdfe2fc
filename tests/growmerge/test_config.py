"""Reading a pipeline file: types, YAML's traps, and a line for everything that can be wrong."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pipeline_files import SMALL, change, load, write

from growmerge.config import load_pipeline, merged_training
from growmerge.schema import MergeMethod, TrainStage
from merge.table import METHODS
from parallel.errors import InputError

SLOTS = [
    "name: small",
    "seed: 3",
    "name: English",
    "first: 0.8",
    "files: texts/eng/*.txt",
    "package: texts==1.0",
    "reader: json-strings",
    "vocab_size: 512",
    "hidden_size: 32",
    "num_attention_heads: 4",
    "num_key_value_heads: 2",
    "eng.first: 1",
    "lr: 6e-3",
    "from: scratch",
    "data: english\n",
    "steps: 5",
    "betas: [0.9, 0.99]",
    "width: 2",
    'method: "{method}"',
    "setup: [1x, 2x], method",
    "models: [seed]",
    "by: 0.4",
    "partition: gpu",
]
"""Places in SMALL whose value garbage is put into."""

ERRORS = [
    # the key
    ("seed: 3", "sed: 3", "2: unknown key 'sed': allowed are name, title, seed,*; did you mean 'seed'?"),
    ("name: English", "nam: English", "5: corpora.eng: unknown key 'nam': allowed are name, sources, splits;*'name'?"),
    ("name: small\n", "", "1: the key 'name' is missing; needed are name, corpora, mixtures, stages"),
    ("    name: English\n", "", "4: corpora.eng: the key 'name' is missing; needed are name"),
    ("seed: 3", "seed: 3\nname: b", "3: the key 'name' is given twice; the first is in line 1"),
    ("  swe:\n    n", "  no:\n    n", "9: the key 'no' is read as bool by YAML: write it in quotes"),
    ("name: small", "1: b", "1: the key '1' is read as int by YAML: write it in quotes"),
    ("name: small", '"a\\nb": b', "1: the key 'a\\nb' holds a control character"),
    (
        "name: small",
        "? [a]\n: b",
        "1: a key has to be text, not a list or mapping (quote keys that begin with a bracket)",
    ),
    # the type
    (
        "seed: 3",
        "seed: three",
        "2: seed: 'three' is not a whole number; allowed is a whole number in plain decimal digits",
    ),
    ("seed: 3", "seed: 3.5", "2: seed: 3.5 is not a whole number;*"),
    ("seed: 3", "seed: 010", "2: seed: 010 is not a whole number;*"),  # octal in YAML 1.1
    ("seed: 3", "seed: 1:30", "2: seed: 1:30 is not a whole number;*"),  # 90 in YAML 1.1
    ("seed: 3", "seed: 99999999999999999999", "2: seed: 99999999999999999999 is not a whole number;*"),
    ("seed: 3", "seed: true", "2: seed: true is not a whole number;*"),
    ("seed: 3", "seed:", "2: seed: nothing is not a whole number;*"),
    ("seed: 3", "seed: [1]", "2: seed: a list is given; allowed is a whole number"),
    ("name: small", "name: no", "1: name: no is read as bool by YAML, not as text: write it in quotes"),
    ("name: small", "name: 3.13", "1: name: 3.13 is read as float by YAML, not as text: write it in quotes"),
    ("name: small", "name: 2025-04-04", "1: name: '2025-04-04' is read as timestamp by YAML, not as text:*"),
    ("name: small", 'name: "a\\0b"', "1: name: 'a\\x00b' holds a control character"),
    ("name: small", "name: {a: b}", "1: name: a mapping is given; allowed is text"),
    ("lr: 6e-3", "lr: fast", "27: training.lr: 'fast' is not a number; allowed is a number, such as 0.5 or 6e-3"),
    ("lr: 6e-3", "lr: .nan", "27: training.lr: .nan is not a number;*"),
    ("lr: 6e-3", "lr: 1e999", "27: training.lr: '1e999' is not a number;*"),
    ("warmup: 2", "betas: [0.9]", "28: training.betas: a list of 1 is given; allowed is a list of 2"),
    ("warmup: 2", "betas: 0.9", "28: training.betas: 0.9 is given; allowed is a list"),
    ("models: [seed]", "models: seed", "47: checks.0.models: 'seed' is given; allowed is a list, such as [seed]"),
    ("- files: texts", "files: texts", "7: corpora.eng.sources: a mapping is given; allowed is a list"),
    (
        "{steps: 10}",
        "[steps]",
        "31: stages.seed.train.training: a list is given; allowed is a mapping of keys to values",
    ),
    ("partition: gpu", "partition: yes", "51: resources.slurm.partition: yes is read as bool by YAML, not as text:*"),
    ("partition: gpu", "partition: [a]", "51: resources.slurm.partition: a list is given; allowed is text"),
    ('method: "{method}"', "parameters: {normalize: maybe}", "45: *.normalize: 'maybe' is not true or false;*"),
    # the value
    ("warmup: 2", "precision: fp16", "28: training.precision: unknown precision 'fp16': allowed are float32, bfloat16"),
    (
        "reader: json-",
        "reader: jso-",
        "12: *.reader: unknown reader 'jso-strings': allowed are jsonl, *'json-strings'?",
    ),
    ("seed: 3", "seed: -1", "2: seed: -1 is out of range: allowed is at least 0"),
    ("lr: 6e-3", "lr: -1", "27: training.lr: -1 is out of range: allowed is at least 0"),
    ("warmup: 2", "warmup: -2", "28: training.warmup: -2 is out of range: allowed is at least 0"),
    ("warmup: 2", "betas: [0.9, 1]", "28: training.betas: 1 is out of range: allowed is at least 0 and below 1"),
    (
        "warmup: 2",
        "warmup: 20\n  steps: 10",
        "28: training.warmup: 20 steps of warm-up are more than the run's 10 steps",
    ),
    ("steps: 10", "steps: -10", "31: stages.seed.train.training.steps: -10 is out of range: allowed is at least 1"),
    ("steps: 10", "stepz: 10", "31: stages.seed.train.training: unknown key 'stepz': allowed are *'steps'?"),
    ("steps: 10", "steps: many", "31: stages.seed.train.training.steps: 'many' is not a whole number;*"),
    ("width: 2", "width: 0", "39: stages.grown.grow.width: 0 is out of range: allowed is at least 1 and at most 1000"),
    ("width: 2", "ffn: 0", "39: stages.grown.grow.ffn: 0 is out of range: allowed is at least 1 and at most 1000"),
    ("width: 2", "heads: 1.5", "39: stages.grown.grow.heads: 1.5 is not a whole number;*"),
    ("width: 2", "method: diagonl", "39: *.method: unknown method 'diagonl': allowed are *'diagonal'?"),
    ("width: 2", "noise_db: -1", "39: *.noise_db: -1 is out of range: allowed is at least 0 and at most 200"),
    ("width: 2", "optimizer: scale", "39: *.optimizer: unknown optimizer 'scale': allowed are reset, *'scaled'?"),
    ("warmup: 2", "dynamics: keep", "28: training.dynamics: unknown dynamics 'keep': allowed are preserve, mup, free"),
    ("ranks: 2", "ranks: 0", "51: resources.ranks: 0 is out of range: allowed is at least 1"),
    ("name: small", "name: ../x", "1: name: '../x' cannot be a name: it becomes a folder;*"),
    (
        "  swe:\n    n",
        "  s w:\n    n",
        "9: corpora.s w: 's w' cannot be a language's code: use letters, digits, - and _",
    ),
    ("vocab_size: 512", "vocab_size: 100", "13: tokenizer.vocab_size: 100 is out of range: allowed is at least 258"),
    ("hidden_size: 32", "hidden_size: 30", "17: model.num_attention_heads: 4 heads do not divide hidden_size 30"),
    (
        "hidden_size: 32",
        "hidden_size: 36",
        "17: model.num_attention_heads: 4 heads of 9: rotary embedding needs an even*",
    ),
    ("heads: 2", "heads: 3", "18: model.num_key_value_heads: 3 kv heads do not divide num_attention_heads 4"),
    ("layers: 2", "layers: 20000", "16: model.num_hidden_layers: 20000 is out of range: *at most 10000"),
    (
        "checks:",
        "heldout: {share: 1.5}\nchecks:",
        "46: heldout.share: 1.5 is out of range: allowed is above 0 and below 1",
    ),
    (
        "checks:",
        "evaluation: {stride: 65}\nchecks:",
        "46: evaluation.stride: 65 is not shorter than the window of 64 tokens",
    ),
    # text
    (
        "- files: texts/eng/*.txt",
        "[]",
        "4: corpora.eng: language without text: no `sources`, and no `prepared` folder*",
    ),
    ("- files: texts/eng/*.txt", "- {}", "8: corpora.eng.sources.0: no text: it needs `files` (a glob) or `package`"),
    (", files: sv.json", "", "12: corpora.swe.sources.0: no text: it needs `files`: which files of the wheel"),
    ("*.txt", "*.txt\n        sha256: ab", "9: corpora.eng.sources.0.sha256: has a meaning for a `package` alone,*"),
    (
        "texts==1.0",
        "texts",
        "12: *.package: 'texts' is not pinned: write name==version, such as homeassistant==2025.4.4",
    ),
    ("sv.json", "sv.json, sha256: ab", "12: *.sha256: 'ab' is not a SHA-256: 64 hexadecimal digits in lower case"),
    ("rest: 0.2", "rest: 1.2", "6: corpora.eng.splits.rest: 1.2 is not a share: allowed is above 0 and at most 1"),
    ("rest: 0.2", "rest: 0.1", "6: corpora.eng.splits: the shares add up to 0.9, not to 1"),
    (
        "first: 0.8",
        "a.b: 0.8",
        "6: corpora.eng.splits.a.b: 'a.b' cannot be a split's name: use letters, digits, - and _",
    ),
    ("vocab_size: 512", "train_on: [est]", "13: tokenizer.train_on: language without text: unknown corpus 'est':*"),
    ("{eng.first: 1}", "{}", "22: mixtures.english: the mixture is empty: give weights of corpora, such as {eng: 1}"),
    ("eng.first", "eng.frist", "22: mixtures.english.eng.frist: unknown split of eng 'frist': allowed are *'first'?"),
    ("{eng.first: 1}", "{eng.first: 0}", "22: mixtures.english.eng.first: 0 is not a weight: allowed is above 0"),
    (
        "{swe: 0.9",
        "{swd: 0.9",
        "23: mixtures.swe.swd: language without text: unknown corpus 'swd': allowed are *'swe'?",
    ),
    # long mixtures
    (
        "{eng.first: 1}",
        "{sampling: weights, weights: {eng.frist: 1}}",
        "22: mixtures.english.weights.eng.frist: unknown corpus 'eng.frist': allowed are eng, eng.first,*'eng.first'?",
    ),
    (
        "{eng.first: 1}",
        "{sampling: temperature, temperature: 2, corpora: [eng, est]}",
        "22: mixtures.english.corpora.1: unknown corpus 'est': allowed are *",
    ),
    (
        "{eng.first: 1}",
        "{sampling: weights, weights: {swe: 1}, replay: [{corpus: eng.rst, share: 0.1}]}",
        "22: mixtures.english.replay.0.corpus: unknown corpus 'eng.rst': allowed are *'eng.rest'?",
    ),
    ("{eng.first: 1}", "{sampling: unimax, corpora: [eng]}", "22: mixtures.english: unimax needs `budget_characters`"),
    (
        "{eng.first: 1}",
        "{part_of: sve, corpora: [swe]}",
        "22: mixtures.english.part_of: unknown mixture 'sve': allowed are english, swe; did you mean 'swe'?",
    ),
    (
        "{eng.first: 1}",
        "{part_of: swe, corpora: [swe, eng.first]}",
        "22: mixtures.english.corpora.1: unknown corpus of swe 'eng.first': allowed are swe, eng.rest;*",
    ),
    (
        "{eng.first: 1}",
        "{part_of: english, corpora: [swe]}",
        "22: mixtures.english.part_of: english is a part itself: name a mixture that is not",
    ),
    (
        "{eng.first: 1}",
        "{stages: [{from_step: 0, mixture: swe}, {from_step: 3, mixture: sew}]}",
        "22: mixtures.english.stages.1.mixture: unknown mixture 'sew': allowed are english, swe; did you mean 'swe'?",
    ),
    (
        "{eng.first: 1}",
        "{stages: [{from_step: 0, mixture: english}]}",
        "22: mixtures.english.stages.0.mixture: english is in stages itself: name a mixture that is not",
    ),
    # the stage
    (
        "width: 2}",
        "width: 2}\n    merge: {from: [seed], method: linear}",
        "38: *exactly one of *; given: grow and merge",
    ),
    ("    grow: {from: seed, width: 2}", "    each: {}", "38: stages.grown: a stage is exactly one of *; given: none"),
    ("grow: {from: seed, width: 2}", "grow: {width: 2}", "39: stages.grown.grow: the key 'from' is missing;*"),
    ("each: {setup: [1x, 2x]}", "each: {setup: [1, 2]}", "33: *.each.setup.0: 1 is read as int by YAML, not as text:*"),
    ("each: {setup: [1x, 2x]}", "each: {setup: []}", "33: stages.base-{setup}.each.setup: the list of values is empty"),
    # YAML itself
    ("name: small", "name: [small", "2: not valid YAML: while parsing a flow sequence expected *(begun in line 1)"),
    ("name: small", "\tname: small", "1: not valid YAML: * found character '\\t' that cannot start any token"),
    ("name: small", "name: *nothing", "1: not valid YAML: found undefined alias 'nothing'"),
    ("name: small", "name: &a [*a]", "1: an alias in it refers to itself"),
    ("name: small", "<<: 3", "1: << takes a mapping or a list of them, not 3"),
    ("name: small", "name: !!python/name:os.system x", "1: the YAML tag '*python/name:os.system' is not allowed: *"),
    ("name: small", 'name: "\\UFFFFFFFF"', "1: not valid YAML: a number or character is too large"),
    ("name: small", "name: " + "[" * 500, "*: not valid YAML: nested too deeply"),
    ("name: small", "name:\n " + "[" * 200 + "]" * 200, "2: nested too deeply: allowed are 50 levels"),
    ("seed: 3", "seed: 3\x07", "2: not valid YAML: it holds the character '\\x07'"),
]


def matches(line: str, pattern: str) -> bool:
    """Whether a line is the pattern, in which each `*` stands for anything."""
    head, *parts = pattern.split("*")
    if not line.startswith(head) or (not parts and line != head):
        return False
    rest = line[len(head) :]
    for part in parts[:-1]:
        if part not in rest:
            return False
        rest = rest.partition(part)[2]
    return not parts or rest.endswith(parts[-1])


@pytest.mark.parametrize(("old", "new", "expected"), ERRORS)
def test_an_error_is_one_line_that_names_file_line_value_and_what_is_allowed(
    old: str, new: str, expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path, change(old, new, SMALL.replace("name: Swedish", "name: Svenska")))
    with pytest.raises(InputError) as caught:
        load(path)
    assert matches(str(caught.value), f"{path}:{expected}"), str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_have_their_fields_types(tmp_path: Path) -> None:
    pipeline, _ = load_pipeline(write(tmp_path, SMALL))
    assert (pipeline.seed, pipeline.title, pipeline.study) == (3, "", None)
    assert pipeline.training.lr == 0.006 and isinstance(pipeline.training.lr, float)  # text in YAML 1.1
    assert pipeline.training.betas == (0.9, 0.95)
    assert pipeline.mixtures["english"]["eng.first"] == 1.0
    assert pipeline.corpora["swe"].sources[0].reader == "json-strings"
    assert pipeline.model is not None and pipeline.model.tie_word_embeddings is True
    assert pipeline.resources.slurm == {"partition": "gpu", "nice": 5}
    assert pipeline.stages["{setup}-{method}"].each == {"setup": ("1x", "2x"), "method": ("linear", "ties")}
    merge = pipeline.stages["{setup}-{method}"].merge
    assert merge is not None and merge.from_ == ("seed", "base-{setup}") and merge.method == "{method}"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1", 1.0), ("1_000", 1000.0), ("6e-3", 0.006), ("'6e-3'", 0.006), ("1.5E2", 150.0), (".5", 0.5), ("+2.", 2.0)],
)
def test_numbers_are_read_however_they_are_written(written: str, value: float, tmp_path: Path) -> None:
    pipeline, _ = load_pipeline(write(tmp_path, change("lr: 6e-3", f"lr: {written}")))
    assert pipeline.training.lr == value


def test_a_stages_own_training_keys_go_before_the_pipelines(tmp_path: Path) -> None:
    pipeline, nodes = load(write(tmp_path, SMALL))
    stage = nodes["base-2x"].stage
    assert isinstance(stage, TrainStage)
    training = merged_training(pipeline, stage)
    assert (training.steps, training.betas) == (5, (0.9, 0.99))
    assert (training.lr, training.warmup, training.clip) == (0.006, 2, 1.0)


def test_lines_are_known_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    _, marks = load_pipeline(path)
    assert marks.lines["stages.seed.train.from"] == 31
    assert marks.lines["stages.{setup}-{method}.merge.from.1"] == 43
    assert marks.at("checks.1.by") == f"{path}:50"
    assert marks.at("checks.1.beats") == f"{path}:48"  # not written: the mapping that it belongs in


def test_anchors_and_merge_keys_are_written_out(tmp_path: Path) -> None:
    text = change("- {package: texts==1.0, files: sv.json,", "- &sv {package: texts==1.0, files: sv.json,")
    text = change("tokenizer:", "      - {<<: *sv, files: more.json}\n      - *sv\ntokenizer:", text)
    pipeline, _ = load_pipeline(write(tmp_path, text))
    first, second, third = pipeline.corpora["swe"].sources
    assert (first.files, second.files, third.files) == ("sv.json", "more.json", "sv.json")
    assert second.package == first.package == "texts==1.0" and third == first


def test_an_earlier_merge_goes_before_a_later_one(tmp_path: Path) -> None:
    text = change(
        "  sequence_length: 64\n  global_batch: 4\n",
        "  <<: [{global_batch: 2, clip: 3}, {global_batch: 9, eps: 1e-6}]\n  clip: 5\n",
    )
    training = load_pipeline(write(tmp_path, text))[0].training
    assert (training.global_batch, training.clip, training.eps) == (2, 5.0, 1e-6)


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    path = write(tmp_path, "\n".join(rows))
    with pytest.raises(InputError, match=r"x\.yaml:6: aliases come to 1111111 values here; allowed are 1000000"):
        load_pipeline(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    for given_path, line in [
        (tmp_path / "y.yaml", f"{tmp_path / 'y.yaml'}: no such file; did you mean 'x.yaml'?"),
        (tmp_path / "no" / "z", f"{tmp_path / 'no' / 'z'}: no such file"),
        (tmp_path, f"{tmp_path}: is a folder, not a YAML file"),
        (path / "below", f"{path / 'below'}: cannot be read (Not a directory)"),
    ]:
        with pytest.raises(InputError) as caught:
            load_pipeline(given_path)
        assert str(caught.value) == line
    for data, line in [
        (b"", f"{path}: the file is empty"),
        (b"# nothing\n", f"{path}: the file is empty"),
        (b"- a\n", f"{path}:1: expected keys such as `name:` and `stages:`, not a list"),
        (b"name: a\ntitle: \xff\n", f"{path}:2: not UTF-8 text (invalid start byte)"),
        (b"name: a\n---\nname: b\n", f"{path}:2: not valid YAML: expected a single document in the stream but found"
                                      " another document (begun in line 1)"),
    ]:  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            load_pipeline(path)
        assert str(caught.value) == line


GARBAGE = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["{x}", "{", "}", "{setup}", "~", "!", "&a", "*a", "<<", "=", "%", "\\", "''", '"\\ud800"', "0x", "0b_"]
    ),
    st.from_regex(r"[-+.0-9_e:]{1,12}", fullmatch=True),
    st.text(max_size=12).map(lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slot=st.sampled_from(SLOTS), garbage=GARBAGE)
@example(slot="files: texts/eng/*.txt", garbage='"\\0"')
@example(slot="from: scratch", garbage="a/" + "b" * 300)
@example(slot="seed: 3", garbage="9" * 5000)
def test_garbage_is_bad_input_and_never_another_error(slot: str, garbage: str, tmp_path: Path) -> None:
    key, _, _ = slot.partition(": ")
    text = SMALL.replace(slot, f"{key}: {garbage}\n" if slot.endswith("\n") else f"{key}: {garbage}")
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load(path)
    except InputError as error:
        line = str(error)
        assert line.startswith(f"{path}:") and len(line.splitlines()) == 1, line


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60))
def test_any_bytes_are_bad_input(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError):
        load_pipeline(path)


def test_the_front_door_imports_nothing_heavy() -> None:
    code = (
        "import sys, growmerge.config, growmerge.graph, growmerge.plan; "
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'deepspeed', 'numpy', 'datasets', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("corpora", "language without text: no corpus is given"),
        ("mixtures", "none is given"),
        ("stages", "none is given"),
    ],
)
def test_a_pipeline_needs_text_mixtures_and_stages(key: str, problem: str, tmp_path: Path) -> None:
    parts = {"corpora": "{a: {name: A, sources: [{files: a.txt}]}}", "mixtures": "{m: {a: 1}}"}
    parts["stages"] = "{s: {grow: {from: ./x}}}"
    text = "name: n\n" + "\n".join(f"{name}: {'{}' if name == key else part}" for name, part in parts.items())
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_pipeline(path)
    assert str(caught.value) == f"{path}:{2 + list(parts).index(key)}: {key}: {problem}"


def test_merge_stages_know_every_method():
    assert {*get_args(MergeMethod)} == {*METHODS, "search"}
