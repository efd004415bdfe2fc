"""Recipes: every method with several settings, and everything that a recipe can say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf


@dataclass(frozen=True, kw_only=True)
class Known:
    """A difference that is known."""

    reason: str
    largest: float = inf
    """Relative to the largest magnitude of the tensor."""
    share: float = 1.0
    """Of the elements, at most."""
    tensors: tuple[str, ...] = ()
    """If given, these alone differ, and do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A recipe, and the models that it is run on."""

    name: str
    recipe: str
    models: str = "tied"
    variants: tuple[str, ...] = ("float32", "float64", "bfloat16")
    """Keys of `merges.VARIANTS`."""
    fast: bool = False
    """Whether it is one of those that every test run has."""
    known: Mapping[str, Known] = field(default_factory=dict)
    """By variant."""


def listed(*models: str) -> str:
    return f"models: [{', '.join(models)}]\n"


def one(name: str, **parameters: object) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in parameters.items())
    return f"{{model: {name}, parameters: {{{inner}}}}}" if inner else f"{{model: {name}}}"


def weighted(*weights: float, based: bool = True, **each: list[object]) -> str:
    """Return `models` with weights and other parameters, one each."""
    names = ("swe", "est", "fin")
    models = [
        one(name, weight=weight, **{key: values[place] for key, values in each.items()})
        for place, (name, weight) in enumerate(zip(names, weights, strict=False))
    ]
    return listed(*models) + ("base_model: base\n" if based else "")


def method(name: str, **parameters: object) -> str:
    inner = ", ".join(f"{key}: {str(value).lower()}" for key, value in parameters.items())
    return f"merge_method: {name}\n" + (f"parameters: {{{inner}}}\n" if inner else "")


def two(name: str, **parameters: object) -> str:
    return listed("{model: base}", "{model: swe}") + "base_model: base\n" + method(name, **parameters)


ALL = weighted(0.5, 0.3, 0.4)
PLAIN = weighted(0.5, 0.3, 0.4, based=False)
THREE = listed("{model: swe}", "{model: est}", "{model: fin}")

METHODS: list[tuple[str, str, bool]] = [
    ("linear", PLAIN + method("linear"), True),
    ("linear, sum", weighted(1.5, -0.5, based=False) + method("linear", normalize=False), True),
    ("linear, negative weight", weighted(1.5, -0.5, 0.25, based=False) + method("linear"), False),
    ("slerp", two("slerp", t=0.3), True),
    ("slerp, t 0", two("slerp", t=0), False),
    ("slerp, t 1.2", two("slerp", t=1.2), False),
    ("nuslerp", weighted(0.6, 0.9, based=False) + method("nuslerp"), True),
    ("nuslerp of task vectors", weighted(1, 3) + method("nuslerp"), True),
    ("nuslerp, opposite weights", weighted(1, -1) + method("nuslerp"), False),
    ("nuslerp, lines", weighted(1, 2) + method("nuslerp", nuslerp_flatten=False), False),
    (
        "nuslerp, columns",
        weighted(1, 2, based=False) + method("nuslerp", nuslerp_flatten=False, nuslerp_row_wise=True),
        False,
    ),
    ("multislerp", PLAIN + method("multislerp"), True),
    ("multislerp of task vectors", ALL + method("multislerp", normalize_weights=False), True),
    ("multislerp of one", weighted(0.4) + method("multislerp"), False),
    ("multislerp, negative weight", weighted(1, -0.3, 0.5) + method("multislerp", eps=1e-6), False),
    ("karcher", THREE + method("karcher"), True),
    ("karcher, two rounds", THREE + method("karcher", max_iter=2, tol=1e-9), False),
    ("karcher, base listed", THREE + "base_model: base\n" + method("karcher"), False),
    ("model_stock", THREE + "base_model: base\n" + method("model_stock"), True),
    ("model_stock of two, lines", two("model_stock", filter_wise=True).replace("swe", "swe}, {model: est"), False),
    ("task_arithmetic", ALL + method("task_arithmetic"), True),
    (
        "task_arithmetic, lambda and normalize",
        weighted(0.5, 0.7, -0.2) + method("task_arithmetic", **{"lambda": 0.6, "normalize": True}),
        False,
    ),
    ("ties", weighted(0.5, 0.3, 0.4, density=[0.5, 0.2, 0.7]) + method("ties"), True),
    ("ties, int8_mask", ALL + method("ties", density=0.5, int8_mask=True), False),
    ("ties, sum and lambda", ALL + method("ties", **{"density": 0.33, "normalize": False, "lambda": 0.5}), False),
    ("ties, rescale", ALL + method("ties", density=0.4, rescale=True), False),
    ("ties, negative weight", weighted(1, -0.5, 0.3, density=[0.5] * 3) + method("ties", normalize=False), False),
    ("ties, negative weight, divided", weighted(1, -0.4, 0.3) + method("ties", density=0.8), False),
    ("ties, least density", ALL + method("ties", density=0.0001), False),
    ("dare_linear, density 1", ALL + method("dare_linear"), False),
    ("dare_ties, density 1", ALL + method("dare_ties", normalize=True), False),
    ("della, density 1", ALL + method("della"), False),
    ("della_linear, density 1", ALL + method("della_linear", **{"lambda": 1.5}), False),
    (
        "breadcrumbs",
        weighted(0.5, 0.3, 0.4, density=[0.9, 0.5, 1], gamma=[0.02, 0.1, 0.1]) + method("breadcrumbs"),
        True,
    ),
    ("breadcrumbs, gamma 0", ALL + method("breadcrumbs", density=0.6, gamma=0), False),
    ("breadcrumbs_ties", ALL + method("breadcrumbs_ties", density=0.8), True),
    (
        "breadcrumbs_ties, rescale",
        ALL + method("breadcrumbs_ties", density=0.95, gamma=0.2, rescale=True, normalize=True),
        False,
    ),
    ("sce", THREE + "base_model: base\n" + method("sce"), True),
    ("sce, select_topk", THREE + "base_model: base\n" + method("sce", select_topk=0.3), True),
    ("sce, nothing selected", THREE + "base_model: base\n" + method("sce", select_topk=0), False),
    ("ram", THREE + "base_model: base\n" + method("ram", epsilon=0.003), True),
    ("ram, epsilon as by default", THREE + "base_model: base\n" + method("ram"), False),
    ("ramplus_tl", THREE + "base_model: base\n" + method("ramplus_tl", epsilon=0.003, r=0.4, alpha=0.7), True),
    ("nearswap", two("nearswap", t=0.002), True),
    ("arcee_fusion", two("arcee_fusion"), True),
    ("passthrough", listed("{model: swe}") + method("passthrough"), True),
    ("passthrough, scale", listed(one("swe", scale=0.75)) + method("passthrough"), False),
]

KNOWN = {
    "arcee_fusion": {
        "float32": Known(
            reason="mergekit takes the divergence of near rows in float32, where little of it is left; ours in float64",
            share=0.01,
        ),
        "bfloat16": Known(
            reason="mergekit takes the divergence in bfloat16, where nothing of it is left, and writes float32",
            share=0.3,
        ),
    },
    "sce, select_topk": {
        "float64": Known(
            reason="which of equal variances mergekit selects is arbitrary, and the models' weights follow from that",
            largest=5e-3,
        ),
        "bfloat16": Known(reason="as in float64, and variances are bfloat16 in mergekit"),
    },
    "ramplus_tl": {"bfloat16": Known(reason="mergekit writes float32: its factor of unique parts is float32")},
}

FILTERED = """
slices:
  - sources:
      - {model: base, layer_range: [0, 3]}
      - {model: swe, layer_range: [0, 3]}
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.45
"""
STACK = """
slices:
  - sources: [{model: swe, layer_range: [0, 2]}]
  - sources:
      - model: est
        layer_range: [1, 3]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: layers.2., value: 0.5}
            - {value: 1.0}
  - sources: [{model: swe, layer_range: [1, 3]}]
