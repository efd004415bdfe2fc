"""The merge methods by name: their parameters, how many models they take, and where each is described.

A table alone, without torch: reading a configuration has to be quick. How each is run is in `merge.boxes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number, switch or, of kind `str`, folder that a method goes by."""

    kind: type = float
    default: Any = None
    """None if it has to be given, unless `optional`."""
    each: bool = False
    """Every model has one of its own; the base has none, unless it is merged like the others."""
    optional: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    """What is allowed, both included."""
    unused: bool = False
    """mergekit takes it as well, and it changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method takes."""

    base: Literal["needed", "allowed", "none"] = "none"
    """`none`: a base is one of the models."""
    least: int = 1
    most: int | None = None
    """How many models, the base not counted unless it is one of them."""
    parameters: Mapping[str, Parameter]
    source: str
    """Where it is described."""
    whole_matrix: bool = False
    """Whether a whole matrix is held while it is written."""


WEIGHT = Parameter(each=True)
DENSITY = Parameter(each=True, default=1.0, low=0, high=1)
UNUSED = Parameter(kind=bool, default=False, unused=True)
LINEAR = "arXiv 2203.05482"
TASK = "arXiv 2212.04089"
DELLA = {"epsilon": Parameter(each=True, default=0.15, low=0, high=1)}
BREADCRUMBS = {"gamma": Parameter(each=True, default=0.01, low=0, high=1)}
SHARE = Parameter(each=True, default=1.0, low=0)
RAM = {"epsilon": Parameter(default=1e-5, low=0)}


def _of_task_vectors(*, normalize: bool, rescale: bool, more: Mapping[str, Parameter] | None = None) -> dict[str, Any]:
    return {
        "weight": WEIGHT,
        "density": DENSITY,
        "normalize": Parameter(kind=bool, default=normalize),
        "rescale": Parameter(kind=bool, default=rescale),
        "lambda": Parameter(default=1.0),
        "int8_mask": UNUSED,
        **(more or {}),
    }


METHODS: dict[str, Method] = {
    "linear": Method(
        parameters={"weight": WEIGHT, "normalize": Parameter(kind=bool, default=True)},
        source=LINEAR,
    ),
    "slerp": Method(
        base="needed",
        most=1,
        parameters={"t": Parameter()},
        source="Shoemake, SIGGRAPH 1985",
    ),
    "nuslerp": Method(
        base="allowed",
        least=2,
        most=2,
        parameters={
            "weight": WEIGHT,
            "nuslerp_flatten": Parameter(kind=bool, default=True),
            "nuslerp_row_wise": Parameter(kind=bool, default=False),
        },
        source="Shoemake, SIGGRAPH 1985",
    ),
    "multislerp": Method(
        base="allowed",
        parameters={
            "weight": WEIGHT,
            "normalize_weights": Parameter(kind=bool, default=True),
            "eps": Parameter(default=1e-8, low=0),
        },
        source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    ),
    "karcher": Method(
        parameters={"max_iter": Parameter(kind=int, default=10, low=0), "tol": Parameter(default=1e-5, low=0)},
        source="arXiv 2603.04972",
    ),
    "model_stock": Method(
        base="needed",
        least=2,
        parameters={"filter_wise": Parameter(kind=bool, default=False)},
        source="arXiv 2403.19522",
    ),
    "task_arithmetic": Method(
        base="needed",
        parameters={
            **_of_task_vectors(normalize=False, rescale=False),
            "density": Parameter(each=True, default=1.0, unused=True),
            "rescale": UNUSED,
        },
        source=TASK,
    ),
    "ties": Method(
        base="needed",
        parameters=_of_task_vectors(normalize=True, rescale=False),
        source="arXiv 2306.01708",
    ),
    "dare_linear": Method(
        base="needed",
        parameters=_of_task_vectors(normalize=False, rescale=True),
        source="arXiv 2311.03099",
    ),
    "dare_ties": Method(
        base="needed",
        parameters=_of_task_vectors(normalize=False, rescale=True),
        source="arXiv 2311.03099",
    ),
    "della": Method(
        base="needed",
        parameters=_of_task_vectors(normalize=True, rescale=True, more=DELLA),
        source="arXiv 2406.11617",
    ),
    "della_linear": Method(
        base="needed",
        parameters=_of_task_vectors(normalize=False, rescale=True, more=DELLA),
        source="arXiv 2406.11617",
    ),
    "breadcrumbs": Method(
        base="needed",
        parameters=_of_task_vectors(normalize=False, rescale=False, more=BREADCRUMBS),
        source="arXiv 2312.06795",
    ),
    "breadcrumbs_ties": Method(
        base="needed",
        parameters=_of_task_vectors(normalize=False, rescale=False, more=BREADCRUMBS),
        source="arXiv 2312.06795",
    ),
    "sce": Method(
        base="needed",
        parameters={"select_topk": Parameter(default=1.0, low=0, high=1), "int8_mask": UNUSED},
        source="arXiv 2408.07990",
    ),
    "ram": Method(base="needed", parameters=RAM, source="arXiv 2601.13572"),
    "ramplus_tl": Method(
        base="needed",
        parameters={**RAM, "r": Parameter(default=0.1), "alpha": Parameter(default=0.2, low=0)},
        source="arXiv 2601.13572",
    ),
    "nearswap": Method(
        base="needed",
        most=1,
        parameters={"t": Parameter(low=0)},
        source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    ),
    "arcee_fusion": Method(base="needed", most=1, parameters={}, source="https://arcee.ai"),
    "passthrough": Method(
        most=1,
        parameters={"scale": Parameter(each=True, optional=True)},
        source="depth stacking by slices, without arithmetic",
    ),
    "fisher": Method(
        parameters={
            "fisher": Parameter(kind=str, each=True),
            "weight": SHARE,
            "floor": Parameter(default=1e-6, low=1e-12),
        },
        source="arXiv 2111.09832",
    ),
    "regmean": Method(
        whole_matrix=True,
        parameters={
            "gram": Parameter(kind=str, each=True),
            "weight": SHARE,
            "alpha": Parameter(default=0.9, low=0, high=1),
        },
        source="arXiv 2212.09849",
    ),
    "tsv": Method(
        whole_matrix=True, base="needed", parameters={"lambda": Parameter(default=1.0)}, source="arXiv 2412.00081"
    ),
}
"""A merge method a name, as mergekit 0.1.5 calls them; it has none of the last three."""
STATISTICS = ("fisher", "gram")
"""Parameters that name the folder of a model's statistics, called as `growmerge stats` calls these."""


def statistic_of(method: str) -> str | None:
    """Return which statistics of each model a method goes by, if it goes by some."""
    return next((name for name in STATISTICS if name in METHODS[method].parameters), None)
