"""`growmerge tokenizer` on real folders: stock transformers load what it writes, old text keeps its logits."""

import json

import pytest
import torch
from click.testing import CliRunner
from real_models import SMOLLM2, real_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint.open import open_checkpoint
from checkpoint.source import read_tensor
from eval.bits_per_byte import score_documents
from eval.model import load_model
from growmerge.cli import main
from growmerge.sample_text import TEXT
from growmerge.tokenizer_report import measure, read_text
from train.data.tokenizer import load_tokenizer, train_tokenizer

EMBED = "model.embed_tokens.weight"
SWEDISH = """
Färjan lämnade hamnen strax efter sex, när dimman hade lättat så mycket att lotsen kunde se den andra bojen.

Vattnet utvidgas när det fryser, och därför flyter isen. Sjöarna fryser från ytan, och fiskarna överlever vintern.

Bröd bakas av grovt mjöl, ljummet vatten och surdeg; degen får stå över natten, och bröden får vila en dag.
"""
HELDOUT = (
    "Lotsen såg bojen när dimman lättade, och färjan lämnade hamnen.\n\nIsen flyter, därför fryser sjöarna från ytan."
)


def call(*arguments):
    return CliRunner().invoke(main, ["tokenizer", *map(str, arguments)])


@pytest.fixture
def texts(tmp_path):
    for name, text in (("eng.txt", TEXT), ("swe.txt", SWEDISH * 3), ("heldout.txt", HELDOUT)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def model(tiny_folder, texts):
    """A Hugging Face folder with a tokenizer trained on English."""

    def make(name="small", **changes):
        folder = tiny_folder(name, vocab_size=600, **changes)
        train_tokenizer([TEXT], vocab_size=600, folder=folder)
        return folder

    return make


@pytest.mark.parametrize("tied", [True, False])
def test_extended_model(model, texts, tied):
    small = model(tie_word_embeddings=tied)
    made = call(
        *("extend", small, texts / "more", "--text", texts / "swe.txt", "--add", 80),
        *("--model", small, "--out", texts / "big", "--pad-to", 64, "--heldout", texts / "heldout.txt"),
    )
    assert made.exit_code == 0, made.output
    lines = made.stdout.splitlines()
    assert lines[0].startswith(f"{texts / 'more'}: 80 tokens more, 680 in all; the text's words are ")
    assert lines[1] == f"{texts / 'big'}: 704 rows: 600 kept, 80 means of old pieces, 24 means of all old rows"

    before, after = AutoModelForCausalLM.from_pretrained(small), AutoModelForCausalLM.from_pretrained(texts / "big")
    tokenizer = AutoTokenizer.from_pretrained(texts / "big")
    assert (len(tokenizer), after.config.vocab_size, after.config.tie_word_embeddings) == (680, 704, tied)
    assert (after.config.bos_token_id, after.config.eos_token_id) == (0, 1)
    old = load_tokenizer(small)
    ids = torch.tensor([old.encode(TEXT)[:100]])
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits[..., :600])
    for tensor in [EMBED] if tied else [EMBED, "lm_head.weight"]:
        small_rows, big_rows = before.state_dict()[tensor], after.state_dict()[tensor]
        assert torch.equal(big_rows[:600], small_rows)
        for number in range(600, 680):
            pieces = old.encode(tokenizer.decode([number]))
            if old.decode(pieces).encode().find("\ufffd".encode()) < 0:
                assert torch.allclose(big_rows[number], small_rows[pieces].mean(0), rtol=0, atol=1e-7)
        assert torch.allclose(big_rows[680:], small_rows.mean(0).expand(24, -1), rtol=0, atol=1e-7)

    for text in (TEXT, SWEDISH, HELDOUT):
        mine = load_tokenizer(texts / "big").encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == mine
        assert tokenizer.decode(mine) == text
    documents = read_text(texts / "heldout.txt")  # the blank line is one line break
    shown = []
    for folder in (small, texts / "big"):
        how = {"window": 128, "stride": 64, "batch_tokens": 512}
        scores = score_documents(load_model(open_checkpoint(folder)), documents, load_tokenizer(folder), **how)
        shown.append((sum(one.bits for one in scores) / (len(HELDOUT.encode()) - 1), sum(one.tokens for one in scores)))
    (bits, tokens), (bits_after, tokens_after) = shown
    assert tokens_after < tokens
    assert lines[2] == (
        f"{texts / 'heldout.txt'}: {bits:.4f} -> {bits_after:.4f} bits per byte, {tokens:,} -> {tokens_after:,} tokens"
    )
    about = json.loads((texts / "big" / "growmerge.json").read_text())
    assert (about["verb"], about["recipe"]["means"], about["parents"]) == (
        "vocabulary",
        80,
        [{"name": "small", "hash": None}],
    )


