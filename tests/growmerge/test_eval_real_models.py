"""Real weights on real parallel text: the English model knows English, and lm-eval agrees."""

import json
import os

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from real_models import GEMMA3, SMOLLM2, real_model
from test_evaluating import verdict
from test_merging import told

from growmerge.schema_text import TextSource
from train.data.packages import default_cache, fetch
from train.data.readers import read_documents

pytestmark = [pytest.mark.slow, pytest.mark.network]
WHEEL = ("homeassistant==2025.4.4", "b7970fe3ce3a9d032a3a5dee3cbf71b227e7f23fad14a23855ee252542ef2631")
LANGUAGES = {"eng": "en", "swe": "sv", "est": "et"}
COUNT = 12


def parallel_text(folder, count=COUNT):
    """Write the same interface strings in three languages: a document a component, of those that all have."""
    wheel = fetch(WHEEL[0], sha256=WHEEL[1], python_version="3.13", cache=default_cache())
    found = {}
    for language, code in LANGUAGES.items():
        files = f"homeassistant/components/*/translations/{code}.json"
        source = TextSource(package=WHEEL[0], files=files, reader="json-strings", min_words=4)
        documents, _ = read_documents(source, wheel)
        found[language] = {
            document.id: dict(zip(document.keys, document.passages, strict=True)) for document in documents
        }
    names = sorted(set.intersection(*(set(part) for part in found.values())))
    both = {
        name: sorted(set.intersection(*(set(part[name]) for part in found.values())))
        for name in names
        if len({json.dumps(part[name], sort_keys=True) for part in found.values()}) == len(LANGUAGES)
    }
    chosen = [name for name, keys in both.items() if 5 <= len(keys) <= 40][:count]
    assert len(chosen) == count
    for language, part in found.items():
        rows = [{"id": name, "text": "\n".join(part[name][key] for key in both[name])} for name in chosen]
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_english_model_on_english_and_two_other_languages(tmp_path, monkeypatch):
    model = real_model(SMOLLM2, tokenizer=True)
    parallel_text(tmp_path)
    tasks = "".join(
        f"  {one}: {{kind: text, files: {one}.jsonl, language: {one}}}\n"
        f"  {one}-made: {{kind: corrupt, files: {one}.jsonl, count: 30, language: {one}}}\n"
        for one in LANGUAGES
    )
    place = os.path.relpath(model, tmp_path)
    (tmp_path / "eval.yaml").write_text(f"models: {{smollm2: {place}}}\ntasks:\n{tasks}")
    monkeypatch.chdir(tmp_path)
    found = told("eval", "eval.yaml", "out")
    assert found.exit_code == 0, found.stderr
    print(found.stdout)
    scores = verdict(tmp_path, "smollm2")["tasks"]
    bits = {one: scores[one]["bits_per_byte"] for one in LANGUAGES}
    swaps = {one: scores[f"{one}-made"]["sum"]["micro"] for one in LANGUAGES}
    for one in ("swe", "est"):
        assert bits["eng"]["high"] < 0.75 * bits[one]["low"]
        assert swaps["eng"]["value"] > swaps[one]["value"]
        assert scores["eng"]["tokens_per_word"] < 0.7 * scores[one]["tokens_per_word"]
    assert told("eval", "eval.yaml", "out", "--export").exit_code == 0
    results = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=["swe-made", "eng"],
        task_manager=TaskManager(include_path=str(tmp_path / "out" / "lm_eval"), include_defaults=False),
        device="cpu",
        batch_size=8,
        log_samples=False,
    )["results"]
    assert results["swe-made"]["acc,none"] == pytest.approx(swaps["swe"]["value"], abs=1e-4)
    assert results["eng"]["bits_per_byte,none"] == pytest.approx(bits["eng"]["value"], abs=1e-4)


@pytest.mark.timeout(1800)  # the vocabulary of the second one is converted for minutes, once
def test_a_multilingual_model_on_the_same_text(tmp_path, monkeypatch):
    """Bits per byte compare models of other vocabularies, where perplexity a token does not."""
    models = {"smollm2": real_model(SMOLLM2, tokenizer=True), "gemma3": real_model(GEMMA3, tokenizer=True)}
    parallel_text(tmp_path, count=6)
    tasks = "".join(f"  {one}: {{kind: text, files: {one}.jsonl, language: {one}}}\n" for one in LANGUAGES)
    places = ", ".join(f"{name}: {os.path.relpath(model, tmp_path)}" for name, model in models.items())
    (tmp_path / "eval.yaml").write_text(f"models: {{{places}}}\ntasks:\n{tasks}")
    monkeypatch.chdir(tmp_path)
    found = told("eval", "eval.yaml", "out")
    assert found.exit_code == 0, found.stderr
    print(found.stdout)
    english, gemma = (verdict(tmp_path, name)["tasks"] for name in models)
    for one in ("swe", "est"):
        assert gemma[one]["bits_per_byte"]["high"] < 0.8 * english[one]["bits_per_byte"]["low"]
        assert gemma[one]["tokens_per_word"] < 0.85 * english[one]["tokens_per_word"]
    assert gemma["eng"]["tokens_per_word"] == pytest.approx(english["eng"]["tokens_per_word"], rel=0.25)
