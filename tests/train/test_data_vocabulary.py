"""Continued BPE against training from scratch and a plain rendering of its rule; spellings; rows of other tokens."""

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from growmerge.sample_text import TEXT
from parallel.errors import InputError
from train.data.pairs import Words, learn, merge_on, pair_key
from train.data.spelling import SYMBOLS, Vocabulary, old_pieces, read_vocabulary, single_bytes, token_bytes
from train.data.vocabulary import count_words, extend

ENGLISH = [part for part in TEXT.split("\n\n") if part.strip()]
SWEDISH = [
    "Färjan lämnade hamnen strax efter sex, när dimman hade lättat så mycket att lotsen kunde se den andra bojen.",
    "Vattnet utvidgas när det fryser, och därför flyter isen. Sjöarna fryser från ytan, och fiskarna överlever.",
    "Bröd bakas av grovt mjöl, ljummet vatten och surdeg; degen får stå över natten, och bröden får vila en dag.",
    "Kommittén möttes på tisdagen för att besluta om den gamla bron. Tre förslag hade kommit in till kommunen.",
] * 2
GEORGIAN = ["გემი დილით ადრე გავიდა ნავსადგურიდან, და გემი საღამოს დაბრუნდა ნავსადგურში."] * 3


def byte_level(texts: list[str], size: int, *, alphabet: bool = True) -> Tokenizer:
    """Train a byte-level BPE from scratch with `tokenizers`."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    return found


def sentencepiece(texts: list[str], size: int) -> dict[str, Any]:
    """Train a tokenizer.json in the form that Llama 2 has: no pre-tokenizer, byte fallback."""
    found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *map("<0x{:02X}>".format, range(256))]
    found.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, show_progress=False))
    data = json.loads(found.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    data["pre_tokenizer"] = None
    normal = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.normalizer, found.decoder = normal, decoders.Sequence(steps)
    shown = json.loads(found.to_str())
    return {**data, "normalizer": shown["normalizer"], "decoder": shown["decoder"]}


def encoded(data: Any, texts: list[str]) -> list[list[int]]:
    model = Tokenizer.from_str(json.dumps(data))
    return [found.ids for found in model.encode_batch(texts, add_special_tokens=False)]


def decoded(data: Any, ids: list[list[int]]) -> list[str]:
    return Tokenizer.from_str(json.dumps(data)).decode_batch(ids, skip_special_tokens=False)


def plain(words: dict[tuple[int, ...], int], merges: dict[int, tuple[int, int]], add: int, first: int):
    """The rule by counting anew at each step: most frequent, then lowest left, then lowest right number."""
    learned = []
    for token in range(first, first + add):
        counts: dict[tuple[int, int], int] = {}
        for word, count in words.items():
            for pair in pairwise(merge_on(word, merges)):
                counts[pair] = counts.get(pair, 0) + count
        if not counts:
            break
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        merges[pair_key(left, right)] = (len(merges), token)
        learned.append((left, right, token))
    return learned, sum(count * len(merge_on(word, merges)) for word, count in words.items())


@settings(max_examples=150, deadline=None)
@given(
    words=st.dictionaries(
        st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple), st.integers(1, 5), min_size=1, max_size=12
    )
)
def test_the_rule_word_by_word(words):
    expected, tokens = plain(words, {}, 12, 4)
    numbers = iter(range(4, 16))
    segments = Words(list(words), list(words.values()))

    def token_of(left: int, right: int) -> int:
        return next(numbers)

    assert learn(segments, {}, token_of, min_count=1) == expected
    assert segments.tokens() == tokens
    merges = {pair_key(left, right): (rank, token) for rank, (left, right, token) in enumerate(expected)}
    assert [segments.symbols(number) for number in range(len(words))] == [merge_on(word, merges) for word in words]


@pytest.mark.parametrize(("first", "last"), [(258, 700), (400, 900)])
def test_extending_is_what_training_goes_on_with(first, last):
    small, large = byte_level(ENGLISH, first), json.loads(byte_level(ENGLISH, last).to_str())
    vocabulary = read_vocabulary(small.to_str())
    found = extend(vocabulary, count_words(vocabulary, ENGLISH), last - first, min_count=1)
    assert len(large["model"]["merges"]) == last - 258
    assert found.data["model"]["merges"] == large["model"]["merges"]  # ties, too: both take the lowest ids
    assert found.data["model"]["vocab"] == large["model"]["vocab"]
    assert (found.before, found.after) == tuple(
        sum(map(len, encoded(json.loads(one), ENGLISH))) for one in (small.to_str(), json.dumps(large))
    )


def test_old_text_keeps_its_ids_where_no_new_merge_applies():
    vocabulary = read_vocabulary(byte_level(ENGLISH, 700).to_str())
    found = extend(vocabulary, count_words(vocabulary, SWEDISH), 150)
    assert found.merges == len(found.tokens) == 150
    assert {token: found.data["model"]["vocab"][token] for token in vocabulary.ids} == vocabulary.ids
    assert found.data["model"]["merges"][:442] == vocabulary.data["model"]["merges"]
    words = [word for text in ENGLISH for word in text.split()]
    before, after = encoded(vocabulary.data, words), encoded(found.data, words)
    changed = [max(new) >= 700 for new in after]
    assert [old != new for old, new in zip(before, after, strict=True)] == changed
    share = sum(changed) / len(words)
    print(f"English words that new Swedish merges change: {100 * share:.1f} %")
    assert 0 < share < 0.2
    assert decoded(found.data, after) == words
    less = sum(map(len, encoded(found.data, SWEDISH))) / sum(map(len, encoded(vocabulary.data, SWEDISH)))
    assert less == pytest.approx(found.after / found.before)
    assert less < 0.6


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.sampled_from(["Färjan färjan", " a  b ", "\n\n", "</s>", "e\u0301", "För för  FÖR"]))
def test_any_text_comes_back(extended, text):
    assert extended.decode(extended.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def extended():
    vocabulary = read_vocabulary(byte_level(ENGLISH, 400).to_str())
    found = extend(vocabulary, count_words(vocabulary, SWEDISH + GEORGIAN), 200)
    model = Tokenizer.from_str(json.dumps(found.data))
    model.encode_special_tokens = True
    return model


def letters(merges: list[str], extra: str = "", **model: Any) -> Vocabulary:
    """A byte-level tokenizer with the tokens a to f, those of these merges (`a bc`), and of `extra`."""
    tokens = [*"abcdef", *extra.split()]
    tokens += [token for token in (merge.replace(" ", "") for merge in merges) if token not in tokens]
    found = Tokenizer(
        models.BPE({token: n for n, token in enumerate(tokens)}, [tuple(m.split()) for m in merges], **model)
    )
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return read_vocabulary(found.to_str())


def test_a_merge_to_an_old_token_lets_old_merges_go_on():
    # b c comes first, so that "abcd" stays a bc d; a bc is the old token abc, which old merges take on to abcd.
    vocabulary = letters(["b c", "a b", "ab c", "abc d"])
    words = {"abcd": 5, "abce": 3, "fabcd": 2, "bcf": 2}
    found = extend(vocabulary, words, 3)
    assert found.data["model"]["merges"][4:] == [["a", "bc"], ["abc", "e"], ["f", "abcd"], ["bc", "f"]]
    assert found.tokens == ("abce", "fabcd", "bcf")
    assert (found.before, found.after) == (5 * 3 + 3 * 3 + 2 * 4 + 2 * 2, 5 + 3 + 2 + 2)
    assert found.merges == 4
    assert [len(ids) for ids in encoded(found.data, list(words))] == [1, 1, 1, 1]


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_the_text_is_counted_as_it_will_be_encoded(ignore_merges):
    for seed in range(200):
        draw = random.Random(seed)
        tokens, merges = [*"abc"], []
        for token in sorted(
            {"".join(draw.choices("abc", k=draw.randint(2, 5))) for _ in range(40)}, key=lambda one: (len(one), one)
        ):
            cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
            known = [f"{left} {right}" for left, right in cuts if left in tokens and right in tokens]
            merges += draw.sample(known, min(1, len(known)))  # of several ways one: new merges may find another
            tokens += [token] if known else []
        draw.shuffle(merges)
        vocabulary = letters(merges, ignore_merges=ignore_merges)
        words = {"".join(draw.choices("abc", k=draw.randint(1, 12))): draw.randint(1, 6) for _ in range(30)}
        found = extend(vocabulary, words, draw.randint(1, 12))
        before, after = encoded(vocabulary.data, list(words)), encoded(found.data, list(words))
        times = words.values()
        assert found.before == sum(count * len(ids) for count, ids in zip(times, before, strict=True))
        assert found.after == sum(count * len(ids) for count, ids in zip(times, after, strict=True)), seed
        names = {number: token for token, number in found.data["model"]["vocab"].items()}
        assert ["".join(names[number] for number in ids) for ids in after] == list(words)


def test_words_that_are_tokens_are_encoded_without_merges_where_the_tokenizer_says_so():
    # By merges alone "cab" would be ca b, and its first two letters a pair with what follows.
    words = {"fab": 9, "ab": 8, "cab": 20, "dcab": 1}
    found = extend(letters(["c a"], "cab", ignore_merges=True), words, 2)
    assert found.data["model"]["merges"] == [["c", "a"], ["a", "b"], ["f", "ab"]]
    found = extend(letters(["c a"], "cab"), words, 2)
    assert found.data["model"]["merges"] == [["c", "a"], ["ca", "b"], ["a", "b"], ["f", "ab"]]


def test_added_tokens_behind_the_vocabulary_keep_their_ids():
    model = byte_level(ENGLISH, 300)
    model.add_special_tokens(["<|begin|>", "<|end|>"])  # as Llama 3 has them: in no vocabulary
    vocabulary = read_vocabulary(model.to_str())
    assert "<|begin|>" not in vocabulary.data["model"]["vocab"]
    found = extend(vocabulary, count_words(vocabulary, SWEDISH), 20)
    loaded = Tokenizer.from_str(json.dumps(found.data))
    assert [loaded.token_to_id(token) for token in ("<|begin|>", "<|end|>", *found.tokens)] == [*range(300, 322)]
    assert loaded.encode("<|begin|>för<|end|>").ids[0] == 300


def test_bytes_that_a_vocabulary_lacks_are_added_first():
    vocabulary = read_vocabulary(byte_level(ENGLISH, 200, alphabet=False).to_str())
    assert SYMBOLS[0xC3] not in vocabulary.ids  # the first byte of å, ä and ö
    assert decoded(vocabulary.data, encoded(vocabulary.data, ["år"])) != ["år"]
    found = extend(vocabulary, count_words(vocabulary, SWEDISH), 40)
    assert found.tokens[0] == SYMBOLS[0xC3]
    assert decoded(found.data, encoded(found.data, SWEDISH)) == SWEDISH


def test_characters_come_before_merges_and_bytes_are_never_merged():
    vocabulary = read_vocabulary(json.dumps(sentencepiece(ENGLISH, 700)))
    assert vocabulary.kind == "sentencepiece"
    found = extend(vocabulary, count_words(vocabulary, GEORGIAN), 40)
    singles = [token for token in found.tokens if len(token) == 1]
    assert list(found.tokens[: len(singles)]) == singles
    assert set(singles) == {char for char in GEORGIAN[0] if char not in " ,."}
    assert max(map(len, found.tokens)) > 4
    assert not any("<0x" in token for token in found.tokens)
    assert single_bytes(vocabulary) == frozenset(range(3, 259))
    before, after = encoded(vocabulary.data, GEORGIAN), encoded(found.data, GEORGIAN)
    assert any(number in single_bytes(vocabulary) for number in before[0])
    assert not any(number in single_bytes(vocabulary) for ids in after for number in ids)
    assert decoded(found.data, after) == decoded(vocabulary.data, before) == GEORGIAN
    assert encoded(found.data, ENGLISH) == encoded(vocabulary.data, ENGLISH)


def test_new_tokens_are_of_one_kind_of_character():
    vocabulary = read_vocabulary(json.dumps(sentencepiece(["1911 1958"], 275)))
    text = ["ord2024 ord2024, (ord2024) x-ord"] * 9 + ["नमस्ते नमस्ते"] * 5
    words = count_words(vocabulary, text)
    split = count_words(read_vocabulary(json.dumps(sentencepiece(["a b c"], 270))), text)
    assert words["2024"] == 27 and "2024" not in split
    assert (split["2"], split["▁ord"]) == (2 * 27, words["▁ord"])
    assert words["▁ord"] == 9 * 2 and words["नमस्ते"] == 0 and words["▁नमस्ते"] == 10
    assert not any("ord2" in word or "d," in word for word in words)


@pytest.mark.parametrize(
    ("text", "add", "said"),
    [
        (["a b c d"], 5, "nothing to add: no pair of tokens occurs twice within a word of this text"),
        ([], 5, "nothing to add: no pair of tokens occurs twice within a word of this text"),
        (["ab ab xyz xyz"], 9, "9 tokens to add are too many for this text: it gives 4"),
        (["ab ab"], 0, "0 tokens to add: allowed are whole numbers from 1 on"),
    ],
)
def test_what_cannot_be_added(text, add, said):
    vocabulary = read_vocabulary(byte_level(["a"], 258).to_str())
    with pytest.raises(InputError) as error:
        extend(vocabulary, count_words(vocabulary, text), add)
    assert str(error.value) == said


def test_other_kinds_are_refused():
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError) as error:
        read_vocabulary(pieces.to_str())
    assert str(error.value) == (
        "WordPiece over Whitespace is not supported: "
        "allowed are byte-level BPE and SentencePiece's tokenizers, as converted"
    )
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], 0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(InputError) as error:
        extend(read_vocabulary(unigram.to_str()), {"▁a": 2}, 1)
    assert str(error.value) == "Unigram cannot be extended: allowed is BPE without marks of a word's inside or end"
    with pytest.raises(InputError, match="not a tokenizer"):
        read_vocabulary("{}")


def test_rows_of_new_tokens_are_their_old_pieces():
    old = read_vocabulary(byte_level(ENGLISH, 500).to_str())
    found = extend(old, count_words(old, SWEDISH), 60)
    new = read_vocabulary(json.dumps(found.data))
    pieces = old_pieces(old, new, {})
    assert pieces[:500] == [[number] for number in range(500)]
    spelled = token_bytes(old)
    for number in range(500, 560):
        assert len(pieces[number]) > 1
        assert b"".join(spelled[piece] for piece in pieces[number]) == token_bytes(new)[number]
        text = token_bytes(new)[number].decode(errors="ignore")
        if text.encode() == token_bytes(new)[number]:  # whole characters: what the old tokenizer makes of them
            assert pieces[number] == old.tokenizer.encode(text).ids


def test_rows_between_kinds_go_by_bytes_and_roles_by_name():
    old = read_vocabulary(json.dumps(sentencepiece(ENGLISH, 700)))
    model = byte_level(ENGLISH + GEORGIAN * 9, 500)
    model.add_special_tokens([AddedToken("<|pad|>", special=True), AddedToken("<|system|>", special=True)])
    new = read_vocabulary(model.to_str())
    pieces = old_pieces(old, new, {new.ids["<|pad|>"]: old.ids["<unk>"]})
    assert pieces[new.ids["<s>"]] == [old.ids["<s>"]]
    assert pieces[new.ids["<|pad|>"]] == [old.ids["<unk>"]]
    assert pieces[new.ids["Ġthe"]] == [old.ids["▁the"]]
    assert pieces[new.ids["Ġ"]] == [old.ids["▁"]]
    assert pieces[new.ids["a"]] == [old.ids["a"]] != [old.ids["<0x61>"]]
    assert pieces[new.ids[SYMBOLS[0xE1]]] == [old.ids["<0xE1>"]]  # no character alone
    spelled = token_bytes(old)
    assert b"".join(spelled[piece] for piece in pieces[new.ids["<|system|>"]]) == b"<|system|>"
    georgian = next(number for number, text in token_bytes(new).items() if text == "ავ".encode())
    assert [spelled[piece] for piece in pieces[georgian]] == [bytes([byte]) for byte in "ავ".encode()]
    back = old_pieces(new, old, {})
    assert back[old.ids["<0x61>"]] == back[old.ids["a"]] == [new.ids["a"]]
    assert back[old.ids["▁the"]] == [new.ids["Ġthe"]]
