"""Log-probabilities of tokens under a model: the core of every score. B batch, T tokens, D model, V vocab, S scored.

Batches are planned over all requests before ranks share them, so that a result is the same for any number of ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from parallel.errors import InputError

LOGITS = 1 << 24
"""Logits held at once (elements): 64 MiB in float32, whatever the vocabulary."""

Gather = Callable[[Any], list[Any]]
"""All-gather of a Python object: every rank gives one and gets the list of all, in rank order."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A sequence to score."""

    name: str
    """What an error calls it."""
    tokens: Sequence[int]
    context: int = 1
    """Leading tokens that are given and not scored; at least 1."""


@torch.no_grad()
def token_logprobs(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    even: bool = False,
) -> list[np.ndarray]:
    """Return ln p(token | tokens before it) (nats, float64 [S]) of every scored token of every request.

    Requests of similar length share a batch of at most `batch_tokens` tokens, padding included; a longer one is a batch
    of its own. With `gather`, each of `world` ranks scores its share of the batches. `even` makes every rank take the
    same number of passes, repeating one if need be: needed where parameters are gathered collectively (ZeRO-3).

    Raises:
        InputError: a token lies outside the model's vocabulary, or a log-probability is not finite.
    """
    assert not model.training, "scoring wants a model in eval mode"
    vocab = model.config.vocab_size
    for request in requests:
        assert request.context >= 1, request
        if (largest := max(request.tokens, default=0)) >= vocab:
            raise InputError(
                f"{request.name}: token {largest} is outside the model's vocabulary of {vocab}; "
                "is this the tokenizer that the model was trained with?"
            )
    batches = plan_batches([len(request.tokens) for request in requests], batch_tokens)
    shares = share_batches([len(batch) * len(requests[batch[0]].tokens) for batch in batches], world)
    mine = shares[rank]
    if even and batches:
        mine = mine + [0] * (max(len(share) for share in shares) - len(mine))
    found: dict[int, np.ndarray] = {}
    for number in mine:
        batch = batches[number]
        found.update(zip(batch, _score_batch(model, [requests[index] for index in batch]), strict=True))
    for part in gather(found) if gather else [found]:
        found |= part
    # Checked after the gather: every rank raises the same error and none waits for another.
    for index, request in enumerate(requests):
        if not np.isfinite(found[index]).all():
            raise InputError(f"{request.name}: a log-probability is not finite; the model has diverged or overflows")
    return [found[index] for index in range(len(requests))]


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences, longest first, so that rows x longest row <= `budget` tokens; at least one row a batch."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def share_batches(costs: Sequence[int], world: int) -> list[list[int]]:
    """Deal batches to ranks: the costliest first, each to the rank with the least so far (lowest rank on a tie)."""
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


def _score_batch(model: PreTrainedModel, batch: Sequence[Request]) -> list[np.ndarray]:
    """Score one batch: hidden states for all of it, logits chunk by chunk and just where a token is scored."""
    width = max(max(len(request.tokens) - 1, 1) for request in batch)
    # Padding is on the right and attention is causal: no scored token sees it, so no mask is needed, which is faster.
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # [B, T]
    where, targets, sizes = [], [], []
    for row, request in enumerate(batch):
        tokens = torch.tensor(request.tokens, dtype=torch.long)
        ids[row, : len(tokens) - 1] = tokens[:-1]
        # The token at position t is predicted by the hidden state at t - 1.
        where.append(torch.arange(request.context - 1, len(tokens) - 1) + row * width)
        targets.append(tokens[request.context :])
        sizes.append(len(targets[-1]))
    device = model.device
    hidden = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state  # [B, T, D]
    hidden = hidden.flatten(0, 1)[torch.cat(where).to(device)]  # [S, D]
    wanted = torch.cat(targets).to(device)  # [S]
    head = model.get_output_embeddings()
    step = max(1, LOGITS // model.config.vocab_size)
    divisor = getattr(model.config, "logits_scaling", None) or 1.0
    cap = getattr(model.config, "final_logit_softcapping", None)
    logprobs = torch.empty(len(wanted), dtype=torch.float64, device=device)
    for start in range(0, len(wanted), step):
        piece = slice(start, start + step)
        logits = head(hidden[piece])  # [S, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        chosen = logits.gather(1, wanted[piece, None]).squeeze(1)
        logprobs[piece] = chosen - logits.logsumexp(dim=1)
    return np.split(logprobs.cpu().numpy(), np.cumsum(sizes)[:-1])


def total(logprobs: np.ndarray) -> float:
    """Return the sum (nats), correctly rounded: the same tokens in another order give the very same number."""
    return math.fsum(logprobs.tolist())
