"""Statistics of a model on text that data-based merging needs: the diagonal Fisher and the Gram matrices of inputs.

A pass reads batches of requests (cut as `eval.bits_per_byte` does) and adds to sums; what is scored counts, context
does not. B batch, T tokens, S scored, D model, V vocab, I a layer's inputs.

Sums are the same, bit for bit, if the same batches are added in the same order on the same kind of machine and number
of threads, in one go or in several: they hold all that a pass needs to go on.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from eval.score import LOGITS, Request
from merge.gram import gram_sums
from merge.statistics_files import Sums
from parallel.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Labels = Literal["text", "sampled"]


After = Callable[[Sums], None]
"""Called after each batch: to save, and to say how far it is."""


def fisher_sums(model: "PreTrainedModel") -> Sums:
    """Return the sums that a pass of `fisher` starts from."""
    named = model.named_parameters()
    return Sums(tensors={name: torch.zeros_like(value, dtype=torch.float32) for name, value in named})


def fisher(
    model: "PreTrainedModel",
    batches: Iterable[Sequence[Request]],
    *,
    labels: Labels = "text",
    seed: int = 0,
    sums: Sums | None = None,
    after: After | None = None,
) -> dict[str, torch.Tensor]:
    """Return the diagonal Fisher information of each parameter a token, float32, by on-disk name; a tied one once.

    F = 1/T sum_s (grad sum_{t in s} ln p(y_t | x_<t))^2 over sequences s with T scored tokens in all: the estimate
    1/N sum_i E_y (grad ln p(y | x_i))^2 of Fisher merging (Matena and Raffel, arXiv 2111.09832), an example being a
    token after its context. Gradients are squared a sequence, since under the model's own labels the scores of tokens
    are uncorrelated: the mean is the same, for one backward pass a sequence. Divided by tokens, not sequences, it is of
    one scale for texts that are cut into windows of other lengths; times tokens / sequences it is the mean over these.

    Sums are float32: nothing cancels, so that n sequences have a relative error near sqrt(n) 6e-8, and a merge takes
    ratios. Memory: the model, one more of its size, one sequence's activations.

    Args:
        model: in float32 and eval mode; its parameters' gradients are taken away.
        labels: `text` is the empirical Fisher, y the text itself; `sampled` is the true one, each y_t drawn from the
            model after the text's x_<t.
        seed: decides the draws, together with the number of the sequence: batches do not matter.
        sums: what earlier batches came to; `batches` are those after them. They become the result, in place.

    Raises:
        InputError: a token is outside the vocabulary, a log-probability is not finite, or a square overflows.
    """
    assert not model.training, "dropout is no part of the likelihood"
    sums = sums or fisher_sums(model)
    hooks = [
        value.register_post_accumulate_grad_hook(partial(_add_square, sums.tensors[name]))
        for name, value in model.named_parameters()
    ]
    try:
        for batch in batches:
            for number, request in enumerate(batch, sums.sequences):
                check_tokens(model, request)
                _log_likelihood(model, request, labels, _stream(seed, number)).backward()
            _count(sums, batch, after)
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.tensors.items():
        if not torch.isfinite(total).all():
            raise InputError(f"{name}: the squared gradients are not finite; the model has diverged or overflows")
        total /= max(1, sums.tokens)
    return sums.tensors


def _add_square(total: torch.Tensor, parameter: torch.Tensor) -> None:
    """Add a gradient's square and drop the gradient: a tensor's at a time is held, not the model's."""
    assert parameter.grad is not None
    gradient = parameter.grad.float()
    total.addcmul_(gradient, gradient)
    parameter.grad = None


