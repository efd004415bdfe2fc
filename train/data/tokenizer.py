"""Tokenizers: byte-level BPE trained here, or any Hugging Face tokenizer.json, loaded without transformers."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint.files import read_json, write_bytes, write_json
from parallel.errors import InputError

BOS, EOS = "<s>", "</s>"
SMALLEST = 258
"""The special tokens and one token a byte: with these any text can be written."""


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer as training and evaluation use it: no special token is ever added or read out of text."""

    bos: int | None
    eos: int | None
    vocab_size: int
    """Entries of the vocabulary, special tokens included."""
    sha256: str
    """Of tokenizer.json."""
    model: Tokenizer

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, on all threads; the result does not depend on their number."""
        return [found.ids for found in self.model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.model.decode(list(tokens), skip_special_tokens=False)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, folder: Path) -> TextTokenizer:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer (`AutoTokenizer.from_pretrained(folder)`).

    Ids: 0 is BOS, 1 is EOS (which pads, too), 2 to 257 are the bytes, merges follow. Any text comes back from
    `decode(encode(text))` unchanged. The files' bytes depend on the texts alone, not on their order or on threads. With
    too little text for `vocab_size` the vocabulary is smaller.

    Raises:
        InputError: vocab_size is below 258, or there is no text.
    """
    if vocab_size < SMALLEST:
        raise InputError(
            f"vocab_size is {vocab_size}: it has to be at least {SMALLEST} (256 bytes and 2 special tokens)"
        )
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() == SMALLEST < vocab_size:
        raise InputError("there is no text to train a tokenizer on: nothing in it occurs twice")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS})
    write_bytes(folder / "tokenizer.json", model.to_str(pretty=True).encode())
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Load the tokenizer.json of a Hugging Face tokenizer; BOS and EOS are those of its tokenizer_config.json.

    Raises:
        InputError: there is no tokenizer.json, or it is none.
    """
    path = folder / "tokenizer.json"
    try:
        data = path.read_bytes()
        model = Tokenizer.from_str(data.decode())
    except OSError:
        raise InputError(f"{folder}: holds no tokenizer.json (a fast Hugging Face tokenizer is needed)") from None
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # "</s>" inside a text is text
    special: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            special |= read_json(folder / name)

    def number(key: str) -> int | None:
        token = special.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else model.token_to_id(content)

    return TextTokenizer(
        bos=number("bos_token"),
        eos=number("eos_token"),
        vocab_size=model.get_vocab_size(with_added_tokens=True),
        sha256=hashlib.sha256(data).hexdigest(),
        model=model,
    )
