"""Fisher and Gram matrices against plain float64 loops; folders that are whole and of the right model, or refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import merge.gram as storing
import merge.statistics as passes
from checkpoint.memory import MemorySource
from checkpoint.safetensors import SafetensorsLayout, open_safetensors
from checkpoint.writer import write_checkpoint
from eval.score import Request
from merge.gram import gram_sums, open_gram, shared_inputs, write_gram
from merge.statistics import fisher, fisher_sums, gram
from merge.statistics_files import STATE, check_model, digest, load_sums, save_sums
from parallel.errors import InputError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.1."
CAPPED = {
    "model_type": "gemma2",
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "attn_implementation": "eager",
}
SCALED = {"model_type": "granite", "logits_scaling": 3.0, "embedding_multiplier": 2.0, "tie_word_embeddings": False}


def some_requests(count=7, vocab=131, seed=1):
    """Sequences of 2 to 30 tokens, some with context that is not scored."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        size = 2 + int(torch.randint(29, (1,), generator=draw))
        tokens = torch.randint(vocab, (size,), generator=draw).tolist()
        found.append(Request(name=f"document {number}", tokens=tokens, context=max(1, size // 3)))
    return found


def other_model(**changes):
    """A tiny model of another family."""
    settings = {
        key: value for key, value in tiny_config(**changes).items() if key not in ("architectures", "model_type")
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(changes["model_type"], **settings))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def fisher_oracle(model, requests, targets=None):
    """The definition, sequence by sequence, in float64."""
    model = model.double()
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for number, request in enumerate(requests):
        ids = torch.tensor([request.tokens])
        logprobs = model(ids).logits[0].log_softmax(-1)
        likelihood = torch.zeros((), dtype=torch.float64)
        for at in range(request.context, len(request.tokens)):
            target = request.tokens[at] if targets is None else targets[number][at - request.context]
            likelihood = likelihood + logprobs[at - 1, target]
        gradients = torch.autograd.grad(likelihood, list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            total[name] += gradient**2
    tokens = sum(len(request.tokens) - request.context for request in requests)
    return {name: value / tokens for name, value in total.items()}


def close(found, wanted, tolerance=2e-5):
    """Whether float32 tensors are the float64 ones, up to a share of each tensor's largest entry."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32 and found[name].shape == value.shape
        assert (found[name].double() - value).abs().max() <= tolerance * value.abs().max(), name


def single(requests):
    return [[request] for request in requests]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("logits", [1 << 24, 131 * 3])
def test_fisher(tied, logits, monkeypatch):
    monkeypatch.setattr(passes, "LOGITS", logits)  # the smaller one has logits made in pieces
    requests = some_requests()
    found = fisher(tiny_model(tie_word_embeddings=tied), [requests[:3], requests[3:]])
    assert (HEAD in found) is not tied
    close(found, fisher_oracle(tiny_model(tie_word_embeddings=tied), requests))


@pytest.mark.parametrize("changes", [CAPPED, SCALED])
def test_fisher_of_other_families(changes):
    requests = some_requests(4)
    close(fisher(other_model(**changes), [requests]), fisher_oracle(other_model(**changes), requests), 1e-4)


def test_fisher_of_sampled_labels(monkeypatch):
    requests, drawn = some_requests(), []
    real = torch.multinomial

    def watched(*given, **named):
        drawn.append(real(*given, **named))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", watched)
    found = fisher(tiny_model(), single(requests), labels="sampled", seed=3)
    assert [len(one) for one in drawn] == [len(one.tokens) - one.context for one in requests]
    close(found, fisher_oracle(tiny_model(), requests, [one.flatten().tolist() for one in drawn]))
    again = fisher(tiny_model(), [requests], labels="sampled", seed=3)
    assert all(torch.equal(found[name], again[name]) for name in found)
    other = fisher(tiny_model(), [requests], labels="sampled", seed=4)
    assert not torch.equal(found[EMBED], other[EMBED])


def test_sampled_labels_estimate_the_true_fisher():
    """For one token the expectation over labels is a sum over the vocabulary."""
    request = Request(name="one", tokens=[5, 9, 7], context=2)
    model = tiny_model(vocab_size=11)
    share = model(torch.tensor([[5, 9]])).logits[0, -1].softmax(-1).detach()
    exact = sum(
        share[label] * fisher_oracle(tiny_model(vocab_size=11), [request], [[label]])[LAYER + "mlp.down_proj.weight"]
        for label in range(11)
    )
    found = fisher(model, [[request]] * 600, labels="sampled")[LAYER + "mlp.down_proj.weight"]
    assert abs(found.double().sum() / exact.sum() - 1) < 0.1


def gram_oracle(model, requests):
    """X^T X of inputs collected by hand, each weight for itself, in float64."""
    model, inputs = model.double(), {}
    modules = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given[0][0]))
    total = {}
    for request in requests:
        with torch.no_grad():
            model(torch.tensor([request.tokens[:-1]]))
        for name in modules:
            for row in inputs[name][request.context - 1 :]:
                total[f"{name}.weight"] = total.get(f"{name}.weight", 0) + torch.outer(row, row)
    return total


@pytest.mark.parametrize("tied", [True, False])
def test_gram(tied):
    requests, model = some_requests(), tiny_model(tie_word_embeddings=tied)
    weights = shared_inputs(model)
    found = gram(model, [requests[:2], requests[2:]])
    assert set(found) == set(weights.values())
    assert len(found) == 2 * 4 + (not tied)
    query, gate = LAYER + "self_attn.q_proj", LAYER + "mlp.gate_proj"
    assert [weights[f"{LAYER}self_attn.{one}_proj.weight"] for one in "qkv"] == [query] * 3
    assert weights[LAYER + "mlp.gate_proj.weight"] == weights[LAYER + "mlp.up_proj.weight"] == gate
    wanted = gram_oracle(tiny_model(tie_word_embeddings=tied), requests)
    wanted = {name: value for name, value in wanted.items() if name != HEAD or not tied}
    assert wanted.keys() == weights.keys()
    close({weight: found[matrix] for weight, matrix in weights.items()}, wanted)


@pytest.mark.parametrize("changes", [CAPPED, SCALED])
def test_gram_of_other_families(changes):
    requests, model = some_requests(4), other_model(**changes)
    found, weights = gram(model, [requests]), shared_inputs(model)
    wanted = gram_oracle(other_model(**changes), requests)
    close({weight: found[matrix] for weight, matrix in weights.items()}, {one: wanted[one] for one in weights}, 1e-4)


@pytest.mark.parametrize("statistic", [fisher, gram])
def test_batches_do_not_matter(statistic):
    requests = some_requests(12)
    first, second = statistic(tiny_model(), single(requests)), statistic(tiny_model(), [requests[:5], requests[5:]])
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= 1e-6 * value.abs().max(), name


@pytest.mark.parametrize(("statistic", "start"), [(fisher, fisher_sums), (gram, gram_sums)])
def test_saved_sums(statistic, start, tmp_path):
    requests = some_requests()
    whole = statistic(tiny_model(), single(requests))
    stopped = start(tiny_model())

    def after(sums):
        save_sums(tmp_path, "this", sums)
        if sums.batches == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statistic(tiny_model(), single(requests), sums=stopped, after=after)
    found = load_sums(tmp_path, "this")
    assert (found.batches, found.sequences, found.tokens) == (4, 4, stopped.tokens)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    rest = statistic(tiny_model(), single(requests[4:]), sums=found)
    assert all(torch.equal(rest[name], value) for name, value in whole.items())

    assert load_sums(tmp_path / "nowhere", "this") is None
    with pytest.raises(InputError, match=r"holds an unfinished pass of another model, text or options; choose another"):
        load_sums(tmp_path, "other")
    data = bytearray((tmp_path / STATE).read_bytes())
    data[-100] ^= 1
    (tmp_path / STATE).write_bytes(data)
    with pytest.raises(InputError, match=r"damaged \(checksum of .*\); delete it to begin anew"):
        load_sums(tmp_path, "this")
    (tmp_path / STATE).write_bytes(data[:-8])
    with pytest.raises(InputError, match="truncated"):
        load_sums(tmp_path, "this")


@pytest.mark.parametrize("statistic", [fisher, gram])
def test_what_cannot_be_counted(statistic):
    requests = some_requests(3)
    wrong = replace(requests[1], tokens=[1, 131])
    with pytest.raises(InputError, match="document 1: token 131 is outside the model's vocabulary of 131; is this the"):
        statistic(tiny_model(), [[requests[0], replace(wrong, context=1)]])
    model = tiny_model()
    model.get_parameter(LAYER + "mlp.up_proj.weight").data[3, 4] = torch.nan
    what = "log-probability" if statistic is fisher else "hidden state"
    with pytest.raises(InputError, match=f"document 0: a {what} is not finite; the model has diverged or overflows"):
        statistic(model, [requests])
    assert not any(value._post_accumulate_grad_hooks for value in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_squares_that_overflow():
    model = tiny_model(tie_word_embeddings=False)
    model.get_parameter("model.norm.weight").data *= 1e25
    model.get_parameter(HEAD).data *= 1e-25
    with pytest.raises(InputError, match=r"^lm_head\.weight: the squared gradients are not finite"):
        fisher(model, [some_requests(2)])


@pytest.fixture
def stored(tmp_path):
    """A model's source, and the folder of its Gram matrices."""
    model = tiny_model(tie_word_embeddings=False)
    source = MemorySource(config=model.config.to_dict(), tensors=model.state_dict())
    facts = {"model": digest(source), "tokens": 9, "sequences": 3}
    write_gram(tmp_path / "gram", gram(model, [some_requests()]), shared_inputs(model), facts, {"note": b"said"})
    return source, tmp_path / "gram"


def test_gram_folder(stored, tmp_path, monkeypatch):
    source, folder = stored
    found = open_gram(folder, source)
    wanted = gram(tiny_model(tie_word_embeddings=False), [some_requests()])
    assert found.tokens == 9 and (folder / "note").read_bytes() == b"said"
    for weight, name in shared_inputs(tiny_model(tie_word_embeddings=False)).items():
        assert torch.equal(found.matrix(weight), wanted[name])
    monkeypatch.setattr(storing, "SHARD", 3000)
    facts = {"model": "", "tokens": 1, "sequences": 1}
    write_gram(tmp_path / "more", wanted, found.weights, facts, {})
    assert len(list((tmp_path / "more").glob("gram-*-of-00009.safetensors"))) == 9
    assert torch.equal(open_gram(tmp_path / "more").matrix(HEAD), wanted["lm_head"])


def refused(folder, source=None):
    with pytest.raises(InputError) as error:
        open_gram(folder, source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_gram_folders_that_are_refused(stored, tmp_path):
    source, folder = stored
    with pytest.raises(InputError) as error:
        open_gram(folder).matrix(EMBED)
    assert str(error.value) == f"{folder}: holds no Gram matrix for {EMBED}"
    other = replace(source, tensors={**source.tensors, HEAD: source.tensors[HEAD] + 1})
    assert refused(folder, other) == f"{folder}: its statistics are of another model than the model given"
    write_checkpoint(other, tmp_path / "other", SafetensorsLayout())
    line = f"{folder}: its statistics are of another model than {tmp_path / 'other'}"
    assert refused(folder, open_safetensors(tmp_path / "other")) == line
    assert refused(tmp_path / "other") == f"{tmp_path / 'other'}: holds no Gram matrices (it has no gram.json)"
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder of Gram matrices"

    def damaged(name, change):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        return copy

    file = "gram-00001-of-00001.safetensors"
    copy = damaged("cut", lambda at: (at / file).write_bytes((folder / file).read_bytes()[:-1]))
    assert refused(copy).startswith(f"{copy / file}: truncated or changed (")
    copy = damaged("unfinished", lambda at: (at / "manifest.json").unlink())
    assert refused(copy) == f"{copy}: incomplete (it has no manifest.json)"

    def future(at):
        index = json.loads((at / "gram.json").read_text())
        (at / "gram.json").write_text(json.dumps({**index, "format": 9}))
        (at / "manifest.json").write_text('{"format": 2, "files": {}}')

    copy = damaged("future", future)
    assert refused(copy) == f"{copy / 'gram.json'}: of format 9, this version of growmerge knows 1"


def test_digest(tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    source = MemorySource(config=model.config.to_dict(), tensors=model.state_dict())
    write_checkpoint(source, tmp_path, SafetensorsLayout(dtype=torch.float32))
    assert digest(open_safetensors(tmp_path)) == digest(source)
    check_model(tmp_path, digest(source), source)
