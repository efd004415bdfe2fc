"""Cleaning: filters on real text, duplicates against brute force, decontamination against its form in memory."""

import json
import multiprocessing
import pickle
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from regex import fullmatch as unicode_fullmatch

from growmerge.schema_clean import Clean
from growmerge.schema_text import TextSource
from parallel.errors import InputError
from train.data.clean import build_filters, problems, reason_to_drop
from train.data.cleaned import Report, combine, read_report, report_lines
from train.data.contamination import contaminated, find_contaminants, read_sentences
from train.data.duplicates import band_rows, digests, near_duplicates, repeated, signatures
from train.data.heldout import decontaminate
from train.data.languages import CODES, identify, sample, script_share
from train.data.packages import default_cache, fetch
from train.data.readers import Document, read_documents

WORDS = [f"w{number}" for number in range(3000)]
FAROESE = (
    "Tað er ein góður dagur í dag, og vit fara út at ganga fram við sjónum. Børnini spæla í garðinum, meðan mamman ger "
    "døgurða. Í gjár regnaði tað allan dagin, so eingin fór út."
)
CATS = "En liten katt satt på trappan och såg på när barnen sprang förbi i regnet på väg till skolan."


def drops(text: str, **options: object) -> str | None:
    """The reason to drop a text, under these options alone; the filters go through pickle, as to another process."""
    filters = pickle.loads(pickle.dumps(build_filters(Clean(**options))))  # type: ignore[arg-type]
    return reason_to_drop(text, filters)


@pytest.mark.parametrize(
    ("options", "kept", "dropped", "reason"),
    [
        ({"min_words": 3}, "one two three", "one two", "too few words"),
        ({"max_words": 3}, "one two three", "one two three four", "too many words"),
        ({"min_characters": 4}, "åäö!", "åäö", "too few characters"),
        ({"max_characters": 4}, "åäö!", "åäö!!", "too many characters"),
        ({"max_repeated_lines": 0.25}, "a\n\nb\n a\nc", "a\n\nb\n a\n", "repeated lines"),
        ({"max_symbols": 0.25}, "a #b c d...", "a #b #c d", "symbols"),
        ({"max_symbols": 0.25}, "a b… c d #", "a… b... c d", "symbols"),
        ({"min_alphabetic_words": 0.75}, "a b2 3c -", "a b2 3 -", "few words with letters"),
        ({"script": "Latn", "min_script_share": 0.75}, "abc д 12 …", "ab д 12 …", "script"),
        ({"script": "Arab"}, "سلام دنیا 2026", "salam donya", "script"),
        ({"script": "Latn"}, "a", "123 …", "script"),
        ({"script": "Jpan"}, "猫がすき。ネコ", "고양이 猫", "script"),
    ],
)
def test_each_gate_at_its_bound(options: dict[str, object], kept: str, dropped: str, reason: str) -> None:
    assert drops(kept, **options) is None
    assert drops(dropped, **options) == reason


def test_nothing_is_filtered_by_default() -> None:
    assert build_filters(Clean()) == {}


def test_the_first_filter_gives_the_reason() -> None:
    assert list(build_filters(Clean(language="swe", script="Latn", min_words=9, max_characters=9))) == [
        "characters",
        "script",
        "words",
        "language",
    ]
    assert drops("два слова", script="Latn", min_words=9) == "script"


def test_script_share_against_unicode_a_letter_at_a_time() -> None:
    text = "Привет, мир! Hello, wörld… שלום 你好 ¼ª ೧ é " + "\U0001d400" + "e\u0301"
    letters = [character for character in text if unicodedata.category(character)[0] == "L"]
    for script in ("Latn", "Cyrl", "Hebr", "Hani"):
        of_it = sum(bool(unicode_fullmatch(rf"\p{{Script={script}}}", letter)) for letter in letters)
        assert of_it
        assert script_share(text, script) == of_it / len(letters)


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else ():
        yield from strings(inner)