def _stream(seed: int, sequence: int) -> torch.Generator:
    """Return random numbers of their own for a sequence: a pass that goes on needs no generator's state."""
    key = hashlib.blake2b(f"{seed}/{sequence}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))


def _log_likelihood(model: "PreTrainedModel", request: Request, labels: Labels, draw: torch.Generator) -> torch.Tensor:
    """Return ln p of a sequence's scored tokens (nats), or of labels drawn in their places, with its graph."""
    tokens = torch.tensor(request.tokens, device=model.device)
    hidden = model.base_model(input_ids=tokens[None, :-1], use_cache=False).last_hidden_state[0]  # [T, D]
    # The token at position t is predicted by the hidden state at t - 1.
    size = max(1, LOGITS // model.config.vocab_size)
    pieces, targets = hidden[request.context - 1 :].split(size), tokens[request.context :].split(size)  # [S, D], [S]
    if labels == "sampled":
        with torch.no_grad():
            # Drawn on the CPU, whose generator gives the same numbers on every machine.
            shares = [torch.softmax(_logits(model, piece), dim=-1).cpu() for piece in pieces]
            drawn = [torch.multinomial(share, 1, generator=draw).squeeze(1) for share in shares]
        targets = tuple(one.to(model.device) for one in drawn)
    # Logits are made again on the way back, so that no more than LOGITS of them are ever held.
    run = _piece if len(pieces) == 1 else partial(checkpoint, _piece, use_reentrant=False)
    total = torch.stack([run(model, *pair) for pair in zip(pieces, targets, strict=True)]).sum()
    if not torch.isfinite(total):
        raise InputError(f"{request.name}: a log-probability is not finite; the model has diverged or overflows")
    return total


def _piece(model: "PreTrainedModel", hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = _logits(model, hidden)
    return (logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)).sum()


def _logits(model: "PreTrainedModel", hidden: torch.Tensor) -> torch.Tensor:
    """Return logits [S, V] of hidden states [S, D], as `eval.score` makes them."""
    logits = model.get_output_embeddings()(hidden) / (getattr(model.config, "logits_scaling", None) or 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def gram(
    model: "PreTrainedModel",
    batches: Iterable[Sequence[Request]],
    *,
    sums: Sums | None = None,
    after: After | None = None,
) -> dict[str, torch.Tensor]:
    """Return X^T X [I, I] of the inputs X [S, I] of each linear layer, summed over tokens, float32, by matrix.

    They are what RegMean's closed form weighs each model's W by (Jin et al., arXiv 2212.09849, section 3):
    (sum_i X_i^T X_i)^-1 sum_i X_i^T X_i W_i^T. `shared_inputs` says which weight uses which matrix. Every position
    counts once, in the window that scores the token after it.

    A batch's product is float32, the sum over batches float64: a few inputs of a language model are a thousand times
    the others, and what n additions in float32 would round off their entries is of the size of the eigenvalues of the
    rest, which are solved for. For hidden size D, feed-forward size F and L layers that is about 8 L (3 D^2 + F^2)
    bytes, most of it down_proj's (SmolLM2-135M: 0.8 GB).

    Args:
        model: in float32 and eval mode.
        sums: what earlier batches came to; `batches` are those after them. They become the result, in place.

    Raises:
        InputError: a token is outside the vocabulary, or a hidden state is not finite.
    """
    assert not model.training, "dropout is no part of what layers are given"
    sums = sums or gram_sums(model)
    totals, where = sums.tensors, torch.zeros(0, dtype=torch.long)

    def add(name: str, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        inputs = given[0].flatten(0, 1)[where].float()  # [S, I]
        totals[name] += inputs.T @ inputs

    modules = {name: model.get_submodule(name) for name in totals}
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), None)
    hooks = [module.register_forward_pre_hook(partial(add, name)) for name, module in modules.items() if name != head]
    try:
        for batch in batches:
            ids, where = _padded(model, batch)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
            if not torch.isfinite(hidden.flatten(0, 1)[where]).all():
                raise InputError(f"{batch[0].name}: a hidden state is not finite; the model has diverged or overflows")
            if head is not None:  # its input alone is wanted: no logits are made
                add(head, None, (hidden,))
            _count(sums, batch, after)
    finally:
        for hook in hooks:
            hook.remove()
    for name in totals:
        totals[name] = totals[name].float()
    return totals


def _padded(model: "PreTrainedModel", batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch's inputs [B, T], padded on the right, and the flat places [S] that predict what is scored.

    Attention is causal: nothing that counts sees the padding, so no mask is needed.
    """
    width = max(len(request.tokens) for request in batch) - 1
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    where = []
    for row, request in enumerate(batch):
        check_tokens(model, request)
        ids[row, : len(request.tokens) - 1] = torch.tensor(request.tokens[:-1])
        where.append(torch.arange(request.context - 1, len(request.tokens) - 1) + row * width)
    return ids.to(model.device), torch.cat(where).to(model.device)


def check_tokens(model: "PreTrainedModel", request: Request) -> None:
    """Raise InputError if a token of a sequence is outside the model's vocabulary."""
    assert 1 <= request.context < len(request.tokens), request
    if (largest := max(request.tokens)) >= model.config.vocab_size:
        raise InputError(
            f"{request.name}: token {largest} is outside the model's vocabulary of {model.config.vocab_size}; "
            "is this the tokenizer that the model was trained with?"
        )


def _count(sums: Sums, batch: Sequence[Request], after: After | None) -> None:
    sums.batches += 1
    sums.sequences += len(batch)
    sums.tokens += sum(len(request.tokens) - request.context for request in batch)
    if after is not None:
        after(sums)
