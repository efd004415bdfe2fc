"""Model cards: the README.md of a model folder, with its data, parents, recipe and, once evaluated, its results."""

from collections.abc import Mapping, Sequence
from typing import Any

VERBS = {
    "train": "trained with DeepSpeed ZeRO-3",
    "grow": "grown without changing its function (HyperCloning, arXiv 2409.12903)",
    "merge": "merged from models of one base",
}


def card(
    *,
    name: str,
    verb: str,
    pipeline: str,
    recipe: Mapping[str, Any],
    parents: Sequence[str],
    corpora: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    confidence: float = 0.95,
) -> str:
    """Return the card as Markdown with the Hub's metadata block.

    Args:
        recipe: the stage's configuration.
        parents: names of the models it was made from.
        corpora: what `train.data.corpus` keeps of each language of the training data, its parents' included.
        results: bits per byte by language, {"value", "low", "high"}; empty before the model is evaluated.
        confidence: of the interval from low to high.
    """
    licences = sorted({source["licence"] for corpus in corpora.values() for source in corpus["sources"]})
    lines = [
        "---",
        "library_name: transformers",
        "license: other",
        f"license_name: {_quoted('; '.join(licences))}",
        "language:",
        *[f"- {language}" for language in corpora],
        "tags:",
        "- growmerge",
        "---",
        "",
        f"# {name}",
        "",
        f"Made by the stage `{name}` of the pipeline `{pipeline}` with growmerge: {VERBS[verb]}.",
        "A plain Hugging Face folder: `AutoModelForCausalLM.from_pretrained` loads it without custom code.",
        "",
        "## Parents",
        "",
        *([f"- {parent}" for parent in parents] or ["None: trained from scratch."]),
        "",
        "## Recipe",
        "",
        "| key | value |",
        "|---|---|",
        *[f"| {key} | `{value}` |" for key, value in _flat(recipe)],
        "",
        "## Data",
        "",
        "| language | edition | rights holder | licence |",
        "|---|---|---|---|",
        *[
            f"| {corpus['name']} | {source['edition']} | {source['rights_holder']} | {source['licence']} |"
            for corpus in corpora.values()
            for source in corpus["sources"]
        ],
    ]
    if results:
        lines += ["", "## Results", ""]
        lines += [f"| language | bits per byte on held-out text | {100 * confidence:g} % interval |", "|---|---|---|"]
        for language, bits in results.items():
            interval = "–" if bits["low"] is None else f"{bits['low']:.3f} to {bits['high']:.3f}"
            lines.append(f"| {language} | {bits['value']:.3f} | {interval} |")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value not in (None, (), [], ""):
            rows.append((prefix + key.rstrip("_"), value))
    return rows
