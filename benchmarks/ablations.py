"""What configs/paper/ablations.yaml found, as docs/ablations.md: every arm against exact split, by seed.

python benchmarks/ablations.py runs/growth-ablations [runs/growth-ablations-wider] [--out docs/ablations.md]
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.bootstrap import resampled
from train.tracker import read_metrics

REFERENCE = "exact-split"
ARMS = {
    REFERENCE: "exact split, optimizer reset, rate kept: the row that the others are compared with",
    "symmetric": "equal shares",
    "noisy": "equal shares with noise at 10 dB that cancels",
    "diagonal": "the whole weight to one copy",
    "scaled": "exact split; Adam's moments grown as the gradients are",
    "asymmetric": "exact split; Adam's moments grown in the first copy, zero in the others",
    "rewarmed": "exact split; the rate warms up again",
    "mup": "exact split; rates by muP's rule for the wider model",
    "1x": "not grown",
}
LANGUAGE = "eng"
RESAMPLES = 2000
DRAWS = 200_000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What an arm came to, a number or a row a seed."""

    bits: np.ndarray
    """Of held-out documents [seeds, documents]."""
    start: float
    """Bits per byte before the first step after growth, the mean over seeds."""
    asymmetry: tuple[float, float] | None
    """Of copies, relative, the mean over blocks and seeds: at the first step that was logged, and at the last."""


def read(workdir: Path) -> tuple[dict[str, Arm], np.ndarray, dict[str, Any]]:
    """Return the arms of a run, the bytes of its held-out documents, and its results."""
    results = json.loads((workdir / "results.json").read_text())
    arms, sizes = {}, np.zeros(0)
    for arm in ARMS:
        names = sorted(name for name in results["scores"] if re.fullmatch(rf"{re.escape(arm)}-\d+", name))
        rows = [results["scores"][name][LANGUAGE] for name in names]
        sizes = np.array([row[2] for row in rows[0]], dtype=np.float64)
        first = [results["curves"][name][0]["scores"][LANGUAGE] for name in names]
        logs = [apart for name in names if (apart := _asymmetry(workdir, name))]
        arms[arm] = Arm(
            bits=np.array([[row[1] for row in found] for found in rows], dtype=np.float64),
            start=float(np.mean([sum(row[1] for row in found) for found in first]) / sizes.sum()),
            asymmetry=(float(np.mean([one[0] for one in logs])), float(np.mean([one[-1] for one in logs])))
            if logs
            else None,
        )
    return arms, sizes, results


def _asymmetry(workdir: Path, name: str) -> list[float]:
    """Return the mean over blocks of how far copies are apart, at each step that was logged."""
    paths = sorted((workdir / "stages" / name).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = read_metrics(paths[-1])
    return [float(np.mean([*line["clone_asymmetry"].values()])) for line in lines if line.get("clone_asymmetry")]


def differences(arm: Arm, reference: Arm, sizes: np.ndarray) -> np.ndarray:
    """Return by how many bits per byte an arm is worse than the reference, a number a seed."""
    return np.asarray((arm.bits - reference.bits).sum(axis=1) / sizes.sum())


def pooled(arms: Sequence[np.ndarray]) -> tuple[float, int]:
    """Return the standard deviation of differences within an arm, and its degrees of freedom, over all arms."""
    squares = sum(float(((one - one.mean()) ** 2).sum()) for one in arms)
    freedom = sum(len(one) - 1 for one in arms)
    return float(np.sqrt(squares / freedom)), freedom


def interval(arm: Arm, reference: Arm, sizes: np.ndarray, spread: tuple[float, int]) -> tuple[float, float, float]:
    """Return the mean difference and its interval, over seeds and documents.

    Documents are resampled; seeds' spread is that of all arms together, and enters by Student's t. The two are
    independent draws that are added.
    """
    columns = {"difference": (arm.bits - reference.bits).mean(axis=0), "bytes": sizes}
    value, values = resampled(columns, lambda sums: sums["difference"] / sums["bytes"], resamples=RESAMPLES, seed=0)
    draw = np.random.default_rng(0)
    error = draw.standard_t(spread[1], size=DRAWS) * spread[0] / np.sqrt(len(arm.bits))
    found = draw.choice(values, size=DRAWS) + error
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return value, float(low), float(high)


def table(workdir: Path) -> list[str]:
    """Return the table of one run, as lines of Markdown."""
    arms, sizes, results = read(workdir)
    reference = arms[REFERENCE]
    spread = pooled([differences(arm, reference, sizes) for name, arm in arms.items() if name != REFERENCE])
    grown, small = (results["models"][f"{name}-0"] for name in (REFERENCE, "1x"))
    lines = [
        f"## {small['parameters']:,} to {grown['parameters']:,} parameters",
        "",
        f"{len(reference.bits)} seeds; {grown['tokens']:,} tokens after growth; {sizes.sum():,.0f} bytes of held-out "
        f"text. Standard deviation of a difference over seeds, of all arms together: {spread[0]:.4f}.",
        "",
        "| arm | bits per byte after growth | at the end | worse than exact split by | copies apart, first, last |",
        "|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        end = arm.bits.sum(axis=1).mean() / sizes.sum()
        shown = ""
        if name != REFERENCE:
            value, low, high = interval(arm, reference, sizes, spread)
            mark = "" if low <= 0 <= high else " *"
            shown = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]{mark}"
        apart = "" if arm.asymmetry is None else f"{arm.asymmetry[0]:.2g}, {arm.asymmetry[1]:.2g}"
        lines.append(f"| {ARMS[name]} | {arm.start:.4f} | {end:.4f} | {shown} | {apart} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines = [
        "# Ways to grow, compared",
        "",
        "Made by `benchmarks/ablations.py` from runs of `configs/paper/ablations.yaml`: one thing changed at a time.",
        f"Differences are paired by seed and document, with intervals of {CONFIDENCE:.0%} over seeds and documents; a",
        "star marks those that exclude zero. Less is better.",
        "",
    ]
    lines += [line for workdir in given.workdirs for line in table(workdir)]
    text = "\n".join(lines)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