def interface(label: str) -> list[str]:
    """Real text of a language: Home Assistant's interface, in documents of a kilobyte or more."""
    wheel = fetch(
        "homeassistant==2025.4.4",
        sha256="b7970fe3ce3a9d032a3a5dee3cbf71b227e7f23fad14a23855ee252542ef2631",
        python_version="3.13",
        cache=default_cache(),
    )
    folder = "homeassistant/components/*/translations/"
    source = TextSource(files=f"{folder}{label}.json", reader="json-strings", untranslated=f"{folder}en.json")
    if label == "en":
        source = TextSource(files=f"{folder}en.json", reader="json-strings", min_words=4)
    documents, _ = read_documents(source, wheel)
    passages = iter([passage for document in documents for passage in document.passages if len(passage) > 30])
    found = [""]
    for passage in passages:
        found[-1] += passage + "\n"
        if len(found[-1].encode()) > 1000:
            found.append("")
    return [text for text in found if len(text) > 150][:100]


@pytest.mark.network
@pytest.mark.parametrize(
    ("label", "code", "other", "least"),
    [("sv", "swe", "nob", 90), ("et", "ekk", "fin", 90), ("is", "isl", "fao", 2), ("fa", "fas", "arb", 1)],
)
def test_the_language_of_real_text(label: str, code: str, other: str, least: int) -> None:
    texts = interface(label)
    assert len(texts) >= least
    reasons = [drops(text, language=code) for text in texts]
    assert reasons.count(None) >= 0.98 * len(texts)
    named = {name for name, found in CODES.items() if found == CODES[code]}
    assert {drops(text, language=other) for text in texts} <= {f"language {name}" for name in named}
    assert drops("\n".join(interface("en")[:2]), language=code) == "language eng"


def test_faroese_is_not_icelandic_and_certainty_is_asked_for() -> None:
    assert identify(FAROESE)[0] == "fao"
    assert drops(FAROESE, language="fao", min_confidence=0.9) is None
    assert drops(FAROESE, language="isl") == "language fao"
    short = "En liten katt satt"
    code, probability = identify(short)
    assert code == "swe" and 0.2 < probability < 0.7
    assert drops(short, language="swe", min_confidence=probability) is None
    assert drops(short, language="swe", min_confidence=probability + 0.01) == "language uncertain"


def test_a_long_text_is_read_at_three_places() -> None:
    long = "a" * 600 + "-" * 5000 + "m" * 600 + "-" * 5000 + "z" * 600
    assert sample(long) == "\n".join(("a" * 600, "m" * 600, "z" * 600))
    assert sample(long[:1800]) == long[:1800]


def test_every_label_of_the_library_has_a_code() -> None:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    labels = set(LanguageIdentifier.from_model_file(MODEL_FILE).labels)
    assert set(CODES.values()) == labels - {"zxx"}
    assert {"swe", "fas", "ekk", "isl", "fao", "eng"} <= set(CODES)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"language": "sv"}, r"clean\.language: unknown language 'sv': allowed are ace, afr, .*, swe, .*, zul.*"),
        ({"script": "Latin"}, r"clean\.script: unknown script 'Latin': allowed are Arab, .*; did you mean 'Latn'\?"),
        ({"near_duplicates": 1.2}, r"clean\.near_duplicates: 1\.2 is out of range: allowed is above 0 and at most 1"),
        ({"min_script_share": 0.0}, r"clean\.min_script_share: 0 is out of range: allowed is above 0 and at most 1"),
        ({"permutations": 8}, r"clean\.permutations: 8 is out of range: allowed is at least 16"),
        ({"ngram": 0}, r"clean\.ngram: 0 is out of range: allowed is at least 1"),
        (
            {"min_words": 9, "max_words": 5},
            r"clean\.max_words: 5 is below min_words, 9: every document would be dropped",
        ),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, object], line: str) -> None:
    with pytest.raises(InputError) as caught:
        build_filters(Clean(**options))  # type: ignore[arg-type]
    assert re.fullmatch(line, str(caught.value))
    key, problem = next(problems(Clean(**options)))  # type: ignore[arg-type]
    assert str(caught.value) == f"clean.{key}: {problem}"


