"""Log-probabilities of tokens under a model: the core of every score. B batch, T tokens, D model, V vocab, S scored.

A row is one sequence, or several that begin alike: their prefix once, and the rest of each behind it, which sees the
prefix and itself alone. Short rows stand behind one another in lines of a batch, none of which sees another, so that
nothing is padding. Batches are planned over all requests before ranks share them, so that a result is the same for any
number of ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from parallel.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 1 << 24
"""Logits held at once (elements): 64 MiB in float32, whatever the vocabulary."""
COLUMNS = 4096
"""Entries of the vocabulary that logits are computed of at once: twice as fast as all of them for fewer tokens."""
SHARED = 1024
"""Tokens of a row of several sequences at most: its mask has the square of them."""
LINE = 256
"""Tokens of a line of several rows at most: enough to leave little empty, few enough for attention to cost little."""
WORTH, WORTH_IN_LINE = 0.25, 0.05
"""Share of its own tokens that a sequence has to save to join a row, and one within a line, which has a mask anyway."""
MASKED = ("sdpa", "eager")
"""Kinds of attention that take any mask."""

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


@dataclass(frozen=True, kw_only=True)
class Row:
    """Requests that are computed together."""

    requests: tuple[int, ...]
    """Their numbers."""
    prefix: int
    """Tokens that they share; 0 for one request alone."""
    length: int
    """Tokens of all."""

    @property
    def places(self) -> int:
        """Tokens that are computed: the last one of each request predicts none."""
        return self.length - len(self.requests)


def token_logprobs(
    model: "PreTrainedModel",
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    even: bool = False,
    share: bool = False,
) -> list[np.ndarray]:
    """Return ln p(token | tokens before it) (nats, float64 [S]) of every scored token of every request.

    Requests of similar length share a batch of at most `batch_tokens` tokens, padding included; a longer one is a batch
    of its own. With `gather`, each of `world` ranks scores its share of the batches. `even` makes every rank take the
    same number of passes, repeating one if need be: needed where parameters are gathered collectively (ZeRO-3).
    `share` computes what neighbouring requests begin with once, and short ones in one line, where the model's attention
    takes any mask.

    Raises:
        InputError: a token lies outside the model's vocabulary, or a log-probability is not finite.
    """
    how: dict[str, Any] = {"rank": rank, "world": world, "gather": gather, "even": even, "share": share}
    return [found[0] for found in _scores(model, requests, batch_tokens=batch_tokens, greedy=False, **how)]


def check_lengths(model: "PreTrainedModel", requests: Sequence[Request]) -> None:
    """Check that sequences are within a model's positions, behind which it computes as it was never trained to.

    Raises:
        InputError: one is not; the line names it.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    for request in requests:
        if len(request.tokens) - 1 > longest:  # the last one is scored alone
            raise InputError(
                f"{request.name}: {len(request.tokens)} tokens are more than the model's {longest} positions"
            )


def greedy_logprobs(model: "PreTrainedModel", requests: Sequence[Request], **how: Any) -> list[tuple[np.ndarray, bool]]:
    """Return of every request what `token_logprobs` does, and whether each of its scored tokens is a likeliest one."""
    found = _scores(model, requests, greedy=True, share=True, **how)
    return [(logprobs, bool(best.all())) for logprobs, best in found]


@torch.no_grad()
def _scores(
    model: "PreTrainedModel",
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    greedy: bool,
    share: bool,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    even: bool = False,
) -> list[np.ndarray]:
    """Return [1, S] of every request: log-probabilities, and with `greedy` [2, S]: whether no token is likelier."""
    assert not model.training, "scoring wants a model in eval mode"
    vocab = model.config.vocab_size
    for request in requests:
        assert request.context >= 1, request
        if (largest := max(request.tokens, default=0)) >= vocab:
            raise InputError(
                f"{request.name}: token {largest} is outside the model's vocabulary of {vocab}; "
                "is this the tokenizer that the model was trained with?"
            )
    longest = _longest_shared(model) if share else 0
    rows = plan_rows(requests, longest=longest)
    short = min(LINE, longest, batch_tokens)
    batches = plan_lines([row for row in rows if row.places <= short], short, batch_tokens)
    for shared in (True, False):  # apart: a mask is slower, and has no window of attention
        long = [row for row in rows if row.places > short and bool(row.prefix) == shared]
        planned = plan_batches([row.length for row in long], batch_tokens)
        batches += [[[long[number]] for number in batch] for batch in planned]
    shares = share_batches([len(batch) * _width(batch) for batch in batches], world)
    mine = shares[rank]
    if even and batches:
        mine = mine + [0] * (max(len(share) for share in shares) - len(mine))
    found: dict[int, np.ndarray] = {}
    for number in mine:
        found |= _score_batch(model, requests, batches[number], greedy)
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


