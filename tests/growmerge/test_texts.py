"""Tokenizers from elsewhere: only the tokenizer is taken, and one that changes text is told of."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from growmerge.texts import copy_tokenizer, irreversible
from train.data.readers import Document
from train.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["Det här är en text.", "Och en text till, på svenska."] * 20
HELD = {"swe": [Document(id="d", passages=("En Text.",))]}


def test_a_models_folder_gives_its_tokenizer_alone(tmp_path):
    train_tokenizer(TEXTS, vocab_size=300, folder=tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights of another model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "onnx").mkdir()
    copy_tokenizer(tmp_path / "model", tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert load_tokenizer(tmp_path / "copy").sha256 == load_tokenizer(tmp_path / "model").sha256
    assert irreversible(load_tokenizer(tmp_path / "copy"), HELD) is None


@pytest.mark.parametrize("what", ["lower", "unknown"])
def test_a_tokenizer_that_changes_text_is_told_of(tmp_path, what):
    vocab = {letter: at for at, letter in enumerate(["<unk>", "</s>", " ", *"entxETé."])}
    model = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if what == "lower":
        model.normalizer = normalizers.Lowercase()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    line = irreversible(load_tokenizer(tmp_path), HELD)
    assert line is not None
    assert "swe, document 'd': " in line
