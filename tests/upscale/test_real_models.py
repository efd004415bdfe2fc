"""Real weights, grown and loaded by stock transformers: the figures that docs/growth.md gives."""

import shutil
from pathlib import Path

import pytest
import torch
from real_models import GEMMA3, SMOLLM2, real_model
from state_runs import STOP, run
from tiny import on_ranks
from transformers import AutoModelForCausalLM

from checkpoint.files import read_json
from checkpoint.pickles import load_pickle
from growmerge.convert import Target, convert_checkpoint, grow_checkpoint
from growmerge.sample_text import TEXT
from growmerge.verify import text_batches
from upscale.factors import Recipe
from upscale.verify import Preservation, compare

pytestmark = [pytest.mark.slow, pytest.mark.network]


def stock(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def grown(small: Path, folder: Path, batches: list[torch.Tensor], **recipe) -> dict[str, Preservation]:
    """Grow, and compare in float32 and in bfloat16 compute with the small model in float32."""
    grow_checkpoint(small, Target(folder=folder, format="safetensors"), Recipe(**recipe))
    reference = stock(small, torch.float32)
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        found[name] = compare(reference, stock(folder, dtype), batches)
    found["floor"] = compare(reference, stock(small, torch.bfloat16), batches)
    shutil.rmtree(folder)
    for name, row in found.items():
        print(recipe, name, row)
    return found


TOKENS = {2: 1024, 3: 256}
"""By factor: bfloat16 takes minutes on a CPU without its instructions."""


@pytest.mark.parametrize("factor", [2, 3])
def test_smollm2_grown_in_bfloat16_is_the_same_function(tmp_path, factor):
    small = real_model(SMOLLM2, tokenizer=True)
    batches = text_batches(small, None, TOKENS[factor])
    assert sum(batch.numel() for batch in batches) == TOKENS[factor]
    found = grown(small, tmp_path / "grown", batches, width=factor)
    assert found["float32"].max_logit_difference <= 2e-4
    assert f"{abs(found['float32'].mean_kl):.6f}" == "0.000000"
    assert found["float32"].argmax_agreement == 1
    assert found["bfloat16"].mean_kl <= 1.05 * found["floor"].mean_kl  # kernels of other CPUs round otherwise


def pieces_of(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Cut a text into the longest pieces of a vocabulary: near to its tokenizer, which takes minutes to convert."""
    text, ids, longest = "▁" + " ".join(text.split()).replace(" ", "▁"), [], max(map(len, vocabulary))
    while text:
        piece = next(text[:end] for end in range(min(longest, len(text)), 0, -1) if text[:end] in vocabulary)
        ids.append(vocabulary[piece])
        text = text[len(piece) :]
    return ids


@pytest.mark.parametrize("factor", [2, 3])
def test_gemma3_grown_in_bfloat16_is_as_near_as_its_norms_allow(tmp_path, factor):
    """Norms of what is added to the residual stream are times sqrt(factor), which bfloat16 rounds; no more is."""
    small = real_model(GEMMA3, tokenizer=False)
    vocabulary = read_json(small / "vocabulary.json")
    ids = pieces_of(TEXT, vocabulary)[: TOKENS[factor] // 128 * 127]
    rows = torch.tensor(ids[: len(ids) // 127 * 127]).view(-1, 127)
    batches = list(torch.cat([torch.full((len(rows), 1), vocabulary["<bos>"]), rows], 1).split(2))
    found = grown(small, tmp_path / "grown", batches, width=factor)
    assert found["float32"].mean_kl <= 0.1 * found["floor"].mean_kl
    assert found["float32"].relative <= 2**-7
    assert found["bfloat16"].mean_kl <= 1.05 * found["floor"].mean_kl


def test_weights_come_back_from_every_format(tmp_path):
    small = real_model(SMOLLM2, tokenizer=True)
    steps = [
        Target(folder=tmp_path / "universal", format="universal"),
        Target(folder=tmp_path / "zero3", format="zero3", ranks=3),
        Target(folder=tmp_path / "back", format="safetensors", dtype="bfloat16"),
    ]
    at = small
    for target in steps:
        convert_checkpoint(at, target)
        at = target.folder
    theirs, ours = stock(small, torch.bfloat16).state_dict(), stock(at, torch.bfloat16).state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name


def test_a_run_of_smollm2_comes_back_from_every_topology(tmp_path):
    """DeepSpeed's own two ranks, 3 x 3 ranks, universal, two ranks: the flat buffers are the first ones."""
    small = real_model(SMOLLM2, tokenizer=True)
    on_ranks(tmp_path, 2, run, str(small), str(tmp_path), 0, STOP, "bfloat16")
    steps = [
        Target(folder=tmp_path / "cut", format="zero3", ranks=3, tensor_ranks=3),
        Target(folder=tmp_path / "universal", format="universal"),
        Target(folder=tmp_path / "back", format="zero3", ranks=2),
    ]
    at = tmp_path / "stop"
    for target in steps:
        convert_checkpoint(at, target)
        at = target.folder
    for rank in range(2):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        theirs, ours = (load_pickle(folder / name)["optimizer_state_dict"] for folder in (tmp_path / "stop", at))
        assert len(theirs["fp32_flat_groups"]) == len(ours["fp32_flat_groups"]) > 1
        for mine, other in zip(ours["fp32_flat_groups"], theirs["fp32_flat_groups"], strict=True):
            assert torch.equal(mine, other)
        before, after = (found["optimizer_state_dict"]["state"] for found in (theirs, ours))
        assert before.keys() == after.keys()
        for key, state in before.items():
            assert state["step"] == after[key]["step"] == STOP
            assert state["exp_avg_sq"].any()
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state[moment], after[key][moment]), (key, moment)