merge_method: passthrough
"""
TWO_SLICES = """
slices:
  - sources:
      - {model: swe, layer_range: [0, 2], parameters: {weight: [0.2, 0.9]}}
      - {model: est, layer_range: [1, 3]}
    parameters: {weight: 0.3}
  - sources:
      - {model: est, layer_range: [2, 3], parameters: {weight: [0.1, 0.7]}}
      - {model: fin, layer_range: [0, 1]}
merge_method: linear
parameters: {weight: [{filter: layers.2., value: 0.5}, {filter: mlp, value: 0.6}, {value: 0.8}]}
"""
BASES = """
slices:
  - sources:
      - {model: base, layer_range: [0, 1]}
      - {model: swe, layer_range: [0, 1], parameters: {weight: 0.5}}
      - {model: est, layer_range: [2, 3], parameters: {weight: 0.7}}
  - base_model: est
    parameters: {density: [0.9, 0.4], lambda: [{filter: layers.2., value: [0.5, 1.5]}, {value: 0.8}]}
    sources:
      - {model: swe, layer_range: [0, 2]}
      - {model: est, layer_range: [1, 3]}
      - {model: fin, layer_range: [0, 2], parameters: {weight: [{filter: "*", value: 0.7}]}}
merge_method: ties
base_model: base
parameters: {weight: 0.4, density: 0.6}
"""
MORE_AND_MORE = """
slices:
  - sources: [{model: swe, layer_range: [0, 1]}]
  - sources: [{model: est, layer_range: [1, 2]}, {model: fin, layer_range: [1, 2]}]
