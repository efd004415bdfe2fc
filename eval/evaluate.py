"""Everything that is measured of one model, as plain JSON, and the numbers that a report takes from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from eval.bits_per_byte import check_window, document_requests, document_score
from eval.bootstrap import ratio_interval
from eval.pairs import KINDS, Pair, PairScore, accuracy, pair_requests, pair_scores
from eval.score import Gather, Request, token_logprobs
from eval.text import Document, Tokenizer


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    heldout: Mapping[str, Sequence[Document]],
    pairs: Mapping[str, Sequence[Pair]],
    *,
    window: int,
    stride: int,
    batch_tokens: int = 4096,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    even: bool = False,
) -> dict[str, Any]:
    """Score held-out documents and pairs of all languages; return plain JSON, the same on every rank.

    {"window", "stride", "languages": {language: {"documents": [[id, bits, bytes, tokens], ...],
    "pairs": [[good_sum, bad_sum, good_tokens, bad_tokens, kind], ...]}}}; bits as in `score_documents`, sums in nats.

    Documents and pairs of all languages share batches, and ranks share the batches (`token_logprobs`): the result is
    the same, bit for bit, for any `world` on the same kind of machine and number of threads.

    Raises:
        InputError: see `check_window` and `token_logprobs`.
    """
    check_window(model, window=window, stride=stride)
    requests: list[Request] = []
    windows: dict[str, list[int]] = {}
    for language, documents in heldout.items():
        cut = [document_requests(document, tokenizer, window=window, stride=stride) for document in documents]
        windows[language] = [len(part) for part in cut]
        requests += [request for part in cut for request in part]
    for found in pairs.values():
        requests += pair_requests(found, tokenizer)
    logprobs = token_logprobs(
        model, requests, batch_tokens=batch_tokens, rank=rank, world=world, gather=gather, even=even
    )
    scored = iter(logprobs)
    languages: dict[str, Any] = {language: {"documents": [], "pairs": []} for language in {**heldout, **pairs}}
    for language, documents in heldout.items():
        for document, count in zip(documents, windows[language], strict=True):
            score = document_score(document, [next(scored) for _ in range(count)])
            languages[language]["documents"].append([score.id, score.bits, score.bytes, score.tokens])
    for language, found in pairs.items():
        scores = pair_scores(found, [next(scored) for _ in range(2 * len(found))])
        languages[language]["pairs"] = [
            [score.good_sum, score.bad_sum, score.good_tokens, score.bad_tokens, score.kind] for score in scores
        ]
    return {"window": window, "stride": stride, "languages": languages}


def summarise(
    result: Mapping[str, Any], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Return the numbers of a report by language: bits per byte with its bootstrap, pair accuracies with Wilson's.

    {language: {"bits_per_byte": {value, low, high}, "documents", "bytes", "tokens", "bytes_per_token",
    "pairs": {"swap": {"sum": {value, low, high, correct, ties, count}, "per_token": ...}, "drop": {"per_token": ...}}}}
    A drop shortens a sentence, which a sum rewards: it has no entry by sum. What a language lacks is left out.
    """
    return {
        language: {
            **_summarise_documents(entry["documents"], resamples=resamples, confidence=confidence, seed=seed),
            "pairs": _summarise_pairs(entry["pairs"], confidence=confidence),
        }
        for language, entry in result["languages"].items()
    }


def _summarise_documents(rows: Sequence[Sequence[Any]], **how: Any) -> dict[str, Any]:
    if not rows:
        return {}
    _, bits, size, tokens = zip(*rows, strict=True)
    return {
        "bits_per_byte": asdict(ratio_interval(bits, size, **how)),
        "documents": len(rows),
        "bytes": sum(size),
        "tokens": sum(tokens),
        "bytes_per_token": sum(size) / sum(tokens),
    }


def _summarise_pairs(rows: Sequence[Sequence[Any]], *, confidence: float) -> dict[str, Any]:
    scores = [
        PairScore(good_sum=good, bad_sum=bad, good_tokens=good_tokens, bad_tokens=bad_tokens, kind=kind)
        for good, bad, good_tokens, bad_tokens, kind in rows
    ]
    found = {}
    for kind in KINDS:
        if chosen := [score for score in scores if score.kind == kind]:
            found[kind] = {"per_token": asdict(accuracy(chosen, per_token=True, confidence=confidence))}
            if kind == "swap":
                found[kind]["sum"] = asdict(accuracy(chosen, per_token=False, confidence=confidence))
    return found
