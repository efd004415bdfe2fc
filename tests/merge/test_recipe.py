"""mergekit's recipes: what each key comes to, tensor by tensor, and a line for everything that is wrong."""

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from models import EMBEDDING, MATRIX, NORM, model

from checkpoint.memory import MemorySource
from checkpoint.source import read_tensor
from merge.apply import Applied, apply_recipe
from merge.merge import merge
from merge.recipe_files import read_recipe
from parallel.errors import InputError

HEAD = "lm_head.weight"
MODELS = {"base": model(0), "swe": model(1), "est": model(2), "fin": model(3)}


def applied(tmp_path, text: str, models: dict[str, MemorySource] | None = None, **options) -> Applied:
    known = MODELS if models is None else models
    path = tmp_path / "recipe.yaml"
    path.write_text(text)

    def open_model(name: str) -> MemorySource:
        if name not in known:
            raise InputError("no such folder")
        return known[name]

    recipe = read_recipe(path, lenient=options.pop("lenient", False))
    return apply_recipe(recipe, open_model, **options)


def refused(tmp_path, text: str, **options) -> str:
    with pytest.raises(InputError) as error:
        applied(tmp_path, text, **options)
    line = str(error.value)
    assert "\n" not in line and line.startswith(str(tmp_path / "recipe.yaml"))
    return line.removeprefix(str(tmp_path / "recipe.yaml"))


def same(merged, wanted, names=(MATRIX, NORM, EMBEDDING)) -> None:
    for name in names:
        assert torch.equal(read_tensor(merged, name), read_tensor(wanted, name)), name


def test_models_weights_and_a_base(tmp_path):
    found = applied(
        tmp_path,
        """
models:
  - model: base
  - model: swe
    parameters: {weight: 0.3, density: 0.5}
  - model: est
    parameters:
      weight: 0.7
merge_method: ties
base_model: base
parameters:
  density: 0.25
  normalize: false
  lambda: 5e-1
dtype: float32
""",
    )
    wanted = merge(
        [MODELS["swe"], MODELS["est"]],
        "ties",
        base=MODELS["base"],
        weights=[0.3, 0.7],
        parameters={"density": [0.5, 0.25], "normalize": False, "lambda": 0.5},
    )
    same(found.merged, wanted)
    assert [line.split(": ", 1)[1] for line in found.merged.notes] == [
        f"{name}: not known whether it stems from base" for name in ("swe", "est")
    ]


def test_filters_and_gradients(tmp_path):
    found = applied(
        tmp_path,
        """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: swe, layer_range: [0, 2]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5]}
    - filter: mlp
      value: [1, 0.2, 0.6]
    - value: 0.25
""",
    )

    def t(value: float) -> MemorySource:
        return merge([MODELS["swe"]], "slerp", base=MODELS["base"], parameters={"t": value})

    for layer, attention, mlp in ((0, 0, 1), (1, 0.5, 0.6)):
        same(found.merged, t(attention), [f"model.layers.{layer}.self_attn.q_proj.weight"])
        same(found.merged, t(mlp), [f"model.layers.{layer}.mlp.down_proj.weight"])
        same(found.merged, t(0.25), [f"model.layers.{layer}.input_layernorm.weight", EMBEDDING])


def test_switches_may_be_quoted(tmp_path):
    text = TIES + "parameters: {normalize: 'false', rescale: \"Yes\", lambda: '5e-1'}\n"
    shared = applied(tmp_path, text).merged.orders[MATRIX].shared
    assert (shared["normalize"], shared["rescale"], shared["lambda"]) == (False, True, 0.5)
    assert refused(tmp_path, TIES + "parameters: {normalize: 'perhaps'}\n") == (
        ":4: normalize is 'perhaps': true or false is needed"
    )


def test_a_gradient_between_layers_and_outside_of_them(tmp_path):
    three = {name: model(seed, num_hidden_layers=3) for seed, name in enumerate(("base", "swe"))}
    text = "models:\n  - {model: swe, parameters: {weight: [0.2, 0.8]}}\n  - {model: base, parameters: {weight: 1}}\n"
    found = applied(tmp_path, text + "merge_method: linear\n", three)
    for name, weight in ((EMBEDDING, 0.2), ("model.norm.weight", 0.2), ("model.layers.1.mlp.up_proj.weight", 0.5)):
        wanted = merge([three["swe"], three["base"]], "linear", weights=[weight, 1])
        same(found.merged, wanted, [name])


