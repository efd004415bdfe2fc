"""Bits per byte of held-out text: -log2 p(text) / UTF-8 bytes, which models with different tokenizers can share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eval.score import Request, token_logprobs, total
from eval.text import Document, Tokenizer, prefix_token
from parallel.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """What a document costs under a model."""

    id: str
    bits: float
    """-log2 of the document's probability."""
    bytes: int
    """Length of the text in UTF-8."""
    tokens: int
    """Tokens scored: all of the document's, the prefix not among them."""


def score_documents(
    model: "PreTrainedModel",
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    window: int,
    stride: int,
    batch_tokens: int,
) -> list[DocumentScore]:
    """Score documents by a sliding window; bits per byte is sum(bits) / sum(bytes).

    The rule: BOS (else EOS) is put before the document and not scored; nothing is put behind it. The window holds
    `window` tokens, the last of them a target, and moves by `stride`. Each token is scored exactly once, in the first
    window that holds it, and so sees at least `window - stride` tokens, or everything back to the document's start.

    Raises:
        InputError: window or stride does not fit (see `check_window`), or see `token_logprobs`.
    """
    check_window(model, window=window, stride=stride)
    requests = [document_requests(document, tokenizer, window=window, stride=stride) for document in documents]
    flat = [request for windows in requests for request in windows]
    scored = iter(token_logprobs(model, flat, batch_tokens=batch_tokens))
    return [
        document_score(document, [next(scored) for _ in windows])
        for document, windows in zip(documents, requests, strict=True)
    ]


def check_window(model: "PreTrainedModel", *, window: int, stride: int) -> None:
    """Check that a window fits the model and that windows overlap.

    Raises:
        InputError: the window is below 2 tokens or longer than the model's positions, or the stride is not below it.
    """
    longest = model.config.max_position_embeddings
    if not 2 <= window <= longest:
        raise InputError(f"window {window} is not possible: allowed are 2 to {longest} tokens (the model's positions)")
    if not 1 <= stride < window:
        raise InputError(f"stride {stride} is not possible: allowed are 1 to {window - 1} tokens (window - 1)")


def document_requests(document: Document, tokenizer: Tokenizer, *, window: int, stride: int) -> list[Request]:
    """Return the windows of a document, in order; their scored parts cover its tokens once."""
    tokens = [prefix_token(tokenizer), *tokenizer.encode(document.text)]
    requests = []
    start, done = 0, 1
    while done < len(tokens):
        stop = min(start + window, len(tokens))
        name = f"document {document.id}"
        requests.append(Request(name=name, tokens=tokens[start:stop], context=done - start))
        start, done = start + stride, stop
    return requests


def document_score(document: Document, logprobs: Sequence[np.ndarray]) -> DocumentScore:
    """Combine the log-probabilities (nats) of a document's windows."""
    joined = np.concatenate([np.zeros(0), *logprobs])
    return DocumentScore(
        id=document.id,
        bits=-total(joined) / math.log(2) + 0.0,  # + 0.0: an empty document costs 0, not -0
        bytes=len(document.text.encode()),
        tokens=len(joined),
    )