def test_from_a_zero3_checkpoint(model, texts):
    small = model(dtype=torch.bfloat16)
    converted = CliRunner().invoke(main, ["convert", str(small), str(texts / "run"), "--format", "zero3", "--dp", "2"])
    assert converted.exit_code == 0, converted.output
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (texts / "run" / name).unlink()
    extended = ("extend", small, texts / "more", "--text", texts / "swe.txt", "--add", 40)
    assert call(*extended, "--model", texts / "run", "--out", texts / "big").exit_code == 0
    replaced = call("replace", texts / "run", texts / "more", texts / "again", "--old-tokenizer", small)
    assert replaced.exit_code == 0, replaced.output
    first, second = open_checkpoint(texts / "big"), open_checkpoint(texts / "again")
    assert first.infos[EMBED].shape == (640, 32)
    assert first.infos[EMBED].slots == {"weight": torch.bfloat16}
    rows = read_tensor(first, EMBED)
    assert torch.equal(rows, read_tensor(second, EMBED))
    assert torch.equal(rows[:600], read_tensor(open_checkpoint(small), EMBED))
    (record,) = json.loads((texts / "big" / "growmerge.json").read_text())["parents"]
    assert record["name"] == json.loads((texts / "run" / "growmerge.json").read_text())["name"] == "run"


