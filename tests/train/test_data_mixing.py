"""Mixtures against other ways to count: water filling, plain loops, and what the order of samples really gives."""

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import InputError
from train.data import component, mixing
from train.data.component import Component
from train.data.mixing import Size
from train.data.order import ENOUGH, LONGEST, MOVED, PERIOD, Mixture, Part, period_for, permute
from train.data.staged import Staged


@dataclass(frozen=True)
class Replay:
    corpus: str
    share: float | None = None
    tokens: float | None = None
    scale_by: str | None = None
    shares: dict[str, float] = field(default_factory=dict)
    epochs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    sampling: str | None = "weights"
    corpora: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    temperature: float | None = None
    budget_characters: float | None = None
    budget_tokens: float | None = None
    max_epochs: float | None = None
    replay: tuple[Replay, ...] = ()


SIZES = {
    "swe": Size(tokens=1000, characters=3000, documents=40),
    "fao": Size(tokens=100, characters=250, documents=10),
    "eng.first": Size(tokens=5000, characters=20000, documents=80),
    "code": Size(tokens=400),
}


def test_unimax_by_hand() -> None:
    """The budget of 100 leaves 97 to two after the smallest, capped at 3 times 1, and 77 to the last after 20."""
    assert mixing.unimax({"large": 50, "tiny": 1, "mid": 5}, 100, 3) == {"large": 82 / 50, "tiny": 3, "mid": 3}
    assert mixing.unimax({"a": 10, "b": 10}, 10, 6) == {"a": 0.5, "b": 0.5}
    assert mixing.unimax({"a": 10, "b": 20}, 1e9, 4) == {"a": 4, "b": 4}, "no more than the cap, whatever the budget"


@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=8),
    budget=st.floats(1, 1e11),
    cap=st.floats(1, 20),
)
def test_unimax_fills_up_to_one_level(sizes: list[int], budget: float, cap: float) -> None:
    """What UniMax gives is min(level, cap x size) with one level for all, found here by bisection."""
    found = mixing.unimax({str(at): size for at, size in enumerate(sizes)}, budget, cap)
    low, high = 0.0, max(sizes) * cap
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if sum(min(level, cap * size) for size in sizes) < budget else (low, level)
    expected = [min(high, cap * size) / size for size in sizes]
    assert list(found) == [str(at) for at in range(len(sizes))]
    assert list(found.values()) == pytest.approx(expected, rel=1e-9)


