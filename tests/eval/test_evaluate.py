"""Held-out text of all languages at once: equal to each language alone, ranks equal one process."""

import json
import threading

import pytest

from eval.bits_per_byte import score_documents
from eval.evaluate import evaluate_model

SWEDISH = (
    "En gammal räv sover under det stora trädet. Sedan går den hem igen nu.",
    "Två katter sitter still på en sten.",
)
ESTONIAN = ("Vana rebane magab suure puu all täna.", "Kaks kassi istuvad vaikselt ühe kivi peal.", "Tere!")


@pytest.fixture
def heldout(texts):
    return {"swe": texts(*SWEDISH), "est": texts(*ESTONIAN), "fin": []}


HOW = {"window": 32, "stride": 16}


def test_result_is_plain_json_and_equals_each_language_alone(llama, tokenizer, heldout):
    model = llama()
    result = evaluate_model(model, tokenizer, heldout, **HOW, batch_tokens=200)
    assert json.loads(json.dumps(result)) == result
    assert list(result["languages"]) == ["swe", "est", "fin"]
    assert result["languages"]["fin"] == {"documents": []}
    for language, entry in result["languages"].items():
        alone = score_documents(model, heldout[language], tokenizer, **HOW, batch_tokens=1000)
        for row, score in zip(entry["documents"], alone, strict=True):
            assert row == [score.id, pytest.approx(score.bits, abs=1e-4), score.bytes, score.tokens]


def test_three_ranks_give_the_very_result_of_one(llama, tokenizer, heldout):
    model = llama()
    alone = evaluate_model(model, tokenizer, heldout, **HOW, batch_tokens=200)
    parts, barrier, results = [None] * 3, threading.Barrier(3), [None] * 3

    def work(rank):
        def gather(part):
            parts[rank] = part
            barrier.wait(timeout=60)
            return list(parts)

        results[rank] = evaluate_model(
            model, tokenizer, heldout, **HOW, batch_tokens=200, rank=rank, world=3, gather=gather
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [alone] * 3
