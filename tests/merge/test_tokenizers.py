"""The output's vocabulary against loops over dicts, for every kind of request; bad ones are one line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from merge.token_requests import TokenEntry, VocabularyRequest, read_request
from merge.tokenizer_files import ModelTokenizer, read_tokenizer
from merge.tokenizers import Given, MergedVocabulary, merged_vocabulary
from parallel.errors import InputError
from train.data.tokenizer import train_tokenizer

TEXTS = {
    "en": ["the cat sat on the mat", "the dog ran to the man"] * 3,
    "b": ["der hund lief zum mann", "die katze lag auf der matte"] * 3,
    "c": ["the hund ran zum man", "le chat et le chien"] * 3,
}
ADDED = {
    "en": [AddedToken("<x>", special=True), AddedToken("<y>", normalized=False)],
    "b": [AddedToken("<y>", special=True, lstrip=True), AddedToken("<b>", special=True)],
    "c": [AddedToken("<c>", special=True), AddedToken("the", rstrip=True)],
}


def tokenizer_folder(folder: Path, name: str, size: int = 285) -> Path:
    """Train a tokenizer on a text and add tokens to it: 258 tokens in each, few words in two of them."""
    train_tokenizer(TEXTS[name], vocab_size=size, folder=folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(ADDED[name])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tokenizer_folder(tmp_path_factory.mktemp(name), name) for name in TEXTS}


@pytest.fixture
def models(folders) -> list[ModelTokenizer]:
    return [read_tokenizer(name, folder, 300) for name, folder in folders.items()]


def ids_of(model: ModelTokenizer) -> dict[str, int]:
    return model.tokenizer.get_vocab(with_added_tokens=True)


def check_ids(found: MergedVocabulary, models: list[ModelTokenizer]) -> None:
    """Each model's array, by a loop; and the files hold the tokenizer that the ids are of."""
    out = Tokenizer.from_str(found.files["tokenizer.json"].decode()).get_vocab(with_added_tokens=True)
    assert found.tokens == out and [*found.tokens.values()] == sorted(out.values())
    assert found.ids.keys() == {model.name for model in models}
    for model in models:
        wanted = [-1] * (max(out.values()) + 1)
        for token, number in out.items():
            if token in ids_of(model):
                wanted[number] = ids_of(model)[token]
        assert found.ids[model.name].dtype == np.int64 and found.ids[model.name].tolist() == wanted


@pytest.mark.parametrize("base", [None, "b"])
def test_union(models, base) -> None:
    found = merged_vocabulary(models, VocabularyRequest(), base=base)
    check_ids(found, models)
    first = next(model for model in models if model.name == (base or "en"))
    assert [*found.tokens][: len(ids_of(first))] == [*first.ids]  # its ids stay
    ordered = [first, *(model for model in models if model is not first)]
    words, added = [], []
    for model in ordered:
        tokens = model.tokenizer.get_added_tokens_decoder()
        for number, token in sorted((number, token) for token, number in ids_of(model).items()):
            if number in tokens and token not in added:
                added.append(token)
            elif number not in tokens and token not in words:
                words.append(token)
    new = [word for word in words if word not in ids_of(first) and word not in added]
    new += [token for token in added if token not in ids_of(first)]
    assert [*found.tokens][len(ids_of(first)) :] == new
    assert found.size == len(found.tokens) == len({*words, *added})


def test_a_union_keeps_what_added_tokens_are(models) -> None:
    found = merged_vocabulary(models, VocabularyRequest(), base="en")
    out = Tokenizer.from_str(found.files["tokenizer.json"].decode())
    added = {token.content: token for token in out.get_added_tokens_decoder().values()}
    assert not added["<y>"].special and not added["<y>"].lstrip  # the base's settings
    assert added["<b>"].special and added["<c>"].special
    # A word of the base, added in another model: an added token of the same id now.
    assert "the" in models[0].ids and added["the"].rstrip and found.tokens["the"] == models[0].ids["the"]
    word = next(word for word in models[1].ids if word not in models[0].ids and word not in models[1].added)
    assert not added[word].special and added[word].normalized
    assert out.encode("<b> cat <c>").ids.count(found.tokens["<b>"]) == 1


def test_the_same_request_gives_the_same_bytes(folders) -> None:
    files = []
    for _ in range(3):
        models = [read_tokenizer(name, folder, 300) for name, folder in folders.items()]
        files.append(merged_vocabulary(models, VocabularyRequest()).files)
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    ("source", "base", "donor"), [("base", "b", "b"), ("base", None, "en"), ("c", "en", "c"), ("b", None, "b")]
)
def test_a_model_s_own_tokenizer_is_copied(models, folders, source, base, donor) -> None:
    found = merged_vocabulary(models, VocabularyRequest(source=source), base=base)
    check_ids(found, models)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert found.files[name] == (folders[donor] / name).read_bytes()
    assert (found.ids[donor] == np.arange(found.size)).all() and found.base == base
    assert found.roles == {"bos": "<s>", "eos": "</s>", "pad": "</s>"}