merge_method: linear
parameters: {weight: 1}
"""
MODULE = """
modules:
  default:
    models: [{model: swe}, {model: est, parameters: {weight: 0.2}}]
    parameters: {weight: 0.6}
merge_method: task_arithmetic
base_model: base
parameters: {weight: 0.1}
"""
MODULE_OF_SLICES = """
modules:
  default:
    slices:
      - sources: [{model: swe, layer_range: [0, 2]}, {model: est, layer_range: [1, 3]}]
        parameters: {weight: 0.3}
    parameters: {weight: 0.9}
merge_method: linear
parameters: {weight: 2}
"""
MAPPINGS = """
models:
  - model: {model: {path: swe}}
    parameters: {weight: "0.5"}
  - {model: {model: {path: est}, lora: null}, parameters: {weight: 1}}
merge_method: linear
"""
HEAD = "[{filter: lm_head, value: 0.7}, {filter: embed, value: 0.2}, {value: 1}]"
FALL_THROUGH = (
    listed(
        one("swe", weight="[{filter: mlp, value: [0.1, 0.9]}]"),
        one("est", weight="{filter: self_attn, value: 0.7}"),
        one("base", weight=3),
    )
    + "base_model: base\nmerge_method: task_arithmetic\n"
    + "parameters:\n  weight:\n    - {filter: norm, value: 0.2}\n    - {filter: layers.1., value: 1e-1}\n"
    + "    - {filter: '*', value: 5e-1}\n"
)
TEXT = (
    "merge_method: ties\nparameters: {normalize: 'false', lambda: 5e-1, density: '0.5', rescale: 1, int8_mask: yes}\n"
)
EXACT = ("float32",)

SYNTAX = [
    Case(name="filters and gradients", recipe=FILTERED, fast=True),
    Case(
        name="gradients of each model, also before and behind layers",
        models="untied",
        recipe=listed(one("swe", weight="[0.2, 0.8]"), one("est", weight="[1, 0.5, 0.1, 0.3]"), one("fin", weight=0.4))
        + method("linear"),
        variants=EXACT,
        fast=True,
    ),
    Case(
        name="gradients of density, lambda and a switch",
        recipe=weighted(0.5, 0.3, density=["[0.2, 0.9]", 0.5])
        + method("ties", **{"lambda": [0.5, 1.5, 1], "normalize": [True, False]}),
    ),
    Case(name="filters fall through to the recipe's", recipe=FALL_THROUGH, fast=True),
    Case(name="depth stacking", recipe=STACK, models="untied", variants=("float32", "bfloat16"), fast=True),
    Case(
        name="depth stacking, base model elsewhere",
        recipe=STACK + "base_model: base\n",
        models="untied",
        variants=EXACT,
        fast=True,
    ),
    Case(
        name="depth stacking, a base model with a tied head",
        recipe=STACK.replace("est", "fin") + "base_model: base\n",
        models="mixed",
        variants=EXACT,
    ),
    Case(name="slices of several models", recipe=TWO_SLICES, models="untied", fast=True),
    Case(
        name="slices, base model elsewhere",
        recipe=TWO_SLICES + "base_model: base\n",
        models="untied",
        variants=EXACT,
    ),
    Case(name="a slice with a base of its own", recipe=BASES, models="untied", fast=True),
    Case(
        name="slices of ever more models",
        recipe=MORE_AND_MORE,
        models="untied",
        variants=EXACT,
        known={
            "float32": Known(
                reason="behind the layers mergekit takes as many of the last slice's models as the first slice has",
                tensors=("model.norm.weight", "lm_head.weight"),
            )
        },
    ),
    Case(
        name="base among the models",
        recipe=listed(one("swe", weight=0.5), "{model: base}", one("est", weight=0.8, density=0.3))
        + "base_model: base\n"
        + method("ties", density=0.6),
        fast=True,
    ),
    Case(
        name="base beside the models, merged by a method without a base",
        recipe=weighted(0.5, 0.3) + method("linear", weight=2),
        fast=True,
        variants=EXACT,
    ),
    Case(
        name="base among the models, slerp the other way round",
        recipe=listed("{model: swe}", "{model: base}") + "base_model: base\n" + method("slerp", t=0.2),
        variants=EXACT,
    ),
    Case(name="one module", recipe=MODULE, variants=EXACT, fast=True),
    Case(name="one module of slices", recipe=MODULE_OF_SLICES, variants=EXACT),
    Case(name="models as mappings", recipe=MAPPINGS, variants=EXACT),
    Case(name="settings as text and numbers", recipe=weighted(1, 2) + TEXT, variants=EXACT),
    Case(name="linear, untied", recipe=ALL + method("linear", weight=1), models="untied"),
    Case(name="ties, untied", recipe=ALL + method("ties", density=0.5), models="untied"),
    Case(
        name="a head of its own in some models",
        recipe=THREE + "base_model: base\n" + method("linear", weight=HEAD),
        models="mixed",
        fast=True,
        variants=EXACT,
    ),
    Case(
        name="a head of its own in some models, task vectors",
        recipe=ALL + method("ties", density=0.5),
        models="mixed",
        variants=EXACT,
    ),
    Case(name="qwen2", recipe=ALL + method("ties", density=0.5), models="qwen2", fast=True),
    Case(name="qwen2, slerp", recipe=two("slerp", t=0.4), models="qwen2"),
    *(
        Case(name=family, recipe=ALL + method("breadcrumbs", density=0.7), models=family, variants=EXACT)
        for family in ("mistral", "granite", "gemma2", "gemma3")
    ),
    Case(name="qwen3", recipe=ALL + method("della_linear"), models="qwen3"),
    Case(
        name="out_dtype",
        recipe=PLAIN + method("linear") + "out_dtype: bfloat16\n",
        variants=("float32 as it is",),
        fast=True,
    ),
    Case(
        name="dtype and out_dtype",
        recipe=ALL + method("ties", density=0.5) + "dtype: float32\nout_dtype: float16\n",
        variants=("bfloat16 as it is",),
    ),
    Case(
        name="dtype alone",
        recipe=ALL + method("task_arithmetic") + "dtype: float32\n",
        variants=("bfloat16 as it is",),
    ),
    Case(name="no dtype", recipe=PLAIN + method("linear"), variants=("bfloat16 as it is",)),
    Case(
        name="no dtype, models of two",
        recipe=PLAIN + method("linear"),
        models="mixed dtypes",
        variants=("bfloat16 as it is",),
        known={
            "bfloat16 as it is": Known(
                reason="without a dtype mergekit writes the models' widest one, ours the base's or the first model's",
                largest=2**-7,
            )
        },
    ),
    Case(
        name="dtype narrower than the models",
        recipe=PLAIN + method("linear") + "dtype: bfloat16\n",
        variants=("float32 as it is",),
        known={
            "float32 as it is": Known(
                reason="mergekit rounds the models to dtype before it merges; ours rounds the result alone",
                largest=2**-6,
            )
        },
    ),
]
CASES = [
    *(Case(name=name, recipe=recipe, fast=fast, known=KNOWN.get(name, {})) for name, recipe, fast in METHODS),
    *SYNTAX,
]


@dataclass(frozen=True, kw_only=True)
class Chance:
    """What a random method should come to, of one task vector with weight 1."""

    density: float
    epsilon: float = 0.0
    """By how much the chance to stay is below and above the density, from a row's smallest to its largest."""
    rescale: bool = True