def test_layers_are_stacked(tmp_path):
    found = applied(
        tmp_path,
        """
slices:
  - sources: [{model: swe, layer_range: [0, 2]}]
  - sources: [{model: est, layer_range: [1, 2], parameters: {scale: [{filter: down_proj, value: 0.5}]}}]
  - sources: [{model: swe, layer_range: [0, 1]}]
merge_method: passthrough
dtype: bfloat16
""",
    )
    assert found.merged.config["num_hidden_layers"] == 4
    assert {d for info in found.merged.infos.values() for d in info.slots.values()} == {torch.bfloat16}
    for layer, (source, theirs) in enumerate([("swe", 0), ("swe", 1), ("est", 1), ("swe", 0)]):
        for part, scale in (("mlp.down_proj", 0.5 if layer == 2 else 1), ("self_attn.k_proj", 1)):
            wanted = read_tensor(MODELS[source], f"model.layers.{theirs}.{part}.weight") * scale
            found_there = read_tensor(found.merged, f"model.layers.{layer}.{part}.weight", dtype=torch.bfloat16)
            assert torch.equal(found_there, wanted.bfloat16())
    assert torch.equal(read_tensor(found.merged, EMBEDDING), read_tensor(MODELS["swe"], EMBEDDING))


def test_a_base_outside_of_the_list_is_merged_by_methods_without_a_base(tmp_path):
    text = "models: [{model: swe}, {model: est}]\nmerge_method: linear\nbase_model: base\nparameters: {weight: 1}\n"
    same(applied(tmp_path, text).merged, merge([*(MODELS[name] for name in ("swe", "est", "base"))], "linear"))


def test_one_module_is_as_none(tmp_path):
    text = "modules: {default: {models: [{model: swe}, {model: est}], parameters: {weight: 2}}}\nmerge_method: linear\n"
    same(applied(tmp_path, text).merged, merge([MODELS["swe"], MODELS["est"]], "linear"))


def test_a_head_of_its_own_beside_a_tied_one(tmp_path):
    models = {"swe": model(1), "est": model(2, tie_word_embeddings=False)}
    text = "models: [{model: swe}, {model: est}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    merged = applied(tmp_path, text, models).merged
    assert merged.config["tie_word_embeddings"] is False
    wanted = (read_tensor(models["swe"], EMBEDDING) + read_tensor(models["est"], HEAD)) / 2
    assert torch.equal(read_tensor(merged, HEAD), wanted)


def test_filters_see_a_tied_head_by_its_own_name(tmp_path):
    models = {"swe": model(1), "est": model(2, tie_word_embeddings=False)}
    text = (
        "models: [{model: swe}, {model: est}]\nmerge_method: linear\nparameters:\n  normalize: false\n"
        "  weight: [{filter: lm_head, value: 0.25}, {filter: embed, value: 2}, {value: 1}]\n"
    )
    merged = applied(tmp_path, text, models).merged
    wanted = (read_tensor(models["swe"], EMBEDDING) + read_tensor(models["est"], HEAD)) / 4
    assert torch.equal(read_tensor(merged, HEAD), wanted)


def test_slices_without_the_base_model(tmp_path):
    """Frequent in published stacks: the base gives config and tokenizer, no layers; passthrough needs none of it."""
    slices = (
        "slices: [{sources: [{model: swe, layer_range: [0, 2]}]}, {sources: [{model: est, layer_range: [1, 2]}]}]\n"
    )
    merged = applied(tmp_path, slices + "merge_method: passthrough\nbase_model: base\n").merged
    assert merged.config["num_hidden_layers"] == 3
    same(merged, MODELS["swe"])
    # Nor is its head: that of what is merged counts.
    models = {
        "base": model(0),
        **{name: model(seed, tie_word_embeddings=False) for seed, name in ((1, "swe"), (2, "est"))},
    }
    merged = applied(tmp_path, slices + "merge_method: passthrough\nbase_model: base\n", models).merged
    assert merged.config["tie_word_embeddings"] is False
    assert torch.equal(read_tensor(merged, HEAD), read_tensor(models["est"], HEAD))
    assert refused(tmp_path, slices + "merge_method: multislerp\nbase_model: base\nparameters: {weight: 1}\n") == (
        ":1: the slice has no layers of the base model base"
    )


