"""Log-probabilities against a plain softmax over full logits, one sequence at a time, in float64."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import eval.score
from eval.score import Request, Row, plan_batches, plan_lines, plan_rows, share_batches, token_logprobs, total
from parallel.errors import InputError


def requests(count=23, longest=40):
    rng = np.random.Generator(np.random.Philox(3))
    made = []
    for at in range(count):
        tokens = rng.integers(0, 258, size=rng.integers(2, longest)).tolist()
        made.append(Request(name=f"r{at}", tokens=tokens, context=int(rng.integers(1, len(tokens) + 1))))
    return made


def oracle(model, request):
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = double(torch.tensor([request.tokens])).logits[0]
    table = torch.log_softmax(logits, dim=-1)
    return np.array([table[at - 1, request.tokens[at]] for at in range(request.context, len(request.tokens))])


@pytest.mark.parametrize("batch_tokens", [1, 64, 200, 10_000])
def test_equals_full_softmax_whatever_the_batch(llama, batch_tokens):
    model = llama()
    made = requests()
    for request, found in zip(made, token_logprobs(model, made, batch_tokens=batch_tokens), strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, oracle(model, request), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("granite", {"logits_scaling": 3.0}), ("gemma2", {"final_logit_softcapping": 0.1})],
)
def test_heads_that_divide_or_cap_their_logits(kind, changes):
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    config = AutoConfig.for_model(kind, **shape, intermediate_size=48, vocab_size=258, pad_token_id=0, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    made = requests(count=5)
    for request, found in zip(made, token_logprobs(model, made, batch_tokens=100), strict=True):
        np.testing.assert_allclose(found, oracle(model, request), rtol=0, atol=1e-5)


def alike():
    """Sequences that begin alike in twos and threes, with contexts within what they share, and some that do not."""
    rng = np.random.Generator(np.random.Philox(4))

    def some(count):
        return rng.integers(0, 258, size=count).tolist()

    made = []
    for group, rests in enumerate([(1, 1), (3, 8), (2, 30), (5, 4, 6), (1, 1), (9,)]):
        prefix, context = some(12), int(rng.integers(1, 12))
        made += [Request(name=f"g{group}", tokens=prefix + some(rest), context=context) for rest in rests]
    same = some(9)
    return [*made, Request(name="same", tokens=same), Request(name="same", tokens=same), *requests(count=3)]


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt_neox")


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_sequences_begin_with_is_computed_once(kind, batch_tokens):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, **shape, head_dim=16, intermediate_size=48, vocab_size=258, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made = alike()
    passed = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, given: passed.append(given["input_ids"].numel()), with_kwargs=True
    )
    together = token_logprobs(model, made, batch_tokens=batch_tokens, share=True)
    hook.remove()
    for request, found in zip(made, together, strict=True):
        np.testing.assert_allclose(found, oracle(model, request), rtol=0, atol=2e-5)
    if batch_tokens == 1:
        assert sum(passed) < 0.8 * sum(len(request.tokens) - 1 for request in made)


def test_rows_are_joined_where_that_saves_a_share_of_their_tokens():
    def rows(*given, longest=100):
        made = [Request(name="r", tokens=tokens, context=context) for tokens, context in given]
        return [(row.requests, row.prefix, row.length) for row in plan_rows(made, longest=longest)]

    assert rows(([1, 2, 3, 4], 1), ([1, 2, 3, 5], 1)) == [((0, 1), 3, 5)]
    assert rows(([1, 2, 3, 4], 1), ([1, 2, 3, 4], 1)) == [((0, 1), 3, 5)]  # of each, the last is still scored
    assert rows(([1, 2, 3, 4], 1), ([1, 2, 3, 5], 2)) == [((0,), 0, 4), ((1,), 0, 4)]  # another context
    assert rows(([1, 2, 3, 4], 3), ([1, 2, 9, 4], 3)) == [((0,), 0, 4), ((1,), 0, 4)]  # contexts that differ
    one, other = [1, *[2] * 23], [1, *[3] * 23]
    assert rows((one, 1), (other, 1)) == [((0,), 0, 24), ((1,), 0, 24)]  # BOS alone is less than a twentieth
    assert rows((one[:20], 1), (other[:20], 1)) == [((0, 1), 1, 39)]
    one, other = [*[1] * 60, *[2] * 240], [*[1] * 60, *[3] * 240]
    assert rows((one, 1), (other, 1), longest=1024) == [((0,), 0, 300), ((1,), 0, 300)]  # more than a line: a quarter
    assert rows(([*[1] * 30, *one], 1), ([*[1] * 30, *other], 1), longest=1024) == [((0, 1), 90, 570)]
    three = (([1, 2, 3, 4], 1), ([1, 2, 3, 5], 1), ([1, 2, 6, 7], 1))
    assert rows(*three) == [((0, 1, 2), 2, 8)]
    assert rows(*three, longest=7) == [((0, 1), 3, 5), ((2,), 0, 4)]
    assert plan_rows([Request(name="r", tokens=[1, 2, 3])] * 2, longest=0) == [
        Row(requests=(number,), prefix=0, length=3) for number in (0, 1)
    ]


def test_a_window_of_attention_is_not_left_by_shared_rows():
    """Gemma attends to its last tokens alone: in a row of several sequences positions and places differ."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        "gemma3_text", **shape, head_dim=16, intermediate_size=48, vocab_size=258, pad_token_id=0, sliding_window=14
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for request, found in zip(alike(), token_logprobs(model, alike(), batch_tokens=200, share=True), strict=True):
        np.testing.assert_allclose(found, oracle(model, request), rtol=0, atol=1e-5)


