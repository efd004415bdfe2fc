"""The tokenizer: reversible on any text, the same bytes every time, and a normal Hugging Face tokenizer."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import InputError
from train.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "In the beginning God created the heavens and the earth.\nNow the earth was formless and empty.",
    "Det gick inte att ansluta till enheten. Försök igen när den är påslagen.",
    "Seadmega ei õnnestunud ühendust luua. Proovi uuesti, kui see on sisse lülitatud.",
] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, vocab_size=320, folder=folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text() | st.sampled_from(["", " a  b ", "\n\n", "</s>", "a<s>b", "don 't , really .", "\r\n\t", "e\u0301"])
)
def test_any_text_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert not {0, 1} & set(tokens), "text never makes a special token"


def test_ids_and_sizes(tokenizer: TextTokenizer, folder: Path) -> None:
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (0, 1, 320)
    assert tokenizer.decode([0, 1]) == "<s></s>"
    assert tokenizer.sha256 == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    bytes_ = sum(len(text.encode()) for text in TEXTS)
    assert sum(map(len, tokenizer.encode_batch(TEXTS))) < 0.75 * bytes_, "merges were learned"


def test_transformers_loads_it_and_agrees(tokenizer: TextTokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 1, 1, 320)
    for text in [*TEXTS, "don 't , really .  é\n"]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_the_same_bytes_whatever_order_threads_and_process(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from train.data.tokenizer import train_tokenizer;"
        "train_tokenizer(eval(sys.argv[1]), vocab_size=320, folder=Path(sys.argv[2]))"
    )
    for threads, texts in (("1", TEXTS), ("4", TEXTS[::-1])):
        out = tmp_path / threads
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, "-c", script, repr(texts), str(out)], check=True, env=env)
        for path in folder.iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_existing_tokenizer_may_name_its_tokens_otherwise(folder: Path, tmp_path: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())
    model["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": None}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos, loaded.eos) == (None, 1)
    assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0], "not cut to 2 tokens"


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="vocab_size is 200: it has to be at least 258"):
        train_tokenizer(TEXTS, vocab_size=200, folder=tmp_path)
    with pytest.raises(InputError, match="no text to train a tokenizer on"):
        train_tokenizer([], vocab_size=300, folder=tmp_path)
    assert train_tokenizer(TEXTS, vocab_size=258, folder=tmp_path / "bytes").vocab_size == 258