LINEAR = (
    "models: [{model: swe, parameters: {weight: 1}}, {model: est, parameters: {weight: 1}}]\nmerge_method: linear\n"
)
TIES = LINEAR.replace("linear", "ties") + "base_model: base\n"
PART = "slices: [{sources: [{model: swe, layer_range: %s}]}]\nmerge_method: passthrough\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            LINEAR.replace("merge_method", "merge_methods"),
            ":2: unknown key 'merge_methods': allowed are merge_method, *",
        ),
        (LINEAR.replace("linear", "liner"), ":2: unknown merge_method 'liner': * did you mean 'linear'?"),
        (LINEAR + "slices: []\n", ":1: a recipe has exactly one of models, slices, modules; this one has models and *"),
        ("merge_method: linear\n", ":1: a recipe has exactly one of models, slices, modules; this one has none"),
        (LINEAR.split("merge")[0], ":1: merge_method is missing: which method merges?"),
        (LINEAR + "parameters: {wieght: 1}\n", ":3: unknown parameter of linear 'wieght': * did you mean 'weight'?*"),
        (LINEAR + "regularization: [a]\n", ":3: unknown key 'regularization': *"),
        (LINEAR + "dtype: float8\n", ":3: unknown dtype 'float8': allowed are float32, float16, bfloat16, float64*"),
        (LINEAR.replace("weight: 1", "weight: a"), ":1: weight is a: a finite number is needed"),
        (LINEAR.replace("weight: 1", "weight: .nan"), ":1: weight is .nan: a finite number is needed"),
        (LINEAR.replace(", parameters: {weight: 1}", ""), ":1: linear needs a weight for swe; model.embed_tokens*"),
        (LINEAR.replace("weight: 1", "weight: []"), ":1: weight: the list is empty"),
        (LINEAR.replace("weight: 1", "weight: [{filter: mlp}]"), ":1: weight: a filter without a value"),
        (LINEAR.replace("est", "swe"), ":1: swe is given twice among what is merged into one"),
        (LINEAR.replace("est", "nor"), ":1: nor: no such folder"),
        (TIES.replace("base_model: base\n", ""), ":1: ties needs a base_model: what all models started from"),
        (TIES + "parameters: {density: 2}\n", ":4: density is 2.0: allowed is 0 to 1"),
        (TIES.replace("ties", "slerp"), ":1: merge method slerp takes 1 models beside the base, not 2"),
        (LINEAR.replace("weight: 1", "weight: 1").replace("{weight: 1}}]", "{weight: -1}}]"), ":1: *add up to 0*"),
        ("models: 3\nmerge_method: linear\n", ":1: models: 3 is given; a list with one entry at least is needed"),
        ("models: [{modl: swe}]\nmerge_method: linear\n", ":1: unknown key of a model 'modl': *'model'?*"),
        ("models: [{parameters: {}}]\nmerge_method: linear\n", ":1: the key model is missing: which one?"),
        (
            "slices: [{sources: [{model: swe, layer_range: [0, 3]}]}]\nmerge_method: passthrough\n",
            ":1: layer_range [0, 3]: swe has 2 layers",
        ),
        (
            "slices: [{sources: [{model: swe, layer_range: [1, 1]}]}]\nmerge_method: passthrough\n",
            ":1: layer_range is [1, 1]: two layers are needed, such as [0, 12]",
        ),
        (
            "slices: [{sources: [{model: swe}]}]\nmerge_method: passthrough\n",
            ":1: the key layer_range is missing, such as [0, 12]",
        ),
        (
            "slices: [{sources: [{model: swe, layer_range: [0, 2]}, {model: est, layer_range: [0, 1]}]}]\n"
            "merge_method: linear\nparameters: {weight: 1}\n",
            ":1: as many layers of each model are needed, given are swe [0, 2], est [0, 1]",
        ),
        ("modules: {a: {models: []}, b: {models: []}}\nmerge_method: linear\n", ":1: 2 modules: models of these *"),
        (LINEAR + "tokenizer: {}\ntokenizer_source: union\n", ":3: tokenizer and tokenizer_source are both given: *"),
        (LINEAR + "dtype: |\n  float32\n", ":3: dtype: 'float32\\n' is given; text is needed"),
        (LINEAR + 'chat_template: "{{ a }}\\e"\n', ":3: chat_template: '{{ a }}\\x1b' is given; text is needed"),
        (LINEAR + "base_model: {path: swe}\n", ":3: unknown key of base_model 'path': allowed are model, lora, *"),
        (LINEAR + "base_model: {model: {revision: a}}\n", ":3: model: the key path is missing: which one?"),
        (LINEAR + "base_model: [swe]\n", ":3: base_model: a list is given; text is needed"),
        (PART % "[8:24]", ":1: layer_range is ['8:24']: two layers are needed, such as [0, 12]"),
        (PART % "[0, 8:24]", ":1: layer_range is [0, '8:24']: two layers are needed, such as [0, 12]"),
        (PART % "[0, .nan]", ":1: layer_range is [0, nan]: two layers are needed, such as [0, 12]"),
        (PART % "[0, !!int a]", ":1: layer_range is [0, 'a']: two layers are needed, such as [0, 12]"),
        (PART % "null", ":1: the key layer_range is missing, such as [0, 12]"),
        (LINEAR.replace("weight: 1", "weight: null"), ":1: weight: a value is needed"),
        (LINEAR.replace("weight: 1", "weight: 8:24"), ":1: weight is 8:24: a finite number is needed"),
        (LINEAR.replace("weight: 1", "weight: 1" + 400 * "0"), ":1: weight is 100*: a finite number is needed"),
        (LINEAR.replace("weight: 1", "weight: !!bool a"), ":1: weight is a: a finite number is needed"),
        (TIES + "parameters: {normalize: !!bool a}\n", ":4: normalize is 'a': true or false is needed"),
        (
            PART % "[0, 2]" + "parameters: {scale: [1, null]}\n",
            ":3: scale: nothing is given among the values of a list",
        ),
        ("models: null\nmerge_method: linear\n", ":1: a recipe has exactly one of *; this one has none"),
        (LINEAR.replace("linear", "null"), ":2: merge_method: nothing is given; text is needed"),
        (LINEAR + "seed: -1\n", ":3: seed is -1: a whole number, 0 or more, is needed"),
        (LINEAR + "seed: 1.5\n", ":3: seed is 1.5: a whole number, 0 or more, is needed"),
        (LINEAR + "seed: 'a'\n", ":3: seed is 'a': a whole number, 0 or more, is needed"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, text, line):
    found = refused(tmp_path, text)
    assert fnmatchcase(found, line.replace("[", "[[]")), found


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        (LINEAR + "parameters: {density: 0.5}\n", ["3: linear has no parameter density: it changes nothing"]),
        (TIES + "parameters: {int8_mask: true, density: 0.5}\n", ["4: int8_mask changes nothing in ties"]),
        (
            TIES + "parameters: {density: [{filter: mpl, value: 0.5}, {value: 0.4}]}\n",
            ["4: density: filter 'mpl' applies to no tensor"],
        ),
        (
            TIES + "parameters: {density: [{value: 0.5}, {filter: mlp, value: 0.4}]}\n",
            ["4: density: filter 'mlp' applies to no tensor"],
        ),
        (
            LINEAR + "dtype: float16\n",
            ["3: float16 loses digits below 6e-5 and ends at 65504; sums are *"],
        ),
        (LINEAR + "dtype: bfloat16\n", ["3: models in float32 are rounded to bfloat16"]),
        (TIES, ["2: ties at density 1 drops nothing: it only elects signs"]),
        (
            TIES.replace("ties", "task_arithmetic") + "parameters: {normalize: true, density: 0.5}\n",
            [
                "4: density changes nothing in task_arithmetic",
                "2: task_arithmetic with normalize and lambda 1 is linear, whatever the base: base + mean(x - base)",
            ],
        ),
        (TIES.replace("ties", "dare_linear"), ["2: dare_linear at density 1 is task_arithmetic"]),
        (
            TIES.replace("ties", "slerp").replace(", {model: est, parameters: {weight: 1}}", "")
            + "parameters: {t: 0}\n",
            ["1: slerp has no parameter weight: it changes nothing", "2: slerp with t 0 is the base"],
        ),
    ],
)
def test_what_changes_nothing_or_little_is_said(tmp_path, text, notes):
    found = [one.removeprefix(f"{tmp_path / 'recipe.yaml'}:") for one in applied(tmp_path, text).merged.notes]
    found = [one for one in found if "not known whether" not in one]
    assert len(found) == len(notes) and all(map(fnmatchcase, found, notes)), found