def test_temperature() -> None:
    sizes = {"a": 8.0, "b": 1.0, "c": 64.0}
    assert mixing.temperature(sizes, 3) == pytest.approx({"a": 2 / 7, "b": 1 / 7, "c": 4 / 7})
    assert mixing.temperature(sizes, 1) == pytest.approx({"a": 8 / 73, "b": 1 / 73, "c": 64 / 73})
    assert mixing.temperature(sizes, 1e9) == pytest.approx(dict.fromkeys(sizes, 1 / 3))
    assert mixing.temperature({"a": 1e300, "b": 1e290}, 0.5) == pytest.approx({"a": 1, "b": 1e-20}, abs=1e-25)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: mixing.unimax({"a": 1}, 0, 2), "a budget of 0 characters: it has to be above 0"),
        (lambda: mixing.unimax({"a": 1}, 5, 0.5), "max_epochs is 0.5: it has to be at least 1"),
        (lambda: mixing.unimax({"a": 0}, 5, 1), "characters 0 of a: it has to be above 0"),
        (lambda: mixing.temperature({"a": 1}, 0), "temperature is 0: it has to be above 0"),
        (lambda: mixing.temperature({"a": 1}, -2), "temperature is -2: it has to be above 0"),
        (lambda: mixing.weighted({"a": 1, "b": 0}), "weight 0 of b: it has to be above 0"),
        (lambda: mixing.weighted({"a": math.nan}), "weight nan of a: it has to be above 0"),
        (lambda: mixing.weighted({}), "the mixture is empty"),
        (
            lambda: mixing.components(Options(weights={"sew": 1}), SIZES),
            "unknown corpus 'sew': allowed are swe, fao, eng.first, code; did you mean 'swe'?",
        ),
        (
            lambda: mixing.components(Options(weights={"swe": 1}, replay=(Replay("eng"),)), SIZES),
            "unknown corpus 'eng': allowed are swe, fao, eng.first, code",
        ),
        (
            lambda: mixing.components(
                Options(sampling="unimax", corpora=("code",), budget_characters=9, max_epochs=1), SIZES
            ),
            "the characters of code are not known, and unimax needs them: give them in `sizes`",
        ),
        (
            lambda: mixing.components(Options(weights={"swe": 1}, replay=(Replay("code", tokens=401),)), SIZES),
            "replay of 401 tokens: code has only 400",
        ),
        (
            lambda: mixing.components(
                Options(weights={"swe": 1, "code": 1}, replay=(Replay("eng.first", share=1, scale_by="documents"),)),
                SIZES,
            ),
            "the documents of code are not known, and scale_by: documents needs them: give them in `sizes`",
        ),
        (
            lambda: component.beside(mixing.components(Options(weights={"swe": 1}), SIZES), ["fao"]),
            "unknown corpus 'fao': allowed are swe",
        ),
    ],
)
def test_what_is_wrong_is_one_line(call, line: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == line


def test_components_by_hand() -> None:
    """UniMax gives fao 4 x 250 characters and swe the other 5,000; replay is 10 % of English, by documents."""
    options = Options(
        sampling="unimax",
        corpora=("swe", "fao"),
        budget_characters=6000,
        max_epochs=4,
        replay=(
            Replay("eng.first", share=0.1, scale_by="documents"),
            Replay("code", tokens=100, shares={"fao": 0}, epochs={"swe": 1}),
        ),
    )
    found = mixing.components(options, SIZES)
    assert [(part.name, part.corpus, part.beside, part.tokens, part.part) for part in found] == [
        ("swe", "swe", "swe", 1000, 1),
        ("fao", "fao", "fao", 100, 1),
        ("eng.first for swe", "eng.first", "swe", 500, 0.1),
        ("eng.first for fao", "eng.first", "fao", 125, 0.025),
        ("code for swe", "code", "swe", 100, 0.25),
    ]
    assert [part.epochs for part in found] == pytest.approx([5 / 3, 4, 5 / 3, 4, 1])
    assert [part.replayed for part in found] == [False, False, True, True, True]
    assert [part.name for part in component.beside(found, ["fao"])] == ["fao", "eng.first for fao"]


def test_weights_and_temperature_share_out_a_total() -> None:
    found = mixing.components(Options(weights={"swe": 3, "fao": 1}), SIZES)
    assert [part.seen for part in found] == pytest.approx([825, 275]), "as many as both hold: 1,100"
    found = mixing.components(Options(weights={"swe": 3, "fao": 1}, budget_tokens=4000), SIZES)
    assert [part.epochs for part in found] == pytest.approx([3, 10])
    found = mixing.components(Options(sampling="temperature", corpora=("swe", "fao"), temperature=1), SIZES)
    assert [part.epochs for part in found] == pytest.approx([1, 1])
    options = Options(sampling="temperature", corpora=("swe", "fao"), temperature=2, budget_tokens=1000)
    found = mixing.components(options, SIZES)
    assert [part.seen for part in found] == pytest.approx([1000 / (1 + 10**-0.5), 1000 / (1 + 10**0.5)])


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    repeats=st.lists(st.floats(0.1, 7), min_size=3, max_size=3),
    batch=st.integers(1, 50),
)
def test_steps_by_epoch_against_counting(sizes: list[int], repeats: list[float], batch: int) -> None:
    """Sequences of an epoch counted corpus by corpus, a new batch with each epoch."""
    length, total = 16, 0
    for epoch in range(7):
        left = [round(size * min(max(many - epoch, 0.0), 1.0)) for size, many in zip(sizes, repeats, strict=False)]
        total += len(range(0, sum(left), batch))
    parts = [
        Component(name=str(at), corpus=str(at), beside="0", part=1, tokens=size * length, epochs=many)
        for at, (size, many) in enumerate(zip(sizes, repeats, strict=False))
    ]
    assert component.steps_by_epoch(parts, length, batch) == total
    assert component.sequences(parts, length) == sum(round(s * r) for s, r in zip(sizes, repeats, strict=False))
    assert component.steps(parts, length, batch) == math.ceil(component.sequences(parts, length) / batch)


