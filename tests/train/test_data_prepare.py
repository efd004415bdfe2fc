"""Corpora to token files, against plain reading and tokenising: any kind of file, shards, processes and kills."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from growmerge.schema_clean import Clean
from growmerge.schema_data import DataCorpus, DataHeldOut, DataSource
from parallel.errors import InputError
from train.data.heldout import shared_ngrams
from train.data.parts import hashed
from train.data.prepare import Settings, prepare
from train.data.rows import read_shard
from train.data.shards import cut_source
from train.data.tokenizer import load_tokenizer, train_tokenizer
from train.data.tokens import open_tokens

WORDS = ("en", "två", "tre", "fyra", "fem", "sex", "sju", "åtta", "nio", "tio", "över", "under", "bakom", "före")
PLAIN = Clean(exact_duplicates=False, decontaminate=False)
NOTHING_HELD = DataHeldOut(share=0)


def texts(count: int, seed: int = 0, lines: int = 4) -> dict[str, str]:
    """Return documents that share no line: each line has a number of its own."""
    rng = random.Random(seed)
    found = {}
    for number in range(count):
        words = [[f"{seed}x{number}x{line}", *rng.choices(WORDS, k=rng.randint(2, 20))] for line in range(lines)]
        found[f"d{seed}-{number}"] = "\n".join(" ".join(line) for line in words)
    return found


def write_jsonl(path: Path, documents: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in documents.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(50).values(), vocab_size=400, folder=folder)
    return folder


def settings(tmp_path: Path, tokenizer: Path, **changes: Any) -> Settings:
    return Settings(**{"folder": tmp_path / "out", "tokenizer": tokenizer, "base": tmp_path, "workers": 2} | changes)


def corpus(*patterns: str, **changes: Any) -> DataCorpus:
    sources = tuple(DataSource(files=pattern) for pattern in patterns)
    return DataCorpus(**{"sources": sources, "clean": PLAIN, "heldout": NOTHING_HELD} | changes)


def documents_in(path: Path, tokenizer: Path) -> list[str]:
    """Return the texts of a token file, BOS and EOS checked and taken off."""
    file, known = open_tokens(path), load_tokenizer(tokenizer)
    found = []
    for start, stop in zip(file.offsets[:-1], file.offsets[1:], strict=True):
        ids = file.tokens[start:stop].tolist()
        assert (ids[0], ids[-1]) == (known.bos, known.eos)
        found.append(known.decode(ids[1:-1]))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the token files and of the held-out text."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in (".bin", ".idx", ".jsonl")}


# Reading in pieces

DOCUMENTS = texts(40) | {"blank lines": "one\n\n  two\n", "5": "an id that is a number"}


def as_jsonl(folder: Path) -> str:
    write_jsonl(folder / "a.jsonl", DOCUMENTS)
    return "*.jsonl"


def as_gzip(folder: Path) -> str:
    write_jsonl(folder / "a.jsonl", DOCUMENTS)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    return "*.jsonl.gz"


def as_zstd(folder: Path) -> str:
    write_jsonl(folder / "a.jsonl", DOCUMENTS)
    with pa.output_stream(str(folder / "a.jsonl.zst"), compression="zstd") as out:
        out.write((folder / "a.jsonl").read_bytes())
    return "*.jsonl.zst"


def as_parquet(folder: Path) -> str:
    table = pa.table({"other": range(len(DOCUMENTS)), "text": list(DOCUMENTS.values()), "id": list(DOCUMENTS)})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    return "*.parquet"


def as_hub_parquet(folder: Path) -> str:
    (folder / "set").mkdir()
    for number in range(3):
        part = dict(list(DOCUMENTS.items())[number * 14 : number * 14 + 14])
        table = pa.table({"id": list(part), "text": list(part.values()), "url": ["x"] * len(part)})
        pq.write_table(table, folder / "set" / f"train-{number}.parquet")
    return "hub"


def as_hub_jsonl(folder: Path) -> str:
    for number in range(3):
        write_jsonl(folder / "set" / f"{number}.jsonl", dict(list(DOCUMENTS.items())[number * 14 : number * 14 + 14]))
    return "hub"


def source_of(pattern: str) -> DataSource:
    return DataSource(hub="set") if pattern == "hub" else DataSource(files=pattern)


@pytest.mark.parametrize("size", [1, 100, 777, 1 << 20])
@pytest.mark.parametrize("make", [as_jsonl, as_gzip, as_zstd, as_parquet, as_hub_parquet, as_hub_jsonl])
def test_pieces_hold_every_document_once_and_in_order(tmp_path: Path, make: Any, size: int) -> None:
    source = source_of(make(tmp_path))
    shards = cut_source(source, tmp_path, size)
    found = [document for shard in shards for document in read_shard(shard, tmp_path, tmp_path)]
    assert found == list(DOCUMENTS.items())
    if make is as_jsonl:
        assert len(shards) == -(-(tmp_path / "a.jsonl").stat().st_size // size)
    if make is as_parquet:
        assert len(shards) == (6 if size <= 100 else 1 if size > 10_000 else len(shards))


def test_crlf_and_documents_without_an_id_are_called_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n\n{"text": "c"}\n{"text": null}')
    for size in (1, 1000):
        shards = cut_source(DataSource(files="a.jsonl"), tmp_path, size)
        found = [document for shard in shards for document in read_shard(shard, tmp_path, tmp_path)]
        assert found == [("a.jsonl@0", "a\nb"), ("a.jsonl@21", "c"), ("a.jsonl@35", None)]
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet", row_group_size=1)
    shards = cut_source(DataSource(files="a.parquet"), tmp_path, 1)
    found = [document for shard in shards for document in read_shard(shard, tmp_path, tmp_path)]
    assert found == [("a.parquet:1", "a"), ("a.parquet:2", "b")]


def test_small_files_share_a_shard(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"text number\n{number}\n\nsecond paragraph")
    for size, count in ((1, 10), (60, 5), (10_000, 1)):
        shards = cut_source(DataSource(files="*.txt"), tmp_path, size)
        found = [document for shard in shards for document in read_shard(shard, tmp_path, tmp_path)]
        assert found == [(str(number), f"text number {number}\nsecond paragraph") for number in range(10)]
        assert len(shards) == count


def test_a_wheel_is_read_as_a_whole(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("p/en.json", json.dumps({"a": "one two three", "b": "same words here"}))
        archive.writestr("p/sv.json", json.dumps({"a": "ett två tre", "b": "same words here"}))
    digest = hashlib.sha256((tmp_path / "w.whl").read_bytes()).hexdigest()
    (tmp_path / digest).mkdir()
    (tmp_path / "w.whl").rename(tmp_path / digest / "w.whl")
    source = DataSource(
        package="w==1", sha256=digest, files="*/sv.json", untranslated="*/en.json", reader="json-strings"
    )
    (shard,) = cut_source(source, tmp_path, 1)
    assert [text for _, text in read_shard(shard, tmp_path, tmp_path)] == ["ett två tre"]


@pytest.mark.parametrize("size", [10, 1000])
@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "text", r"a\.jsonl:2: not valid JSON"),
        (b'{"text": "a"}\n\n["b"]\n', "text", r"a\.jsonl:3: not a JSON object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "text", r"a\.jsonl:2: not UTF-8"),
        (b'{"text": "a"}\n{"text": 5}\n', "text", r"a\.jsonl:2: 'text' is int, not text"),
        (b'{"text": "a"}\n' * 3, "txt", r"a\.jsonl: unknown field 'txt': allowed are text; did you mean 'text'\?"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(
    tmp_path: Path, data: bytes, field: str, message: str, size: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    shards = cut_source(DataSource(files="a.jsonl", field=field), tmp_path, size)
    with pytest.raises(InputError, match=message):
        [list(read_shard(shard, tmp_path, tmp_path)) for shard in shards]


def test_what_is_wrong_with_parquet_compression_and_the_hub(tmp_path: Path) -> None:
    def read(source: DataSource) -> None:
        for shard in cut_source(source, tmp_path, 1000):
            list(read_shard(shard, tmp_path, tmp_path))

    as_parquet(tmp_path)
    with pytest.raises(InputError, match=r"a\.parquet: unknown column 'txt': allowed are other, text, id"):
        read(DataSource(files="a.parquet", field="txt"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"b\.parquet: not a readable parquet file"):
        read(DataSource(files="b.parquet"))
    as_gzip(tmp_path)
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: damaged or cannot be read"):
        read(DataSource(files="a.jsonl.gz"))
    as_hub_jsonl(tmp_path)
    with pytest.raises(InputError, match=r"set: unknown field 'txt': allowed are id, text"):
        read(DataSource(hub="set", field="txt"))
    with pytest.raises(InputError, match=r"^hub: .*set: .*validation"):
        read(DataSource(hub="set", split="validation"))
    with pytest.raises(InputError, match=r"unknown reader of a\.csv: it needs reader:, now None"):
        read(DataSource(files="a.csv") if (tmp_path / "a.csv").write_text("a") else DataSource())


def test_a_row_of_the_hub_may_lack_text_and_its_files_can_be_chosen(tmp_path: Path) -> None:
    as_hub_jsonl(tmp_path)
    (tmp_path / "set" / "2.jsonl").write_text('{"id": "a", "text": "first"}\n{"id": "b", "text": null}\n')
    source = DataSource(hub="set", data_files=("2.jsonl",))
    (shard,) = cut_source(source, tmp_path, 1)
    assert list(read_shard(shard, tmp_path, tmp_path)) == [("a", "first"), ("b", None)]


# From end to end


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[DataCorpus, dict[str, str]]:
    """A corpus of two kinds of files, with its documents in order."""
    first, second = texts(30, seed=1), texts(25, seed=2)
    write_jsonl(tmp_path / "a.jsonl", first)
    table = pa.table({"id": list(second), "text": list(second.values())})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=4)
    return corpus("a.jsonl", "b.parquet"), first | second


def test_tokens_are_those_of_the_documents_in_order(tmp_path: Path, tokenizer: Path, mixed: Any) -> None:
    """Whatever the size of the shards and the number of processes, to the byte."""
    made, documents = mixed
    results = []
    for number, (size, workers) in enumerate([(1 << 25, 1), (500, 3)]):
        given = settings(tmp_path, tokenizer, folder=tmp_path / str(number), shard_bytes=size, workers=workers)
        about = prepare({"swe": made}, given)["swe"]
        results.append(contents(tmp_path / str(number)))
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == ["swe.bin", "swe.idx", "swe.json"]
    assert results[0] == results[1]
    assert documents_in(tmp_path / "1" / "swe", tokenizer) == list(documents.values())
    assert about["documents"] == 55 and about["bytes"] == about["characters"] + sum(
        len(text.encode()) - len(text) for text in documents.values()
    )
    assert about["characters"] == sum(map(len, documents.values()))
    assert [source["documents"] for source in about["sources"]] == [30, 25]
    assert open_tokens(tmp_path / "1" / "swe").metadata == about
    direct = load_tokenizer(tokenizer).encode_batch(list(documents.values()))
    assert about["tokens"] == sum(len(ids) + 2 for ids in direct)


def test_held_out_documents_go_by_a_hash_of_their_id(tmp_path: Path, tokenizer: Path, mixed: Any) -> None:
    made, documents = mixed
    made = corpus("a.jsonl", "b.parquet", heldout=DataHeldOut(share=0.3, max_bytes=1200))
    order = sorted((name for name in documents), key=lambda name: hashed(5, "heldout", name))
    expected, size = [], 0
    for name in order:
        size += len(documents[name].encode())
        if size > 1200 or hashed(5, "heldout", name) >= 0.3 * 2**64:
            break
        expected.append(name)
    assert 2 < len(expected) < 12
    for number, shard_bytes in enumerate((500, 1 << 25)):
        given = settings(tmp_path, tokenizer, folder=tmp_path / str(number), shard_bytes=shard_bytes, seed=5)
        about = prepare({"swe": made}, given)["swe"]
        lines = (given.folder / "swe.heldout.jsonl").read_text().splitlines()
        held = {line["id"]: line["text"] for line in map(json.loads, lines)}
        assert list(held) == [name for name in documents if name in expected]
        assert all(documents[name] == text for name, text in held.items())
        assert documents_in(given.folder / "swe", tokenizer) == [
            text for name, text in documents.items() if name not in expected
        ]
        assert about["heldout"] == {"documents": len(held), "bytes": sum(len(text.encode()) for text in held.values())}


def test_a_small_corpus_holds_out_at_least_one_document(tmp_path: Path, tokenizer: Path) -> None:
    documents = texts(5)
    write_jsonl(tmp_path / "a.jsonl", documents)
    source = DataSource(files="a.jsonl", never_heldout=("d0-[0123]",))
    made = corpus(sources=(source,), heldout=DataHeldOut(share=1e-9, max_bytes=1))
    prepare({"swe": made}, settings(tmp_path, tokenizer))
    (line,) = (tmp_path / "out" / "swe.heldout.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": "d0-4", "text": documents["d0-4"]}
    with pytest.raises(InputError, match="language swe has no held-out text: no document may be held out"):
        source = DataSource(files="a.jsonl", never_heldout=("*",))
        prepare({"swe": corpus(sources=(source,), heldout=DataHeldOut())}, settings(tmp_path, tokenizer))


def test_splits_go_by_a_hash_of_the_id_and_share_no_document(tmp_path: Path, tokenizer: Path) -> None:
    documents = texts(300, lines=1)
    write_jsonl(tmp_path / "a.jsonl", documents)
    made = corpus("a.jsonl", splits={"first": 0.8, "rest": 0.2})
    about = prepare({"eng": made}, settings(tmp_path, tokenizer, shard_bytes=4000))["eng"]
    first, rest = (documents_in(tmp_path / "out" / f"eng.{name}", tokenizer) for name in ("first", "rest"))
    assert set(first) | set(rest) == set(documents.values()) and len(first) + len(rest) == 300
    assert 220 < len(first) < 260
    assert [text for text in documents.values() if text in set(first)] == first
    assert about["documents"] == 300
    assert {name: counts["documents"] for name, counts in about["splits"].items()} == {
        "eng.first": len(first),
        "eng.rest": len(rest),
    }
    with pytest.raises(InputError, match=r"eng was split: use eng\.first, eng\.rest"):
        open_tokens(tmp_path / "out" / "eng")
    # Without splits there is one file again, and those of the splits are gone.
    prepare({"eng": corpus("a.jsonl")}, settings(tmp_path, tokenizer))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eng.bin", "eng.idx", "eng.json"]


def test_training_text_is_kept_clear_of_held_out_and_evaluation_text(tmp_path: Path, tokenizer: Path) -> None:
    documents = texts(40, lines=6)
    secret = "this sentence of an evaluation set has a good dozen of words in it altogether"
    held = next(name for name in sorted(documents, key=lambda name: hashed(0, "heldout", name)))
    stolen = documents[held].split("\n")
    long = next(line for line in stolen if len(line.split()) >= 14)
    short = next(line for line in stolen if 4 <= len(line.split()) <= 12)
    others = [name for name in documents if name != held]
    documents[others[0]] += f"\nbefore, {long.upper()}; after"
    documents[others[1]] += f"\n{short}"
    documents[others[2]] += f"\n{secret}"
    documents[others[3]] = secret
    documents[others[4]] += "\nan innocent line"
    write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "test.txt").write_text(secret + "\n")
    clean = Clean(exact_duplicates=False, evaluation=("test.txt",))
    made = corpus("a.jsonl", clean=clean, heldout=DataHeldOut(share=1e-9))
    about = prepare({"swe": made}, settings(tmp_path, tokenizer, shard_bytes=3000))["swe"]
    found = documents_in(tmp_path / "out" / "swe", tokenizer)
    assert not shared_ngrams(found, [documents[held], secret], 13)
    assert not any(short in text.split("\n") for text in found)
    assert any("an innocent line" in text for text in found)
    assert len(found) == 38
    dropped = {reason: counts["passages"] for reason, counts in about["cleaned"]["dropped"].items()}
    assert dropped == {"shared ngram": 1, "equal": 3}
    # The rest of a document stays as it was.
    assert found[[name for name in others if name != others[3]].index(others[1])] == documents[others[1]].removesuffix(
        f"\n{short}"
    )
    off = corpus("a.jsonl", clean=PLAIN, heldout=DataHeldOut(share=1e-9))
    prepare({"swe": off}, settings(tmp_path, tokenizer))
    assert shared_ngrams(documents_in(tmp_path / "out" / "swe", tokenizer), [secret], 13)


def test_duplicates_anywhere_in_the_corpus_are_left_out(tmp_path: Path, tokenizer: Path) -> None:
    documents = texts(30, lines=8)
    names = list(documents)
    line = documents[names[0]].split("\n")[0] + " and now it has more than ten words for certain"
    documents[names[0]] += f"\n{line}"
    documents[names[20]] += f"\n{line}"
    more = {"copy": documents[names[3]].replace(" ", "  "), "empty": " \n", "new": "short"}
    near = documents[names[4]].split("\n")
    more["near"] = "\n".join([*near[:-1], near[-1] + " changed"])
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_jsonl(tmp_path / "b.jsonl", more)
    clean = Clean(near_duplicates=0.7, repeated_paragraphs=11, min_words=2)
    results = []
    for number, size in enumerate((700, 1 << 25)):
        given = settings(tmp_path, tokenizer, folder=tmp_path / str(number), shard_bytes=size)
        about = prepare({"swe": corpus("*.jsonl", clean=clean)}, given)["swe"]
        results.append(contents(given.folder))
        found = documents_in(given.folder / "swe", tokenizer)
        expected = {**documents, names[20]: documents[names[20]].removesuffix(f"\n{line}")}
        assert found == list(expected.values())
        dropped = about["cleaned"]["dropped"]
        assert {reason: (counts["documents"], counts["passages"]) for reason, counts in dropped.items()} == {
            "no text": (1, 0),
            "too few words": (1, 0),
            "exact duplicate": (1, 0),
            "near duplicate": (1, 0),
            "repeated paragraph": (0, 1),
        }
        assert about["cleaned"]["documents"] == 34
    assert results[0] == results[1]


def test_what_is_not_unicode_is_dropped_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "bad \\ud800"}\n')
    for clean in (PLAIN, Clean()):
        about = prepare({"swe": corpus("a.jsonl", clean=clean)}, settings(tmp_path, tokenizer))["swe"]
        assert about["cleaned"]["dropped"]["not valid Unicode"]["documents"] == about["documents"] == 1


# Interruptions


PREPARE = """
import sys
sys.path[:0] = [sys.argv[3]]
from pathlib import Path
from test_data_prepare import corpus, settings, SLOW
from train.data.prepare import prepare