def test_unknown_keys_can_be_passed_over(tmp_path):
    text = LINEAR + "regularization:\n  - method: x\n"
    assert "unknown key 'regularization'" in "".join(applied(tmp_path, text, lenient=True).merged.notes)


def test_a_model_that_does_not_stem_from_the_base_is_refused(tmp_path):
    """The published recipes of the paper name the wrong base in 76 of 78 cases: this is the line that says so."""
    base = {"name": "base", "hash": "b", "parents": [], "ancestors": []}
    child = {"name": "swe", "hash": "s", "parents": [{"name": "base", "hash": "b"}], "ancestors": ["b"]}
    other = {"name": "est", "hash": "e", "parents": [{"name": "other", "hash": "o"}], "ancestors": ["o"]}
    records = {"base": base, "swe": child, "est": other}
    models = {name: model(seed, provenance=records[name]) for seed, name in enumerate(records)}
    assert refused(tmp_path, TIES, models=models) == (
        ":1: est does not stem from the base_model base: name the model that it was trained from, or pass "
        "--allow-unrelated"
    )
    notes = applied(tmp_path, TIES, models, allow_unrelated=True).merged.notes
    assert any("est does not stem from" in note for note in notes)
    assert not any("swe" in note for note in notes)


def test_heads_that_are_scaled_differently_are_refused(tmp_path):
    scaled = replace(model(2), config={**model(2).config, "lm_head_normalization_factor": 2})
    line = refused(tmp_path, LINEAR, models={"swe": model(1), "est": scaled})
    scales = "lm_head_normalization_factor: swe none, est 2"
    assert line == f":1: the models scale their heads differently ({scales}): convert them first"