def test_a_whole_number_of_epochs_has_no_epoch_more() -> None:
    part = Component(name="a", corpus="a", beside="a", part=1, tokens=10 * 16, epochs=1.0000000000001)
    assert component.steps_by_epoch([part], 16, 4) == 3


def test_stages_add_up() -> None:
    code = mixing.components(Options(weights={"code": 1}), SIZES)
    mixed = mixing.components(Options(weights={"code": 400, "eng.first": 5000}), SIZES)
    found = component.one_after_the_other([component.for_tokens(code, 800), mixed])
    assert [(part.name, part.epochs) for part in found] == [("code", pytest.approx(3)), ("eng.first", 1)]


# the order of samples


PARTS = Mixture(
    names=("swe", "eng.first for swe", "eng.first for fao"),
    weights=(0.6, 0.25, 0.15),
    sizes=(211, 60, 17),
    seed=5,
    parts=(None, Part(corpus="eng.first", whole=900), Part(corpus="eng.first", whole=900)),
)
GOLDEN_PARTS = [("swe", 97, 0), ("eng.first", 428, 0), ("eng.first", 384, 0), ("swe", 97, 1), ("eng.first", 665, 97)]


NUMBERS = (0, 2344, 2345, 12_000, 123_456_789)
GOLDEN_LONG = [("swe", 662, 0), ("swe", 280, 3), ("swe", 580, 3), ("swe", 658, 17), ("swe", 685, 175837)]
GOLDEN_STAGED = [("eng", 18, 0), ("eng", 32, 57), ("swe", 662, 0), ("swe", 366, 13), ("swe", 517, 175834)]


def visited(mixture: Mixture | Staged, samples: int) -> dict[tuple[int, int], list[int]]:
    """By (corpus number, epoch): the sequences in order."""
    found = defaultdict(list)
    for corpus, sequence, epoch in zip(*(part.tolist() for part in mixture.samples(0, samples)), strict=True):
        found[corpus, epoch].append(sequence)
    return found


def test_a_part_is_the_first_of_a_permutation_in_every_epoch() -> None:
    found = visited(PARTS, 1000)
    part = permute(np.arange(60), 900, "part/5/eng.first").tolist()
    assert [sorted(found[1, epoch]) for epoch in range(4)] == [sorted(part)] * 4
    assert found[1, 0] != found[1, 1], "each epoch has an order of its own"
    assert [sorted(found[2, epoch]) for epoch in range(8)] == [sorted(part[:17])] * 8, "the smaller in the larger"
    assert sorted(found[0, 0]) == list(range(211))


def test_a_part_is_read_from_its_corpus() -> None:
    assert PARTS.corpora == ("swe", "eng.first", "eng.first")
    assert {PARTS.sample(number)[0] for number in range(50)} == {"swe", "eng.first"}
    usage = PARTS.usage(1000, 8)
    assert {name: (use.samples, use.epochs) for name, use in usage.items()} == {
        "swe": (600, 600 / 211),
        "eng.first for swe": (250, 250 / 60),
        "eng.first for fao": (150, 150 / 17),
    }


def test_the_rest_of_a_mixture_is_no_matter_to_a_part() -> None:
    alone = Mixture(names=PARTS.names[1:2], weights=(1,), sizes=(60,), seed=5, parts=PARTS.parts[1:2])
    assert alone.samples(0, 120)[1].tolist() == visited(PARTS, 1000)[1, 0] + visited(PARTS, 1000)[1, 1]
    other = Mixture(names=PARTS.names[1:2], weights=(1,), sizes=(60,), seed=6, parts=PARTS.parts[1:2])
    assert set(other.samples(0, 60)[1].tolist()) != set(alone.samples(0, 60)[1].tolist()), "the seed draws the part"


def test_parts_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert [PARTS.sample(number) for number in (0, 1, 2, 500, 23_456)] == GOLDEN_PARTS


def test_long_periods_and_stages_are_the_same_everywhere() -> None:
    long = Mixture(names=("swe", "eng"), weights=(99.7, 0.3), sizes=(700, 41), seed=17, period=10_000)
    staged = Staged(starts=(0, 2345), mixtures=(Mixture(names=("eng",), weights=(1,), sizes=(41,), seed=17), long))
    assert [long.sample(number) for number in NUMBERS] == GOLDEN_LONG
    assert [staged.sample(number) for number in NUMBERS] == GOLDEN_STAGED


