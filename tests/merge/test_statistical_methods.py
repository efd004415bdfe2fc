"""Merging by Fisher, RegMean and TSV: statistics of real tiny models, float64 oracles, folders that are refused."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from models import EMBEDDING, MATRIX, NORM
from models import model as plain_model
from test_statistics import some_requests
from tiny import tiny_model

import checkpoint.blocks as blocks
import merge.matrices as matrices
import merge.merge as merging
import merge.stack as stack
from checkpoint import manifest
from checkpoint.memory import MemorySource
from checkpoint.safetensors import SafetensorsLayout, open_safetensors
from checkpoint.source import Source, Wrapped, read_tensor, row_major_tiles
from checkpoint.writer import write_checkpoint
from merge.apply import Applied, apply_recipe
from merge.gram import open_gram, shared_inputs, write_gram
from merge.merge import MergedSource, merge
from merge.recipe_files import read_recipe
from merge.statistics import fisher, gram
from merge.statistics_files import digest
from parallel.errors import InputError

HEAD = "lm_head.weight"
DOWN, KEY = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"
NAMES = (EMBEDDING, NORM, KEY, DOWN, HEAD)
SIZES = (25, 40, 31)
"""Sequences of text of each model: other numbers of tokens."""


@dataclass(frozen=True)
class Given:
    """Models and the folders of their statistics."""

    models: list[MemorySource]
    fishers: list[str]
    grams: list[str]


def source_of(model) -> MemorySource:
    return MemorySource(config=model.config.to_dict(), tensors=model.state_dict())


def write_fisher(folder: Path, tensors: dict, source: MemorySource, verb: str = "stats fisher", **config) -> str:
    about = {"format": 1, "name": folder.name, "verb": verb, "statistic": {"model": digest(source)}}
    found = MemorySource(config={**source.config, **config}, tensors=tensors)
    write_checkpoint(found, folder, SafetensorsLayout(), about=about)
    return str(folder)


def write_grams(folder: Path, found: dict, weights: dict, source: Source, tokens: int) -> str:
    write_gram(folder, found, weights, {"model": digest(source), "tokens": tokens, "sequences": 1}, {})
    return str(folder)


def made(folder: Path, tied: bool, dtype: torch.dtype = torch.float32, sizes=SIZES) -> Given:
    """Models that training has set apart from one another a little, each with statistics of a text of its own."""
    models, fishers, grams = [], [], []
    for number, size in enumerate(sizes):
        model, other = (tiny_model(seed, tie_word_embeddings=tied) for seed in (0, number + 1))
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data = (mine.data + 0.3 * (theirs.data - mine.data)).to(dtype).float()
        requests = some_requests(size, seed=number)
        tokens = sum(len(one.tokens) - one.context for one in requests)
        source = source_of(model)
        if dtype != torch.float32:
            source = replace(source, tensors={name: value.to(dtype) for name, value in source.tensors.items()})
        models.append(source)
        weights = shared_inputs(model)
        grams.append(write_grams(folder / f"gram{number}", gram(model, [requests]), weights, source, tokens))
        fishers.append(write_fisher(folder / f"fisher{number}", fisher(model, [requests]), source))
    return Given(models, fishers, grams)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return made(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return made(tmp_path_factory.mktemp("tied"), tied=True)


def values_of(sources, name):
    return [read_tensor(one, name).double().numpy() for one in sources]


def by_fisher(given: Given, weights=None, **parameters) -> MergedSource:
    return merge(given.models, "fisher", weights=weights, parameters={"fisher": given.fishers, **parameters})


def by_regmean(given: Given, weights=None, **parameters) -> MergedSource:
    return merge(given.models, "regmean", weights=weights, parameters={"gram": given.grams, **parameters})


def wanted_of(method: str, given: Given, name: str, weight, **parameters):
    values = values_of(given.models, name)
    if method == "fisher":
        fishers = values_of([open_safetensors(Path(folder)) for folder in given.fishers], name)
        return oracles.fisher(None, values, fisher=fishers, weight=weight, **parameters)
    opened = [open_gram(folder) for folder in given.grams]
    has = name in opened[0].weights
    grams = [one.matrix(name).double().numpy() / one.tokens for one in opened] if has else None
    return oracles.regmean(None, values, gram=grams, weight=weight, **parameters)


def near(found: torch.Tensor, wanted, share: float = 1e-6) -> None:
    wanted = np.asarray(wanted)
    assert np.abs(found.double().numpy() - wanted).max() <= share * np.abs(wanted).max()


CASES = [
    ("fisher", [1.0, 1.0, 1.0], {}),
    ("fisher", [0.2, 0.0, 3.0], {"floor": 0.3}),
    ("regmean", [1.0, 1.0, 1.0], {}),
    ("regmean", [0.2, 0.0, 3.0], {"alpha": 0.3}),
    ("regmean", [0.0, 1.0, 2.0], {"alpha": 0.0}),
]


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize(("method", "weights", "parameters"), CASES)
def test_float32(method, weights, parameters, kind, request):
    given = request.getfixturevalue(kind)
    merged = (by_fisher if method == "fisher" else by_regmean)(given, weights, **parameters)
    for name in NAMES if kind == "untied" else NAMES[:-1]:
        wanted = wanted_of(method, given, name, weights, **parameters)
        near(read_tensor(merged, name), wanted)
        mean = oracles.linear(None, values_of(given.models, name), weight=weights)
        is_mean = method == "regmean" and name in (EMBEDDING, NORM)
        assert (np.abs(wanted - mean).max() < 1e-3) == is_mean, name


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_bfloat16_is_the_rounded_value(method, tmp_path):
    given = made(tmp_path, True, torch.bfloat16)
    merged = (by_fisher if method == "fisher" else by_regmean)(given)
    for name in (EMBEDDING, DOWN):
        wanted = torch.from_numpy(wanted_of(method, given, name, [1.0, 1.0, 1.0]))
        found = read_tensor(merged, name, dtype=torch.bfloat16)
        low, high = ((wanted + sign * 1e-6 * wanted.abs().max()).float().bfloat16() for sign in (-1, 1))
        assert merged.infos[name].slots == {"weight": torch.bfloat16}
        assert ((low <= found) & (found <= high)).all()


def test_bfloat16_of_tsv_is_the_rounded_value():
    sources = [plain_model(seed, torch.bfloat16) for seed in range(4)]
    found = read_tensor(merge(sources[1:], "tsv", base=sources[0]), MATRIX, dtype=torch.bfloat16)
    base, *others = values_of(sources, MATRIX)
    wanted = torch.from_numpy(oracles.tsv(base, others, matrix=True))
    assert (found == wanted.float().bfloat16()).double().mean() > 0.99
    near(found.float(), wanted.numpy(), 2**-8)


def permuted(given: Given, order) -> Given:
    return Given(*([one[number] for number in order] for one in (given.models, given.fishers, given.grams)))


@pytest.mark.parametrize("by", [by_fisher, by_regmean])
def test_the_order_of_models_does_not_matter(by, untied):
    one, other = by(untied, [1.0, 2.0, 3.0]), by(permuted(untied, [2, 0, 1]), [3.0, 1.0, 2.0])
    for name in NAMES:
        near(read_tensor(one, name), read_tensor(other, name).double().numpy())


def test_the_order_of_models_does_not_matter_to_tsv():
    sources = [plain_model(seed) for seed in range(4)]
    one, other = (merge([sources[n] for n in order], "tsv", base=sources[0]) for order in ([1, 2, 3], [3, 1, 2]))
    for name in (EMBEDDING, MATRIX, NORM):
        near(read_tensor(one, name), read_tensor(other, name).double().numpy())


def test_equal_fishers_are_the_weighted_mean(untied, tmp_path):
    draw = torch.Generator().manual_seed(5)
    same = {name: torch.rand(value.shape, generator=draw) ** 8 for name, value in untied.models[0].tensors.items()}
    same[KEY] = torch.zeros_like(same[KEY])
    folders = [write_fisher(tmp_path / str(n), same, model) for n, model in enumerate(untied.models)]
    merged, weights = by_fisher(replace(untied, fishers=folders), [1.0, 2.0, 5.0]), [1.0, 2.0, 5.0]
    plain = merge(untied.models, "linear", weights=weights)
    for name in NAMES:
        near(read_tensor(merged, name), read_tensor(plain, name).double().numpy())


def test_the_scale_of_fishers_does_not_matter(untied, tmp_path):
    folders = []
    for number, model in enumerate(untied.models):
        source = open_safetensors(Path(untied.fishers[number]))
        small = {name: read_tensor(source, name) * 2.0**-60 for name in model.tensors}
        folders.append(write_fisher(tmp_path / str(number), small, model))
    merged, wanted = by_fisher(replace(untied, fishers=folders)), by_fisher(untied)
    for name in NAMES:
        near(read_tensor(merged, name), read_tensor(wanted, name).double().numpy())


def test_regmean_of_equal_models_is_the_model(untied, tmp_path):
    first = untied.models[0]
    folders = []
    for number, folder in enumerate(untied.grams):
        found = open_gram(folder)
        grams = {name: found.matrix(weight) for weight, name in found.weights.items()}
        folders.append(write_grams(tmp_path / str(number), grams, dict(found.weights), first, found.tokens))
    for alpha in (0.9, 1.0):
        merged = by_regmean(Given([first] * 3, [], folders), [1.0, 2.0, 0.5], alpha=alpha)
        for name in (KEY, DOWN, HEAD):
            assert torch.equal(read_tensor(merged, name), first.tensors[name])


def with_grams(given: Given, folder: Path, change, tokens: int = 1000) -> Given:
    """The models with other Gram matrices: `change` of each, by number and matrix."""
    folders = []
    for number, (old, model) in enumerate(zip(given.grams, given.models, strict=True)):
        found = open_gram(old)
        new = {name: change(number, found.matrix(weight).clone()) for weight, name in found.weights.items()}
        folders.append(write_grams(folder / f"changed{number}", new, dict(found.weights), model, tokens))
    return replace(given, grams=folders)


def test_regmean_with_identity_matrices_is_the_mean(untied, tmp_path):
    merged = by_regmean(with_grams(untied, tmp_path, lambda _, one: torch.eye(len(one))), [1.0, 2.0, 5.0])
    plain = merge(untied.models, "linear", weights=[1.0, 2.0, 5.0])
    for name in NAMES:
        near(read_tensor(merged, name), read_tensor(plain, name).double().numpy())


def test_regmean_where_too_few_tokens_leave_it_open(untied, tmp_path):
    """Outputs on the inputs that there were are nearest to the models'; an input that is always 0 has the mean."""
    draw = torch.Generator().manual_seed(3)
    inputs = {}

    def few(number, one):
        rows = torch.randn(5, len(one), generator=draw)
        rows[:, 7] = 0
        inputs[number, len(one)] = rows.double()
        return rows.T @ rows

    given = with_grams(untied, tmp_path, few, tokens=5)
    merged = by_regmean(given, alpha=1.0)
    assert [note.split(": ")[1] for note in merged.notes] == ["5 tokens for 48 inputs of a layer"] * 3
    found = read_tensor(merged, DOWN).double()
    values = [torch.from_numpy(one) for one in values_of(given.models, DOWN)]
    near(found[:, 7], sum(values)[:, 7] / 3)
    for number, value in enumerate(values):  # 15 inputs of 48: all can be met
        x = inputs[number, 48]
        assert (x @ (found - value).T).abs().max() < 2e-3 * (x @ value.T).abs().max()
    assert found.abs().max() < 2 * max(value.abs().max() for value in values)
    assert not by_regmean(untied).notes