def test_models_that_do_not_fit(tmp_path):
    models = {"swe": model(1), "est": model(2, rope_theta=5e5), "nor": model(3, vocab_size=31)}
    assert refused(tmp_path, LINEAR.replace("est", "nor"), models=models) == (
        ":1: nor has vocab 31, swe has 30: they cannot be merged"
    )
    models["swe"] = model(1, rope_theta=1e4)
    assert "has rope_theta 500000.0" in refused(tmp_path, LINEAR, models=models)


def test_the_model_is_named_as_mergekit_names_it(tmp_path):
    named = "{model: {path: org/swe, revision: main}, lora: {path: adapter}}"
    text = f"models:\n  - model: {named}\nmerge_method: passthrough\n"
    seen = []

    def open_model(name: str) -> MemorySource:
        seen.append(name)
        return MODELS["swe"]

    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    apply_recipe(read_recipe(path), open_model)
    assert seen == ["org/swe@main+adapter"]


def test_a_base_is_named_as_a_model_is(tmp_path):
    base = "base_model: {model: {path: base, revision: null}, lora: null}"
    same(applied(tmp_path, TIES.replace("base_model: base", base)).merged, applied(tmp_path, TIES).merged)
    slices = "slices:\n  - sources: [{model: swe, layer_range: [0, 2]}, {model: base, layer_range: [0, 2]}]\n"
    text = slices + "    base_model: {model: base}\nmerge_method: slerp\nparameters: {t: 0.5}\n"
    wanted = merge([MODELS["swe"]], "slerp", base=MODELS["base"], parameters={"t": 0.5})
    same(applied(tmp_path, text).merged, wanted)


def test_a_chat_template_has_lines(tmp_path):
    template = "{% for message in messages %}\n\t{{ message['content'] }}\n{% endfor %}\n"
    text = LINEAR + "chat_template: |\n" + "".join(f"  {line}\n" for line in template.splitlines())
    assert applied(tmp_path, text).recipe.chat_template == template