def test_a_float64_model_is_scored_in_float64(llama):
    model = llama().double()
    made = requests()
    for request, found in zip(made, token_logprobs(model, made, batch_tokens=100), strict=True):
        np.testing.assert_allclose(found, oracle(model, request), rtol=0, atol=1e-12)


def test_logits_are_never_held_for_more_than_a_chunk(llama, monkeypatch):
    model = llama(tie_word_embeddings=False)
    seen = []
    logits = eval.score._logits

    def counted(*given, **how):
        seen.append(tuple(logits(*given, **how).shape))
        return logits(*given, **how)

    monkeypatch.setattr(eval.score, "_logits", counted)
    made = requests()
    whole = token_logprobs(model, made, batch_tokens=10_000)
    wanted = sum(len(request.tokens) - request.context for request in made)
    assert seen == [(wanted, 258)], "logits just where a token is scored"
    seen.clear()
    monkeypatch.setattr(eval.score, "COLUMNS", 100)
    monkeypatch.setattr(eval.score, "LOGITS", 100 * 7)
    pieces = token_logprobs(model, made, batch_tokens=10_000)
    assert {columns for _, columns in seen} == {100, 58}
    assert max(rows for rows, _ in seen) == 7
    assert sum(rows for rows, columns in seen if columns == 58) == wanted
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_a_head_that_is_no_plain_matrix_is_called(llama):
    class Head(torch.nn.Linear):
        """As ZeRO-3 has it, whose weight is whole within the call alone."""

    model = llama(tie_word_embeddings=False)
    head = Head(model.config.hidden_size, 258, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    made = requests(count=5)
    plain = token_logprobs(model, made, batch_tokens=1000)
    model.lm_head = head
    for one, other in zip(plain, token_logprobs(model, made, batch_tokens=1000), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_short_rows_share_lines_with_little_left_empty(llama):
    rng = np.random.Generator(np.random.Philox(6))
    made = [Request(name=f"r{at}", tokens=rng.integers(0, 258, size=rng.integers(2, 60)).tolist()) for at in range(200)]
    rows = plan_rows(made, longest=1024)
    batches = plan_lines(rows, 256, 1024)
    lines = [line for batch in batches for line in batch]
    assert sorted(one for line in lines for row in line for one in row.requests) == list(range(200))
    filled = [sum(row.places for row in line) for line in lines]
    assert max(filled) <= 256
    assert max(len(batch) for batch in batches) == 4
    assert sum(filled) > 0.95 * 256 * len(lines)
    assert plan_lines([], 256, 1024) == []
    assert plan_lines(rows[:1], 256, 1) == [[[rows[0]]]]
    # None of a line sees another: each is as it is alone.
    model = llama()
    for request, found in zip(made[:20], token_logprobs(model, made[:20], batch_tokens=4096, share=True), strict=True):
        np.testing.assert_allclose(found, oracle(model, request), rtol=0, atol=1e-5)


class Given(Exception):
    """Carries what a rank gives to the gather."""


def give(part):
    raise Given(part)


def test_ranks_together_give_what_one_gives(llama):
    model = llama()
    made = requests()
    alone = token_logprobs(model, made, batch_tokens=64)
    parts = []
    for rank in range(3):
        with pytest.raises(Given) as caught:
            token_logprobs(model, made, batch_tokens=64, rank=rank, world=3, gather=give)
        parts.append(caught.value.args[0])
    assert sorted(index for part in parts for index in part) == list(range(len(made))), "each request by one rank"
    assert all(parts)
    together = token_logprobs(model, made, batch_tokens=64, rank=1, world=3, gather=lambda part: parts)
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


def test_plan_fits_the_budget_and_is_balanced():
    rng = np.random.Generator(np.random.Philox(5))
    lengths = rng.integers(1, 300, size=200).tolist()
    batches = plan_batches(lengths, 256)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 256
    assert sum(len(batch) * lengths[batch[0]] for batch in batches) < 1.15 * sum(lengths), "little padding"
    costs = [len(batch) * lengths[batch[0]] for batch in batches]
    loads = [sum(costs[index] for index in share) for share in share_batches(costs, 4)]
    assert sum(loads) == sum(costs)
    assert max(loads) - min(loads) <= max(costs)
    assert share_batches([], 2) == [[], []]


def test_nothing_to_score(llama):
    assert token_logprobs(llama(), [], batch_tokens=64) == []
    (found,) = token_logprobs(llama(), [Request(name="a", tokens=[256])], batch_tokens=64)
    assert found.shape == (0,)


def test_a_diverged_model_is_an_error_that_names_the_text(llama):
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    model.lm_head.weight = torch.nn.Parameter(llama(seed=1).lm_head.weight.detach())
    fine = Request(name="document a", tokens=[1, 2, 3])
    with pytest.raises(InputError, match=r"^document b: a log-probability is not finite; the model has diverged"):
        token_logprobs(model, [fine, Request(name="document b", tokens=[1, 7, 3])], batch_tokens=64)


def test_a_token_outside_the_vocabulary(llama):
    with pytest.raises(InputError, match=r"^document c: token 300 is outside the model's vocabulary of 258; is this"):
        token_logprobs(llama(), [Request(name="document c", tokens=[1, 300])], batch_tokens=64)


def test_total_does_not_depend_on_the_order():
    values = np.random.Generator(np.random.Philox(1)).normal(size=1000) * 10.0 ** np.arange(1000).clip(0, 12)
    assert total(values) == total(values[::-1])