def test_the_length_of_a_text_does_not_count(untied, tmp_path):
    longer = with_grams(untied, tmp_path, lambda number, one: one / open_gram(untied.grams[number]).tokens * 10, 10)
    for name in (KEY, DOWN):
        near(read_tensor(by_regmean(longer), name), read_tensor(by_regmean(untied), name).double().numpy())


def test_tsv_of_one_model_is_that_model():
    base, other = plain_model(0), plain_model(1)
    for name in (EMBEDDING, MATRIX, NORM):
        near(read_tensor(merge([other], "tsv", base=base), name), other.tensors[name].double().numpy())


def test_tsv_of_task_vectors_that_are_nothing_alike_or_the_same():
    base, other = plain_model(0), plain_model(1)
    assert torch.equal(read_tensor(merge([base] * 3, "tsv", base=base), MATRIX), base.tensors[MATRIX])
    delta = (other.tensors[MATRIX] - base.tensors[MATRIX]).double().numpy()
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    half = u[:, :6] @ np.diag(s[:6]) @ v[:6]
    same = read_tensor(merge([other, other], "tsv", base=base), MATRIX).double() - base.tensors[MATRIX].double()
    near(same, half, 1e-5)
    with_base = read_tensor(merge([other, base], "tsv", base=base), MATRIX).double() - base.tensors[MATRIX].double()
    near(with_base, half, 1e-5)