def test_long_periods_have_their_shares_from_the_start() -> None:
    """Any run has about its shares: a prefix is off by a few samples, not by chance's hundreds."""
    shares = np.array([0.66, 0.25, 0.08, 0.0098, 0.0002])
    for seed in range(3):
        mixture = Mixture(names=tuple("abcde"), weights=tuple(shares), sizes=(10**6,) * 5, seed=seed, period=100_000)
        corpus, _, _ = mixture.samples(0, 250_000)
        given = np.cumsum(corpus[:, None] == np.arange(5), axis=0)
        off = np.abs(given - np.arange(1, 250_001)[:, None] * shares).max(axis=0)
        assert (off < 1 + 6 * np.sqrt(MOVED / 6 * shares)).all(), off
        assert mixture.given(123_456).tolist() == given[123_455].tolist()
    steps = np.diff(np.flatnonzero(corpus == 1)[:2000])
    assert 0.2 < (steps == 1).mean() < 0.3 and steps.max() > 15, "neighbours are shuffled, as if drawn"


def test_a_long_period_is_exact_and_visits_all() -> None:
    mixture = Mixture(names=("a", "b"), weights=(9998, 2), sizes=(3000, 7), seed=1, period=10_000)
    corpus, _, _ = mixture.samples(0, 30_000)
    assert [np.bincount(part).tolist() for part in corpus.reshape(3, 10_000)] == [[9998, 2]] * 3
    found = visited(mixture, 30_000)
    assert all(sorted(found[0, epoch]) == list(range(3000)) for epoch in range(9))
    pieces = [mixture.samples(start, start + 7) for start in range(9_990, 10_011, 7)]
    assert np.concatenate([piece[1] for piece in pieces]).tolist() == mixture.samples(9_990, 10_011)[1].tolist()
    with pytest.raises(InputError, match="weight 2 of b is less than one sample in 1000: raise it or leave b out"):
        Mixture(names=("a", "b"), weights=(9998, 2), sizes=(3000, 7), seed=1)


@given(weights=st.lists(st.floats(1e-7, 1), min_size=1, max_size=6))
def test_periods_have_samples_enough(weights: list[float]) -> None:
    period = period_for(weights)
    assert period in (PERIOD, 10 * PERIOD, 100 * PERIOD, LONGEST)
    least = min(weights) / sum(weights)
    assert period == LONGEST or least * period >= ENOUGH
    assert period == PERIOD or least * period / 10 < ENOUGH, "no longer than needed"


def test_order_of_components() -> None:
    options = Options(
        weights={"swe": 1}, budget_tokens=3000, replay=(Replay("eng.first", share=0.02), Replay("code", share=1))
    )
    parts = mixing.components(options, SIZES)
    mixture = component.order(parts, {"swe": 100, "eng.first": 500, "code": 40}, seed=9)
    assert mixture.names == ("swe", "eng.first for swe", "code for swe")
    assert mixture.corpora == ("swe", "eng.first", "code")
    assert mixture.sizes == (100, 10, 40) and mixture.weights == pytest.approx((3000, 300, 1200))
    assert mixture.period == PERIOD
    usage = mixture.usage(450, 10)
    assert [use.epochs for use in usage.values()] == pytest.approx([3, 3, 3], rel=0.2)
    assert {mixture.corpora[corpus] for corpus in mixture.samples(0, 450)[0].tolist()} == {"swe", "eng.first", "code"}


def test_short_mixtures_keep_their_order() -> None:
    """Weights alone, in a period of 1000, come to what `Mixture` gave before there were components."""
    plain = Mixture(names=("swe", "code"), weights=(0.97, 0.03), sizes=(70, 41), seed=17)
    parts = mixing.components(Options(weights={"swe": 0.97, "code": 0.03}), SIZES)
    same = component.order(parts, {"swe": 70, "code": 41}, seed=17, period=PERIOD)
    for one, other in zip(plain.samples(0, 2500), same.samples(0, 2500), strict=True):
        assert one.tolist() == other.tolist()


@cache
def shuffled(name: str, epoch: int, size: int) -> list[int]:
    return permute(np.arange(size), size, f"sequence/3/{epoch}/{name}").tolist()


