"""The dry run's numbers, against transformers, real tokenizers and arithmetic done by hand."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from pipeline_files import SMALL, change, load, write
from test_config import matches
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from growmerge.plan import duration, plan, print_plan, scientific, short, total_seconds
from growmerge.shapes import model_configs, vocabulary
from parallel.errors import InputError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
WRITTEN = yaml.safe_load(QUICKSTART.read_text())["stages"]
OLD = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 600,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def counted(config: object) -> int:
    """Return transformers' number of parameters of a config."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**config)).num_parameters()  # type: ignore[arg-type]


def checkpoint(folder: Path, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**OLD, **changes}))


def test_parameters_are_those_of_transformers() -> None:
    pipeline, nodes = load(QUICKSTART)
    configs = model_configs(pipeline, nodes, base=QUICKSTART.parent)
    stages = {stage.name: stage for stage in plan(pipeline, nodes, base=QUICKSTART.parent)}
    for name in ("seed", "seed-2x"):
        assert stages[name].parameters == counted(configs[name])
    assert configs["seed-2x"]["hidden_size"] == 192 and configs["seed-2x"]["head_dim"] == 16
    assert configs["seed-2x"]["num_attention_heads"] == 12 and configs["seed-2x"]["num_key_value_heads"] == 4
    large = {name for name, stage in stages.items() if stage.parameters == stages["seed-2x"].parameters}
    assert large == {name for name in stages if "2x" in name or "cloned" in name}


def test_cost_is_six_flops_a_parameter_and_token() -> None:
    pipeline, nodes = load(QUICKSTART)
    stages = {stage.name: stage for stage in plan(pipeline, nodes, base=QUICKSTART.parent)}
    seed = stages["seed"]
    steps = WRITTEN["seed"]["train"]["training"]["steps"]
    assert (seed.steps, seed.tokens) == (steps, steps * 8 * 128)
    assert seed.flops == 6 * seed.parameters * seed.tokens  # tied: the embedding is the head
    assert seed.seconds / seed.steps == pytest.approx(0.10, rel=0.01)  # as measured on 2 ranks
    assert stages["2x-swe"].seconds / stages["2x-swe"].steps == pytest.approx(0.146, rel=0.01)
    for name in ("seed-2x", "2x-ties"):
        assert (stages[name].steps, stages[name].tokens, stages[name].flops, stages[name].seconds) == (0, 0, 0, 0.0)
    total = sum(stage.seconds for stage in stages.values())
    assert total_seconds(list(stages.values()), pipeline.resources) == total + 14


def test_a_checkpoint_brings_its_own_shape_and_a_lookup_costs_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path / "old")
    text = change("from: scratch, data: english", "from: ./old, data: english")
    path = write(tmp_path, change(", width: 2", ", width: 3", text))
    pipeline, nodes = load(path)
    stages = {stage.name: stage for stage in plan(pipeline, nodes, base=tmp_path)}
    assert stages["seed"].parameters == counted(OLD)
    assert stages["seed"].flops == 6 * (counted(OLD) - 600 * 24) * 10 * 4 * 64
    grown = {**OLD, "hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 120}
    assert stages["grown"].parameters == counted({**grown, "head_dim": 12})
    assert stages["seed"].inputs == ("./old",) and stages["2x-ties"].inputs == ("seed", "base-2x")


def test_each_part_has_its_own_factor(tmp_path: Path) -> None:
    factors = "hidden: 2, heads: 4, kv_heads: 2, ffn: 3, method: diagonal, noise_db: 10"
    pipeline, nodes = load(write(tmp_path, change("width: 2", f"width: 1, {factors}")))
    grown = model_configs(pipeline, nodes, base=tmp_path)["grown"]
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
    assert [grown[key] for key in sizes] == [64, 16, 4, 144, 8]


def test_jobs_that_are_not_packed_each_take_time_to_start(tmp_path: Path) -> None:
    path = write(tmp_path, change("ranks: 2,", "ranks: 2, pack: false,"))
    pipeline, nodes = load(path)
    stages = plan(pipeline, nodes, base=tmp_path)
    assert total_seconds(stages, pipeline.resources) == sum(stage.seconds for stage in stages) + 8 * 14


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model_type": "gpt2"},
            "stage grown: */old/config.json: unknown model_type 'gpt2': allowed are llama, mistral, qwen2, *",
        ),
        (
            {"hidden_size": None},
            "stage grown: */old/config.json: hidden_size is None; a positive whole number is needed",
        ),
        ({"num_hidden_layers": "2"}, "stage grown: */old/config.json: num_hidden_layers is '2'; a positive*"),
        ({"head_dim": 0}, "stage grown: */old/config.json: head_dim is 0; a positive whole number is needed"),
        ({"hidden_size": 2**60}, "stage grown: the model comes to * parameters; allowed are 1000000000000000000"),
    ],
)
def test_a_checkpoint_that_has_no_usable_config(changes: dict[str, object], expected: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "old", **changes)
    path = write(tmp_path, change("from: seed, width", "from: ./old, width"))
    pipeline, nodes = load(path)
    with pytest.raises(InputError) as caught:
        plan(pipeline, nodes, base=tmp_path)
    assert matches(str(caught.value), f"{path}:38: {expected}"), str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(None, "cannot be read (No such file or directory)"), ("{", "not valid JSON (*)"), ("[]", "not a JSON object")],
)
def test_a_config_that_cannot_be_read(data: str | None, expected: str, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    if data is not None:
        (tmp_path / "old" / "config.json").write_text(data)
    path = write(tmp_path, change("from: seed, width", "from: ./old, width"))
    pipeline, nodes = load(path)
    with pytest.raises(InputError) as caught:
        plan(pipeline, nodes, base=tmp_path)
    assert matches(str(caught.value), f"{path}:38: stage grown: {tmp_path}/old/config.json: {expected}")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            '[seed, "base-{setup}"]',
            "[seed, grown]",
            "40: stage 1x-linear: 'grown' has hidden 64, 'seed' has 32: they cannot be merged",
        ),
        ("sequence_length: 64", "sequence_length: 256", "30: stage seed: sequence_length 256 is more than the*, 128"),
        ("width: 2", "heads: 3, kv_heads: 2", "38: stage grown: growth factor of heads is 3: allowed are *"),
        ("width: 2", "depth: stack, layers: 3", "38: stage grown: 3 layers by stack from 2: allowed are *"),
        ("width: 2", "to_ffn: 8", "38: stage grown: size of ffn is 8: allowed are whole numbers from *"),
        ("width: 2", "noise_db: 10", "38: stage grown: noise of 10.0 dB with method exact-split: allowed is *"),
        ("width: 2", "width: 1, heads: 3, kv_heads: 3", "38: stage grown: hidden size 32 and 12 heads after growth: *"),
        (
            "      from: seed\n",
            "      from: ./old\n",
            "32: stage base-1x: the tokenizer has 512 entries, *'./old' only 300",
        ),
    ],
)
def test_models_that_do_not_fit(old: str, new: str, expected: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "old", vocab_size=300)
    path = write(tmp_path, change(old, new))
    pipeline, nodes = load(path)
    with pytest.raises(InputError) as caught:
        plan(pipeline, nodes, base=tmp_path)
    line = str(caught.value)
    assert matches(line, f"{path}:{expected.replace('has hidden_size', 'has *')}") or matches(
        line, f"{path}:{expected}"
    ), line


