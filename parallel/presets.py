"""Shapes of Llama models: public ones by name, and one of about so many parameters."""

from typing import Any

from parallel.errors import InputError
from parallel.families import LLAMA

VOCABULARY = 128_256
"""Llama 3's."""


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, *, tied: bool, longest: int
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": longest,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama-180m": _llama(576, 30, 9, 3, 1536, VOCABULARY, tied=True, longest=2048),
    "llama-572m": _llama(1152, 30, 18, 6, 3072, VOCABULARY, tied=True, longest=2048),
    "llama-1.1b": _llama(2048, 22, 32, 4, 5632, 32_000, tied=False, longest=2048),
    "llama-1.7b": _llama(2048, 24, 32, 32, 8192, 49_152, tied=True, longest=8192),
    "llama-3b": _llama(3072, 28, 24, 8, 8192, VOCABULARY, tied=True, longest=131_072),
    "llama-8b": _llama(4096, 32, 32, 8, 14_336, VOCABULARY, tied=False, longest=131_072),
    "llama-70b": _llama(8192, 80, 64, 8, 28_672, VOCABULARY, tied=False, longest=131_072),
}
"""Hugging Face configs, what of them decides a shape: of the paper's two sizes (arXiv 2512.10772), TinyLlama 1.1B,
SmolLM2 1.7B, Llama 3.2 3B, Llama 3.1 8B and 70B."""


def llama_of(parameters: float, vocab: int = VOCABULARY) -> dict[str, Any]:
    """Return the shape of a Llama of about so many parameters, with Llama 3's proportions.

    Heads of 128, of 64 below a hidden size of 2048; 8 key/value heads, 4 below 4096; an FFN 3.5 times as wide; the
    embedding tied below 5 billion. Of the hidden sizes it is the one whose ratio to the layers is nearest to 110.

    Raises:
        InputError: the vocabulary alone has as many.
    """
    found: list[tuple[float, dict[str, Any]]] = []
    for hidden in (*range(256, 2048, 256), *range(2048, 4096, 512), *range(4096, 32_768 + 1, 1024)):
        heads, kv_heads = hidden // (64 if hidden < 2048 else 128), 4 if hidden < 4096 else 8
        shape = _llama(hidden, 1, heads, kv_heads, 7 * hidden // 2, vocab, tied=parameters < 5e9, longest=131_072)
        one = LLAMA.parameters(shape)
        a_layer = LLAMA.parameters({**shape, "num_hidden_layers": 2}) - one
        layers = round((parameters - one) / a_layer) + 1
        if layers >= 2:
            found.append((abs(hidden / layers - 110), {**shape, "num_hidden_layers": layers}))
    if not found:
        raise InputError(f"{parameters:g} parameters are too few for a vocabulary of {vocab}")
    return min(found, key=lambda pair: pair[0])[1]