def test_more_models_than_singular_values():
    merged = merge([plain_model(1)] * 13, "tsv", base=plain_model(0))
    with pytest.raises(InputError) as error:
        read_tensor(merged, MATRIX)
    assert str(error.value) == f"{MATRIX}: tsv gives each of 13 models a part of 12 singular vectors"


@pytest.mark.parametrize("by", [by_fisher, by_regmean])
def test_workers_and_tiles_do_not_matter(by, untied, tmp_path, monkeypatch):
    for module in (merging, stack):
        monkeypatch.setattr(module, "row_major_tiles", lambda shape: row_major_tiles(shape, 64))
    monkeypatch.setattr(matrices, "ROWS", 16)
    for module in (blocks, manifest):
        monkeypatch.setattr(module, "BLOCK", 2**12)
    assert by(untied).one_process == (by is by_regmean)
    hashes = set()
    for workers, one_process in ((1, True), (3, True), (3, False)):  # threads, processes
        monkeypatch.setattr(MergedSource, "one_process", one_process)
        folder = tmp_path / f"{workers}-{one_process}"
        hashes.add(write_checkpoint(by(untied), folder, SafetensorsLayout(), workers=workers))
    assert len(hashes) == 1
    monkeypatch.undo()
    whole = open_safetensors(tmp_path / "3-True")
    for name in NAMES:
        near(read_tensor(by(untied), name), read_tensor(whole, name).double().numpy())