def plan_lines(rows: Sequence[Row], width: int, budget: int) -> list[list[list[Row]]]:
    """Put rows into lines of at most `width` tokens, and lines into batches of at most `budget`.

    The longest row goes first, each into the line where it leaves least (best fit decreasing).
    """
    lines: list[list[Row]] = []
    left: list[list[int]] = [[] for _ in range(width + 1)]
    """Lines by the tokens that they have room for."""
    for row in sorted(rows, key=lambda row: (-row.places, row.requests)):
        room = next((room for room in range(row.places, width + 1) if left[room]), None)
        if room is None:
            lines.append([row])
            left[width - row.places].append(len(lines) - 1)
        else:
            line = left[room].pop()
            lines[line].append(row)
            left[room - row.places].append(line)
    count = max(1, budget // width) if width else 1
    return [lines[start : start + count] for start in range(0, len(lines), count)]


def _width(batch: Sequence[Sequence[Row]]) -> int:
    """Return the tokens of the longest line."""
    return max(1, max(sum(row.places for row in line) for line in batch))


def share_batches(costs: Sequence[int], world: int) -> list[list[int]]:
    """Deal batches to ranks: the costliest first, each to the rank with the least so far (lowest rank on a tie)."""
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


def plan_rows(requests: Sequence[Request], *, longest: int) -> list[Row]:
    """Join neighbouring requests that begin alike into rows of at most `longest` tokens; 0: each is a row of its own.

    Those of a row have the same context, within what they share; each saves a share of its tokens, WORTH.
    """
    rows: list[Row] = []
    for number, request in enumerate(requests):
        row = _joined(rows[-1], requests, number, longest) if rows and longest else None
        if row is None:
            rows.append(Row(requests=(number,), prefix=0, length=len(request.tokens)))
        else:
            rows[-1] = row
    return rows


def _joined(row: Row, requests: Sequence[Request], number: int, longest: int) -> Row | None:
    """Return a row with one more request, or None if it does not save enough."""
    first, new = requests[row.requests[0]], requests[number]
    if first.context != new.context:
        return None
    members = (*row.requests, number)
    most = min(row.prefix or len(first.tokens) - 1, len(new.tokens) - 1)  # of each, a token is left to be scored
    pairs = zip(first.tokens[:most], new.tokens[:most], strict=True)
    prefix = next((at for at, (one, other) in enumerate(pairs) if one != other), most)
    length = prefix + sum(len(requests[member].tokens) - prefix for member in members)
    worth = WORTH_IN_LINE if length <= LINE else WORTH
    if length > min(longest, row.length + (1 - worth) * len(new.tokens)) or prefix < new.context:
        return None
    return Row(requests=members, prefix=prefix, length=length)


def _longest_shared(model: "PreTrainedModel") -> int:
    """Return how long a row of several sequences may be: 0 where attention takes no mask, and within its window."""
    config = model.config
    if getattr(config, "_attn_implementation", None) not in MASKED:
        return 0
    return min(SHARED, getattr(config, "sliding_window", None) or SHARED)


def _score_batch(
    model: "PreTrainedModel", requests: Sequence[Request], batch: Sequence[Sequence[Row]], greedy: bool
) -> dict[int, np.ndarray]:
    """Score a batch of lines: hidden states for all of it, logits chunk by chunk and just where a token is scored."""
    width = _width(batch)
    # Padding is on the right and attention is causal: no scored token sees it. A row alone in its line needs no mask.
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # [B, T]
    places = torch.arange(width).repeat(len(batch), 1)  # [B, T]: positions in the sequence
    owners = torch.zeros(2, len(batch), width, dtype=torch.long)  # [2, B, T]: the row, and which of its rests or 0
    where, targets, sizes = [], [], []

    def score(tokens: torch.Tensor, at: torch.Tensor) -> None:
        where.append(at)
        targets.append(tokens)
        sizes.append(len(tokens))

    for number, line in enumerate(batch):
        at = 0
        for owner, row in enumerate(line):
            prefix, start = row.prefix, number * width + at
            members = [torch.tensor(requests[member].tokens, dtype=torch.long) for member in row.requests]
            context = requests[row.requests[0]].context
            owners[0, number, at:] = owner
            places[number, at:] = torch.arange(width - at)
            if prefix:  # the token at position t is predicted by the hidden state at t - 1
                ids[number, at : at + prefix] = members[0][:prefix]
                score(members[0][context:prefix], torch.arange(context - 1, prefix - 1) + start)
            at += prefix
            for part, tokens in enumerate(members, start=1):
                rest = len(tokens) - 1 - prefix
                ids[number, at : at + rest] = tokens[prefix:-1]
                places[number, at : at + rest] = torch.arange(prefix, prefix + rest)
                owners[1, number, at : at + rest] = part if prefix else 0
                if prefix:
                    places_of_rest = torch.arange(at, at + rest) + number * width
                    score(tokens[prefix:], torch.cat([torch.tensor([start + prefix - 1]), places_of_rest]))
                else:
                    score(tokens[context:], torch.arange(context - 1, rest) + start)
                at += rest
    about: dict[str, torch.Tensor] = {}
    if any(row.prefix or len(line) > 1 for line in batch for row in line):
        about["attention_mask"] = _mask(owners[0], owners[1], model.dtype).to(model.device)
        about["position_ids"] = places.to(model.device)
    hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False, **about).last_hidden_state  # [B, T, D]
    chosen = hidden.flatten(0, 1)[torch.cat(where).to(model.device)]
    pieces = iter(np.split(_logprobs(model, chosen, torch.cat(targets), greedy), np.cumsum(sizes)[:-1], axis=1))
    found: dict[int, np.ndarray] = {}
    for row in (row for line in batch for row in line):
        begin = [next(pieces)] if row.prefix else []
        found |= {member: np.concatenate([*begin, next(pieces)], axis=1) for member in row.requests}
    return found


