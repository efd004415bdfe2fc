"""`growmerge train` of a mixture of experts: a dense shape that is given experts first, and a folder that has some."""

import json
from pathlib import Path

import pytest
from test_training import ALONE, losses, run, texts, write
from transformers import AutoModelForCausalLM

from train.data.tokenizer import train_tokenizer
from train.data.tokens import write_tokens

SHAPE = next(line for line in ALONE.splitlines() if line.startswith("shape:"))
DENSE = ALONE.replace("both: {eng: 0.3, swe: 0.7}", "both: {eng: 1.0}")
SPARSE = DENSE.replace(SHAPE, f"{SHAPE}\ngrow: {{experts: 4}}")
SHORT = {"steps": 4, "evaluate_every": 0}


def home_of(folder: Path) -> Path:
    """A tokenizer, token files and held-out text."""
    tokenizer = train_tokenizer(texts("eng"), vocab_size=300, folder=folder / "tokenizer")
    write_tokens(texts("eng")[4:], tokenizer, folder / "data" / "eng")
    lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(texts("eng")[:4])]
    (folder / "data" / "eng.heldout.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_dense_shape_is_trained_with_experts(tmp_path: Path) -> None:
    code, _, err = run(write(home_of(tmp_path), "sparse", SPARSE, **SHORT))
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "sparse" / "model")
    assert (type(model).__name__, model.config.num_local_experts) == ("MixtralForCausalLM", 4)
    found = losses(tmp_path / "runs" / "sparse")
    assert len(found) == 4 and found[-1] < found[0]


@pytest.mark.slow
def test_a_folder_with_experts_is_trained_on(tmp_path: Path) -> None:
    home = home_of(tmp_path)
    code, _, err = run(write(home, "sparse", SPARSE, **SHORT))
    assert code == 0, err
    again = DENSE.replace(SHAPE, "model: runs/sparse/model")
    code, _, err = run(write(home, "again", again, **SHORT))
    assert code == 0, err
    assert losses(home / "runs" / "again")[0] < losses(home / "runs" / "sparse")[0]
    refused = again.replace("training:", "grow: {experts: 2}\ntraining:")
    code, _, err = run(write(home, "refused", refused, **SHORT))
    assert code != 0
    assert "mixtral has experts already: experts is for models of llama, mistral, qwen2, qwen3" in err
