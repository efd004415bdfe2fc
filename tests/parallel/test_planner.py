"""The planner's memory is that of running engines: exactly between steps, and at the peak of a step within 10 %."""

import math

import pytest
import torch
from live_bytes import MODEL, measure, setup_of
from tiny import on_ranks, tiny_config, tiny_model

import train.engine
from parallel import planner
from parallel import sizes as of_models
from parallel.cluster import Cluster, latency, rate_of, ring
from parallel.errors import InputError
from parallel.families import family_of
from parallel.gpus import GPUS, gpu_of
from parallel.mesh import Mesh, check_model
from parallel.planner import memory_of
from parallel.presets import PRESETS, llama_of
from parallel.sizes import Setup, layer_activations, sizes_of
from parallel.timing import flops_per_token, step_time

STAGES = {
    f"{precision} {zero}": {"zero": zero, "precision": precision}
    for zero in (1, 2, 3)
    for precision in ("float32", "bfloat16")
}
LONG = {"precision": "float32", "micro_batch": 4, "sequence_length": 256}
OTHERS = {
    "float32 0": {"zero": 0, "precision": "float32"},
    "float32 2, two passes": {"zero": 2, "precision": "float32", "accumulation": 2},
    "3, two passes": {"accumulation": 2},
    "1, long": {"zero": 1, **LONG},
    "2, long, two passes": {"zero": 2, "accumulation": 2, **LONG},
    "3, long": LONG,
    "3, long, recompute": {"recompute": True, **LONG},
    "2, offload": {"zero": 2, "offload": True},
    "2, offload, two passes": {"zero": 2, "offload": True, "accumulation": 2},
    "3, offload": {"offload": True},
    "2, gradients larger than the bucket": {"zero": 2, "bucket": 500_000},
    "3, gradients larger than the bucket": {"bucket": 500_000},
}


def compare(folder, world, cases, model):
    """Measure on real ranks, and compare with the planner's figures: on a CPU what is offloaded is there as well."""
    variants = {name: (setup_of(**{"dp": world, **given}), model) for name, given in cases.items()}
    ranks = on_ranks(folder, world, measure, variants)
    for name, (setup, _) in variants.items():
        planned = memory_of(tiny_config(**model), setup)
        host = sum(size for term, size in planned.host.items() if term != "checkpoint buffers")
        peak = max(found[name][1][-1] for found in ranks)
        low = pytest.approx(sum(planned.rest.values()) + host, rel=0.01 if setup.mesh == Mesh(dp=world) else 0.05)
        rests = [found[name][0] for found in ranks]
        if setup.mesh.pp > 1:  # the planner describes the stage that takes most: others may hold more between steps
            assert low in rests, (name, planned.rest)
        else:
            assert max(rests) == low, (name, planned.rest)
        assert planned.total + host == pytest.approx(peak, rel=0.1), (name, planned.when, planned.peak)


SMALL = {**MODEL, "num_hidden_layers": 2, "vocab_size": 4096}
"""9 million parameters."""


@pytest.mark.slow
def test_memory_is_that_of_a_running_engine(tmp_path):
    """The peak is at the gradients' reduction and at the update: few tokens do."""
    compare(tmp_path, 1, {"2": {"zero": 2}, "3": {}}, SMALL)


