"""docs/extending.md, followed: what each example adds is put in place and used; what the page names is there."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from checkpoint.open import FORMATS
from eval.score import token_logprobs
from growmerge.cli import main
from growmerge.convert import LAYOUTS
from growmerge.schema_text import Corpus, HeldOut, TextSource
from merge.boxes import RUNNERS
from merge.table import METHODS
from parallel.errors import InputError
from train.data.corpus import build_corpora
from train.data.readers import READERS
from train.data.rows import READ
from train.data.tokenizer import train_tokenizer

HOME = Path(__file__).parents[2]
PAGE = HOME / "docs" / "extending.md"
TABLES: tuple[dict, ...] = (FORMATS, LAYOUTS, METHODS, READERS, RUNNERS)


@pytest.fixture(scope="module", autouse=True)
def added() -> Iterator[list[str]]:
    """Run each block where its first line says, in a module that is there or a new one, and take it back at the end."""
    tables = [dict(table) for table in TABLES]
    with pytest.MonkeyPatch.context() as patch:
        places = []
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            place = re.match(r"# ([\w/]+\.py)\n", code)[1]
            name = place.removesuffix(".py").replace("/", ".")
            if (HOME / place).is_file():
                module = import_module(name)
            else:
                module = ModuleType(name)
                patch.setitem(sys.modules, name, module)
            before = dict(vars(module))
            patched = {**before}
            exec(compile(code, place, "exec"), patched)
            for key, value in patched.items():
                if key not in before or before[key] is not value:
                    patch.setattr(module, key, value, raising=False)
            places.append(place)
        yield places
    for table, old in zip(TABLES, tables, strict=True):
        table.clear()
        table.update(old)


def run(*arguments: object) -> str:
    ran = CliRunner().invoke(main, [str(one) for one in arguments])
    assert ran.exit_code == 0, ran.output
    return ran.output


def test_a_reader_of_subtitles_makes_a_corpus(tmp_path: Path) -> None:
    for number in range(4):
        shown = [f"{at}\n00:00:0{at},000 --> 00:00:0{at},900\nScene {number},\nline {at}.\n" for at in range(3)]
        (tmp_path / f"{number}.srt").write_bytes("\n".join(shown).replace("\n", "\r\n").encode())
    corpora = {"eng": Corpus(name="English", sources=(TextSource(files="*.srt"),))}
    built = build_corpora(corpora, HeldOut(share=0.5), seed=0, cache=tmp_path, base_dir=tmp_path)["eng"]
    assert len(built.heldout) == 2
    found = {document.id: document.passages for document in (*built.training, *built.heldout)}
    assert found == {str(number): tuple(f"Scene {number}, line {at}." for at in range(3)) for number in range(4)}
    (tmp_path / "4.srt").write_bytes(b"1\n00:00:00,000 --> 00:00:00,900\n\xff\n")
    with pytest.raises(InputError, match=r"4\.srt:3: not UTF-8"):
        build_corpora(corpora, HeldOut(share=0.5), seed=0, cache=tmp_path, base_dir=tmp_path)


def test_a_method_merges_by_a_recipe(tmp_path: Path, tiny_folder) -> None:
    folders = [tiny_folder(f"model-{seed}", seed) for seed in range(4)]
    for count in (3, 4):
        names = "".join(f"  - {{model: {folder}}}\n" for folder in folders[:count])
        (tmp_path / "recipe.yaml").write_text(f"models:\n{names}merge_method: median\n")
        run("merge", tmp_path / "recipe.yaml", tmp_path / f"out-{count}", "--workers", 1, "--allow-unrelated")
        found = load_file(tmp_path / f"out-{count}" / "model.safetensors")
        models = [load_file(folder / "model.safetensors") for folder in folders[:count]]
        for name, tensor in found.items():
            wanted = np.median([model[name].double().numpy() for model in models], axis=0)
            np.testing.assert_allclose(tensor.double().numpy(), wanted, rtol=1e-6, atol=1e-9)
    card = (tmp_path / "out-4" / "README.md").read_text()
    assert "the method `median` (arXiv 1803.01498)" in card


def test_a_format_is_written_and_read(tmp_path: Path, tiny_folder) -> None:
    small = tiny_folder("small")
    run("grow", small, tmp_path / "arrays", "--width", 2, "--format", "npy", "--workers", 1)
    assert {path.suffix for path in (tmp_path / "arrays").iterdir()} == {".npy", ".json"}
    assert " npy " in run("inspect", tmp_path / "arrays", "--check")
    run("convert", tmp_path / "arrays", tmp_path / "back", "--workers", 1)
    run("grow", small, tmp_path / "direct", "--width", 2, "--workers", 1)
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("back", "direct")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_task_is_scored(tmp_path: Path) -> None:
    from eval.choices import Choice, ChoiceTask  # type: ignore[import-not-found]

    words = train_tokenizer(["en katt sover här nu"] * 9, vocab_size=280, folder=tmp_path / "words")
    model = tiny_model(vocab_size=280)
    choices = [
        Choice(question="en katt", endings=(" sover", " här nu")),
        Choice(question="en katt", endings=(" här nu", " sover")),
        Choice(question="nu", endings=(" katt katt", " en")),
    ]
    task = ChoiceTask(choices=choices)
    rows = []
    for item, choice in enumerate(choices):
        rows.append(task.row(item, token_logprobs(model, task.requests(item, words), batch_tokens=64)))
        means = []
        for ending in choice.endings:  # by transformers alone
            given, rest = words.encode(choice.question), words.encode(ending)
            ids = torch.tensor([[words.bos, *given, *rest]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            means.append(logprobs.gather(1, ids[0, 1:, None])[-len(rest) :].mean())
        assert rows[-1] == [int(means[0] > means[1])]
    assert sorted(rows[:2]) == [[0], [1]]  # the same endings, turned round
    found = task.summary(rows, resamples=100, confidence=0.95, seed=0)
    assert found["choices"] == 3
    assert found["accuracy"]["value"] == pytest.approx(sum(row[0] for row in rows) / 3)


def test_all_that_the_page_names_is_there(added: list[str]) -> None:
    page = PAGE.read_text()
    new = {place for place in added if not (HOME / place).is_file()}
    assert new == {"checkpoint/npy.py", "eval/choices.py"}
    for path in {*re.findall(r"`((?:\w+/)+\w+\.py)`", page)}:
        assert (HOME / path).is_file(), path
    for name, path in re.findall(r"`(\w+)`, `((?:\w+/)+\w+\.py)`", page):
        assert hasattr(import_module(path.removesuffix(".py").replace("/", ".")), name), (name, path)
    assert all(isinstance(table, dict) and len(table) > 2 for table in (*TABLES, READ))