def refused(models, method, **parameters) -> str:
    with pytest.raises(InputError) as error:
        merge(models, method, parameters=parameters)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_statistics_that_are_refused(untied, tmp_path):
    models, fishers, grams = untied.models, untied.fishers, untied.grams
    assert refused(models, "fisher") == "fisher: a folder is needed for model 1"
    assert refused(models, "fisher", fisher=fishers[:2]) == "fisher: 2 values given for 3 models"
    assert refused(models, "fisher", fisher=[*fishers[:2], None]) == "fisher: a folder is needed for model 3"
    assert refused(models, "fisher", fisher=[*fishers[:2], 3]) == "fisher is 3: a folder is needed"
    assert refused(models, "regmean", gram=[*grams[:2], "nowhere"]) == "nowhere: no such folder of Gram matrices"
    assert refused(models, "fisher", fisher=fishers[0]).startswith(f"{fishers[0]}: its statistics are of another model")
    assert refused(models, "fisher", fisher=grams).startswith(f"{grams[0]}: not a checkpoint of a known format")
    assert refused(models, "regmean", gram=fishers) == f"{fishers[0]}: holds no Gram matrices (it has no gram.json)"
    line = f"{grams[1]}: its statistics are of another model than the model given"
    assert refused(models, "regmean", gram=[grams[1], grams[0], grams[2]]) == line
    line = "weights [0.0, 0.0, 0.0] add up to 0: one model at least has to count"
    for method, parameters in (("fisher", {"fisher": fishers}), ("regmean", {"gram": grams})):
        with pytest.raises(InputError) as error:
            merge(models, method, weights=[0, 0, 0], parameters=parameters)
        assert str(error.value) == line
        with pytest.raises(InputError, match=r"^weight is -1: allowed is 0 or more$"):
            merge(models, method, weights=[1, 1, -1], parameters=parameters)
    assert refused(models, "fisher", fisher=fishers, floor=0) == "floor is 0: allowed is 1e-12 or more"

    write_checkpoint(models[0], tmp_path / "model", SafetensorsLayout(), about={"verb": "train"})
    line = f"{tmp_path / 'model'}: is no diagonal Fisher: `growmerge stats fisher` writes one"
    assert refused(models[:1], "fisher", fisher=str(tmp_path / "model")) == line
    taller = {**models[0].tensors, EMBEDDING: torch.ones(132, 32), HEAD: torch.ones(132, 32)}
    folder = write_fisher(tmp_path / "taller", taller, models[0], vocab_size=132)
    line = f"{folder}: {EMBEDDING} has shape (132, 32), the model's is (131, 32)"
    assert refused(models[:1], "fisher", fisher=folder) == line
    folder = write_fisher(tmp_path / "short", models[0].tensors, models[0], num_hidden_layers=1)
    assert refused(models[:1], "fisher", fisher=folder).startswith(f"{folder}: lacks the tensor model.layers.1.")
    broken = {**models[0].tensors, KEY: torch.full((16, 32), torch.inf)}
    folder = write_fisher(tmp_path / "inf", broken, models[0])
    with pytest.raises(InputError, match=f"^{folder}: {KEY} holds a value that is not finite"):
        read_tensor(merge(models[:1], "fisher", parameters={"fisher": folder}), KEY)
    found = open_gram(grams[0])
    some = {weight: name for weight, name in found.weights.items() if weight != KEY}
    all_of = {name: found.matrix(weight) for weight, name in found.weights.items()}
    folder = write_grams(tmp_path / "some", all_of, some, models[0], 9)
    assert refused(models[:1], "regmean", gram=folder) == f"{folder}: holds no Gram matrix for {KEY}"
    small = {**all_of, found.weights[KEY]: torch.eye(31)}
    folder = write_grams(tmp_path / "small", small, dict(found.weights), models[0], 9)
    line = f"{folder}: the Gram matrix of {KEY.replace('.k_', '.q_')} has shape (31, 31), the weight has 32 inputs"
    assert refused(models[:1], "regmean", gram=folder) == line


