"""Text that a model writes: a sample for a reader's eye, the same for the same seed."""

from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from eval.text import Tokenizer, prefix_token
from parallel.errors import InputError


@torch.inference_mode()
def continue_text(
    model: PreTrainedModel,
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
    new, cache = written, None
    while len(written) < start + tokens:
        ids = torch.tensor([new], device=model.device)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[0, -1].float().cpu()  # [V]
        logits[never] = -torch.inf
        best, tokens_by_rank = logits.topk(min(top_k, len(logits)))
        # Drawn on the CPU, whose generator gives the same numbers on every machine.
        draw = torch.multinomial(torch.softmax(best / temperature, dim=0), 1, generator=generator)
        token = int(tokens_by_rank[draw])
        if token == tokenizer.eos:
            break
        written.append(token)
        new = [token]
    return tokenizer.decode(written[start:])