def test_a_union_of_equals_adds_nothing(folders) -> None:
    models = [read_tokenizer(name, folders["b"], 300) for name in ("one", "two")]
    found = merged_vocabulary(models, VocabularyRequest())
    assert found.files["tokenizer.json"] == (folders["b"] / "tokenizer.json").read_bytes()


def test_explicit_tokens(models) -> None:
    request = read_request(
        {
            "source": "base",
            "tokens": {
                "<new>": {"source": {"kind": "model_token", "model": "b", "token": "<b>"}, "force": True},
                "<row>": {"source": {"kind": "model_token", "model": "c", "token_id": 299}},
                "<zero>": {"source": {"kind": "zero"}},
                "<c>": {"source": "c"},
                "<b>": None,
                "<x>": {"source": "en", "force": True},
            },
        }
    )
    found = merged_vocabulary(models, request, base="en")
    check_ids(found, models)
    at, old = found.tokens, len(models[0].ids)
    assert [*at][old:] == ["<new>", "<row>", "<zero>", "<c>", "<b>"] and at["<x>"] == models[0].ids["<x>"]
    assert found.given == {
        at["<new>"]: Given(row=("b", models[1].ids["<b>"]), force=True),
        at["<row>"]: Given(row=("c", 299), force=False),
        at["<zero>"]: Given(row=None, force=False),
        at["<c>"]: Given(row=("c", models[2].ids["<c>"]), force=False),
        at["<x>"]: Given(row=("en", models[0].ids["<x>"]), force=True),
    }
    union = merged_vocabulary(models, replace(request, source="union"), base="en")
    check_ids(union, models)
    assert [*union.tokens][-3:] == ["<new>", "<row>", "<zero>"] and len(union.tokens) == union.size


@pytest.mark.parametrize(("multiple", "size"), [(None, 0), (1, 0), (64, 64), (7, 7)])
def test_padding(models, multiple, size) -> None:
    request = read_request({"source": "base", "pad_to_multiple_of": multiple})
    found = merged_vocabulary(models, request)
    wanted = len(models[0].ids)  # rows behind the tokenizer's, 300 here, are no more
    while size and wanted % size:
        wanted += 1
    assert found.size == wanted