def mixture_of(names: str, weights: tuple[float, ...], sizes: dict[str, int], seed: int = 3) -> Mixture:
    return Mixture(names=tuple(names), weights=weights, sizes=tuple(sizes[name] for name in names), seed=seed)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 1700), min_size=1, max_size=4),
    stages=st.lists(st.sampled_from(["a", "b", "ab", "ac", "abc"]), min_size=5, max_size=5),
    sizes=st.fixed_dictionaries({name: st.integers(20, 500) for name in "abc"}),
)
def test_stages_against_a_plain_loop(lengths: list[int], stages: list[str], sizes: dict[str, int]) -> None:
    """Each corpus keeps one counter over all stages; the mixture of a stage counts from its start."""
    mixtures = tuple(mixture_of(names, (3, 2, 1)[: len(names)], sizes) for names in stages[: len(lengths) + 1])
    starts = (0, *itertools.accumulate(lengths))
    staged = Staged(starts=starts, mixtures=mixtures)
    counters: Counter[str] = Counter()
    expected = []
    for number in range(starts[-1] + 300):
        stage = max(at for at, start in enumerate(starts) if start <= number)
        first = starts[stage]
        if number == first:
            corpora = mixtures[stage].samples(0, starts[-1] + 300 - first)[0].tolist()
        name = stages[stage][corpora[number - first]]
        epoch, place = divmod(counters[name], sizes[name])
        expected.append((name, shuffled(name, epoch, sizes[name])[place], epoch))
        counters[name] += 1
        if number > 600 and number < starts[-1] - 50:
            continue
        assert staged.sample(number) == expected[-1]
    streams, sequences, epochs = staged.samples(0, len(expected))
    found = zip((staged.names[at] for at in streams), sequences.tolist(), epochs.tolist(), strict=True)
    assert list(found) == expected
    for name, usage in staged.usage(len(expected), 7).items():
        assert (usage.samples, usage.tokens) == (counters[name], 7 * counters[name])
        assert usage.epochs == pytest.approx(counters[name] / sizes[name])
    middle = len(expected) // 2
    pieces = [staged.samples(0, middle), staged.samples(middle, len(expected))]
    assert np.concatenate([piece[1] for piece in pieces]).tolist() == sequences.tolist()


def test_one_stage_is_its_mixture() -> None:
    mixture = mixture_of("ab", (2, 1), {"a": 90, "b": 40})
    staged = Staged(starts=(0,), mixtures=(mixture,))
    assert [part.tolist() for part in staged.samples(0, 2500)] == [part.tolist() for part in mixture.samples(0, 2500)]
    assert staged.usage(1234, 5) == mixture.usage(1234, 5)
    assert staged.usage(0, 5)["a"].samples == 0 and staged.samples(4, 4)[0].tolist() == []


def test_a_changed_part_begins_anew() -> None:
    """Stage 1 and 2 take 20 of 50, stage 3 takes 30: the second goes on after 15, the third begins."""

    def mixture(size: int) -> Mixture:
        part = Part(corpus="eng", whole=50)
        return Mixture(names=("eng for swe",), weights=(1,), sizes=(size,), seed=2, parts=(part,))

    staged = Staged(starts=(0, 15, 25), mixtures=(mixture(20), mixture(20), mixture(30)))
    assert staged.names == ("eng for swe", "eng for swe") and staged.corpora == ("eng", "eng")
    streams, sequences, epochs = staged.samples(0, 35)
    assert streams.tolist() == [0] * 25 + [1] * 10
    assert epochs.tolist() == [0] * 20 + [1] * 5 + [0] * 10
    assert len(set(sequences[:20].tolist())) == 20
    usage = staged.usage(35, 4)
    assert usage["eng for swe"].samples == 35 and usage["eng for swe"].epochs == pytest.approx(25 / 20 + 10 / 30)
    assert staged.sample(30)[0] == "eng"


@pytest.mark.parametrize("starts", [(), (1,), (0, 5, 5), (0, 7, 3)])
def test_stages_rise_from_0(starts: tuple[int, ...]) -> None:
    mixture = mixture_of("a", (1,), {"a": 9})
    with pytest.raises(AssertionError, match="stages start at"):
        Staged(starts=starts, mixtures=(mixture,) * len(starts))
