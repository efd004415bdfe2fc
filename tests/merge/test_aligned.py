"""Rows of aligned models against a loop over tokens and dicts; boxes, tiles and tied heads do not matter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.memory import MemorySource
from checkpoint.source import RunState, read_tensor, row_major_tiles
from merge import vocabulary as aligning
from merge.merge import merge
from merge.token_requests import VocabularyRequest, read_request
from merge.tokenizer_files import ModelTokenizer, read_tokenizer
from merge.tokenizers import MergedVocabulary, merged_vocabulary
from merge.vocabulary import aligned, moved_ids
from parallel.errors import InputError
from train.data.tokenizer import train_tokenizer

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TEXTS = {
    "a": ["the cat sat on the mat", "the dog ran to the man"] * 3,
    "b": ["der hund lief zum mann", "die katze lag auf der matte"] * 3,
    "c": ["the hund ran zum man", "die hunde und the cat"] * 3,
}
ROWS = {"a": 300, "b": 288, "c": 275}
REQUESTS = {
    "union": {},
    "base": {"source": "base"},
    "b": {"source": "b"},
    "padded": {"source": "c", "pad_to_multiple_of": 64},
    "tokens": {
        "tokens": {
            "<zero>": {"source": {"kind": "zero"}},
            "<new>": {"source": {"kind": "model_token", "model": "b", "token": "der"}},
            "<row>": {"source": {"kind": "model_token", "model": "a", "token_id": 299}},
            "Ġthe": {"source": "a"},
            "a": {"source": "b", "force": True},
            "b": {"source": {"kind": "zero"}, "force": True},
            "c": {"source": {"kind": "zero"}},
        },
        "pad_to_multiple_of": 50,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in TEXTS}
    for name, folder in folders.items():
        train_tokenizer(TEXTS[name], vocab_size=275, folder=folder)
    return folders


@pytest.fixture
def tokenizers(folders) -> list[ModelTokenizer]:
    return [read_tokenizer(name, folder, ROWS[name]) for name, folder in folders.items()]


def model(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> MemorySource:
    config = {
        "model_type": "llama",
        "vocab_size": ROWS[name],
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    draw = torch.Generator().manual_seed(ord(name))
    tensors = MemorySource(config=config, tensors={}).family.tensors(config)
    values = {
        key: torch.randn(tensor.shape, generator=draw).to(dtype)
        for key, tensor in tensors.items()
        if not tensor.tied_to
    }
    values[EMBEDDING][2] = -0.0
    return MemorySource(config=config, tensors=values, run=RunState(provenance={"name": name}))


def oracle(
    name: str, tables: dict[str, torch.Tensor], tokenizers: list[ModelTokenizer], request: dict, found: MergedVocabulary
) -> torch.Tensor:
    """Token by token, in float64: mergekit's rule."""
    tables = {key: table.double() for key, table in tables.items()}
    vocabularies = {m.name: m.tokenizer.get_vocab(with_added_tokens=True) for m in tokenizers}
    rows = torch.zeros(found.size, tables[name].shape[1], dtype=torch.float64)
    for token, number in found.tokens.items():
        entry = request.get("tokens", {}).get(token, {})
        having = [key for key, vocabulary in vocabularies.items() if token in vocabulary]
        source = entry.get("source")
        if token in vocabularies[name] and not entry.get("force"):
            rows[number] = tables[name][vocabularies[name][token]]
        elif isinstance(source, str):
            rows[number] = tables[source][vocabularies[source][token]]
        elif source is not None and source["kind"] == "model_token":
            at = source.get("token_id", vocabularies[source["model"]].get(source.get("token")))
            rows[number] = tables[source["model"]][at]
        elif source is None and found.base in having:
            rows[number] = tables[found.base][vocabularies[found.base][token]]
        elif source is None:
            for key in having:
                rows[number] += tables[key][vocabularies[key][token]] / len(having)
    rows[len(found.tokens) :] = rows[: len(found.tokens)].mean(0)
    return rows


