"""Text that a model writes: a sample for a reader's eye, the same for the same seed; or its likeliest answer."""

from collections.abc import Collection, Generator, Sequence
from typing import TYPE_CHECKING

import torch

from eval.text import Tokenizer, prefix_token
from parallel.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def continue_text(
    model: "PreTrainedModel",
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 40,
    banned: Collection[int] = (),
) -> str:
    """Return up to `tokens` tokens that continue a prompt, without the prompt; EOS ends the text early.

    The next token is drawn from the `top_k` likeliest at a temperature, which has to be above 0. BOS and the tokens in
    `banned` (other special tokens) are never drawn.

    Raises:
        InputError: temperature or top_k is not positive, or prompt and continuation exceed the model's positions.
    """
    if temperature <= 0 or top_k < 1:
        raise InputError(f"temperature {temperature} and top_k {top_k}: both have to be above 0")
    written = [prefix_token(tokenizer), *tokenizer.encode(prompt)]
    start, longest = len(written), model.config.max_position_embeddings
    if start + tokens > longest:
        raise InputError(f"a prompt of {start} tokens and {tokens} new ones exceed the model's {longest} positions")
    never = sorted({*banned, *({tokenizer.bos} if tokenizer.bos is not None else ())} - {tokenizer.eos})
    generator = torch.Generator().manual_seed(seed)
    steps = _steps(model, written)
    logits = next(steps)
    while len(written) < start + tokens:
        logits[never] = -torch.inf
        best, tokens_by_rank = logits.topk(min(top_k, len(logits)))
        # Drawn on the CPU, whose generator gives the same numbers on every machine.
        draw = torch.multinomial(torch.softmax(best / temperature, dim=0), 1, generator=generator)
        token = int(tokens_by_rank[draw])
        if token == tokenizer.eos:
            break
        written.append(token)
        if len(written) < start + tokens:
            logits = steps.send(token)
    return tokenizer.decode(written[start:])


@torch.inference_mode()
def continue_greedily(
    model: "PreTrainedModel", tokenizer: Tokenizer, prompt: str, *, tokens: int, until: Sequence[str] = ()
) -> str:
    """Return up to `tokens` likeliest tokens that continue a prompt, without the prompt and what stands in `until`.

    EOS ends the text early. A prompt that leaves no room for them loses its beginning.
    """
    longest = model.config.max_position_embeddings
    tokens = min(tokens, longest - 1)
    prefix, words = prefix_token(tokenizer), tokenizer.encode(prompt)
    room = longest - tokens - 1
    steps = _steps(model, [prefix, *words[max(0, len(words) - room) :]])
    logits = next(steps)
    new: list[int] = []
    text = ""
    while len(new) < tokens:
        token = int(logits.argmax())
        if token == tokenizer.eos:
            break
        new.append(token)
        text = tokenizer.decode(new)
        if any(stop in text for stop in until):
            break
        if len(new) < tokens:
            logits = steps.send(token)
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


def _steps(model: "PreTrainedModel", prompt: Sequence[int]) -> Generator[torch.Tensor, int, None]:
    """Yield the logits [V] behind a prompt, and behind each token that is sent."""
    new, cache = [*prompt], None
    while True:
        output = model(
            input_ids=torch.tensor([new], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        new = [(yield output.logits[0, -1].float().cpu())]