@pytest.mark.parametrize(
    ("method", "parameters"), [("passthrough", "scale"), ("task_arithmetic", "density"), ("ties", "int8_mask")]
)
def test_a_parameter_may_be_nothing_where_that_means_something(tmp_path, method, parameters):
    texts = {"passthrough": PART % "[0, 2]", "task_arithmetic": TIES.replace("ties", method), "ties": TIES}
    found = applied(tmp_path, texts[method] + f"parameters: {{{parameters}: null}}\n").merged
    same(found, applied(tmp_path, texts[method]).merged)


def test_nothing_is_as_not_given(tmp_path):
    wanted = applied(tmp_path, PART % "[0, 2]").merged
    nothing = "".join(f"{name}: null\n" for name in ("models", "modules", "parameters", "base_model", "seed", "dtype"))
    same(applied(tmp_path, PART % "[0, 2]" + nothing).merged, wanted)
    inner = "{base_model: null, parameters: null, sources: [{model: swe, layer_range: [0, 2], parameters: null}]}"
    same(applied(tmp_path, f"slices: [{inner}]\nmerge_method: passthrough\n").merged, wanted)
    module = f"modules: {{default: {{models: null, slices: [{inner}]}}}}\nmerge_method: passthrough\n"
    same(applied(tmp_path, module).merged, wanted)


@pytest.mark.parametrize("span", ["[0, 0x2]", "[0b0, 02]", "[0, 0_2]"])
def test_layers_as_yaml_writes_numbers(tmp_path, span):
    same(applied(tmp_path, PART % span).merged, applied(tmp_path, PART % "[0, 2]").merged)


def test_a_seed(tmp_path):
    recipe = applied(tmp_path, LINEAR + "seed: 0x10\n").recipe
    assert recipe.seed == 16 and recipe.at("seed") == f"{tmp_path / 'recipe.yaml'}:3"
    assert applied(tmp_path, LINEAR).recipe.seed is None


BIAS = "self_attn.q_proj.bias"


def test_models_with_other_tensors_are_refused(tmp_path):
    models = {**MODELS, "est": model(2, attention_bias=True)}
    assert refused(tmp_path, LINEAR, models=models) == (
        f":1: est has the tensor model.layers.0.{BIAS}, which the merged model lacks"
    )
    first = LINEAR.replace("swe", "fin").replace("est", "swe").replace("fin", "est")
    assert refused(tmp_path, first, models=models) == (
        f":1: swe lacks the tensor model.layers.0.{BIAS}, which the merged model has"
    )
    models = {**MODELS, "base": model(0, attention_bias=True)}
    assert refused(tmp_path, TIES.replace("models: [", "models:\n  [\n    "), models=models) == (
        f":3: swe lacks the tensor model.layers.0.{BIAS}, which the merged model has"
    )
    assert refused(tmp_path, "\n" + PART % "[0, 2]" + "base_model: base\n", models=models).startswith(":2: swe lacks")
    text = LINEAR + "base_model: base\nparameters: {weight: 1}\n"
    assert refused(tmp_path, text, models={**models, "est": models["base"]}).startswith(":1: swe lacks the tensor")


def test_layers_of_a_model_with_other_tensors_are_refused(tmp_path):
    models = {**MODELS, "est": model(2, attention_bias=True)}
    swe = "\n  - sources: [{model: swe, layer_range: [0, 1]}]"
    est = "\n  - sources: [{model: est, layer_range: [1, 2]}]"
    end = "\nmerge_method: passthrough\n"
    line = f":3: est has the tensor model.layers.1.{BIAS}, which the merged model lacks"
    assert refused(tmp_path, f"slices:{swe}{est}{end}", models=models) == line
    line = f":3: swe lacks the tensor model.layers.0.{BIAS}, which the merged model has as model.layers.1.{BIAS}"
    assert refused(tmp_path, f"slices:{est}{swe}{end}", models=models) == line


def test_parts_of_models_that_no_slice_names_do_not_count(tmp_path):
    """A middle slice's head and embeddings, and layers outside of each range."""
    models = {**MODELS, "est": model(2, tie_word_embeddings=False)}
    text = "slices:\n" + "".join(
        f"  - sources: [{{model: {name}, layer_range: [1, 2]}}]\n" for name in ("swe", "est", "fin")
    )
    merged = applied(tmp_path, text + "merge_method: passthrough\n", models).merged
    assert merged.config["num_hidden_layers"] == 3
    same(merged, MODELS["swe"], [EMBEDDING])
