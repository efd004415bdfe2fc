"""Token files: what was written is what is read, sequences cover all tokens, damage is noticed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_the_bytes_on_disk(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    file = write_tokens(iter(TEXTS), Letters(vocab_size=vocab_size), tmp_path / "eng.first")
    assert (tmp_path / "eng.first.bin").read_bytes() == np.array(FLAT, dtype=dtype).tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eng.first.bin", "eng.first.idx.npy", "eng.first.json"]
    for found in (file, open_tokens(tmp_path / "eng.first")):
        assert isinstance(found.tokens, np.memmap) and found.tokens.tolist() == FLAT and len(found) == 8
        assert found.offsets.tolist() == [0, 4, 5, 8]
        assert (found.metadata["documents"], found.metadata["tokens"], found.metadata["bytes"]) == (3, 8, 6)
        assert found.metadata["tokenizer"] == "of letters"


def test_a_document_stands_between_bos_and_eos(tmp_path: Path) -> None:
    """Evaluation conditions every text on BOS: training has to have seen it there."""
    file = write_tokens(TEXTS, Letters(bos=0), tmp_path / "x")
    assert file.tokens.tolist() == [0, 99, 100, 101, 1, 0, 1, 0, 102, 235, 1]
    assert file.offsets.tolist() == [0, 5, 7, 11]


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
        with pytest.raises(IndexError, match=f"sequence {number} of {7 // length}"):
            file.sequence(number, length)


def test_too_short_for_one_sequence() -> None:
    file = TokenFile(tokens=np.arange(8), offsets=np.array([0, 8]), metadata={})
    assert (file.sequences(7), file.sequences(8)) == (1, 0)


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
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        open_tokens(tmp_path / "none")


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x: there is no text to tokenise"):
        write_tokens([], Letters(), tmp_path / "x")
    with pytest.raises(InputError, match="x: the tokenizer has no EOS token"):
        write_tokens(TEXTS, Letters(eos=None), tmp_path / "x")
