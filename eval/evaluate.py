"""Everything that is measured of one model, as plain JSON, and the numbers that a report takes from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from eval.bits_per_byte import check_window
from eval.pairs import SHORTENED, Pair
from eval.score import Gather, token_logprobs
from eval.tasks import PairsTask, Task, TextTask, summarise_documents, summarise_pairs
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
    tasks: list[tuple[str, str, Task]] = [
        *((name, "documents", TextTask(documents=one, window=window, stride=stride)) for name, one in heldout.items()),
        *((name, "pairs", PairsTask(pairs=one)) for name, one in pairs.items()),
    ]
    requests = [[task.requests(item, tokenizer) for item in range(len(task))] for _, _, task in tasks]
    flat = [request for items in requests for item in items for request in item]
    logprobs = token_logprobs(model, flat, batch_tokens=batch_tokens, rank=rank, world=world, gather=gather, even=even)
    scored = iter(logprobs)
    languages: dict[str, Any] = {language: {"documents": [], "pairs": []} for language in {**heldout, **pairs}}
    for (language, kind, task), items in zip(tasks, requests, strict=True):
        rows = [task.row(number, [next(scored) for _ in item]) for number, item in enumerate(items)]
        languages[language][kind] = [row[:4] for row in rows] if kind == "documents" else rows
    return {"window": window, "stride": stride, "languages": languages}


def summarise(
    result: Mapping[str, Any], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Return the numbers of a report by language: bits per byte with its bootstrap, pair accuracies with Wilson's.

    {language: {"bits_per_byte": {value, low, high}, "documents", "bytes", "tokens", "bytes_per_token",
    "pairs": {"swap": {"sum": {value, low, high, correct, ties, count}, "per_token": ...}, "drop": {"per_token": ...}}}}
    A drop shortens a sentence, which a sum rewards: it has no entry by sum. What a language lacks is left out.
    """
    found: dict[str, Any] = {}
    for language, entry in result["languages"].items():
        rows, pairs = entry["documents"], entry["pairs"]
        about = summarise_documents(rows, resamples=resamples, confidence=confidence, seed=seed) if rows else {}
        counted = summarise_pairs(pairs, shortened=SHORTENED, confidence=confidence)
        kinds: dict[str, Any] = {}
        for how in ("per_token", "sum"):
            for kind, part in counted.get(how, {"phenomena": {}})["phenomena"].items():
                kinds.setdefault(kind, {})[how] = part
        found[language] = {**about, "pairs": kinds}
    return found