@pytest.mark.slow
def test_memory_of_long_sequences_in_bfloat16_is_that_of_a_running_engine(tmp_path):
    long = {"micro_batch": 4, "sequence_length": 128}
    compare(tmp_path, 1, {"2": {"zero": 2, **long}, "3, recompute": {"recompute": True, **long}}, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_memory_of_every_stage_is_that_of_running_engines(tmp_path, world):
    compare(tmp_path, world, {**STAGES, **OTHERS}, MODEL)


@pytest.mark.slow
def test_memory_of_other_axes_is_that_of_running_engines(tmp_path):
    meshes = {
        "tp": {"mesh": Mesh(tp=2)},
        "tp, 1": {"mesh": Mesh(tp=2), "zero": 1},
        "sp": {"mesh": Mesh(sp=2)},
        "pp": {"mesh": Mesh(pp=2), "zero": 1, "accumulation": 4},
    }
    cases = {
        name + kind: {**mesh, **how} for name, mesh in meshes.items() for kind, how in {"": {}, ", long": LONG}.items()
    }
    compare(tmp_path, 2, cases, MODEL)


def test_constants_are_those_of_training():
    assert of_models.PERSISTENT == train.engine.PERSISTENT
    assert of_models.BUCKET == train.engine.BUCKET
    assert planner.SUB_GROUP == train.engine.SUB_GROUP


@pytest.mark.parametrize("tied", [True, False])
def test_elements_are_the_models(tied):
    model = tiny_model(tie_word_embeddings=tied)
    sizes = sizes_of(tiny_config(tie_word_embeddings=tied))
    assert sizes.whole == sum(parameter.numel() for parameter in model.parameters())


def test_a_layers_activations_are_what_autograd_saves():
    """Saved by transformers' own layer in bfloat16, parameters and the rotary tables aside."""
    model = tiny_model(dtype=torch.bfloat16, num_hidden_layers=2).train()
    one = tiny_model(dtype=torch.bfloat16, num_hidden_layers=1).train()
    tokens = 64

    def saved(model):
        storages = {}
        outside = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in outside:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        return sum(storage.nbytes() for storage in storages.values())

    a_layer = saved(model) - saved(one)
    assert tokens * layer_activations(sizes_of(tiny_config()), 2) == pytest.approx(a_layer, rel=0.05)


def test_zero_cuts_what_its_stage_says():
    """At 64 ranks, by hand from ZeRO's paper (arXiv 1910.02054): 2 P + 2 P + 12 P, cut by stage; sums in float32."""
    config = tiny_config(**MODEL)
    count = sizes_of(config).whole
    rest = {
        zero: memory_of(config, Setup(zero=zero, mesh=Mesh(dp=64), micro_batch=1, accumulation=1, sequence_length=64))
        for zero in (1, 2, 3)
    }
    share = math.ceil(count / 64)
    assert sum(rest[1].rest.values()) == 2 * count + 4 * count + 12 * share
    assert sum(rest[2].rest.values()) == 2 * count + 12 * share
    held = {"reduce bucket", "whole small weights"}
    assert sum(size for term, size in rest[3].rest.items() if term not in held) == (2 + 4 + 12) * share


def test_a_family_that_norms_all_heads_is_not_cut_between_them():
    check_model(Mesh(sp=2), tiny_config(model_type="olmo2"), 64)
    with pytest.raises(InputError, match=r"parallel\.tp is 2: olmo2 norms all heads together, and a rank has some of"):
        check_model(Mesh(tp=2), tiny_config(model_type="olmo2"), 64)


def test_tensor_parallelism_cuts_matrices_and_not_the_embedding():
    whole, half = sizes_of(tiny_config()), sizes_of(tiny_config(), 2)
    assert half.embedding == whole.embedding
    norms = 2 * 32
    assert half.layer - norms == (whole.layer - norms) // 2


def cluster(**given):
    gpu = gpu_of("h100")
    plain = {"gpus_a_node": 8, "nodes": 4, "link_gb_s": 450.0, "node_link_gb_s": 400.0, "disk_gb_s": 5.0}
    return Cluster(**{"gpu": gpu, **plain, **given})


def test_links_by_where_a_group_lies():
    lies = cluster(node_link_gb_s=80.0)
    assert rate_of(lies, 8, 1) == pytest.approx(0.8 * 450e9)  # tp 8: a node
    assert rate_of(lies, 32, 1) == pytest.approx(0.8 * 80e9)  # dp 32: one ring has the node's cards
    assert rate_of(lies, 4, 8) == pytest.approx(0.8 * 10e9)  # dp 4 beside tp 8: eight rings share them
    assert ring(8e9, 4, 1e9) == pytest.approx(6.0)
    assert ring(8e9, 1, 1e9) == 0.0


def test_latency_is_a_rings():
    """By hand from NCCL's figures: 31 hops between 32 GPUs, the 4 between nodes at 14 us, the others at 3.4 us."""
    assert latency(cluster(), 8, 1) == pytest.approx(8e-6 + 7 * 3.4e-6)
    assert latency(cluster(), 32, 1) == pytest.approx(8e-6 + 28 * 3.4e-6 + 4 * 14e-6)
    assert latency(cluster(), 4, 8) == pytest.approx(8e-6 + 4 * 14e-6)
    assert latency(cluster(), 1, 8) == 0.0


def seconds(config, lies, **given):
    setup = Setup(**{"micro_batch": 1, "sequence_length": 4096, **given})
    sizes = sizes_of(config, setup.mesh.tp)
    return step_time(sizes, setup, memory_of(config, setup), lies, flops_per_token(config, 4096))


LARGE = tiny_config(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def test_compute_is_flops_by_the_sustained_rate():
    time = seconds(LARGE, cluster(), zero=3, mesh=Mesh(dp=32), accumulation=2)
    assert time.compute == pytest.approx(2 * 4096 * flops_per_token(LARGE, 4096) / (989e12 * 0.55))
    again = seconds(LARGE, cluster(), zero=3, mesh=Mesh(dp=32), accumulation=2, recompute=True)
    head = 6 * 4096 * 128256 / flops_per_token(LARGE, 4096)
    assert again.compute / time.compute == pytest.approx(4 / 3 - head / 3)


def test_a_small_model_waits_for_the_host():
    small = tiny_config()
    plain, hooked = (seconds(small, cluster(), zero=zero, mesh=Mesh(dp=32), accumulation=3) for zero in (1, 3))
    assert plain.compute == pytest.approx(3 * 2 * 1.5e-3)
    assert hooked.compute == pytest.approx(3 * 2 * 5.6e-3)


def test_offloaded_sums_travel_every_pass():
    """ZeRO-3 keeps them with the host, where each further pass fetches them, adds, and brings them back."""
    times = {
        (zero, passes): seconds(LARGE, cluster(), zero=zero, mesh=Mesh(dp=32), accumulation=passes, offload=True).update
        for zero in (2, 3)
        for passes in (1, 5)
    }
    share = sizes_of(LARGE).whole / 32
    assert times[2, 5] == times[2, 1] == times[3, 1]
    assert times[3, 5] - times[3, 1] == pytest.approx(4 * 8 * share / 25e9)


def test_tensor_parallelism_reduces_each_columns_gradient():
    """Two sums a layer forward and, by AutoTP's rules, five backward (q, k, v, gate, up); logits and a sixth, once."""
    lies = cluster(link_gb_s=1.0)  # latency is nothing beside that
    time = seconds(LARGE, lies, zero=1, mesh=Mesh(dp=4, tp=8), accumulation=1)
    hidden = 2 * (4096 * 4096 * 2) * 7 / 8 / 0.8e9
    logits = 4096 * 128256 * 2 * 7 / 8 / 0.8e9
    assert time.tensor == pytest.approx(32 * (2 + 5) * hidden + hidden + logits, rel=1e-3)


def test_stage_3_gathers_backward_what_it_has_not_kept():
    slow = cluster(node_link_gb_s=0.01)
    time = seconds(LARGE, slow, zero=3, mesh=Mesh(dp=32), accumulation=1)
    weights = sizes_of(LARGE).whole
    twice = 2 * weights - 5 * 10**8  # DeepSpeed keeps what is used again within 1e9 elements, there and back
    assert time.gather / time.reduce == pytest.approx(twice / weights, rel=0.01)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-180m", 180_078_912),
        ("llama-572m", 572_494_464),
        ("llama-1.1b", 1_100_048_384),
        ("llama-1.7b", 1_711_376_384),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
    ],
)
def test_presets_are_the_published_models(name, count):
    assert family_of(PRESETS[name]).parameters(PRESETS[name]) == count