def _mask(rows: torch.Tensor, parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores of attention [B, 1, T, T]: each sees what is before it in its row and rest."""
    keys, queries = parts[:, None, None, :], parts[:, None, :, None]
    width = parts.shape[1]
    seen = torch.ones(width, width, dtype=torch.bool).tril() & ((keys == 0) | (keys == queries))
    seen &= rows[:, None, None, :] == rows[:, None, :, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def _logprobs(model: "PreTrainedModel", hidden: torch.Tensor, wanted: torch.Tensor, greedy: bool) -> np.ndarray:
    """Return ln p (float64 [1, S]) of tokens [S], given the hidden state that predicts each [S, D]; as `_scores`."""
    wanted = wanted.to(hidden.device)
    head, vocab = model.get_output_embeddings(), model.config.vocab_size
    # Under ZeRO-3 a weight is whole within its module's call alone.
    columns = COLUMNS if type(head) is torch.nn.Linear and len(head.weight) == vocab else vocab
    divisor = getattr(model.config, "logits_scaling", None) or 1.0
    cap = getattr(model.config, "final_logit_softcapping", None)
    found = torch.empty(1 + greedy, len(wanted), dtype=torch.float64, device=hidden.device)
    step = max(1, LOGITS // columns)
    for start in range(0, len(wanted), step):
        piece = slice(start, start + step)
        tokens = wanted[piece]
        chosen = torch.empty(len(tokens), dtype=torch.float64, device=hidden.device)
        sums, best = [], []
        for first in range(0, vocab, columns):
            logits = _logits(head, hidden[piece], first, columns, whole=columns == vocab)  # [S, V] or some of V
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if divisor != 1.0:
                logits = logits / divisor
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            (here,) = torch.nonzero((tokens >= first) & (tokens < first + logits.shape[1]), as_tuple=True)
            chosen[here] = logits[here, tokens[here] - first].double()
            sums.append(logits.logsumexp(dim=1))
            if greedy:
                best.append(logits.amax(dim=1))
        found[0, piece] = chosen - torch.stack(sums).logsumexp(dim=0)
        if greedy:
            found[1, piece] = (chosen >= torch.stack(best).amax(dim=0)).double()
    return found.cpu().numpy()


def _logits(head: torch.nn.Module, hidden: torch.Tensor, first: int, count: int, *, whole: bool) -> torch.Tensor:
    """Return the logits of some entries of the vocabulary, or of all."""
    if whole:
        logits: torch.Tensor = head(hidden)
        return logits
    assert isinstance(head, torch.nn.Linear), head
    bias = None if head.bias is None else head.bias[first : first + count]
    return torch.nn.functional.linear(hidden, head.weight[first : first + count], bias)


def total(logprobs: np.ndarray) -> float:
    """Return the sum (nats), correctly rounded: the same tokens in another order give the very same number."""
    return math.fsum(logprobs.tolist())
