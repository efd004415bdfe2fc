"""A byte tokenizer, documents and tiny real Llamas."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Text:
    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """UTF-8 bytes as tokens 0-255, then BOS and EOS."""

    bos: int | None = 256
    eos: int | None = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are fastest so, and the same sums are added in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[Text]]:
    return lambda *given: [Text(id=f"d{at}", text=text) for at, text in enumerate(given)]


@pytest.fixture(scope="session")
def llama() -> Callable[..., LlamaForCausalLM]:
    """Make a tiny Llama with weights large enough that every token and position matters."""

    def make(*, seed: int = 0, **changes: object) -> LlamaForCausalLM:
        sizes = {
            "vocab_size": 258,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**sizes, "tie_word_embeddings": True, **changes}))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make