def drawn(name: str, **parameters: object) -> str:
    return weighted(1) + method(name, **parameters)


CHANCES: list[tuple[Case, Chance]] = [
    (
        Case(
            name=f"{name}, density {density}", recipe=drawn(name, density=density), variants=EXACT, fast=density == 0.3
        ),
        Chance(density=density),
    )
    for name in ("dare_linear", "dare_ties")
    for density in (0.1, 0.3, 0.8)
] + [
    (
        Case(name="dare_linear, no rescale", recipe=drawn("dare_linear", density=0.4, rescale=False), variants=EXACT),
        Chance(density=0.4, rescale=False),
    ),
    (
        Case(name="della, chances", recipe=drawn("della", density=0.5, epsilon=0.3), variants=EXACT, fast=True),
        Chance(density=0.5, epsilon=0.3),
    ),
    (
        Case(
            name="della_linear, chances",
            recipe=drawn("della_linear", density=0.4, epsilon=0.3, rescale=False),
            variants=EXACT,
        ),
        Chance(density=0.4, epsilon=0.3, rescale=False),
    ),
]

TWICE = listed(one("swe", weight=1), one("swe", weight=1)) + method("linear")
UNEVEN = """
slices: [{sources: [{model: swe, layer_range: [0, 2]}, {model: est, layer_range: [0, 1]}]}]
merge_method: linear
parameters: {weight: 1}
"""
NO_BASE = """
slices: [{sources: [{model: swe, layer_range: [0, 2]}, {model: est, layer_range: [0, 2]}]}]
base_model: base
parameters: {weight: 1}
"""
BEYOND = "slices: [{sources: [{model: swe, layer_range: [2, 4]}]}]\nmerge_method: passthrough\n"

