"""Text as windows and batches of them, made as they are asked for: one document's are held at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from eval.bits_per_byte import document_requests
from eval.score import Request
from eval.text import Document
from train.data.tokenizer import TextTokenizer


def cut(
    documents: Iterable[Document], tokenizer: TextTokenizer, *, length: int, tokens: int | None
) -> Iterator[Request]:
    """Yield the windows of documents, as bits per byte score them, until `tokens` are scored: BOS (else EOS) first."""
    for document in documents:
        for request in document_requests(document, tokenizer, window=length, stride=length // 2):
            scored = len(request.tokens) - request.context
            if tokens is not None and scored >= tokens:
                yield replace(request, tokens=request.tokens[: request.context + tokens])
                return
            tokens = None if tokens is None else tokens - scored
            yield request


def batched(requests: Iterable[Request], budget: int) -> Iterator[list[Request]]:
    """Yield requests in their order, as many at once as rows x longest row <= `budget` tokens; at least one."""
    batch: list[Request] = []
    longest = 0
    for request in requests:
        longest = max(longest, len(request.tokens))
        if batch and (len(batch) + 1) * longest > budget:
            yield batch
            batch, longest = [], len(request.tokens)
        batch.append(request)
    if batch:
        yield batch
