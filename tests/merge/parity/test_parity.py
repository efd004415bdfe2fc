"""Recipes as they are, merged by mergekit 0.1.5 and by this project: every tensor compared, every difference explained.

mergekit is the oracle itself: its float32 arithmetic, and its float64 arithmetic on bfloat16 models. Its bfloat16
arithmetic rounds after each step: there ours has to be the rounded float64 value, and never further off than it.
"""

import math

import pytest
import torch

from checkpoint.source import read_tensor
from merge.table import METHODS
from parallel.errors import InputError
from parity.cases import CASES, CHANCES, REFUSED, STRICTER, Case, Chance, Known
from parity.compare import Difference, difference, error, read_all, rounded_right, undecided
from parity.environment import CACHE, NoMergekit
from parity.merges import Merges, Run
from parity.vocabularies import CASES as VOCABULARIES
from parity.vocabularies import difference_by_token, same_vocabulary

pytestmark = pytest.mark.network
CLOSE = 1e-6
"""Largest difference of two float32 computations, relative to the largest magnitude of the tensor.

Twice that of karcher: inner products are summed in float32, and the norm of the result follows from all of them.
"""
STEP = {torch.float32: CLOSE, torch.float64: CLOSE, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""The same after rounding: one step, where a value is in the middle between two numbers."""
STEPS = 1.5
"""By how many steps mergekit's bfloat16 arithmetic is off, the root of the mean square; rounding once is 0.3 to 0.5."""


def runs_of(cases: list[Case], *variants: str) -> list[object]:
    """Return a parameter a run; those that are not fast are marked so."""
    runs = [Run(case, variant) for case in cases for variant in case.variants if not variants or variant in variants]
    return [pytest.param(run, id=run.name, marks=() if run.case.fast else pytest.mark.slow) for run in runs]


@pytest.fixture(scope="module")
def merges(request, tmp_path_factory) -> Merges:
    """Run with mergekit, in one process, what the selected tests need."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    runs = {item.callspec.params["run"]: None for item in items}
    for run in [*runs]:
        if "float64" in run.case.variants and run.variant == "bfloat16":
            runs[Run(run.case, "float64")] = None
    try:
        return Merges(tmp_path_factory.mktemp("parity"), runs)
    except NoMergekit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def report():
    """Collect a line a run; they are written when all are done."""
    lines: list[tuple[str, ...]] = []
    yield lambda *cells: lines.append(cells)
    if lines:
        CACHE.mkdir(exist_ok=True)
        (CACHE / "report.md").write_text(written(lines))


def written(lines: list[tuple[str, ...]]) -> str:
    head = ("recipe", "arithmetic", "largest difference", "elements that differ", "left out", "remarks")
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines)]
    return "\n".join(["# Merges against mergekit 0.1.5", "", *WORDS, "", *rows]) + "\n"


WORDS = (
    "Differences are relative to the tensor's largest magnitude. float32: models, arithmetic and result; float64:",
    "mergekit's arithmetic on bfloat16 models (ours stays float32); bfloat16: models and result, and mergekit's",
    "arithmetic (ours stays float32, rounded once). Left out: elements that hang on a tie (equal magnitudes at a",
    "threshold, a sum that is zero but for rounding).",
)


def line(run: Run, found: Difference, remarks: str = "") -> tuple[str, ...]:
    known = run.case.known.get(run.variant)
    said = "; ".join(part for part in (remarks, known.reason if known and found.differing else "") if part)
    where = f" ({found.tensor})" if found.largest > CLOSE else ""
    return (
        run.case.name,
        run.variant,
        f"{found.largest:.1e}{where}",
        f"{found.differing:.2%}",
        f"{found.left_out:.2%}",
        said,
    )


def check(found: Difference, limit: float, known: Known | None) -> None:
    """Check that a difference is as small as it should be, or is the one that is known."""
    if known is None:
        assert found.largest <= limit, found
    else:
        assert found.largest <= known.largest and found.differing <= known.share, found


def test_every_method_has_a_case() -> None:
    used = {one for one in METHODS if any(f"merge_method: {one}\n" in case.recipe for case in CASES)}
    assert used >= {*METHODS} - {"fisher", "regmean", "tsv"}  # which mergekit does not have


@pytest.mark.parametrize("run", runs_of(CASES, "float32", "float64", "float32 as it is", "bfloat16 as it is"))
def test_equal(merges, report, run) -> None:
    theirs, (merged, _) = merges.theirs(run), merges.ours(run)
    ours, open_ = read_all(merged), undecided(merged)
    known = run.case.known.get(run.variant)
    if known and known.tensors:
        names = [name for name in ours if name in known.tensors]
        assert len(names) == len(known.tensors)
        found = difference(*({name: one[name] for name in names} for one in (ours, theirs, open_)))
        assert found.largest > 0.01, "mergekit has changed"
        report(*line(run, found))
        ours, theirs, open_ = ({k: v for k, v in one.items() if k not in names} for one in (ours, theirs, open_))
        known = None
    found = difference(ours, theirs, open_)
    if run.case.known.get(run.variant) is known:
        report(*line(run, found))
    assert merged.config["num_hidden_layers"] == merges.config(run)["num_hidden_layers"]
    if not known:
        assert {name: one.dtype for name, one in ours.items()} == {name: one.dtype for name, one in theirs.items()}
    check(found, STEP[next(iter(ours.values())).dtype] * (2 if merged.method == "karcher" else 1), known)


@pytest.mark.parametrize("run", runs_of(CASES, "bfloat16"))
def test_bfloat16(merges, report, run) -> None:
    theirs, (merged, _) = merges.theirs(run), merges.ours(run)
    ours, open_ = read_all(merged), undecided(merged)
    known = run.case.known.get(run.variant)
    wide = {name for name, one in theirs.items() if one.dtype != torch.bfloat16}
    assert not wide or (known and "float32" in known.reason), wide
    theirs = {name: one.bfloat16() for name, one in theirs.items()}
    found = difference(ours, theirs, open_)
    if "float64" not in run.case.variants:
        report(*line(run, found))
        assert found.largest == 0
        return
    exact = merges.theirs(Run(run.case, "float64"))
    step = error({name: one * (1 + 2**-8) for name, one in exact.items()}, exact, open_)
    mine, other = (error(one, exact, open_) / step for one in (ours, theirs))
    # A sign that is elected or an element that is kept by bfloat16's rounding may be far off; the others are not.
    decided = error(theirs, exact, undecided(merged, rounding=2**-6)) / step
    but = "" if f"{decided:.2f}" == f"{other:.2f}" else f" ({decided:.2f} where no sign or threshold hangs on rounding)"
    report(*line(run, found, f"off by {mine:.2f} steps, mergekit by {other:.2f}{but}"))
    # Ties make mergekit's float64 result arbitrary in whole tensors of SCE: it is not quite the truth there.
    right = rounded_right(ours, exact, open_)
    assert right == 1.0 or (known and right > 0.99)
    assert mine <= other * (1 + 1e-6)
    assert decided <= STEPS or (known and found.differing <= known.share)


@pytest.mark.parametrize(
    ("run", "chance"),
    [
        pytest.param(Run(case, "float32"), chance, id=case.name, marks=() if case.fast else pytest.mark.slow)
        for case, chance in CHANCES
    ],
)
def test_random(merges, report, run, chance) -> None:
    theirs, (merged, _) = merges.theirs(run), merges.ours(run)
    statistics = [statistics_of(one, merged, chance) for one in (read_all(merged), theirs)]
    said = ", ".join(f"{who} keeps {kept:.3f}" for who, (kept, _) in zip(("ours", "mergekit"), statistics, strict=True))
    report(run.case.name, run.variant, "random", "-", "-", said)
    assert abs(statistics[0][0] - statistics[1][0]) <= statistics[0][1] + statistics[1][1]


def statistics_of(found: dict[str, torch.Tensor], merged, chance: Chance) -> tuple[float, float]:
    """Check a merge of one task vector; return the share of elements that stayed and four standard deviations of it."""
    stayed, changed = 0, 0
    by_rank = torch.zeros(4, 2)
    for name, one in found.items():
        base, model = (read_tensor(source, name) for source in reversed(merged.reads.sources[:2]))
        if merged.orders[name].base.model == 0:
            base, model = model, base
        delta, kept = model - base, one - base
        mask = kept.abs() > 0.25 * delta.abs()
        stayed, changed = stayed + int((mask & (delta != 0)).sum()), changed + int((delta != 0).sum())
        factor = delta.abs().sum() / delta[mask].abs().sum() if chance.rescale and mask.any() else 1.0
        torch.testing.assert_close(kept, delta * mask * factor, rtol=1e-4, atol=3e-7)
        quarter = 4 * delta.abs().argsort(dim=-1).argsort(dim=-1) // delta.shape[-1]
        for part in range(4):
            here = (quarter == part) & (delta != 0)
            by_rank[part] += torch.tensor([(mask & here).sum(), here.sum()])
    for part, (some, all_) in enumerate(by_rank.tolist()):
        wanted = chance.density + chance.epsilon * (part - 1.5) / 2
        # Zeros have the lowest ranks and are not seen: the lowest quarter's chances are those of its upper part.
        slack = chance.epsilon / 8 if part == 0 else chance.epsilon / 32
        assert abs(some / all_ - wanted) <= 5 * math.sqrt(wanted * (1 - wanted) / all_) + slack, (part, some / all_)
    share = stayed / changed
    return share, 4 * math.sqrt(share * (1 - share) / changed)


@pytest.mark.parametrize("run", runs_of(REFUSED))
def test_both_refuse(merges, report, run) -> None:
    assert merges.error(run) is not None
    with pytest.raises(InputError) as refused:
        merges.ours(run)
    said = str(refused.value).partition(".yaml")[2].replace("|", "/")
    report(run.case.name, "-", "both refuse", "-", "-", f"ours: line {said.removeprefix(':')}")


@pytest.mark.parametrize(
    ("run", "says"),
    [pytest.param(Run(case, "float32"), says, id=case.name, marks=pytest.mark.slow) for case, says in STRICTER],
)
def test_ours_is_stricter(merges, report, run, says) -> None:
    assert merges.error(run) is None
    with pytest.raises(InputError, match=says):
        merges.ours(run)
    report(run.case.name, "-", "ours refuses", "-", "-", says)


@pytest.mark.parametrize("run", runs_of(VOCABULARIES))
def test_vocabulary(merges, report, run) -> None:
    theirs, (merged, models) = merges.theirs(run), merges.ours(run)
    assert same_vocabulary(merges.out(run), models)
    found = difference_by_token(merges.out(run), theirs, merged, models)
    report(*line(run, found))
    check(found, STEP[next(iter(theirs.values())).dtype], run.case.known.get(run.variant))