@pytest.mark.parametrize("value", [-1.0, torch.nan])
def test_matrices_that_are_no_gram_matrices(value, untied, tmp_path):
    given = with_grams(untied, tmp_path, lambda _, one: one.fill_diagonal_(value))
    with pytest.raises(InputError) as error:
        read_tensor(by_regmean(given), DOWN)
    folders = ", ".join(given.grams)
    assert str(error.value) == f"{DOWN}: its Gram matrices are no X^T X, or hold values that are not finite: {folders}"


def applied(tmp_path, given: Given, text: str, **options) -> Applied:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    models = {f"m{number}": model for number, model in enumerate(given.models)}
    return apply_recipe(read_recipe(path), models.__getitem__, **options)


class Realigned(Wrapped):
    """A model whose tokens have other rows; see merge.vocabulary.AlignedSource."""

    changed = (EMBEDDING, HEAD)


def recipe(method: str, key: str, folders, more: str = "") -> str:
    lines = [f"models:\n{more}"]
    for number, folder in enumerate(folders):
        lines.append(f"  - model: m{number}\n    parameters: {{{key}: {folder}, weight: {number + 1}}}\n")
    return "".join(lines) + f"merge_method: {method}\n"


def test_recipes(untied, tmp_path):
    folder = Path(untied.fishers[0]).parent
    names = [f"fisher{number}" for number in range(3)]
    found = applied(tmp_path, untied, recipe("fisher", "fisher", names), place=lambda name: folder / name)
    for name in NAMES:
        assert torch.equal(read_tensor(found.merged, name), read_tensor(by_fisher(untied, [1, 2, 3]), name))
    text = recipe("regmean", "gram", untied.grams) + "parameters: {alpha: [{filter: mlp, value: 0.5}, {value: 0.8}]}\n"
    found = applied(tmp_path, untied, text)
    for name, alpha in ((DOWN, 0.5), (KEY, 0.8)):
        wanted = read_tensor(by_regmean(untied, [1, 2, 3], alpha=alpha), name)
        assert torch.equal(read_tensor(found.merged, name), wanted)
    alone = applied(tmp_path, untied, recipe("fisher", "fisher", untied.fishers[:1])).merged
    assert alone.notes == (f"{tmp_path / 'recipe.yaml'}:4: fisher of one model is that model",)
    near(read_tensor(alone, DOWN), values_of(untied.models, DOWN)[0])
    assert found.merged.run.provenance["parents"] == [{"name": None, "hash": None}] * 3


