"""Tiny real models, and a group of real ranks; what tests of all rooms use."""

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from parallel.errors import InputError
from parallel.ranks import connect


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Return the Hugging Face config of a tiny Llama with grouped-query attention."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 131,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {**config, **changes}


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a tiny random Llama whose norms are not 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_config(**changes)), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    # Parameters alone: casting the model would round the rotary frequencies too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _rank(
    rank: int,
    world: int,
    rendezvous: str,
    environment: dict[str, str],
    body: Callable[..., Any],
    given: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    gc.freeze()  # What was imported is no garbage, and DeepSpeed searches all there is before each engine.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ.clear()  # of the moment when the server began
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    ranks = connect(rank, world, rendezvous=Path(rendezvous))
    try:
        value = body(ranks, *given, **named)
    except InputError as error:
        value = error
    torch.save(value, f"{rendezvous}.{rank}")
    ranks.barrier()
    # Without an interpreter's end: threads of torch and DeepSpeed that still run then may abort the process.
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


PRELOADED = [
    *("deepspeed", "hypothesis", "pytest", "transformers.models.llama.modeling_llama", "train.pipeline"),
    *("growmerge.merge_stages", "growmerge.results", "growmerge.run_of_ranks", "growmerge.scores"),
]
"""What ranks import anyway: seconds of CPU each, which they share as forks of one server that has done nothing else."""


def on_ranks(folder: Path, world: int, body: Callable[..., Any], *given: Any, **named: Any) -> list[Any]:
    """Run `body(ranks, *given, **named)` on real processes over gloo and return what each rank returned."""
    rendezvous = folder / f"meet-{len(list(folder.iterdir()))}"
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _rank,
        args=(world, str(rendezvous), dict(os.environ), body, given, named),
        nprocs=world,
        start_method="forkserver",
    )
    return [torch.load(f"{rendezvous}.{rank}", weights_only=False) for rank in range(world)]  # written by _rank above
