"""Held-out text of all languages scored at once, as training asks of the model that it trains."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.bits_per_byte import check_window
from eval.score import Gather, token_logprobs
from eval.tasks import TextTask
from eval.text import Document, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_model(
    model: "PreTrainedModel",
    tokenizer: Tokenizer,
    heldout: Mapping[str, Sequence[Document]],
    *,
    window: int,
    stride: int,
    batch_tokens: int = 4096,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    even: bool = False,
) -> dict[str, Any]:
    """Score held-out documents of all languages; return plain JSON, the same on every rank.

    {"window", "stride", "languages": {language: {"documents": [[id, bits, bytes, tokens], ...]}}}; bits as in
    `score_documents`.

    Documents of all languages share batches, and ranks share the batches (`token_logprobs`): the result is the same,
    bit for bit, for any `world` on the same kind of machine and number of threads.

    Raises:
        InputError: see `check_window` and `token_logprobs`.
    """
    check_window(model, window=window, stride=stride)
    tasks = {language: TextTask(documents=one, window=window, stride=stride) for language, one in heldout.items()}
    requests = {
        language: [task.requests(item, tokenizer) for item in range(len(task))] for language, task in tasks.items()
    }
    flat = [request for items in requests.values() for item in items for request in item]
    logprobs = token_logprobs(model, flat, batch_tokens=batch_tokens, rank=rank, world=world, gather=gather, even=even)
    scored = iter(logprobs)
    languages = {
        language: {
            "documents": [task.row(number, [next(scored) for _ in item])[:4] for number, item in enumerate(items)]
        }
        for (language, task), items in zip(tasks.items(), requests.values(), strict=True)
    }
    return {"window": window, "stride": stride, "languages": languages}
