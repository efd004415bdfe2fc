"""docs/adding-a-family.md, followed: with its table alone a model is read, grown, sharded and written."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from grown_models import config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import parallel.families
from checkpoint.open import open_checkpoint
from growmerge.cli import main
from parallel.errors import InputError
from parallel.family import Family

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"
IDS = torch.randint(0, 40, (3, 17), generator=torch.Generator().manual_seed(9))


def table() -> Family:
    """Return what the page's Python makes of what families.py has."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    known = dict(vars(parallel.families))
    exec(compile(code, PAGE.name, "exec"), known)
    return known["ARCEE"]


def run(*arguments: str) -> str:
    ran = CliRunner().invoke(main, arguments)
    assert ran.exit_code == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_page_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    torch.manual_seed(3)
    settings = config(tied, mlp_bias=True, bos_token_id=1, eos_token_id=2)
    del settings["model_type"]
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model("arcee", **settings)).eval()
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"config\.json: unknown model_type 'arcee': allowed are llama, mistral, "):
        open_checkpoint(tmp_path / "small")

    monkeypatch.setitem(parallel.families.FAMILIES, "arcee", table())
    assert "arcee" in run("inspect", str(tmp_path / "small"))
    sizes = ("--width", "2", "--to-hidden", "56", "--to-ffn", "50", "--depth", "identity", "--layers", "4")
    run("grow", str(tmp_path / "small"), str(tmp_path / "sharded"), *sizes, "--format", "zero3", "--dp", "3")
    run("convert", str(tmp_path / "sharded"), str(tmp_path / "big"))
    run("grow", str(tmp_path / "small"), str(tmp_path / "direct"), *sizes)
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("big", "direct")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big").eval()
    assert (big.config.hidden_size, big.config.intermediate_size, big.config.num_hidden_layers) == (56, 50, 4)
    with torch.no_grad():
        before, after = small(input_ids=IDS).logits, big(input_ids=IDS).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_an_unknown_architecture_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown model_type 'qwen2_5': allowed are .*; did you mean 'qwen2'\?"):
        parallel.families.family_of({"model_type": "qwen2_5"})