def test_added_tokens_without_a_row_are_left_out(folders, tmp_path) -> None:
    full = read_tokenizer("en", folders["en"], 300)
    rows = full.ids["<y>"]
    folder = tmp_path / "short"
    folder.mkdir()
    config = json.loads((folders["en"] / "tokenizer_config.json").read_text())
    extra = {"pad_token": "<y>", "extra": ["<x>", "<y>"], "added_tokens_decoder": {str(rows): {"content": "<y>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **extra}))
    (folder / "tokenizer.json").write_bytes((folders["en"] / "tokenizer.json").read_bytes())
    short = read_tokenizer("en", folder, rows)
    assert short.ids == {token: number for token, number in full.ids.items() if token != "<y>"}
    assert short.roles == {"bos": "<s>", "eos": "</s>"}
    assert json.loads(short.files["tokenizer_config.json"]) == {
        **{key: value for key, value in config.items() if key != "pad_token"},
        "extra": ["<x>"],
        "added_tokens_decoder": {},
    }
    other = read_tokenizer("b", folders["b"], 300)
    for models in ([short, other], [other, short]):
        found = merged_vocabulary(models, VocabularyRequest(source="base"))
        check_ids(found, models)
        assert found.ids["en"].max() < rows and found.size == len(models[0].ids)
        check_ids(merged_vocabulary(models, VocabularyRequest()), models)


def test_an_added_token_without_a_row_that_is_a_word_too(folders, tmp_path) -> None:
    data = json.loads((folders["en"] / "tokenizer.json").read_text())
    rows = max(data["model"]["vocab"].values()) + 1
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < rows]
    token = "Ġ<"
    assert token not in data["model"]["vocab"]
    data["model"]["vocab"][token] = rows
    data["model"]["merges"].append(["Ġ", "<"])
    data["added_tokens"].append({**data["added_tokens"][0], "id": rows, "content": token})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert read_tokenizer("m", tmp_path, rows + 1).ids[token] == rows
    short = read_tokenizer("m", tmp_path, rows)
    assert token not in short.ids and max(short.ids.values()) == rows - 1


def with_gap(folder: Path, target: Path) -> Path:
    """Write a tokenizer whose last word has an id further on."""
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    data["added_tokens"] = data["added_tokens"][:2]
    vocab[last] += 3
    (target / "tokenizer.json").write_text(json.dumps(data))
    return target


def test_ids_with_gaps(folders, tmp_path) -> None:
    models = [read_tokenizer("gap", with_gap(folders["en"], tmp_path), 300), read_tokenizer("b", folders["b"], 300)]
    found = merged_vocabulary(models, VocabularyRequest(source="base"))
    check_ids(found, models)
    assert found.size == len(found.tokens) + 3 and (~found.named).sum() == 3
    with pytest.raises(InputError, match="gap: its tokenizer's ids have gaps"):
        merged_vocabulary(models, VocabularyRequest())


def test_read_request() -> None:
    assert read_request("base") == VocabularyRequest(source="base")
    for request in ("model:est", {"source": "model:est"}):  # as mergekit documents it
        assert read_request(request) == VocabularyRequest(source="est")
    assert read_request({}) == VocabularyRequest() == read_request({"tokens": None, "pad_to_multiple_of": None})
    entry = {"source": {"kind": "model_token", "model": "m", "token_id": 3}, "force": True}
    assert read_request({"source": "m", "tokens": {"a": entry}, "pad_to_multiple_of": 8}) == VocabularyRequest(
        source="m", tokens={"a": TokenEntry(model="m", token_id=3, force=True)}, pad_to_multiple_of=8
    )


def entry(**source: object) -> dict:
    return {"tokens": {"<t>": {"source": source}}}


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (3, "tokenizer is 3: a mapping is needed with source, tokens, pad_to_multiple_of"),
        ({"sorce": "base"}, "unknown key 'sorce': allowed are .*did you mean 'source'"),
        ({"source": 3}, "source is 3: allowed are union, base and the name of a model"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0: allowed are whole numbers from 1 on"),
        ({"pad_to_multiple_of": True}, "pad_to_multiple_of is True"),
        ({"tokens": ["a"]}, r"tokens is \['a'\]: a mapping"),
        ({"tokens": {1: None}}, "1 is no token: a text is needed; put it in quotes"),
        ({"tokens": {"": None}}, "'' is no token"),
        ({"tokens": {"<t>": "base"}}, "token '<t>' is 'base': a mapping is needed with source, force"),
        ({"tokens": {"<t>": {"src": "base"}}}, "token '<t>': unknown key 'src': allowed are source, force"),
        ({"tokens": {"<t>": {"source": "b", "force": 1}}}, "force is 1: allowed are true and false"),
        ({"tokens": {"<t>": {"force": True}}}, "token '<t>': force needs a source"),
        ({"tokens": {"<t>": {"source": 7}}}, "unknown kind of source 7: allowed are model_token, zero"),
        (entry(kind="zeros"), "token '<t>': unknown kind of source 'zeros': allowed are .*did you mean 'zero'"),
        (entry(kind="zero", model="b"), "token '<t>': source: unknown key 'model': allowed are kind"),
        (entry(kind="model_token", token="a"), "kind model_token needs a model"),
        (entry(kind="model_token", model="b"), "needs token or token_id, one of them"),
        (entry(kind="model_token", model="b", token="a", token_id=1), "needs token or token_id, one of them"),
        (entry(kind="model_token", model="b", token_id="1"), "token_id is '1': a whole number is needed"),
        (entry(kind="model_token", model="b", id=1), "unknown key 'id'"),
    ],
)
def test_bad_requests(value, line) -> None:
    with pytest.raises(InputError, match=line) as caught:
        read_request(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"source": "d"}, "unknown source of the tokenizer 'd': allowed are union, base, en, b, c"),
        ({"tokens": {"<t>": {"source": "d"}}}, "token '<t>': unknown model 'd': allowed are en, b, c"),
        ({"tokens": {"<t>": {"source": "b"}}}, "token '<t>': b has no token '<t>'; give another source"),
        (entry(kind="model_token", model="b", token="<c>"), "token '<t>': b has no token '<c>'"),
        (entry(kind="model_token", model="b", token_id=300), "token_id is 300, but b has rows 0 to 299"),
        (entry(kind="model_token", model="b", token_id=-1), "token_id is -1, but b has rows 0 to 299"),
        ({"tokens": {"<t>": None}}, "token '<t>' is in no model's tokenizer: give it a source"),
    ],
)
def test_requests_that_do_not_fit_the_models(models, value, line) -> None:
    with pytest.raises(InputError, match=line) as caught:
        merged_vocabulary(models, read_request(value))
    assert "\n" not in str(caught.value)


def test_an_unknown_base(models) -> None:
    with pytest.raises(InputError, match="unknown base 'd': allowed are en, b, c"):
        merged_vocabulary(models, VocabularyRequest(), base="d")


def test_bad_tokenizers(folders, tmp_path) -> None:
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}: holds no tokenizer.json"):
        read_tokenizer("m", tmp_path, 300)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: not a tokenizer"):
        read_tokenizer("m", tmp_path, 300)
    line = "has a token '.*' with id 27., but m has 270 rows of embeddings: it is another model's tokenizer"
    with pytest.raises(InputError, match=line):
        read_tokenizer("m", folders["en"], 270)
