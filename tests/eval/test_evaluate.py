"""The whole evaluation: parts equal the single functions, ranks equal one process, numbers of the summary."""

import json
import threading

import pytest

from eval.bits_per_byte import score_documents
from eval.evaluate import evaluate_model, summarise
from eval.pairs import make_pairs, score_pairs, wilson

SWEDISH = (
    "En gammal räv sover under det stora trädet. Sedan går den hem igen nu.",
    "Två katter sitter still på en sten.",
)
ESTONIAN = ("Vana rebane magab suure puu all täna.", "Kaks kassi istuvad vaikselt ühe kivi peal.", "Tere!")


@pytest.fixture
def inputs(texts):
    heldout = {"swe": texts(*SWEDISH), "est": texts(*ESTONIAN)}
    pairs = {language: make_pairs(found, count=3, seed=0, corpus=[]) for language, found in heldout.items()}
    return heldout, pairs


HOW = {"window": 32, "stride": 16}


def test_result_is_plain_json_and_equals_the_parts(llama, tokenizer, inputs):
    model = llama()
    heldout, pairs = inputs
    result = evaluate_model(model, tokenizer, heldout, pairs, **HOW, batch_tokens=200)
    assert json.loads(json.dumps(result)) == result
    assert list(result["languages"]) == ["swe", "est"]
    for language, entry in result["languages"].items():
        alone = score_documents(model, heldout[language], tokenizer, **HOW, batch_tokens=1000)
        for row, score in zip(entry["documents"], alone, strict=True):
            assert row == [score.id, pytest.approx(score.bits, abs=1e-4), score.bytes, score.tokens]
        scored = score_pairs(model, pairs[language], tokenizer, batch_tokens=1000)
        assert len(scored) >= 4
        for row, score in zip(entry["pairs"], scored, strict=True):
            sums = [pytest.approx(score.good_sum, abs=1e-4), pytest.approx(score.bad_sum, abs=1e-4)]
            assert row == [*sums, score.good_tokens, score.bad_tokens, score.kind]


def test_three_ranks_give_the_very_result_of_one(llama, tokenizer, inputs):
    model = llama()
    alone = evaluate_model(model, tokenizer, *inputs, **HOW, batch_tokens=200)
    parts, barrier, results = [None] * 3, threading.Barrier(3), [None] * 3

    def work(rank):
        def gather(part):
            parts[rank] = part
            barrier.wait(timeout=60)
            return list(parts)

        results[rank] = evaluate_model(
            model, tokenizer, *inputs, **HOW, batch_tokens=200, rank=rank, world=3, gather=gather
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [alone] * 3


def test_a_language_with_pairs_alone_or_documents_alone(llama, tokenizer, inputs):
    heldout, pairs = inputs
    result = evaluate_model(llama(), tokenizer, {"swe": heldout["swe"]}, {"est": pairs["est"]}, **HOW)
    summary = summarise(result, resamples=50)
    assert set(summary["swe"]) == {"bits_per_byte", "documents", "bytes", "tokens", "bytes_per_token", "pairs"}
    assert summary["swe"]["pairs"] == {}
    assert set(summary["est"]) == {"pairs"}


def test_summary_by_hand():
    pairs = [[-9.0, -10.0, 5, 5, "swap"], [-9.0, -9.0, 5, 5, "swap"], [-10.0, -9.0, 5, 5, "swap"]]
    pairs += [[-10.0, -9.0, 5, 4, "drop"], [-10.0, -7.0, 5, 4, "drop"]]
    result = {"languages": {"swe": {"documents": [["a", 200.0, 100, 40], ["b", 100.0, 100, 60]], "pairs": pairs}}}
    summary = summarise(result, resamples=200, confidence=0.9)["swe"]
    assert summary["bits_per_byte"] == {"value": 1.5, "low": 1.0, "high": 2.0}
    assert (summary["documents"], summary["bytes"], summary["tokens"], summary["bytes_per_token"]) == (2, 200, 100, 2.0)
    assert list(summary["pairs"]["drop"]) == ["per_token"], "a sum favours the shorter sentence"
    low, high = wilson(1, 3, confidence=0.9)
    swap = {"value": 1 / 3, "low": low, "high": high, "correct": 1, "ties": 1, "count": 3}
    assert summary["pairs"]["swap"] == {"per_token": swap, "sum": swap}
    assert (summary["pairs"]["drop"]["per_token"]["correct"], summary["pairs"]["drop"]["per_token"]["count"]) == (1, 2)
    assert json.loads(json.dumps(summary)) == summary