@pytest.mark.parametrize(
    ("library", "options"),
    [("py3langid", {"language": "swe"}), ("regex", {"script": "Latn"}), ("rensa", {"near_duplicates": 0.8})],
)
def test_a_missing_library_says_how_to_get_it(
    library: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # as Python itself marks a module that cannot be imported
    (key,) = options
    with pytest.raises(InputError) as caught:
        build_filters(Clean(**options))  # type: ignore[arg-type]
    assert str(caught.value) == f"clean.{key}: {library} is not installed: pip install growmerge[data]"


def test_exact_duplicates_keep_the_first() -> None:
    choose = random.Random(1)
    texts = [choose.choice("abcd") * choose.randint(1, 30) for _ in range(500)]
    texts[7], texts[400], texts[450] = "caf\u00e9  au\nlait", "cafe\u0301 au lait ", "café  aulait"
    seen: set[str] = set()
    wanted = []
    for text in texts:
        key = " ".join(unicodedata.normalize("NFC", text).split())
        wanted.append(key in seen)
        seen.add(key)
    shards = [digests(texts[at : at + 37]) for at in range(0, 500, 37)]
    found = repeated(np.concatenate(shards))
    assert found.tolist() == wanted
    assert found[400] and not found[450]
    assert shards[0].nbytes == 37 * 16


def test_what_is_not_alive_is_no_first_copy() -> None:
    found = repeated(digests(["a", "b", "a", "b", "a"]), alive=np.array([False, True, True, True, False]))
    assert found.tolist() == [False, False, False, True, False]


def test_digests_that_share_half_of_their_bits_differ() -> None:
    first, second = np.array([[5, 1]], dtype=np.uint64), np.array([[5, 2]], dtype=np.uint64)
    assert not repeated(np.concatenate([first, second, np.array([[6, 2]], dtype=np.uint64)])).any()


def near_copies(seed: int, bases: int) -> list[list[str]]:
    """Documents of random words, most with copies in which up to 15 words are others."""
    choose = random.Random(seed)
    documents = []
    for _ in range(bases):
        base = choose.choices(WORDS, k=choose.randint(60, 300))
        documents.append(base)
        for _ in range(choose.randint(0, 3)):
            copy = list(base)
            for at in choose.sample(range(len(copy)), choose.randint(0, 15)):
                copy[at] = choose.choice(WORDS)
            documents.append(copy)
    choose.shuffle(documents)
    return documents


def jaccard(documents: list[list[str]], size: int) -> dict[tuple[int, int], float]:
    """The similarity of all pairs that have a shingle in common, by brute force."""
    sets = [{tuple(words[at : at + size]) for at in range(len(words) - size + 1)} for words in documents]
    pairs = combinations(range(len(sets)), 2)
    return {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs if sets[a] & sets[b]}


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_near_duplicates_against_all_pairs(threshold: float) -> None:
    documents = near_copies(seed=3, bases=250)
    similar = jaccard(documents, 5)
    assert sum(value >= threshold + 0.1 for value in similar.values()) > 50
    assert sum(0.1 < value < threshold - 0.15 for value in similar.values()) > 50
    found = near_duplicates(
        signatures([" ".join(words) for words in documents], shingle=5, permutations=128), threshold
    )
    for (_, later), value in similar.items():
        if value >= threshold + 0.1:
            assert found[later], f"a copy of similarity {value:.2f} was kept"
    for number in np.flatnonzero(found):
        nearest = max((value for pair, value in similar.items() if number in pair), default=0)
        assert nearest > threshold - 0.15, f"a document was dropped whose nearest is {nearest:.2f} similar"


def test_a_cluster_keeps_its_first_document() -> None:
    """A chain: each is similar to the next, the first and the last are not."""
    words = WORDS[:200]
    chain = [" ".join(WORDS[1000 : 1000 + changed] + words[changed:]) for changed in (0, 12, 24, 36, 48)]
    texts = ["something else entirely, of a few words", *chain, "nothing at all to do with the others here"]
    found = near_duplicates(signatures(texts, shingle=5, permutations=256), 0.8)
    assert found.tolist() == [False, False, True, True, True, True, False]


def test_signatures_estimate_jaccard_without_bias() -> None:
    left = [WORDS[3 * at : 3 * at + 300] for at in range(300)]
    right = [words[60:] + [f"x{at}" for at in range(60)] for words in left]
    exact = next(iter(jaccard([left[0], right[0]], 5).values()))
    found = [signatures([" ".join(words) for words in side], shingle=5, permutations=128) for side in (left, right)]
    estimates = (found[0] == found[1]).mean(axis=1)
    assert abs(estimates.mean() - exact) < 3 * np.sqrt(exact * (1 - exact) / 128 / 300)
    assert estimates.std() < 1.2 * np.sqrt(exact * (1 - exact) / 128)


def test_signatures_are_these_numbers() -> None:
    """Whatever the machine: a corpus may be hashed on several, by one version of the library."""
    wanted = [4274767790, 3558362088, 3720334294, 2163944582, 3787204626, 3962825289, 98008457, 1383382248]
    wanted += [3646496640, 3805435088, 3798077822, 3839151844, 3618987468, 4119442489, 3240856433, 4214861641]
    assert signatures(["one two three", ""], shingle=5, permutations=16).tolist() == [wanted, [0xFFFFFFFF] * 16]


def test_case_punctuation_and_short_texts() -> None:
    texts = ["One, two; THREE!", "one two three", "one two", "", "...", "", "one two"]
    found = near_duplicates(signatures(texts, shingle=5, permutations=64), 0.9)
    assert found.tolist() == [False, True, False, False, False, False, True]


def test_bands_let_pairs_at_the_threshold_meet() -> None:
    assert band_rows(128, 0.8) == 7 and 1 - (1 - 0.8**7) ** 18 > 0.95 > 1 - (1 - 0.8**8) ** 16
    assert band_rows(128, 1) == 128
    assert band_rows(16, 0.01) == 1


def test_many_equal_signatures_in_one_band_do_not_take_for_ever() -> None:
    """30,000 documents that share half of their signature: no pair is similar, all meet in every band of that half."""
    numbers = np.random.default_rng(1).integers(0, 2**31, (30_000, 128), dtype=np.uint32)
    numbers[:, :64] = numbers[0, :64]
    numbers[20_000] = numbers[19_990]
    assert np.flatnonzero(near_duplicates(numbers, 0.8)).tolist() == [20_000]


def hashed(texts: list[str]) -> tuple[bytes, bytes]:
    return digests(texts).tobytes(), signatures(texts, shingle=5, permutations=128).tobytes()


def test_the_same_in_processes_after_a_fork() -> None:
    texts = [" ".join(words) for words in near_copies(seed=4, bases=150)]
    whole = hashed(texts)  # in this process first: threads that it had started would not be there in the others
    with multiprocessing.get_context("fork").Pool(2) as pool:
        parts = pool.map_async(hashed, [texts[at : at + 100] for at in range(0, len(texts), 100)]).get(60)
    assert tuple(b"".join(part) for part in zip(*parts, strict=True)) == whole


def made_up(seed: int, documents: int, vocabulary: int) -> list[Document]:
    choose = random.Random(seed)
    return [
        Document(
            id=f"{seed}.{number}",
            passages=tuple(
                " ".join(choose.choices(WORDS[:vocabulary], k=choose.randint(0, 9))) + choose.choice(["", ".", " –"])
                for _ in range(choose.randint(1, 8))
            ),
        )
        for number in range(documents)
    ]


@pytest.mark.parametrize(("n", "vocabulary"), [(3, 20), (4, 12), (1, 200), (13, 2)])
def test_decontamination_is_that_in_memory(n: int, vocabulary: int) -> None:
    """Few words, so that n-grams are shared all over, over passages too, and what remains meets anew."""
    training, heldout = made_up(1, 300, vocabulary), made_up(2, 12, vocabulary)
    wanted, dropped = decontaminate(training, heldout, n)
    assert dropped["equal"] > 5 and dropped["shared_ngram"] > 20 and len(wanted) > 20
    contaminants = pickle.loads(pickle.dumps(find_contaminants(heldout, [], n)))
    kept, reasons = [], []
    for document in training:
        gone = contaminated(document.passages, contaminants)
        reasons += gone.values()
        if left := tuple(passage for number, passage in enumerate(document.passages) if number not in gone):
            kept.append(Document(id=document.id, passages=left))
    assert kept == wanted
    assert {reason: reasons.count(reason) for reason in dropped} == dropped


@pytest.mark.parametrize(
    ("sentence", "passage", "gone"),
    [
        (CATS, f"Först regn. {CATS} Sedan sol.", True),  # 18 words: its 13-grams
        ("Barnen sprang förbi i regnet på väg hem.", "I går: barnen sprang förbi I REGNET på väg hem!", True),  # 8
        ("Barnen sprang förbi i regnet på väg.", "I går: barnen sprang förbi i regnet på väg.", False),  # 7
        ("Barnen sprang förbi i regnet på väg.", "barnen sprang förbi i regnet på väg", True),
        ("sv plural", "Sv: plural.", False),  # a label
    ],
)
def test_evaluation_sentences(sentence: str, passage: str, gone: bool) -> None:
    contaminants = find_contaminants([], [sentence], 13)
    assert contaminated(["Något helt annat.", passage], contaminants).keys() == ({1} if gone else set())


def test_without_held_out_text_nothing_goes() -> None:
    assert contaminated(["ett två tre"] * 9, find_contaminants([], [], 13)) == {}
    assert contaminated([], find_contaminants([], ["ett två tre fyra"], 13)) == {}


def test_evaluation_files(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    pair = {"good": "Han ser den.", "bad": ["Den han ser."], "n": 3, "more": {"note": "ordföljd"}}
    (tmp_path / "pairs/a.jsonl").write_text(json.dumps(pair) + "\n\n", encoding="utf-8")
    (tmp_path / "pairs/b.tsv").write_text("sen\twrong_sen\nGod dag.\tDag god.\n")
    (tmp_path / "c.txt").write_text("En rad.\nEn till.\n")
    found = list(read_sentences(["pairs/*", "c.txt"], tmp_path))
    assert sorted(filter(None, found)) == sorted(
        ["Han ser den.", "Den han ser.", "ordföljd", "sen", "wrong_sen", "God dag.", "Dag god.", "En rad.", "En till."]
    )


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        (
            "a.jsonl",
            b'{"x": "y"}\n{"x": \n',
            r"a\.jsonl:2: not valid JSON \(Expecting value: line 1 column 7 \(char 6\)\)",
        ),
        ("a.txt", b"ett\ntv\xe5\n", r"a\.txt:2: not UTF-8 \(unexpected end of data\)"),
        ("a.csv", b"x", r"a\.csv: unknown kind of evaluation file '\.csv': allowed are \.jsonl, \.tsv, \.txt.*"),
    ],
)
def test_evaluation_files_that_cannot_be_read(name: str, data: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        list(read_sentences(["a.*"], tmp_path))
    assert re.fullmatch(".*/" + line, str(caught.value))
    with pytest.raises(InputError, match=r"^no file matches 'b\.\*' in "):
        list(read_sentences(["b.*"], tmp_path))


def report_of(texts: list[str], judge: Callable[[str], str | None]) -> Report:
    report = Report()
    for text in texts:
        report.see(text)
        if reason := judge(text):
            report.drop(reason, text)
    return report


def test_the_report_does_not_depend_on_how_shards_are_spread() -> None:
    texts = [f"text {number}\n{'word ' * (number % 90)}" for number in range(200)]
    judge = partial(reason_to_drop, filters=build_filters(Clean(min_words=50, max_words=80)))
    whole = report_of(texts, judge)
    shards = [report_of(texts[at : at + 30], judge) for at in range(0, 200, 30)]
    assert combine(shards) == whole
    assert combine([combine(shards[:3]), combine(shards[3:])]) == whole
    assert read_report(json.loads(json.dumps(asdict(whole)))) == whole
    few = [text for text in texts if len(text.split()) < 50]
    assert whole.dropped["too few words"].documents == len(few)
    assert whole.dropped["too few words"].characters == sum(map(len, few))
    assert whole.dropped["too few words"].examples[:2] == ["text 0", "text 1 word"]
    assert whole.dropped["too many words"].examples[0] == f"text 79 {'word ' * 20}"[:80]


def test_the_report_for_a_person() -> None:
    report = Report()
    for text in ("x" * 900, "short", "a b c d e"):
        report.see(text)
    report.drop("too few words", "short")
    report.drop("shared_ngram", "a b\nc", passage=True)
    report.drop("shared_ngram", "d e", passage=True)
    assert list(report_lines(report)) == [
        "3 documents, 914 characters; 1.4 % dropped",
        "  shared_ngram: 2 passages, 8 characters (0.9 %)",
        "    | a b c",
        "    | d e",
        "  too few words: 1 documents, 5 characters (0.5 %)",
        "    | short",
    ]
