"""Token files: what was written is what is read, sequences cover all tokens, damage is noticed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.files import read_json, write_json
from parallel.errors import InputError
from train.data.tokens import TokenFile, open_tokens, write_tokens


@dataclass
class Letters:
    """A tokenizer of code points, shifted by two."""

    eos: int | None = 1
    bos: int | None = None
    vocab_size: int = 1 << 16
    sha256: str = "of letters"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) + 2 for letter in text] for text in texts]


TEXTS = ["abc", "", "dé"]
FLAT = [99, 100, 101, 1, 1, 102, 235, 1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<i4")])
def test_the_bytes_on_disk(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    file = write_tokens(iter(TEXTS), Letters(vocab_size=vocab_size), tmp_path / "eng.first")
    assert (tmp_path / "eng.first.bin").read_bytes() == np.array(FLAT, dtype=dtype).tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eng.first.bin", "eng.first.idx", "eng.first.json"]
    for found in (file, open_tokens(tmp_path / "eng.first")):
        assert isinstance(found.tokens, np.memmap) and found.tokens.tolist() == FLAT and len(found) == 8
        assert found.offsets.tolist() == [0, 4, 5, 8]
        assert found.metadata == {
            "dtype": np.dtype(dtype).name,
            "documents": 3,
            "tokens": 8,
            "bytes": 6,
            "characters": 5,
            "tokenizer": "of letters",
            "vocab_size": vocab_size,
            "bos": None,
            "eos": 1,
        }


def test_a_document_stands_between_bos_and_eos(tmp_path: Path) -> None:
    """Evaluation conditions every text on BOS: training has to have seen it there."""
    file = write_tokens(TEXTS, Letters(bos=0), tmp_path / "x")
    assert file.tokens.tolist() == [0, 99, 100, 101, 1, 0, 1, 0, 102, 235, 1]
    assert file.offsets.tolist() == [0, 5, 7, 11]
    assert (file.metadata["bos"], file.metadata["eos"]) == (0, 1)


@pytest.mark.parametrize(
    ("append_eos", "prepend_bos", "tokens", "offsets"),
    [
        (False, None, [0, 99, 100, 101, 0, 0, 102, 235], [0, 4, 5, 8]),
        (True, False, FLAT, [0, 4, 5, 8]),
        (False, False, [99, 100, 101, 102, 235], [0, 3, 3, 5]),
        (True, True, [0, 99, 100, 101, 1, 0, 1, 0, 102, 235, 1], [0, 5, 7, 11]),
    ],
)
def test_what_documents_are_put_between_is_a_choice(
    tmp_path: Path, append_eos: bool, prepend_bos: bool | None, tokens: list[int], offsets: list[int]
) -> None:
    options = {"append_eos": append_eos, "prepend_bos": prepend_bos}
    file = write_tokens(TEXTS, Letters(bos=0), tmp_path / "x", **options)
    assert file.tokens.tolist() == tokens and file.offsets.tolist() == offsets
    assert file.metadata["eos"] == (1 if append_eos else None)
    assert file.metadata["bos"] == (None if prepend_bos is False else 0)


def test_more_documents_than_a_batch(tmp_path: Path) -> None:
    texts = [chr(97 + number % 26) * (number % 5) for number in range(3000)]
    file = write_tokens(texts, Letters(), tmp_path / "many")
    for number in (0, 1023, 1024, 2999):
        start, stop = file.offsets[number : number + 2]
        assert file.tokens[start:stop].tolist() == [ord(letter) + 2 for letter in texts[number]] + [1]


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_sequences_cover_every_target_once(tmp_path: Path, length: int) -> None:
    file = write_tokens(TEXTS, Letters(), tmp_path / "x")
    chunks = [file.sequence(number, length).tolist() for number in range(file.sequences(length))]
    assert {len(chunk) for chunk in chunks} == {length + 1}
    targets = [token for chunk in chunks for token in chunk[1:]]
    assert targets == FLAT[1 : 1 + 7 // length * length]
    for number in (-1, file.sequences(length)):
        for ask in (file.sequence, file.starts):
            with pytest.raises(IndexError, match=f"sequence {number} of {7 // length}"):
                ask(number, length)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_where_documents_start_in_a_sequence(lengths: list[int], length: int) -> None:
    """Against marks of each token that is the first of its document."""
    firsts = [first for size in lengths for first in [True, *[False] * (size - 1)][:size]]
    file = TokenFile(tokens=np.arange(len(firsts)), offsets=np.cumsum([0, *lengths]), metadata={})
    for number in range(file.sequences(length)):
        marked = firsts[number * length : (number + 1) * length + 1]
        assert file.starts(number, length).tolist() == [at for at, first in enumerate(marked) if first]


def test_starts_of_a_file_on_disk(tmp_path: Path) -> None:
    file = write_tokens(TEXTS, Letters(), tmp_path / "x")
    assert [file.starts(number, 3).tolist() for number in range(2)] == [[0], [1, 2]]
    assert file.starts(0, 4).tolist() == [0, 4]
    assert file.starts(0, 4).dtype == np.int64


def test_too_short_for_one_sequence() -> None:
    file = TokenFile(tokens=np.arange(8), offsets=np.array([0, 8]), metadata={})
    assert (file.sequences(7), file.sequences(8)) == (1, 0)
    assert TokenFile(tokens=np.arange(0), offsets=np.array([0]), metadata={}).sequences(1) == 0


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tokens(TEXTS, Letters(), path)
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(data[:-2])
    with pytest.raises(InputError, match=r"x\.bin: holds 7 tokens, not 8 in 3 documents; delete it"):
        open_tokens(path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.bin: not a readable token file"):
        open_tokens(path)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match=r"x\.json: does not describe a token file"):
        open_tokens(path)
    with pytest.raises(InputError, match=r"none\.idx: no such file"):
        open_tokens(tmp_path / "none")


def test_an_index_of_other_tokens_is_noticed(tmp_path: Path) -> None:
    write_tokens(TEXTS, Letters(), tmp_path / "x")
    write_tokens(["abcdefg"], Letters(), tmp_path / "y")
    (tmp_path / "y.idx").replace(tmp_path / "x.idx")
    with pytest.raises(InputError, match=r"x\.bin: holds 8 tokens, not 8 in 3 documents"):
        open_tokens(tmp_path / "x")


def test_a_corpus_that_was_split_names_its_splits(tmp_path: Path) -> None:
    write_json(tmp_path / "eng.json", {"documents": 3, "tokens": 8, "splits": {"eng.first": {}, "eng.rest": {}}})
    with pytest.raises(InputError, match=r"eng\.bin: no such file: eng was split: use eng\.first, eng\.rest"):
        open_tokens(tmp_path / "eng")


def test_a_vocabulary_that_the_model_has_not(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tokens(TEXTS, Letters(vocab_size=300), path)
    assert len(open_tokens(path, vocab_size=300)) == len(open_tokens(path, vocab_size=320)) == 8
    message = "a tokenizer that does not match the model's vocabulary: the corpus has 300 entries, the model 299"
    with pytest.raises(InputError, match=message):
        open_tokens(path, vocab_size=299)
    (tmp_path / "x.json").unlink()  # as Megatron leaves it: the ids themselves are looked at
    assert len(open_tokens(path, vocab_size=236)) == 8
    with pytest.raises(InputError, match="the corpus has at least 236 entries, the model 235"):
        open_tokens(path, vocab_size=235)


def test_ids_that_do_not_fit_are_not_cut_short(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x: the tokenizer gave the id 235, though it says that it has 200 entries"):
        write_tokens(TEXTS, Letters(vocab_size=200), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x: there is no text to tokenise"):
        write_tokens([], Letters(), tmp_path / "x")
    with pytest.raises(InputError, match="x: the tokenizer has no EOS token, which ends each document"):
        write_tokens(TEXTS, Letters(eos=None), tmp_path / "x")
    with pytest.raises(InputError, match="x: prepend_bos is set, and the tokenizer has no BOS token"):
        write_tokens(TEXTS, Letters(), tmp_path / "x", prepend_bos=True)
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_until_the_new_is_whole(tmp_path: Path) -> None:
    write_tokens(TEXTS, Letters(), tmp_path / "x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="no text"):
        write_tokens([], Letters(), tmp_path / "x")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert read_json(tmp_path / "x.json")["tokens"] == 8
