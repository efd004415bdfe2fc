"""Sweep specs: what they come to, and a line for everything that is wrong."""

from fnmatch import fnmatchcase

import pytest
import yaml

from merge.recipe_files import parse_recipe
from merge.sweep import read_sweep
from parallel.errors import InputError

PAPER = """\
each: {setup: [1x, 1x-cloned, 2x]}
models:
  is: runs/{setup}-icelandic
  sv: runs/{setup}-swedish
  da: runs/{setup}-danish
  nb: runs/{setup}-norwegian
  fo: runs/{setup}-faroese
base_model: runs/{setup}-english
subsets: {least: 2}
methods:
  linear:
  multislerp:
  task_arithmetic:
  ties: {density: 0.5}
  dare_ties: {density: 0.5}
dtype: bfloat16
"""


def written(tmp_path, text=PAPER):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_the_paper_s_390_merges_are_16_lines(tmp_path):
    sweep = read_sweep(written(tmp_path))
    assert [len(group) for group in sweep.groups] == [130, 130, 130]
    assert len({merge.name for merge in sweep.merges}) == 390
    one = next(merge for merge in sweep.merges if merge.name == "1x-cloned-ties-is_da_fo")
    assert yaml.safe_load(one.recipe()) == {
        "merge_method": "ties",
        "models": [{"model": f"runs/1x-cloned-{name}"} for name in ("icelandic", "danish", "faroese")],
        "base_model": "runs/1x-cloned-english",
        "parameters": {"weight": 1.0, "density": 0.5},
        "dtype": "bfloat16",
    }
    linear = next(merge for merge in sweep.merges if merge.method == "linear")
    assert "base_model" not in yaml.safe_load(linear.recipe())


def test_lists_are_grids_and_methods_of_two_models_have_the_pairs(tmp_path):
    text = """\
models: {a: x/a, b: x/b, c: x/c}
base_model: x/base
methods:
  ties: {density: [0.2, 0.5], lambda: [0.5, 1.0]}
  nuslerp: {}
name: "{models}.{method}.{parameters}"
"""
    names = [merge.name for merge in read_sweep(written(tmp_path, text)).merges]
    assert len(names) == 4 * 4 + 3
    assert "a_b_c.ties.density0.2-lambda1.0" in names and "a_c.nuslerp." in names and "a_b_c.nuslerp." not in names


def test_subsets_can_be_listed(tmp_path):
    text = PAPER.replace("{least: 2}", "[[is, sv], [fo]]")
    assert [len(group) for group in read_sweep(written(tmp_path, text)).groups] == [10, 10, 10]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("subsets", "subset", "9: unknown key 'subset': * did you mean 'subsets'?"),
        ("  ties:", "  tise:", "14: unknown merge method 'tise': * did you mean 'ties'?"),
        ("{density: 0.5}\n  dare", "{densty: 0.5}\n  dare", "14: unknown parameter of ties 'densty': *'density'?"),
        ("density: 0.5}\n  dare", "density: [[1]]}\n  dare", "14: density is [1]: a finite number is needed"),
        ("{least: 2}", "{least: 6}", "9: least: 6 is given; allowed is 1 to 5"),
        ("{least: 2}", "{least: 3, most: 2}", "9: no subset has 3 to 2 models"),
        ("{least: 2}", "{lest: 3}", "9: unknown key of subsets 'lest': *'least'?"),
        ("{least: 2}", "[[is, se]]", "9: unknown model 'se': allowed are is, sv, da, nb, fo*"),
        ("runs/{setup}-icelandic", "runs/{setp}-icelandic", "3: unknown variable 'setp': *'setup'?"),
        ("base_model: runs/{setup}-english\n", "", "12: task_arithmetic needs a base_model: *"),
        ("dtype: bfloat16", "dtype: bf16", "16: unknown dtype 'bf16': *"),
        ("methods:\n", "methods: 3\neach:\n", "11: *given twice*"),
        ("dtype: bfloat16", "name: x", "16: two merges are called 'x': name needs more of {...}"),
        ("dtype: bfloat16", "name: '{method}/{models}'", "16: 'linear/is_sv' is no folder's name: *"),
        ("  linear:", "  fisher: {fisher: a}", "11: fisher: a sweep has no statistics; *"),
        ("density: 0.5}\n  dare", "density: .nan}\n  dare", "14: density is .nan: a finite number is needed"),
        ("density: 0.5}\n  dare", "density: null}\n  dare", "14: density: a value is needed"),
        ("density: 0.5}\n  dare", "lambda: [1, 8:24]}\n  dare", "14: lambda is 8:24: a finite number is needed"),
        ("density: 0.5}\n  dare", "lambda: 1e999}\n  dare", "14: lambda is 1e999: a finite number is needed"),
        ("{least: 2}", "{least: 1:30}", "9: least: 1:30 is given; allowed is 1 to 5"),
        ("dtype: bfloat16", "seed: -1", "16: seed is -1: a whole number, 0 or more, is needed"),
        ("dtype: bfloat16", "materialize: 1", "16: materialize is 1: true or false is needed"),
        ("dtype: bfloat16", "seed: true", "16: seed is true: a whole number, 0 or more, is needed"),
        ("models:", "models: null\nother:", "3: unknown key 'other': *"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, old, new, line):
    path = written(tmp_path, PAPER.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        read_sweep(path)
    found = str(error.value)
    assert "\n" not in found
    assert fnmatchcase(found, f"{path}:{line}".replace("[", "[[]")), found


def test_numbers_that_yaml_reads_as_text(tmp_path):
    """As in a recipe: YAML 1.1 takes 1e-5 for text."""
    text = """\
models: {a: x/a, b: x/b}
base_model: x/base
methods:
  multislerp: {eps: [1e-5, 1.0e-6, '1e-7'], normalize_weights: 'no'}
"""
    merges = read_sweep(written(tmp_path, text)).merges
    assert [merge.parameters for merge in merges] == [
        {"eps": eps, "normalize_weights": False} for eps in (1e-5, 1e-6, 1e-7)
    ]
    for merge in merges:
        assert yaml.safe_load(merge.recipe())["parameters"] == {"weight": 1.0, **merge.parameters}


def test_a_seed(tmp_path):
    sweep = read_sweep(written(tmp_path, PAPER + "seed: 7\n"))
    assert sweep.seed == 7
    for merge in sweep.merges:
        assert parse_recipe(merge.recipe(), tmp_path / "recipe.yaml").seed == merge.seed == 7
    sweep = read_sweep(written(tmp_path))
    assert sweep.seed is None
    assert all(merge.seed is None and "seed" not in yaml.safe_load(merge.recipe()) for merge in sweep.merges)


def test_nothing_is_as_not_given(tmp_path):
    keys = "".join(f"{name}:\n" for name in ("name", "seed"))
    assert read_sweep(written(tmp_path, PAPER + keys)).merges == read_sweep(written(tmp_path)).merges
    scale = "models: {a: x/a}\nsubsets: {least: 1}\nmethods: {passthrough: {scale: [null, 2]}}\n"
    first, second = read_sweep(written(tmp_path, scale)).merges
    assert (first.parameters, second.parameters) == ({"scale": None}, {"scale": 2.0})


def test_one_model_alone_is_no_sweep(tmp_path):
    with pytest.raises(InputError, match=r":1: one model is given; a sweep merges two at least"):
        read_sweep(written(tmp_path, "models: {is: here}\nmethods: {linear: }\n"))