def test_the_vocabulary_of_an_existing_tokenizer(tmp_path: Path) -> None:
    for model in (
        models.BPE(vocab={"a": 0, "b": 1, "<s>": 2}, merges=[]),
        models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.add_special_tokens(["<s>", "</s>"])
        (tmp_path / "tok").mkdir(exist_ok=True)
        tokenizer.save(str(tmp_path / "tok" / "tokenizer.json"))
        pipeline, _ = load(write(tmp_path, change("vocab_size: 512", "path: tok")))
        assert vocabulary(pipeline, tmp_path) == tokenizer.get_vocab_size()
    (tmp_path / "tok" / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer: it has no model\.vocab"):
        vocabulary(pipeline, tmp_path)


def test_the_table_names_every_stage_in_order_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline, nodes = load(QUICKSTART)
    print_plan(plan(pipeline, nodes, base=QUICKSTART.parent), pipeline)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 100
    first = [line.split()[0] for line in lines if line[:2].strip()]
    first = [word for word in first if word in {*nodes, "text", "tokens", "pairs", "evaluate", "baselines", "report"}]
    assert first == ["text", "tokens", "pairs", *nodes, "evaluate", "baselines", "report"]
    text = "\n".join(lines)
    row = next(line for line in lines if line.strip().startswith("seed "))
    steps = WRITTEN["seed"]["train"]["training"]["steps"]
    costs = [str(steps), f"{steps * 1.024:.0f}k", f"{6 * 491_904 * steps * 1024:.1e}".replace("e+", "e")]
    assert row.split()[:9] == ["seed", "train", "scratch", "on", "english-first", "492k", *costs]
    total = sum(nodes[name].stage.training["steps"] for name in nodes if nodes[name].verb == "train")
    assert "…" not in text and "20 stages" in text and f"{total * 1.024e-3:.2f}M" in text


def test_long_mixtures_are_said_in_words_and_their_epochs_are_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = """\
  english: {eng.first: 1}
  both:
    sampling: unimax
    corpora: [swe, eng.first]
    budget_characters: 1e6
    max_epochs: 4
    replay: [{corpus: eng.rest, share: 0.5}]
  part: {part_of: both, corpora: [swe]}
  unused: {sampling: temperature, temperature: 2, corpora: [swe]}
  swe: {stages: [{from_step: 0, mixture: english}, {from_step: 4, mixture: part}]}
"""
    text = change("  english: {eng.first: 1}\n  swe: {swe: 0.9, eng.rest: 0.1}\n", long)
    short = plan(*load(write(tmp_path, SMALL)), base=tmp_path)
    pipeline, nodes = load(write(tmp_path, change("      data: english", "      data: swe", text)))
    found = plan(pipeline, nodes, base=tmp_path)
    assert [(stage.steps, stage.tokens) for stage in found] == [(stage.steps, stage.tokens) for stage in short]
    print_plan(found, pipeline)
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("Mixtures, whose epochs are unknown before the text is there and tokenised:")
    assert lines[at + 1 : at + 4] == [
        "  swe: english from step 0, part from step 4",
        "  part: swe of both",
        "  both: unimax of swe, eng.first, with replay of eng.rest",
    ]
    assert lines[at + 4].startswith("Modelled on")


def test_a_long_name_widens_the_table_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "g" * 100
    pipeline, nodes = load(write(tmp_path, change("  grown:", f"  {name}:")))
    print_plan(plan(pipeline, nodes, base=tmp_path), pipeline)
    assert f"{name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (491_904, "492k"),
        (999_600, "1.00M"),
        (1_571_000_000, "1.57B"),
        (12_345, "12.3k"),
    ],
)
def test_counts_are_short(number: int, text: str) -> None:
    assert short(number) == text


def test_flops_and_times() -> None:
    assert [scientific(n) for n in (0, 2_116_000_000_000)] == ["0", "2.1e12"]
    assert [duration(s) for s in (0.0, 70.2, 150.0, 16_200.0)] == ["0 s", "70 s", "2.5 min", "4.5 h"]
