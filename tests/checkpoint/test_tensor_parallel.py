"""How AutoTP cuts a model: as DeepSpeed's own functions say, for every family; and what it cannot cut."""

from itertools import pairwise

import pytest
import torch
from tiny import tiny_config
from trained import Trained

from checkpoint.source import box_shape, read_tensor
from checkpoint.tensor_parallel import cuts_of, piece_of
from parallel.errors import InputError
from parallel.families import FAMILIES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LARGE = {"num_attention_heads": 24, "num_key_value_heads": 6, "hidden_size": 96, "intermediate_size": 131}


@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if not one.uncut])
@pytest.mark.parametrize("tied", [True, False])
def test_as_deepspeed_by_its_plan_for_the_stock_model(family, tied):
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
    from deepspeed.module_inject.tp_shard import AutoTPMeta, get_shard_size_list
    from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan
    from transformers import AutoConfig, AutoModelForCausalLM

    # 132 rows would be 88 and 44, were the head cut between key/value heads.
    changes = {**LARGE, "vocab_size": 132, "tie_word_embeddings": tied, "attention_bias": True}
    config = tiny_config(**changes, model_type=FAMILIES[family].model_types[0])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    plan = AutoTPConfig(layer_specs=TPPlanConverter.convert(_get_hf_tp_plan(model)))
    meta = AutoTPMeta.from_model_config(model.config)
    source = Trained(config=config)
    for ranks in (2, 3, 4, 5, 6):
        expected = {}
        for name, parameter in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            spec = plan.find_matching_spec(f"{module}.weight")
            if spec is None or spec.partition_type == PartitionType.SKIP:
                continue
            if leaf == "bias" and spec.partition_type == PartitionType.ROW:
                continue
            dim = spec.get_partition_dim()
            expected[name] = dim, get_shard_size_list(parameter.shape[dim], ranks, meta, module)
        cuts = cuts_of(source, ranks)
        sizes = {name: (dim, [stop - start for start, stop in pairwise(ends)]) for name, (dim, ends) in cuts.items()}
        assert sizes == expected
        assert (HEAD in cuts) is not tied
        if tied:  # the plan's embedding_rowwise: the head's rows, which the embedding has too
            rows = get_shard_size_list(132, ranks, meta, "lm_head")
            dim, ends = cuts_of(source, ranks, vocab_parallel=True)[EMBEDDING]
            assert (dim, ends) == (0, [sum(rows[:rank]) for rank in range(ranks + 1)])
        else:
            assert cuts_of(source, ranks, vocab_parallel=True) == cuts


@pytest.mark.parametrize(
    ("family", "why"),
    [("olmo2", "norms all heads together"), ("phi3", "has queries, keys and"), ("gpt_neox", "has queries, keys and")],
)
def test_what_cannot_be_cut_is_refused(family, why):
    source = Trained(config=tiny_config(model_type=family))
    with pytest.raises(InputError, match=f"2 tensor-parallel ranks: {family} {why}"):
        cuts_of(source, 2)
    cuts_of(source, 1)


def test_a_piece_is_a_source_of_its_boxes():
    source = Trained(config=tiny_config())
    cuts = cuts_of(source, 2)
    name, bias = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    assert cuts[name] == (1, [0, 24, 48])
    piece = piece_of(source, cuts, 1)
    whole = read_tensor(source, name, "exp_avg")
    assert piece.infos[name].shape == (32, 24)
    assert torch.equal(read_tensor(piece, name, "exp_avg"), whole[:, 24:])
    out = torch.empty(3, 5)
    piece.read(name, (slice(2, 5), slice(7, 12)), {"exp_avg": out})
    assert torch.equal(out, whole[2:5, 31:36])
    assert piece.infos[bias] == source.infos[bias]
    assert sum(box_shape(box)[0] for box in piece.tiles(name)) == 32


@pytest.mark.parametrize(
    ("changes", "ranks", "line"),
    [
        ({}, 3, "model.layers.0.self_attn.q_proj.weight has 2 key/value heads: DeepSpeed cannot train it on 3 *"),
        ({"intermediate_size": 1}, 2, "model.layers.0.mlp.gate_proj.weight has 1 elements along dim 0: *"),
    ],
)
def test_a_rank_without_anything_is_refused(changes, ranks, line):
    with pytest.raises(InputError) as caught:
        cuts_of(Trained(config=tiny_config(**changes)), ranks)
    assert str(caught.value).startswith(line.removesuffix("*"))