REFUSED = [
    Case(name=name, recipe=recipe, variants=EXACT, fast=True)
    for name, recipe in {
        "no weight": listed(one("swe", weight=1), one("est")) + method("linear"),
        "a weight for some tensors": weighted(1) + method("linear", weight="[{filter: mlp, value: 1}]"),
        "one model twice": TWICE,
        "ties without a base": PLAIN + method("ties"),
        "slerp of two beside the base": THREE + "base_model: base\n" + method("slerp", t=0.5),
        "nuslerp of three": PLAIN + method("nuslerp"),
        "model_stock of one": two("model_stock"),
        "passthrough of two": listed("{model: swe}", "{model: est}") + method("passthrough"),
        "passthrough, a base beside": listed("{model: swe}") + "base_model: base\n" + method("passthrough"),
        "della, chances beyond 1": ALL + method("della", density=0.9, epsilon=0.2),
        "slices of uneven length": UNEVEN,
        "a slice without its base": NO_BASE + method("task_arithmetic"),
        "a slice without its base, where it may have one": NO_BASE + method("multislerp"),
        "layers that are not there": BEYOND,
        "models and slices": PLAIN + FILTERED,
        "no method": PLAIN,
        "an unknown method": PLAIN + method("average"),
        "two tokenizers": PLAIN + method("linear") + "tokenizer_source: base\ntokenizer: {source: union}\n",
        "weight that is no number": PLAIN + method("linear", normalize="perhaps"),
    }.items()
]
ONLY_BASE = """
slices:
  - sources: [{model: base, layer_range: [0, 1]}]
  - sources: [{model: base, layer_range: [1, 3]}, {model: swe, layer_range: [1, 3]}]
merge_method: ties
base_model: base
parameters: {weight: 1}
"""
STRICTER = [
    (Case(name=name, recipe=recipe, variants=EXACT), line)
    for name, recipe, line in (
        ("an unknown key", PLAIN + method("linear") + "regularization: []\n", "unknown key 'regularization'"),
        ("an unknown parameter", PLAIN + method("linear", wieght=1), "unknown parameter of linear 'wieght'"),
        ("density 2", ALL + method("ties", density=2), "density is 2.0: allowed is 0 to 1"),
        ("weights that add up to 0", weighted(1, -1, based=False) + method("linear"), "add up to 0"),
        ("a slice of the base alone", ONLY_BASE, "takes 1 or more models beside the base, not 0"),
    )
]
"""Recipes that mergekit takes, and what ours says instead."""
