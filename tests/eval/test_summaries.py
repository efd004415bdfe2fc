"""Numbers of rows, by hand."""

import json

from eval.pairs import SHORTENED, wilson
from eval.tasks import summarise_documents, summarise_pairs

HOW = {"resamples": 200, "confidence": 0.9, "seed": 0}


def test_documents_by_hand():
    rows = [["a", 200.0, 100, 40, 20], ["b", 100.0, 100, 60, 5]]
    found = summarise_documents(rows, **HOW)
    assert found["bits_per_byte"] == {"value": 1.5, "low": 1.0, "high": 2.0}
    assert (found["documents"], found["bytes"], found["tokens"], found["words"]) == (2, 200, 100, 25)
    assert (found["bytes_per_token"], found["tokens_per_word"], found["token_perplexity"]) == (2.0, 4.0, 8.0)
    (alone,) = (summarise_documents(rows[:1], **HOW)["bits_per_byte"],)
    assert alone == {"value": 2.0, "low": None, "high": None}, "nothing can be resampled"


def test_pairs_by_hand():
    rows = [[-9.0, -10.0, 5, 5, "swap"], [-9.0, -9.0, 5, 5, "swap"], [-10.0, -9.0, 5, 5, "swap"]]
    rows += [[-10.0, -9.0, 5, 4, "drop"], [-10.0, -7.0, 5, 4, "drop"]]
    found = summarise_pairs(rows, shortened=SHORTENED, confidence=0.9)
    assert found["pairs"] == 5
    assert list(found["sum"]["phenomena"]) == ["swap"], "a sum favours the shorter sentence"
    low, high = wilson(1, 3, confidence=0.9)
    swap = {"value": 1 / 3, "low": low, "high": high, "correct": 1, "ties": 1, "count": 3}
    assert found["per_token"]["phenomena"]["swap"] == found["sum"]["phenomena"]["swap"] == swap
    drop = found["per_token"]["phenomena"]["drop"]
    assert (drop["correct"], drop["count"]) == (1, 2)
    assert (found["per_token"]["micro"]["correct"], found["per_token"]["micro"]["count"]) == (2, 5)
    assert found["per_token"]["macro"]["value"] == (1 / 3 + 1 / 2) / 2
    assert json.loads(json.dumps(found)) == found
    assert "sum" not in summarise_pairs(rows[3:], shortened=SHORTENED, confidence=0.9)