@pytest.mark.parametrize("base", [None, "a", "c"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_rows(tokenizers, request_, base) -> None:
    found = merged_vocabulary(tokenizers, read_request(request_), base=base)
    sources = {name: model(name) for name in TEXTS}
    for name in TEXTS:
        source = aligned(name, sources, found)
        assert source.config == {**sources[name].config, "vocab_size": found.size}
        for tensor in (EMBEDDING, HEAD):
            assert source.infos[tensor].shape == (found.size, 16)
            wanted = oracle(name, {key: s.tensors[tensor] for key, s in sources.items()}, tokenizers, request_, found)
            got = read_tensor(source, tensor)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
            own = (found.ids[name] >= 0).nonzero()[0]
            own = [number for number in own if not (number in found.given and found.given[number].force)]
            assert len(own) > 250
            assert got[own].numpy().tobytes() == sources[name].tensors[tensor][found.ids[name][own]].numpy().tobytes()
        assert torch.equal(read_tensor(source, NORM), sources[name].tensors[NORM])


def test_three_models_and_no_base_give_means_of_two(tokenizers) -> None:
    found = merged_vocabulary(tokenizers, VocabularyRequest())
    has = {name: ids >= 0 for name, ids in found.ids.items()}
    two = (has["a"] & has["c"] & ~has["b"]).nonzero()[0]
    assert len(two)
    sources = {name: model(name, torch.bfloat16) for name in TEXTS}
    got = read_tensor(aligned("b", sources, found), EMBEDDING, dtype=torch.bfloat16)
    rows = [sources[name].tensors[EMBEDDING][found.ids[name][two]].float() for name in ("a", "c")]
    assert torch.equal(got[two], ((rows[0] + rows[1]) / 2).bfloat16())  # rounded once
    based = merged_vocabulary(tokenizers, VocabularyRequest(), base="a")
    got = read_tensor(aligned("b", sources, based), EMBEDDING, dtype=torch.bfloat16)
    at = [based.tokens[token] for token, number in found.tokens.items() if number in two]
    assert torch.equal(got[at], sources["a"].tensors[EMBEDDING][based.ids["a"][at]])


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_any_box_and_any_tile(tokenizers, request_, monkeypatch) -> None:
    found = merged_vocabulary(tokenizers, read_request(request_))
    sources = {name: model(name) for name in TEXTS}
    source = aligned("b", sources, found)
    whole = read_tensor(source, EMBEDDING)
    stats = source.collect(EMBEDDING, map)
    for rows in (slice(0, 1), slice(3, 250), slice(255, 290), slice(found.size - 9, found.size)):
        rows = slice(rows.start, min(rows.stop, found.size))
        for columns in (slice(0, 16), slice(5, 6), slice(7, 16)):
            out = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
            source.read(EMBEDDING, (rows, columns), {"weight": out}, stats)
            assert torch.equal(out, whole[rows, columns])
            source.read(EMBEDDING, (rows, columns), {"weight": out.fill_(9)})
            assert torch.equal(out, whole[rows, columns])
    monkeypatch.setattr(aligning, "row_major_tiles", lambda shape: row_major_tiles(shape, 24))
    torch.testing.assert_close(read_tensor(source, EMBEDDING), whole, rtol=1e-6, atol=1e-7)


class Counting(MemorySource):
    """A source that notes the rows of the boxes that it is asked for."""

    def read(self, name, box, out, stats=None) -> None:
        self.run.extra.setdefault(name, []).append(box[0])
        super().read(name, box, out, stats)


def test_neighbours_are_read_at_once_and_nothing_more(tokenizers) -> None:
    found = merged_vocabulary(tokenizers, VocabularyRequest(), base="a")
    sources = {}
    for name in TEXTS:
        plain = model(name)
        sources[name] = Counting(config=plain.config, tensors=plain.tensors, run=RunState(extra={}))
    # The base's own ids come first in a union: one read for a box of them, from the base alone.
    box = (slice(0, 260), slice(0, 16))
    aligned("a", sources, found).read(EMBEDDING, box, {"weight": torch.empty(260, 16)})
    assert {name: s.run.extra for name, s in sources.items()} == {"a": {EMBEDDING: [box[0]]}, "b": {}, "c": {}}
    size = found.size
    aligned("b", sources, found).read(EMBEDDING, (slice(0, size), slice(0, 16)), {"weight": torch.empty(size, 16)})
    reads = sources["b"].run.extra[EMBEDDING]
    assert sum(rows.stop - rows.start for rows in reads) == (found.ids["b"] >= 0).sum()
    assert reads[0] == slice(0, 275) and len(reads) == 1  # though they are scattered in the output
    assert sum(rows.stop - rows.start for rows in sources["c"].run.extra[EMBEDDING]) == sum(
        int(found.ids["c"][n] >= 0 and found.ids["a"][n] < 0 and found.ids["b"][n] < 0) for n in range(size)
    )


def test_tied_models(tokenizers) -> None:
    found = merged_vocabulary(tokenizers, VocabularyRequest(), base="a")
    sources = {name: model(name, tie_word_embeddings=True) for name in TEXTS}
    source = aligned("b", sources, found)
    assert source.infos[HEAD].tied_to == EMBEDDING and source.infos[HEAD].shape == (found.size, 16)
    assert source.changed == (EMBEDDING,)
    # A head that is the embedding gives its rows to the head of a model that has one of its own.
    sources["b"] = model("b")
    head = read_tensor(aligned("b", sources, found), HEAD)
    tables = {name: s.tensors.get(HEAD, s.tensors[EMBEDDING]) for name, s in sources.items()}
    wanted = oracle("b", tables, tokenizers, {}, found)
    torch.testing.assert_close(head.double(), wanted, rtol=1e-6, atol=1e-6)


def test_dtypes_are_mixed_in_the_widest(tokenizers) -> None:
    found = merged_vocabulary(tokenizers, VocabularyRequest(), base="a")
    sources = {"a": model("a", torch.float64), "b": model("b", torch.bfloat16), "c": model("c", torch.float16)}
    source = aligned("b", sources, found)
    assert source.infos[EMBEDDING].slots == {"weight": torch.bfloat16}
    new = ((found.ids["b"] < 0) & (found.ids["a"] >= 0)).nonzero()[0]
    got = read_tensor(source, EMBEDDING, dtype=torch.float64)
    assert torch.equal(got[new], sources["a"].tensors[EMBEDDING][found.ids["a"][new]])


def test_aligned_models_can_be_merged(tokenizers) -> None:
    found = merged_vocabulary(tokenizers, read_request({"pad_to_multiple_of": 64}), base="a")
    sources = {name: model(name) for name in TEXTS}
    sources["b"] = replace(sources["b"], run=RunState(provenance={"name": "b", "parents": []}))
    ready = {name: aligned(name, sources, found) for name in TEXTS}
    merged = merge([ready["b"], ready["c"]], "linear", weights=[0.25, 0.75], base=ready["a"])
    assert merged.config["vocab_size"] == found.size == merged.infos[EMBEDDING].shape[0]
    tables = {name: source.tensors[EMBEDDING] for name, source in sources.items()}
    parts = [oracle(name, tables, tokenizers, {}, found) for name in ("b", "c")]
    wanted = 0.25 * parts[0] + 0.75 * parts[1]
    torch.testing.assert_close(read_tensor(merged, EMBEDDING).double(), wanted, rtol=1e-6, atol=1e-6)


def test_token_ids_follow_their_tokens(tokenizers) -> None:
    a, b, c = tokenizers
    end = next(token for token in b.ids if token not in a.ids)
    b = replace(b, roles={"bos": "<s>", "eos": end, "unk": "<s>"})
    found = merged_vocabulary([a, b, c], VocabularyRequest(source="b"), base="a")
    gone = next(number for token, number in a.ids.items() if token not in b.ids)
    kept = next(number for number in range(258, 275) if found.ids["b"][number] >= 0 and found.ids["a"][number] >= 0)
    old = int(found.ids["a"][kept])
    config = {
        "eos_token_id": [1],
        "pad_token_id": -1,
        "unk_token_id": 0,
        "sep_token_id": [old, gone],
        "x_token_id": gone,
    }
    config |= {"decoder_start_token_id": None, "hidden_size": 16}
    assert moved_ids(config, found, "a") == {
        "eos_token_id": b.ids[end],  # another token plays this role now
        "pad_token_id": -1,
        "unk_token_id": b.ids["<s>"],
        "sep_token_id": [kept],
        "x_token_id": None,
        "bos_token_id": 0,
    }
    assert moved_ids({"bos_token_id": None, "eos_token_id": 1}, found, "a") == {"eos_token_id": b.ids[end]}
    source = aligned("a", {name: model(name, eos_token_id=[1]) for name in TEXTS}, found)
    assert source.config["eos_token_id"] == b.ids[end] and source.config["vocab_size"] == 275


def test_ids_without_a_token_are_like_padding(tokenizers) -> None:
    a, b, c = tokenizers
    found = merged_vocabulary([a, b, c], VocabularyRequest(source="base"))
    tokens = {token: number + 5 * (number > 270) for token, number in found.tokens.items()}
    ids = {name: torch.full((280,), -1).numpy() for name in TEXTS}
    for name in TEXTS:
        for token, number in found.tokens.items():
            ids[name][tokens[token]] = found.ids[name][number]
    gaps = MergedVocabulary(**{**vars(found), "tokens": tokens, "ids": ids, "size": 284})
    sources = {name: model(name) for name in TEXTS}
    got = read_tensor(aligned("a", sources, gaps), EMBEDDING)
    there = [number for number in range(284) if number in tokens.values()]
    blank = [number for number in range(284) if number not in tokens.values()]
    assert len(blank) == 9 and torch.equal(got[there], sources["a"].tensors[EMBEDDING][:275])
    wanted = got[there].double().mean(0).float().expand(9, 16)
    torch.testing.assert_close(got[blank], wanted, rtol=1e-6, atol=1e-7)


def test_models_that_do_not_fit(tokenizers) -> None:
    found = merged_vocabulary(tokenizers, VocabularyRequest(), base="a")
    sources = {name: model(name) for name in TEXTS}
    narrow = {**sources, "a": model("a", hidden_size=12)}
    with pytest.raises(InputError, match=r"^a: model.embed_tokens.weight has 12 columns, in b it has 16$"):
        aligned("b", narrow, found)
    short = {**sources, "a": model("a", vocab_size=270)}
    with pytest.raises(InputError, match=r"^a: model.embed_tokens.weight has 270 rows, but .* a token 274$"):
        aligned("a", short, found)

    class Headless(MemorySource):
        @property
        def infos(self):
            return {name: info for name, info in super().infos.items() if name != HEAD}

    headless = {**sources, "a": Headless(config=sources["a"].config, tensors=sources["a"].tensors)}
    with pytest.raises(InputError, match=r"^a lacks the tensor lm_head.weight, which rows of b come from$"):
        aligned("b", headless, found)