def test_models_over_another_vocabulary(untied, tmp_path):
    """Gram matrices are of inputs, which rows of the head do not change; a Fisher has an element for each of them."""

    def align(models):
        return {name: Realigned(model) for name, model in models.items()}

    found = applied(tmp_path, untied, recipe("regmean", "gram", untied.grams), align=align)
    assert torch.equal(read_tensor(found.merged, HEAD), read_tensor(by_regmean(untied, [1, 2, 3]), HEAD))
    with pytest.raises(InputError) as error:
        applied(tmp_path, untied, recipe("fisher", "fisher", untied.fishers), align=align)
    assert str(error.value) == (
        f"{tmp_path / 'recipe.yaml'}:3: {untied.fishers[0]}: rows of {EMBEDDING} are other tokens' than in the merged "
        "model: a merge by Fisher needs models of one vocabulary, without tokenizer_source"
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("fisher: FISHER2, ", ""), ":6: fisher needs a fisher for m2; model.embed_tokens.weight has none"),
        (("FISHER2", "FISHER1"), ":7: FISHER1: its statistics are of another model than the model given"),
        (("FISHER2", "nowhere"), ":7: nowhere: no such checkpoint folder"),
        (("FISHER2", "[FISHER2]"), ":7: fisher is a list: a folder is needed"),
        (("FISHER2", ""), ":7: fisher: a folder is needed"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(change, line, untied, tmp_path):
    text = recipe("fisher", "fisher", untied.fishers)
    old, new = (one.replace("FISHER2", untied.fishers[2]).replace("FISHER1", untied.fishers[1]) for one in change)
    assert old in text
    with pytest.raises(InputError) as error:
        applied(tmp_path, untied, text.replace(old, new))
    wanted = line.replace("FISHER1", untied.fishers[1])
    assert str(error.value) == f"{tmp_path / 'recipe.yaml'}{wanted}"


def test_a_truncated_folder_is_refused(untied, tmp_path):
    shutil.copytree(untied.fishers[0], tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "truncated" in refused(untied.models[:1], "fisher", fisher=str(tmp_path / "copy"))
    assert json.loads((Path(untied.fishers[0]) / manifest.NAME).read_text())["files"]
