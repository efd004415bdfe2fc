"""A Source as a transformers model equals what transformers itself loads, bit for bit."""

import dataclasses

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from checkpoint.memory import MemorySource, ScratchSource
from checkpoint.source import Info, row_major_tiles
from eval.model import load_model, stream_model
from parallel.errors import InputError


def as_source(model):
    return MemorySource(config=model.config.to_dict(), tensors=dict(model.named_parameters()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["default", "llama3"],
)
def test_equals_from_pretrained(llama, tmp_path, tied, dtype, rope):
    saved = llama(tie_word_embeddings=tied, rope_parameters=rope)
    saved.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    state = torch.random.get_rng_state()
    model = load_model(as_source(saved), dtype=dtype)
    assert torch.equal(torch.random.get_rng_state(), state), "loading must not draw random numbers"
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not model.training
    assert type(model) is type(expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(parameter.dtype == dtype for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_streamed_model_is_the_whole_one_and_holds_nothing(family, tied):
    source = ScratchSource(config=tiny_config(model_type=family, tie_word_embeddings=tied), seed=3)
    whole, streamed = load_model(source), stream_model(source)
    held = []
    for module in streamed.modules():
        module.register_forward_hook(
            lambda *_: held.append(sum(p.numel() for p in streamed.parameters() if p.device.type != "meta"))
        )
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(streamed(ids).logits, whole(ids).logits)
    assert max(held) == 0  # hooks are called in order: each module has given its weights back by then
    assert all(parameter.device.type == "meta" for parameter in streamed.parameters())


def test_reads_tile_by_tile_with_collected_statistics(llama):
    """A source whose tensors need a look at the whole first, and that is asked for boxes, never for more."""
    saved = llama()

    class Centred(MemorySource):
        """Subtracts each tensor's mean, which `collect` finds."""

        def tiles(self, name):
            return row_major_tiles(self.infos[name].shape, tile=100)

        def collect(self, name, spread):
            return sum(spread(lambda box: self.tensors[name][box].sum(), self.tiles(name))) / self.tensors[name].numel()

        def read(self, name, box, out, stats=None):
            assert all(tensor.numel() <= 100 for tensor in out.values())
            for tensor in out.values():
                tensor.copy_(self.tensors[name][box] - stats)

    source = as_source(saved)
    model = load_model(Centred(config=source.config, tensors=source.tensors))
    for name, parameter in model.named_parameters():
        expected = source.tensors[name] - source.tensors[name].mean()
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)


class Altered(MemorySource):
    """Says that it has other tensors than its config."""

    @property
    def infos(self):
        infos = dict(super().infos)
        match self.config["alter"]:
            case "missing":
                del infos["model.norm.weight"]
            case "extra":
                infos["model.surplus"] = Info(shape=(3,), slots={"weight": torch.float32})
            case "shape":
                infos["model.norm.weight"] = dataclasses.replace(infos["model.norm.weight"], shape=(31,))
        return infos


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        ("missing", "the source lacks 1 of the model's 20 tensors: first model.norm.weight"),
        ("extra", "the source has 1 tensors that its config knows nothing of: first model.surplus"),
        ("shape", "model.norm.weight has shape (31,), the config says (32,)"),
    ],
)
def test_other_tensors_than_the_config_says(llama, alter, message):
    source = as_source(llama())
    with pytest.raises(InputError) as caught:
        load_model(Altered(config={**source.config, "alter": alter}, tensors=source.tensors))
    assert str(caught.value) == message