if __name__ == "__main__":
    folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
    print("started", flush=True)
    prepare({"swe": corpus("a.jsonl", **SLOW)}, settings(folder, tokenizer, shard_bytes=8_000))
"""
SLOW = {"clean": Clean(), "heldout": DataHeldOut(share=0.05), "splits": {"first": 0.8, "rest": 0.2}}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("parts", [1, 40])
def test_a_kill_loses_no_more_than_the_shards_at_work(tmp_path: Path, tokenizer: Path, parts: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(1000))
    (tmp_path / "whole").mkdir()
    given = settings(tmp_path, tokenizer, folder=tmp_path / "whole")
    prepare({"swe": corpus("a.jsonl", **SLOW)}, given)
    script = tmp_path / "run.py"
    script.write_text(PREPARE)
    command = [sys.executable, str(script), str(tmp_path), str(tokenizer), str(Path(__file__).parent)]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    records: list[Path] = []
    while len(records) < parts and run.poll() is None:
        records = sorted((tmp_path / "out").glob(".parts/swe/*/*.json"))
    assert run.poll() is None, "it was done before it could be killed"
    workers = children(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert workers
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (tmp_path / "out" / "swe.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob(".parts/swe/*/*.json")}
    assert len(before) >= parts
    done: list[Mapping[str, Any]] = []
    after: dict[Path, int] = {}

    def report(event: Mapping[str, Any]) -> None:
        done.append(event)
        after.update({path: path.stat().st_mtime_ns for path in before if path.exists()})

    prepare({"swe": corpus("a.jsonl", **SLOW)}, settings(tmp_path, tokenizer, shard_bytes=8_000), report)
    assert after == before
    passes = 2 * next(event["shards"] for event in done if event["event"] == "corpus")
    assert sum(event["event"] == "shard" for event in done) == passes - len(before)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*"))


def test_a_damaged_part_is_named_and_made_anew(tmp_path: Path, tokenizer: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(40))
    given = settings(tmp_path, tokenizer, shard_bytes=2000)
    made = corpus("a.jsonl", splits={"one": 0.999999, "other": 0.000001})
    with pytest.raises(InputError, match=r"split swe\.other has no text: 40 documents are too few for its share"):
        prepare({"swe": made}, given)  # it leaves its parts
    part = next((tmp_path / "out").glob(".parts/swe/*/000001.swe.one.bin"))
    data = bytearray(part.read_bytes())
    data[0] ^= 1
    part.write_bytes(data)
    other = next((tmp_path / "out").glob(".parts/swe/*/000002.swe.one.bin"))
    other.write_bytes(b"")
    seen = []
    with pytest.raises(InputError, match="split"):
        prepare({"swe": made}, given, lambda event: seen.append(event))
    assert [event["shard"] for event in seen if event["event"] == "shard"] == [2]
    tokenise_all = corpus("a.jsonl")
    prepare({"swe": tokenise_all}, given)
    assert len(documents_in(tmp_path / "out" / "swe", tokenizer)) == 40


# What is up to date


def events_of(corpora: Mapping[str, DataCorpus], given: Settings) -> list[str]:
    """Prepare, and return the corpora that were made."""
    found: list[str] = []
    prepare(corpora, given, lambda event: found.append(event["corpus"]) if event["event"] == "done" else None)
    return found


def test_only_what_changed_is_made_again(tmp_path: Path, tokenizer: Path) -> None:
    for language in ("swe", "est"):
        write_jsonl(tmp_path / f"{language}.jsonl", texts(10, seed=len(language)))
    corpora = {language: corpus(f"{language}.jsonl", name=language) for language in ("swe", "est")}
    given = settings(tmp_path, tokenizer)
    assert events_of(corpora, given) == ["swe", "est"]
    assert events_of(corpora, given) == []
    before = contents(given.folder)
    # Another input, by time and by size.
    os.utime(tmp_path / "est.jsonl", ns=(0, 0))
    assert events_of(corpora, given) == ["est"] and contents(given.folder) == before
    write_jsonl(tmp_path / "swe.jsonl", texts(11))
    assert events_of(corpora, given) == ["swe"]
    assert open_tokens(given.folder / "swe").metadata["documents"] == 11
    # Another option; another label changes nothing but what is told.
    corpora["est"] = corpus("est.jsonl", append_eos=False, name="Estonian")
    assert events_of(corpora, given) == ["est"]
    source = DataSource(files="est.jsonl", licence="CC0-1.0")
    corpora["est"] = corpus(sources=(source,), append_eos=False, name="Eesti")
    assert events_of(corpora, given) == []
    about = open_tokens(given.folder / "est").metadata
    assert (about["name"], about["sources"][0]["licence"], about["eos"]) == ("Eesti", "CC0-1.0", None)
    # A file that is gone, cut short or damaged; one that was only touched.
    os.utime(given.folder / "swe.bin", ns=(0, 0))
    assert events_of(corpora, given) == []
    (given.folder / "swe.idx").unlink()
    assert events_of(corpora, given) == ["swe"]
    (given.folder / ".parts" / "swe" / "old").mkdir(parents=True)
    assert events_of(corpora, given) == [] and not (given.folder / ".parts").exists()
    data = bytearray((given.folder / "swe.bin").read_bytes())
    data[5] ^= 1
    (given.folder / "swe.bin").write_bytes(data)
    assert events_of(corpora, given) == ["swe"]
    # Another seed, which nothing here depends on but the key; another tokenizer.
    assert events_of(corpora, settings(tmp_path, tokenizer, seed=1)) == ["swe", "est"]
    train_tokenizer(texts(5).values(), vocab_size=300, folder=tmp_path / "other")
    assert events_of(corpora, settings(tmp_path, tmp_path / "other", seed=1)) == ["swe", "est"]


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ("", {}, "language swe has no text: its sources hold no document"),
        ('{"text": " "}\n{"text": null}\n', {}, "language swe has no text: all 2 documents were dropped"),
        ('{"text": ""}\n', {"clean": Clean()}, "language swe has no text: all 1 documents were dropped"),
        (
            '{"text": "one"}\n',
            {"heldout": DataHeldOut()},
            "language swe has no text to train on: all of it is held out or repeats held-out text",
        ),
        ('{"text": "one"}\n', {"prepend_bos": True}, None),
        ('{"txt": "one"}\n', {}, r"a\.jsonl: unknown field 'text': allowed are txt; did you mean 'txt'\?"),
    ],
)
def test_nothing_to_train_on(
    tmp_path: Path, tokenizer: Path, lines: str, changes: dict[str, Any], message: str | None
) -> None:
    (tmp_path / "a.jsonl").write_text(lines)
    if message is None:
        assert prepare({"swe": corpus("a.jsonl", **changes)}, settings(tmp_path, tokenizer))["swe"]["documents"] == 1
        return
    with pytest.raises(InputError, match=message):
        prepare({"swe": corpus("a.jsonl", **changes)}, settings(tmp_path, tokenizer))
    assert not (tmp_path / "out" / "swe.json").exists()


def test_a_tokenizer_without_eos(tmp_path: Path, tokenizer: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(3))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="swe: the tokenizer has no EOS token, which ends each document"):
        prepare({"swe": corpus("a.jsonl")}, settings(tmp_path, tmp_path / "bare"))
    about = prepare({"swe": corpus("a.jsonl", append_eos=False)}, settings(tmp_path, tmp_path / "bare"))["swe"]
    assert (about["bos"], about["eos"]) == (None, None)
    with pytest.raises(InputError, match=r"nowhere: holds no tokenizer\.json"):
        prepare({"swe": corpus("a.jsonl")}, settings(tmp_path, tmp_path / "nowhere"))


def test_the_ids_are_those_that_int32_holds_where_the_vocabulary_is_large(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"</s>": 0, **{f"w{number}": number for number in range(1, 70_000)}}
    model = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "large").mkdir()
    model.save(str(tmp_path / "large" / "tokenizer.json"))
    (tmp_path / "large" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    write_jsonl(tmp_path / "a.jsonl", {"a": "w1 w69999", "b": "w65536"})
    prepare({"swe": corpus("a.jsonl")}, settings(tmp_path, tmp_path / "large"))
    file = open_tokens(tmp_path / "out" / "swe")
    assert file.tokens.dtype == np.int32 and file.tokens.tolist() == [1, 69999, 0, 65536, 0]
