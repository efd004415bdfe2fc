"""The models that are merged: tiny Hugging Face folders, with task vectors like those of real fine-tunes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_config
from tokenizers import AddedToken, Tokenizer

from parallel.families import family_of
from parallel.rows import NORMS
from train.data.tokenizer import train_tokenizer

NAMES = ("base", "swe", "est", "fin")
UNTIED = {"tie_word_embeddings": False}


def _family(kind: str, architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": kind, "num_hidden_layers": 1, **changes}


MODELS: Mapping[str, Mapping[str, Any]] = {
    "tied": {},
    "untied": UNTIED,
    "mixed": {"swe": UNTIED, "fin": UNTIED},
    "mixed dtypes": {"est": {"dtype": "float32"}},
    "qwen2": _family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _family("qwen3", "Qwen3ForCausalLM", **UNTIED),
    "mistral": _family("mistral", "MistralForCausalLM", **UNTIED),
    "granite": _family("granite", "GraniteForCausalLM"),
    "gemma2": _family("gemma2", "Gemma2ForCausalLM"),
    "gemma3": _family("gemma3_text", "Gemma3ForCausalLM"),
}
"""What the config of the models in a folder of this name has, or that of some of them."""
TEXTS = {
    "base": ["the cat sat on the mat", "the dog ran to the man"] * 3,
    "swe": ["der hund lief zum mann", "die katze lag auf der matte"] * 3,
    "est": ["the hund ran zum man", "die hunde und the cat"] * 3,
}
ADDED = {
    "base": [AddedToken("<x>", special=True), AddedToken("<y>", normalized=False)],
    "swe": [AddedToken("<y>", special=True, lstrip=True), AddedToken("<b>", special=True)],
    "est": [AddedToken("<c>", special=True)],
}


def make_models(folder: Path, kind: str, dtype: torch.dtype) -> None:
    """Write a base and three models that differ from it by a tenth of its weights' size."""
    if "vocabularies" in kind:
        make_vocabularies(folder, dtype, tied=kind.startswith("tied"))
        return
    for number, name in enumerate(NAMES):
        own = {key: value for key, value in MODELS[kind].items() if key not in NAMES}
        config = (
            tiny_config(num_hidden_layers=3, dtype=str(dtype).removeprefix("torch.")) | own | MODELS[kind].get(name, {})
        )
        write_model(folder / name, config, getattr(torch, config["dtype"]), number)


def write_model(folder: Path, config: dict[str, Any], dtype: torch.dtype, number: int) -> None:
    """Write a base (number 0) or a model that started from it; a tenth of its weights are as they were."""
    tensors = {}
    for place, (name, tensor) in enumerate(family_of(config).tensors(config).items()):
        if tensor.tied_to is None:
            random = torch.Generator().manual_seed(place)
            value = torch.randn(tensor.shape, generator=random) * 0.04 + (tensor.kind in NORMS)
            random.manual_seed(1000 * number + place)
            change = torch.randn(tensor.shape, generator=random) * 0.004
            changed = torch.rand(tensor.shape, generator=random) < 0.9
            # What a model keeps of its base is equal to it bit by bit, in bfloat16 too.
            tensors[name] = (value + change * changed * bool(number)).to(dtype)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_vocabularies(folder: Path, dtype: torch.dtype, *, tied: bool) -> None:
    """Write three models with tokenizers of their own, and one whose tokenizer has more tokens than it has rows."""
    for number, name in enumerate(TEXTS):
        train_tokenizer(TEXTS[name], vocab_size=275 + 3 * number, folder=folder / "tokenizers" / name)
        path = folder / "tokenizers" / name / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.add_tokens(ADDED[name])
        path.write_text(tokenizer.to_str(pretty=True))
        rows = tokenizer.get_vocab_size() + (0, 9, 3)[number]  # some embeddings are padded
        names = {name: rows, "short": rows - 1} if name == "base" else {name: rows}
        for one, height in names.items():
            config = tiny_config(vocab_size=height, tie_word_embeddings=tied, num_hidden_layers=1)
            write_model(folder / one, config, dtype, number)
            for file in path.parent.iterdir():
                (folder / one / file.name).write_bytes(file.read_bytes())