@pytest.mark.parametrize("count", [1e8, 1e9, 7e9, 7e10, 4e11])
def test_a_model_of_about_so_many_parameters(count):
    config = llama_of(count)
    assert family_of(config).parameters(config) == pytest.approx(count, rel=0.02)
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


def test_too_few_parameters_for_the_vocabulary():
    with pytest.raises(InputError, match=r"^1e\+07 parameters are too few for a vocabulary of 128256$"):
        llama_of(1e7)


def test_pipelines_bubble_is_the_textbooks():
    time = seconds(LARGE, cluster(node_link_gb_s=1e9), zero=1, mesh=Mesh(dp=8, pp=4), accumulation=12)
    assert time.bubble / (time.bubble + time.compute) == pytest.approx(3 / (12 + 3), rel=0.01)


def test_stage_2_reduces_every_pass_and_stage_3_beside_computing():
    slow = cluster(node_link_gb_s=40.0)
    one, two = (seconds(LARGE, slow, zero=zero, mesh=Mesh(dp=32), accumulation=4) for zero in (1, 2))
    assert two.reduce == pytest.approx(4 * one.reduce, rel=0.05)  # in smaller buckets
    assert two.gather == one.gather
    fast = seconds(LARGE, cluster(node_link_gb_s=1e6, link_gb_s=1e6), zero=3, mesh=Mesh(dp=32), accumulation=4)
    assert fast.gather == fast.reduce == 0.0
    assert seconds(LARGE, slow, zero=3, mesh=Mesh(dp=32), accumulation=4).gather > 0


def test_an_unknown_gpu_gets_the_nearest():
    with pytest.raises(InputError) as caught:
        gpu_of("h10O")
    assert str(caught.value) == f"unknown GPU 'h10O': allowed are {', '.join(GPUS)}; did you mean 'H100'?"
