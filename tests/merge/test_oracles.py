"""Every method, streamed, against float64 oracles on whole tensors: float32 to 1e-6, bfloat16 to the rounded value."""

import math

import numpy as np
import pytest
import torch
from models import EMBEDDING, MATRIX, NORM, model
from oracles import METHODS as ORACLES

from checkpoint.source import Source, read_tensor
from checkpoint.streams import chosen_at, uniform_at
from merge.merge import MergedSource, merge
from merge.statistics_files import digest
from merge.table import METHODS

SEED = 7
# method, models, with a base, weights, other parameters; all that change the outcome, in one way or another
CASES = [
    ("linear", 3, False, [0.2, 0.5, 0.3], {}),
    ("linear", 2, False, [2.0, -0.5], {"normalize": False}),
    ("passthrough", 1, False, None, {"scale": [None]}),
    ("passthrough", 1, False, None, {"scale": [0.75]}),
    ("nearswap", 1, True, None, {"t": 0.05}),
    ("slerp", 1, True, None, {"t": 0.3}),
    ("slerp", 1, True, None, {"t": 0.0}),
    ("nuslerp", 2, False, [0.6, 0.9], {}),
    ("nuslerp", 2, True, [1.0, 3.0], {}),
    ("nuslerp", 2, True, [1.0, -1.0], {"nuslerp_flatten": False}),
    ("nuslerp", 2, False, [1.0, 2.0], {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", 3, False, [0.2, 0.3, 0.9], {}),
    ("multislerp", 3, True, [0.2, 0.3, 0.9], {"normalize_weights": False}),
    ("multislerp", 1, True, [0.4], {}),
    ("karcher", 3, False, None, {}),
    ("karcher", 2, False, None, {"max_iter": 1, "tol": 1e-9}),
    ("model_stock", 3, True, None, {}),
    ("model_stock", 2, True, None, {"filter_wise": True}),
    ("task_arithmetic", 3, True, [0.5, 0.7, -0.2], {"lambda": 0.6}),
    ("task_arithmetic", 2, True, [0.5, 0.7], {"normalize": True}),
    ("ties", 3, True, [0.2, 0.5, 0.3], {"density": [0.5, 0.2, 0.01]}),
    ("ties", 2, True, [1.0, 1.0], {"normalize": False, "lambda": 0.5}),
    ("ties", 3, True, [1.0, -0.5, 0.25], {"density": [0.3, 0.0, 0.9], "rescale": True}),
    ("ties", 3, True, [0.9, -0.5, 0.25], {"density": [0.5, 0.7, 0.9], "normalize": False}),
    ("dare_linear", 3, True, [0.3, 0.3, 0.3], {"density": [0.5, 0.1, 1.0]}),
    ("dare_ties", 3, True, [0.3, 0.5, 0.3], {"density": [0.5, 0.3, 0.9], "normalize": True}),
    ("dare_ties", 2, True, [1.0, 0.5], {"density": [0.5, 0.0], "rescale": False}),
    ("della", 3, True, [0.3, 0.5, 0.3], {"density": [0.5, 0.3, 1.0], "epsilon": [0.2, 0.1, 0.1]}),
    ("della_linear", 2, True, [1.0, 0.5], {"density": [0.4, 0.0], "lambda": 1.5}),
    ("breadcrumbs", 3, True, [0.3, 0.5, 0.3], {"density": [0.5, 0.3, 1.0], "gamma": [0.1, 0.0, 0.1]}),
    ("breadcrumbs_ties", 2, True, [1.0, 0.5], {"density": [0.95, 0.2], "gamma": [0.2, 0.01], "rescale": True}),
    ("sce", 4, True, None, {}),
    ("sce", 4, True, None, {"select_topk": 0.3}),
    ("sce", 2, True, None, {"select_topk": 0.0}),
    ("ram", 3, True, None, {"epsilon": 0.02}),
    ("ramplus_tl", 3, True, None, {"epsilon": 0.02, "r": 0.4, "alpha": 0.7}),
    ("arcee_fusion", 1, True, None, {}),
    ("tsv", 1, True, None, {}),
    ("tsv", 3, True, None, {}),
    ("tsv", 4, True, None, {"lambda": 0.7}),
]
STATISTICAL = {"fisher", "regmean"}
"""Methods whose cases are in test_statistical_methods.py: they go by statistics of real models."""


def merged_of(
    method: str, count: int, based: bool, weights: list[float] | None, parameters: dict, dtype: torch.dtype
) -> tuple[MergedSource, Source, list[Source]]:
    base, others = model(0, dtype), [model(number + 1, dtype) for number in range(count)]
    names = [f"m{number}" for number in range(count)]
    merged = merge(
        others, method, base=base if based else None, weights=weights, parameters=parameters, names=names, seed=SEED
    )
    return merged, base, others


def oracle(
    method: str,
    based: bool,
    weights: list[float] | None,
    parameters: dict,
    base: Source,
    others: list[Source],
    name: str,
) -> np.ndarray:
    given = dict(parameters)
    if "weight" in METHODS[method].parameters:
        given["weight"] = weights
    tensors = [read_tensor(one, name).double().numpy() for one in (base, *others)]
    if method.startswith(("dare", "della")):
        box = tuple(slice(0, size) for size in tensors[0].shape)

        def uniform(number: int) -> np.ndarray:
            key = f"{SEED}/{digest(others[number])}/{name}"
            if method.startswith("della"):
                return uniform_at(key, box).numpy()
            return np.where(chosen_at(key, box, parameters["density"][number]), 0.0, 1.0)  # below a density, or above

        given["uniform"] = uniform
    if method == "tsv":
        given["matrix"] = name == MATRIX
    return ORACLES[method](tensors[0] if based else None, tensors[1:], **given)


def test_all_methods_have_an_oracle_and_a_case() -> None:
    assert {case[0] for case in CASES} | STATISTICAL == set(ORACLES) == set(METHODS)


@pytest.mark.parametrize("name", [MATRIX, NORM, EMBEDDING])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_float32(case, name) -> None:
    merged, base, others = merged_of(*case, torch.float32)
    wanted = oracle(case[0], *case[2:], base, others, name)
    found = read_tensor(merged, name).double().numpy()
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
    if case[1:] != (1, True, None, {"t": 0.0}) and case[0] != "passthrough" and case[4].get("select_topk") != 0:
        assert not np.allclose(wanted, read_tensor(base, name).numpy(), atol=1e-4) or case[0] == "arcee_fusion"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_bfloat16_is_the_rounded_value(case) -> None:
    merged, base, others = merged_of(*case, torch.bfloat16)
    wanted = torch.from_numpy(oracle(case[0], *case[2:], base, others, EMBEDDING))
    found = read_tensor(merged, EMBEDDING, dtype=torch.bfloat16)
    # A value next to the middle between two bfloat16 numbers may go to either.
    low, high = ((wanted + sign * 1e-6 * wanted.abs().max()).float().bfloat16() for sign in (-1, 1))
    assert ((low <= found) & (found <= high)).all()
    assert (found == wanted.float().bfloat16()).double().mean() > 0.99


def test_random_methods_keep_the_share_that_was_asked_for() -> None:
    sources = [model(number, vocab_size=3000) for number in (0, 1)]
    delta = read_tensor(sources[1], EMBEDDING) - read_tensor(sources[0], EMBEDDING)
    changed = delta != 0
    for density in (0.1, 0.5, 0.8):
        for method in ("dare_linear", "della_linear"):
            parameters = {"density": density, "rescale": False} | ({"epsilon": 0.05} if "della" in method else {})
            merged = merge(sources[1:], method, base=sources[0], parameters=parameters, seed=1)
            kept = read_tensor(merged, EMBEDDING) != read_tensor(sources[0], EMBEDDING)
            share = (kept & changed).sum().item() / changed.sum().item()
            assert abs(share - density) < (4 * math.sqrt(0.25 / changed.sum().item()) if method[:2] == "da" else 0.03)
