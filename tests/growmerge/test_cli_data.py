"""`growmerge data prepare`: its table, what is up to date, and the mistakes that newcomers make, one line each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from toy import growmerge

from growmerge.config import load_file
from growmerge.data import prepare_corpora
from growmerge.schema_data import DataConfig
from parallel.errors import InputError
from train.data.tokenizer import train_tokenizer
from train.data.tokens import open_tokens

CONFIG = """folder: out
tokenizer: tok
seed: 3
workers: 2
corpora:
  swe:
    name: Swedish
    sources:
      - {files: "swe/*.jsonl", licence: CC0-1.0}
    clean: {min_words: 3}
  est:
    sources:
      - hub: est
    splits: {first: 0.8, rest: 0.2}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file for two small languages."""
    for language in ("swe", "est"):
        (tmp_path / language).mkdir()
        lines = [f"{language} {number} the text of document {number * 7919 % 1000}" for number in range(60)]
        rows = [{"id": f"{number}", "text": line} for number, line in enumerate([*lines, "too short"])]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / language / "a.jsonl").write_text(text)
    train_tokenizer([text], vocab_size=300, folder=tmp_path / "tok")
    path = tmp_path / "data.yaml"
    path.write_text(CONFIG)
    return path


def test_a_table_says_what_was_made_and_a_second_run_does_nothing(config: Path) -> None:
    shown = forked.growmerge("data", "prepare", str(config), COLUMNS="150")
    assert shown.returncode == 0, shown.stderr
    rows = {line.split()[0]: line.split() for line in shown.stdout.splitlines()}
    swe, est = (json.loads((config.parent / "out" / f"{name}.json").read_text()) for name in ("swe", "est"))
    assert swe["documents"] + swe["heldout"]["documents"] == 60
    for name, found in (("swe", swe), ("est", est)):
        ratio = f"{found['bytes'] / found['tokens']:.2f}"
        counts = [f"{found[key]:,}" for key in ("documents", "tokens", "bytes")]
        assert rows[name][:6] == [name, *counts, ratio, str(found["heldout"]["documents"])]
    assert " ".join(rows["swe"][6:]) == "too few words 1"
    parts = [int(rows[f"est.{name}"][1]) for name in ("first", "rest")]
    assert sum(parts) == est["documents"] == int(rows["est"][1])
    assert "swe: done" in shown.stderr and "Traceback" not in shown.stderr
    events = [json.loads(line) for line in (config.parent / "out" / "log.jsonl").read_text().splitlines()]
    assert [event["corpus"] for event in events if event["event"] == "done"] == ["swe", "est"]
    again = forked.growmerge("data", "prepare", str(config), COLUMNS="150")
    first, *table = again.stdout.splitlines()
    assert first == "nothing to do: all 2 corpora are up to date" and table == shown.stdout.splitlines()
    assert not (config.parent / "out" / "lease.json").exists()


def test_what_is_up_to_date_is_known_without_what_takes_long_to_import(config: Path) -> None:
    prepare_corpora(config, workers=1, check=False)
    code = (
        "import sys; from pathlib import Path; from growmerge.data import prepare_corpora;"
        "prepare_corpora(Path(sys.argv[1]), workers=None, check=False);"
        "print(sorted({'datasets', 'pyarrow', 'torch', 'transformers', 'rensa'} & sys.modules.keys()))"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_only_the_corpus_whose_input_changed_is_made_again(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_corpora(config, workers=2, check=False)
    before = (config.parent / "out" / "est.json").stat().st_mtime_ns
    with (config.parent / "swe" / "a.jsonl").open("a") as file:
        file.write('{"text": "one more document here"}\n')
    capsys.readouterr()
    prepare_corpora(config, workers=1, check=True)
    said = capsys.readouterr()
    assert "swe: done" in said.err and "est: done" not in said.err and "nothing to do" not in said.out
    assert (config.parent / "out" / "est.json").stat().st_mtime_ns == before
    assert open_tokens(config.parent / "out" / "swe", vocab_size=300).metadata["cleaned"]["documents"] == 62


def test_every_byte_is_read_where_asked(config: Path) -> None:
    prepare_corpora(config, workers=2, check=False)
    path = config.parent / "out" / "swe.bin"
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[4] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert forked.growmerge("data", "prepare", str(config)).returncode == 0  # by size and time all is as it was
    shown = forked.growmerge("data", "prepare", str(config), "--check")
    assert shown.returncode == 2
    assert shown.stderr.strip().endswith(
        "swe.json: a file that it lists is damaged (checksum); delete it to have all made again"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 3", "sed: 3", "data.yaml:3: unknown key 'sed': allowed are folder, tokenizer, seed, workers, corpora"),
        ("workers: 2", "workers: 0", "data.yaml:4: workers: 0 is out of range: allowed is at least 1"),
        ("folder: out\n", "", "data.yaml:1: the key 'folder' is missing; needed are folder, tokenizer, corpora"),
        ("tokenizer: tok", "tokenizer: tik", "data.yaml:2: tokenizer: {base}/tik: holds no tokenizer.json"),
        ("swe/*.jsonl", "sve/*.jsonl", "data.yaml:9: corpora.swe.sources.0: no file matches 'sve/*.jsonl' in {base}"),
        ("swe/*.jsonl", "swe/a.jsonl*", "unknown reader of swe/a.jsonl*: it needs reader:, now None"),
        ("licence: CC0-1.0", "split: train, config: x", "sources.0.config: has a meaning for a `hub` source alone"),
        ("- hub: est", "- {hub: est, files: a}", "sources.0.files: has no meaning beside `hub`"),
        ("- hub: est", "- {licence: none}", "corpora.est.sources.0: no text: it needs `hub`, `files` (a glob) or"),
        ("- hub: est", "- {hub: est, field: txt}", "est: unknown field 'txt': allowed are id, text; did you mean"),
        ("- hub: est", "- {hub: est, split: test}", "hub: "),
        ("rest: 0.2", "rest: 0.3", "data.yaml:14: corpora.est.splits: the shares add up to 1.1, not to 1"),
        (
            "    splits",
            "    heldout: {share: 1}\n    splits",
            "data.yaml:14: corpora.est.heldout.share: 1 is out of range",
        ),
        ("min_words: 3", "min_words: 99", "language swe has no text: all 61 documents were dropped (see `clean`)"),
        ("min_words: 3", "min_wrds: 3", "data.yaml:10: corpora.swe.clean: unknown key 'min_wrds': allowed are"),
        ("min_words: 3", "ngram: 0", "data.yaml:10: corpora.swe.clean.ngram: 0 is out of range: allowed is at least 1"),
        ("min_words: 3", "evaluation: [x.txt]", "data.yaml:6: corpora.swe: no file matches 'x.txt'"),
    ],
)
def test_a_mistake_is_one_line(config: Path, old: str, new: str, message: str) -> None:
    assert old in CONFIG
    config.write_text(CONFIG.replace(old, new))
    with pytest.raises(InputError) as caught:
        prepare_corpora(config, workers=None, check=False)
    assert message.format(base=config.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_end_with_exit_code_2(config: Path) -> None:
    (config.parent / "tok" / "tokenizer_config.json").write_text("{}")
    (config.parent / "tok" / "special_tokens_map.json").write_text("{}")
    shown = growmerge("data", "prepare", str(config))
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1
    assert shown.stderr.startswith("growmerge: swe: the tokenizer has no EOS token, which ends each document")


def test_the_defaults(config: Path) -> None:
    given, _ = load_file(DataConfig, config)
    corpus = given.corpora["swe"]
    assert (corpus.append_eos, corpus.prepend_bos, corpus.clean.exact_duplicates) == (True, None, True)
    assert (corpus.heldout.share, corpus.heldout.max_bytes) == (0.01, 1_000_000)
    assert corpus.clean.decontaminate and corpus.clean.ngram == 13


def test_two_at_once_in_one_folder_are_refused(config: Path) -> None:
    from slurm.lease import Lease

    (config.parent / "out").mkdir()
    with Lease(config.parent / "out" / "lease.json", "another"):
        shown = forked.growmerge("data", "prepare", str(config))
    assert shown.returncode == 2 and "out is in use: another" in shown.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(config: Path) -> None:
    disk = config.parent / "out"
    disk.mkdir()
    lines = [json.dumps({"id": f"x{number}", "text": f"{number} " * 40}) for number in range(4000)]
    (config.parent / "swe" / "b.jsonl").write_text("\n".join(lines))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        shown = growmerge("data", "prepare", str(config))
        assert shown.returncode == 2, shown.stderr
        (line,) = [line for line in shown.stderr.splitlines() if line.startswith("growmerge: ")]
        assert "no space left while writing; nothing that was complete is lost" in line
        assert not (disk / "swe.json").exists() and "Traceback" not in shown.stderr
        assert not list(disk.rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert forked.growmerge("data", "prepare", str(config)).returncode == 0
        found = open_tokens(disk / "swe").metadata
        assert found["documents"] + found["heldout"]["documents"] == 4060
    finally:
        subprocess.run(["umount", str(disk)], check=True)