def test_replaced_tokenizer(model, texts):
    small = model()
    new = texts / "new"
    train_tokenizer([SWEDISH], vocab_size=330, folder=new)
    settings = json.loads((new / "tokenizer_config.json").read_text())
    (new / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|end|>"}))
    (new / "special_tokens_map.json").unlink()
    tokens = Tokenizer.from_file(str(new / "tokenizer.json"))
    tokens.add_special_tokens(["<|end|>"])
    tokens.save(str(new / "tokenizer.json"))
    (small / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "bos_token_id": 0, "top_k": 7}))
    made = call("replace", small, new, texts / "big", "--heldout", texts / "heldout.txt")
    assert made.exit_code == 0, made.output
    before, after = AutoModelForCausalLM.from_pretrained(small), AutoModelForCausalLM.from_pretrained(texts / "big")
    rows = {folder.name: read_tensor(open_checkpoint(folder), EMBED) for folder in (small, texts / "big")}
    old, named = load_tokenizer(small).model.get_vocab(), tokens.get_vocab()
    shared = sorted(old.keys() & named.keys())
    assert f"331 rows: {len(shared) + 1} kept, {330 - len(shared)} means" in made.stdout
    assert len(shared) > 258
    assert torch.equal(rows["big"][[named[one] for one in shared]], rows["small"][[old[one] for one in shared]])
    assert torch.equal(rows["big"][named["<|end|>"]], rows["small"][old["</s>"]])  # what plays its part
    assert (after.config.vocab_size, after.config.bos_token_id, after.config.eos_token_id) == (331, 0, 330)
    generation = json.loads((texts / "big" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 330, "bos_token_id": 0, "top_k": 7}
    assert AutoTokenizer.from_pretrained(texts / "big").eos_token_id == 330
    # A text of tokens that both have, under its two numberings.
    both = [one for one in load_tokenizer(small).model.encode(SWEDISH).tokens if one in named]
    with torch.no_grad():
        small_logits = before(torch.tensor([[old[one] for one in both[:60]]])).logits[..., [old[one] for one in shared]]
        big_logits = after(torch.tensor([[named[one] for one in both[:60]]])).logits[
            ..., [named[one] for one in shared]
        ]
    assert torch.allclose(small_logits, big_logits, rtol=0, atol=1e-6)


def test_report(texts):
    for name, text, size in (("eng", [TEXT], 500), ("both", [TEXT, SWEDISH], 600)):
        train_tokenizer(text, vocab_size=size, folder=texts / name)
    arguments = ("report", texts / "eng", f"en={texts / 'eng.txt'}", texts / "swe.txt", "--tokenizer", texts / "both")
    shown = call(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "tokens/word" in shown.stdout and "eng (500)" in shown.stdout and "both (600)" in shown.stdout
    found = json.loads(call(*arguments, "--json").stdout)
    assert [list(found), list(found["eng"]["texts"])] == [["eng", "both"], ["en", "swe", "all"]]
    (document,) = read_text(texts / "swe.txt")
    tokenizer = load_tokenizer(texts / "eng")
    ids = tokenizer.encode(document.text)
    symbols = [tokenizer.model.id_to_token(number) for number in ids]
    alone = sum(len(one) == 1 and ord(one) > 0x7F and one not in "ĠĊ" for one in symbols)
    assert alone > 100
    assert found["eng"]["vocab_size"] == 500
    assert found["eng"]["texts"]["swe"] == {
        "documents": 1,
        "broken": 0,
        "tokens": len(ids),
        "tokens_per_word": len(ids) / len(document.text.split()),
        "bytes_per_token": len(document.text.encode()) / len(ids),
        "characters_per_token": len(document.text) / len(ids),
        "single_byte_share": alone / len(ids),
        "unused_share": 1 - len(set(ids)) / 500,
    }
    rows = found["both"]["texts"]
    assert rows["swe"]["tokens_per_word"] < found["eng"]["texts"]["swe"]["tokens_per_word"]
    assert rows["all"]["tokens"] == rows["en"]["tokens"] + rows["swe"]["tokens"]
    assert rows["all"]["unused_share"] <= min(rows["en"]["unused_share"], rows["swe"]["unused_share"])


def test_report_of_a_tokenizer_that_loses_text(texts):
    lossy = Tokenizer(models.WordLevel({"[UNK]": 0, "färjan": 1, "vattnet": 2}, unk_token="[UNK]"))
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    (texts / "lossy").mkdir()
    lossy.save(str(texts / "lossy" / "tokenizer.json"))
    lines = [{"text": "färjan"}, {"text": "färjan och bojen"}, {"text": "vattnet"}]
    (texts / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    row = json.loads(call("report", texts / "lossy", texts / "lines.jsonl", "--json").stdout)["lossy"]["texts"]["lines"]
    assert (row["documents"], row["broken"], row["tokens_per_word"]) == (3, 1, 1.0)
    assert row["single_byte_share"] is None
    assert "–" in call("report", texts / "lossy", texts / "lines.jsonl").stdout


def test_long_documents_are_measured_in_pieces(texts, monkeypatch):
    train_tokenizer([TEXT], vocab_size=500, folder=texts / "eng")
    tokenizer, (document,) = load_tokenizer(texts / "eng"), read_text(texts / "eng.txt")
    whole = measure(tokenizer, "eng", [document], None)
    monkeypatch.setattr("growmerge.tokenizer_report.PIECE", 600)
    monkeypatch.setattr("growmerge.tokenizer_report.BATCH", 2)
    assert measure(tokenizer, "eng", [document], None) == whole


def says(result, line):
    assert (result.exit_code, result.stderr) == (2, f"growmerge: {line}\n")


def test_bad_input(model, texts):
    small, swedish = model(), texts / "swe.txt"
    extend = ("extend", small, texts / "out", "--text", swedish, "--add")
    says(call(*extend, 5000), f"{small}: 5000 tokens to add are too many for this text: it gives 121")
    (texts / "dull.txt").write_text("7 8 9")
    says(
        call("extend", small, texts / "out", "--text", texts / "dull.txt", "--add", 3),
        f"{small}: nothing to add: no pair of tokens occurs twice within a word of this text",
    )
    says(call(*extend[:4], texts / "no.txt", "--add", 3), f"{texts / 'no.txt'}: no such file")
    says(
        call("extend", texts, *extend[2:], 3),
        f"{texts}: holds no tokenizer.json (a fast Hugging Face tokenizer is needed)",
    )
    says(
        call(*extend, 3, "--heldout", swedish),
        "--model, --out, --pad-to and --heldout are of a model: give both --model and --out, or none",
    )
    says(call("extend", small, small, *extend[3:], 3), f"{small}: is not empty; choose another folder")
    says(call("extend", small, swedish, *extend[3:], 3), f"{swedish}: is a file; choose another folder")
    target = (*extend, 3, "--model", small, "--out")
    says(call(*target, small), f"{small}: is not empty; choose another folder")
    says(
        call(*target, texts / "big", "--pad-to", 0),
        "rows padded to a multiple of 0: allowed are whole numbers from 1 on",
    )
    both = f"{texts / 'out'}: cannot be the tokenizer's folder and the model's; choose another for one"
    says(call(*target, texts / "out"), both)
    (texts / "blank.txt").write_text(" \n\n ")
    says(call(*target, texts / "big", "--heldout", texts / "blank.txt"), f"{texts / 'blank.txt'}: holds no text")
    nowhere = texts / "nowhere.txt"
    says(call(*target, texts / "big", "--heldout", nowhere), f"{nowhere}: no such file")

    other = texts / "other"
    train_tokenizer([SWEDISH], vocab_size=300, folder=other)
    says(
        call("extend", other, texts / "out", "--text", swedish, "--add", 3, "--model", small, "--out", texts / "big"),
        f"{small / 'tokenizer.json'}: has other tokens than {other}; extend the model's own tokenizer",
    )
    train_tokenizer([TEXT], vocab_size=610, folder=texts / "larger")
    says(
        call("replace", small, other, texts / "big", "--old-tokenizer", texts / "larger"),
        f"{small}: has 600 rows of embeddings, and the tokenizer given as its own has ids up to 609: "
        "it is another model's",
    )
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (texts / "words").mkdir()
    words.save(str(texts / "words" / "tokenizer.json"))
    refused = (
        f"{texts / 'words' / 'tokenizer.json'}: WordPiece over Whitespace is not supported: "
        "allowed are byte-level BPE and SentencePiece's tokenizers, as converted"
    )
    says(call("extend", texts / "words", *extend[2:], 3), refused)
    says(call("replace", small, texts / "words", texts / "big"), refused)
    says(call("report", other, swedish, swedish), f"{swedish} is given twice")
    assert not (texts / "big").exists() and not (texts / "out").exists()


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_learns_to_write_swedish(texts):
    small = real_model(SMOLLM2, tokenizer=True)
    made = call(
        *("extend", small, texts / "more", "--text", texts / "swe.txt", "--add", 60, "--model", small),
        *("--out", texts / "big", "--pad-to", 64, "--heldout", texts / "heldout.txt"),
    )
    assert made.exit_code == 0, made.output
    print(made.stdout)
    before = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(texts / "big", dtype=torch.float32)
    assert after.config.vocab_size == 49216
    tokenizer, old = AutoTokenizer.from_pretrained(texts / "big"), AutoTokenizer.from_pretrained(small)
    assert len(tokenizer(SWEDISH).input_ids) < 0.8 * len(old(SWEDISH).input_ids)
    ids = old(TEXT[:1000], return_tensors="pt").input_ids
    assert torch.equal(tokenizer(TEXT[:1000], return_tensors="pt").input_ids, ids)
    with torch.no_grad():
        assert torch.allclose(before(ids).logits, after(ids).logits[..., :49152], rtol=0, atol=1e-4)
